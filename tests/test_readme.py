"""Every command and code block in README, CONTRIBUTING and docs works: it runs, or its command line is parsed."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import jsonargparse
import pytest
import yaml
from helpers.adapters import base_folder, ppo_with_adapter, reward_with_adapter, save
from helpers.chat_models import random_policy
from helpers.command_line import write_talk
from helpers.look_runs import rollout, write_run
from lightning.pytorch import Trainer

from rlchat.__main__ import COMMANDS, TRAINER_COMMANDS, main
from rlchat.conversation import Conversation, Message
from rlchat.models.model_file import save_bundle
from rlchat.rewards import Reply, Reward
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

ROOT = Path(__file__).parents[1]
LESSON = re.compile(r"docs/lessons/\d")  # tests/benchmarks/test_lessons.py runs their blocks
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [path for path in PAGES if "_build" not in path.parts]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES if path.is_file()}
BLOCKS = [
    (page, language, body)
    for page, text in TEXTS.items()
    if not LESSON.match(page)
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
]
# Commands that train, or listen for requests: their command lines are parsed. The other commands of rlchat run.
PARSED_ONLY = {
    "rlchat demo",
    "rlchat demo --seed 1",
    "rlchat demo --real",
    "rlchat demo --real --rankings",
    "rlchat data reasoning-gym --list",
    "rlchat data reasoning-gym spell_backward -n 1000 --set max_word_len=6 -o data/spelling.jsonl",
    "rlchat data reasoning-gym spell_backward -n 9000 --set min_word_len=5 max_word_len=5 --responses "
    "-o data/spelling.jsonl",
    "rlchat learn checkpoints/rl_chat_model_tiktoken.pt --feedback feedback.jsonl",
    "rlchat learn checkpoints/rl_chat_model_tiktoken.pt --feedback feedback.jsonl --replay data/demo.jsonl "
    "--method ppo",
    "rlchat look",
    "rlchat report",
    "rlchat study overoptimization",
    "rlchat study overoptimization --quick",
    "rlchat study overoptimization --out mine --seeds 0 1 2 3 4 --jobs 4",
    "rlchat report lightning_logs/ppo/version_0 --out ppo_0.html",
    "rlchat look lightning_logs/ppo/version_0 --port 8011",
    "rlchat look lightning_logs/ppo/version_1 --with lightning_logs/ppo/version_0",
}


def shell_lines() -> list[str]:
    """Each distinct command of a ``bash`` block: continued lines joined, comments and ``.venv/bin/`` removed."""
    found: dict[str, None] = {}
    for _, language, body in BLOCKS:
        variables = dict(re.findall(r'^(\w)="(.*)"$', body, re.MULTILINE)) if language == "bash" else {}
        for line in body.replace("\\\n", " ").splitlines() if language == "bash" else []:
            words = [
                word
                for plain in shlex.split(line, comments=True)
                for word in (shlex.split(variables[plain[1:]]) if plain[:1] == "$" else [plain])
            ]
            if words and "=" not in words[0]:
                found[shlex.join([words[0].removeprefix(".venv/bin/"), *words[1:]])] = None
    return list(found)


LINES = shell_lines()


def lines_of(*programs: str) -> list[str]:
    return [line for line in LINES if line.split()[0] in programs]


RLCHAT = lines_of("rlchat") + [line.partition("--no-python ")[2] for line in lines_of("torchrun")]
TRAINING = [line for line in RLCHAT if line.split()[1] in TRAINER_COMMANDS]
OTHER = [line for line in RLCHAT if line not in TRAINING]
BENCHMARKS = [line for line in lines_of("python") if line.startswith(("python benchmarks/", "python -m benchmarks."))]


class CommandLineParsed(Exception):
    """Raised in place of the work that follows the parsing of a command line."""


@pytest.fixture
def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse checks a command line as usual, then the program stops."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: object, **options: object) -> None:
        parse_args(self, *args, **options)  # type: ignore[call-overload]
        raise CommandLineParsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


@pytest.fixture
def folder(workplace: Path, tokenizer: ChatTokenizer) -> Path:
    """A working directory with the files that the commands of the documentation read."""
    for name in ("trees.jsonl", "talk.jsonl", "feedback.jsonl", "data/demo.jsonl", "sgd/train.jsonl", "sgd/dev.jsonl"):
        path = workplace / name
        path.parent.mkdir(exist_ok=True)
        write_talk(path)
        (path.parent / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    (workplace / "questions.txt").write_text("What comes after 3?\nHello\n")
    write_talk(workplace / "data" / "spelling.jsonl")
    policy = random_policy(tokenizer)
    policy.about["reward"] = [{"class_path": "rlchat.rewards.TooShort"}]
    save_bundle("checkpoints/rl_chat_model_tiktoken.pt", policy)
    shutil.copy("checkpoints/rl_chat_model_tiktoken.pt", "checkpoints/sft_model.pt")
    Path("checkpoints/rl_chat_model_tiktoken.versions").mkdir()
    shutil.copy("checkpoints/rl_chat_model_tiktoken.pt", "checkpoints/rl_chat_model_tiktoken.versions/1.pt")
    write_run(Path("lightning_logs/ppo/version_0"), [rollout()])
    (workplace / "lightning_logs" / "ppo" / "version_0" / "metrics.csv").write_text("step,train/reward\n0,1.0\n")
    Path("checkpoints/report.json").write_text('{"ppo": {"reward": 1.05}}')
    return workplace


def test_every_command_is_covered() -> None:
    checked = {"rlchat", "torchrun", "make", "pip", "pre-commit", "python", "python3", "curl", "tensorboard"}
    assert {line.split()[0] for line in LINES} <= checked
    assert len(TRAINING) > 15
    assert {line.split()[1] for line in RLCHAT} == set(COMMANDS)
    assert set(OTHER) >= PARSED_ONLY
    assert [line for line in lines_of("python") if line not in BENCHMARKS and "pytest" not in line] == []


@pytest.mark.parametrize("line", TRAINING)
def test_training_command_parses(line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)[1:]
    if "--ckpt_path" in words:  # the checkpoint is looked up before --print_config
        place = words.index("--ckpt_path")
        del words[place : place + 2]
    assert main([*words, "--print_config"]) == 0
    assert "class_path" in yaml.safe_load(capsys.readouterr().out)["model"]


# They need vLLM or bitsandbytes, or a checkpoint. The other options that are left out choose devices.
ELSEWHERE = ("vllm", "adamw_8bit", "--ckpt_path")
DEVICES = re.compile(r"--config scale/\w+|--trainer\.accelerator \w+|--trainer\.precision [\w-]+")


@pytest.fixture
def models(folder: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models under the names that the documentation uses."""
    from rlchat.training import initial_model

    monkeypatch.setattr(initial_model, "DEFAULT_ENCODING", "rlchat_1k")  # cl100k_base is not on every machine
    for name in ("FOLDER", "SmolLM2-135M-Instruct", "distilbert-base-uncased"):
        base_folder(Path(name))
    save_bundle("checkpoints/sft_model.pt", random_policy(tokenizer, max_length=256))
    save(ppo_with_adapter(base_model="FOLDER"), Path("adapter.pt"))
    save(reward_with_adapter(init_from="checkpoints/sft_model.pt"), Path("checkpoints/reward_model.pt"))
    for name in ("mine.tiktoken", "data/bytes.tiktoken"):
        shutil.copy(ROOT / "rlchat" / "tokenizer" / "encodings" / "rlchat_1k.tiktoken", name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [line for line in TRAINING if " fit " in line and not any(word in line for word in ELSEWHERE)]
)
def test_training_command_builds_its_models(line: str, models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options fit together, and every model that the recipe names is made or loaded."""
    fit = mock.create_autospec(Trainer.fit)
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", fit)
    assert main([*shlex.split(DEVICES.sub("", line))[1:], "--trainer.accelerator", "cpu"]) == 0
    fit.assert_called_once()


@pytest.mark.parametrize("line", [line for line in OTHER if line in PARSED_ONLY or line.startswith("rlchat serve")])
def test_long_command_parses(line: str, folder: Path, stop_after_parsing: None) -> None:
    with pytest.raises(CommandLineParsed):
        main(shlex.split(line)[1:])


@pytest.mark.parametrize("line", [line for line in OTHER if line not in PARSED_ONLY and "serve" not in line])
def test_short_command_runs(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "data" / "demo.jsonl").unlink()
    (folder / "typed.txt").write_text("Hello\n/quit\n")
    if "adapter.pt" in line:
        save(ppo_with_adapter(base_model=base_folder(Path("FOLDER"))), Path("adapter.pt"))
    before = set(folder.rglob("*"))
    words = [{"4096": "300"}.get(word, word) for word in shlex.split(line)[1:]]  # the data here is small
    with (folder / "typed.txt").open() as typed:
        monkeypatch.setattr(sys, "stdin", typed)
        assert main(words) == 0
    assert set(folder.rglob("*")) - before or capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", BENCHMARKS)
def test_benchmark_parses(line: str, folder: Path, stop_after_parsing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)[1:]
    if words[0] == "-m":
        words.pop(0)
        start = partial(runpy.run_module, words[0])
        for name in (words[0], f"{words[0]}.__main__"):  # runpy warns about an imported module, not about a package
            if name in sys.modules and not hasattr(sys.modules[name], "__path__"):
                monkeypatch.delitem(sys.modules, name)
    else:
        start = partial(runpy.run_path, str(ROOT / words[0]))
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(CommandLineParsed):
        start(run_name="__main__")


def test_make_has_the_targets() -> None:
    targets = set(re.findall(r"^([\w$()./-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets |= {target.replace("$(VENV)", ".venv") for target in targets}
    named = {word for line in lines_of("make") for word in line.split()[1:] if "=" not in word}
    assert {"demo", "chat", "test", "docs"} <= named
    assert named <= targets


def test_make_and_pip_use_files_and_extras_that_exist() -> None:
    for line in lines_of("pip"):
        words = shlex.split(line)
        assert words[1] == "install"
        for word in words[2:]:
            if word.startswith(".["):
                extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
                assert word[2:-1] in extras
            else:
                assert word in ("-e", "-c", ".", "constraints.txt")


def test_programs_of_the_dependencies_are_installed() -> None:
    assert importlib.util.find_spec("tensorboard")
    assert all(shlex.split(line)[1] == "--logdir" for line in lines_of("tensorboard"))


@pytest.mark.parametrize("line", lines_of("curl"))
def test_request_to_the_api(line: str, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from helpers.servers import HTTP, serving

    words = shlex.split(line)
    path = re.sub(r"http://127\.0\.0\.1:\d+", "", words[1])
    body = json.loads(words[words.index("-d") + 1])
    with serving(random_policy(tokenizer), tmp_path / "feedback.jsonl") as server:
        response = HTTP.post(server.url + path, json=body)
    assert response.status_code == 200
    assert response.json()["choices"]


def test_linked_files_exist() -> None:
    prose = {page: re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL) for page, text in TEXTS.items()}
    links = [(page, link) for page, text in prose.items() for link in re.findall(r"\]\(([^)#]+)\)", text)]
    local = [(page, link) for page, link in links if "://" not in link]
    assert len(local) > 10
    assert [(page, link) for page, link in local if not ((ROOT / page).parent / link).exists()] == []


def test_files_and_folders_in_backticks_exist() -> None:
    pattern = r"(?<!Create )`((?:rlchat|tests|configs|docs|benchmarks)/[\w./]*)`"
    names = [(page, name) for page, text in TEXTS.items() for name in re.findall(pattern, text)]
    assert len(names) > 10
    kept = [(page, name) for page, name in names if not name.startswith("docs/_build")]  # what make builds
    assert [(page, name) for page, name in kept if not (ROOT / name).exists()] == []


def test_the_table_of_packages_names_every_package() -> None:
    rows = re.findall(r"^\| \d+ \| (.*?) \|", TEXTS["docs/design.md"], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    top = {path.stem for path in (ROOT / "rlchat").glob("*.py")} - {"__init__"}
    assert named == {path.parent.name for path in (ROOT / "rlchat").glob("*/__init__.py")} | top


def test_every_page_is_in_the_table_of_contents() -> None:
    for folder, others in ((ROOT / "docs", {"lessons/index"}), (ROOT / "docs" / "lessons", set())):
        contents = (folder / "index.md").read_text(encoding="utf-8").split("```{toctree}")[1].split("```")[0].split()
        pages = {path.stem for path in folder.glob("*.md")} - {"index"} | others
        assert pages == set(contents) - {":maxdepth:", "1"}


def test_ppo_options_exist() -> None:
    recipe = yaml.safe_load((ROOT / "configs" / "ppo.yaml").read_text())["model"]["init_args"]
    table = TEXTS["docs/ppo.md"].split("## Options")[1].split("## Alarms")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert len(named) > 25
    assert named <= set(recipe)


def test_dpo_options_exist() -> None:
    recipe = yaml.safe_load((ROOT / "configs" / "dpo.yaml").read_text())["model"]["init_args"]
    table = TEXTS["docs/dpo.md"].split("## Options")[1].split("## Metrics")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert {"beta", "loss_type", "label_smoothing"} <= named <= set(recipe)


def test_advantage_estimators_are_documented() -> None:
    from rlchat.ppo.advantages import ESTIMATORS

    table = TEXTS["docs/ppo.md"].split("## Advantage estimators")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == ["advantage", *ESTIMATORS]


def test_reward_factors_exist() -> None:
    import rlchat.rewards

    named = re.findall(r"^\| `(\w+)` \|", TEXTS["docs/rewards.md"], re.MULTILINE)
    assert len(named) >= 8
    assert [name for name in named if not hasattr(rlchat.rewards, name)] == []


def test_nothing_is_left_to_fill_in() -> None:
    for text in TEXTS.values():
        assert "@@" not in text
        assert "TODO" not in text


def test_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 160
    prose = re.sub(r"^```.*?^```|^[|#!].*?$", "", TEXTS["README.md"], flags=re.MULTILINE | re.DOTALL)
    sentences = re.split(r"(?<=[.:;?!])\s+|\n\n|\n- ", prose)
    assert [sentence for sentence in sentences if len(sentence.split()) > 22] == []


def block(page: str, language: str, word: str) -> str:
    """The one block in ``language`` on ``page`` that contains ``word``."""
    (found,) = [body for where, name, body in BLOCKS if (where, name) == (page, language) and word in body]
    return found


def test_chat_from_python(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("README.md", "python", "ChatInterface"), {})
    assert capsys.readouterr().out.strip()
    assert (folder / "talk.json").is_file()


def test_a_reward_factor_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(block("docs/rewards.md", "python", "ReplyFactor"))
    monkeypatch.syspath_prepend(str(tmp_path))
    named = yaml.safe_load(block("docs/rewards.md", "yaml", "my_rewards.Polite"))["model"]["init_args"]["reward"]
    named["init_args"]["factors"] = named["init_args"]["factors"][:1]  # the second one needs a trained reward model
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--reward", type=Reward)
    reward = parser.instantiate_classes(parser.parse_object({"reward": named})).reward
    prompt = Conversation((Message("user", "Tea?"),))
    scores = reward([prompt, prompt], [Reply("Yes, please.", 4, True), Reply("No.", 2, True)])
    assert scores.tolist() == [1.0, 0.0]
