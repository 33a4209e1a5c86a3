"""`rlchat export`: its outputs, the model card, and error messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.chat_models import random_policy
from helpers.command_line import SHAPE
from transformers import AutoConfig, AutoModelForCausalLM

from rlchat.__main__ import main
from rlchat.export.card import CardFacts, model_card
from rlchat.export.folder import FILES
from rlchat.models.base.source import BaseSource
from rlchat.models.base.weights import open_base_model
from rlchat.models.model_file import PolicyBundle, load_policy, new_policy, save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

OLD = Path(__file__).parents[1] / "data" / "v0_1"
MODEL = str(OLD / "ppo_model.pt")


def export(*options: object) -> int:
    return main(["export", *map(str, options)])


def failure(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    assert export(*options) == 2
    return capsys.readouterr().err


def test_a_folder_with_a_model_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "report.json"
    figures.write_text(json.dumps({"ppo": {"reward": 1.25, "name": "x"}, "seed": 3, "ok": True}))
    options = ("--data", "30 conversations", "--license", "apache-2.0", "--figures", figures)
    assert export(MODEL, "--to", "hf", tmp_path / "out", *options) == 0
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "\nlicense: apache-2.0\n" in card.split("---")[1]
    assert "| Data | 30 conversations |" in card
    assert "| Base model | none: a llama model with random initial weights |" in card
    assert '- `rlchat.rewards.MissingEnd`: `{"weight": 0.5}`' in card
    assert "| ppo/reward | 1.25 |\n| seed | 3 |\n" in card
    assert "| ok |" not in card


def test_a_model_card_with_the_training_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "lightning_logs" / "ppo" / "version_0"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("step,val/perplexity,val/reward\n9,3.0,1.0\n19,2.5,2.0\n")
    model = {"class_path": "rlchat.PPOModule", "init_args": {"init_from": "/home/ann/secret/sft.pt", "kl_coef": 0.1}}
    data = {"path": ["/home/ann/secret/talk.jsonl", "more.jsonl"]}
    (run / "config.yaml").write_text(json.dumps({"seed_everything": 3, "model": model, "data": data}))
    (run / "alarms.jsonl").write_text('{"iteration": 7, "message": "the KL is <b>12</b> nats"}\n')
    (run / "versions.json").write_text('{"torch": "2.11.0"}')
    rows = [
        {"iteration": i, "prompt_id": f"p{n}", "prompt": [], "reply": "x", "reward": i / 10, "factors": {}, "kl": 0.5}
        for i in (10, 20)
        for n in range(12)
    ]
    with (run / "held_out.jsonl").open("w") as file:
        file.writelines(json.dumps({**row, "tokens": 4, "ended_by": "end of turn"}) + "\n" for row in rows)
    assert export(MODEL, "--to", "hf", tmp_path / "out", "--run", run) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "secret" not in card
    assert "| Data | `talk.jsonl`, `more.jsonl` |" in card
    assert "| init_from | `sft.pt` |\n| kl_coef | `0.1` |" in card
    assert "Iterations 10 and 20, the same 12 held-out prompts" in card
    assert "| reward | 1 | 2 | +1 | +1 to +1 |" in card
    assert "| perplexity | 3 | 2.5 | -0.5 |  |" in card
    assert "- Iteration 7: the KL is \\<b\\>12\\</b\\> nats" in card
    assert "Versions: torch 2.11.0." in card
    config = yaml.safe_load(card.split("```yaml\n")[1].split("\n```")[0])
    assert config["data"] == {"path": ["talk.jsonl", "more.jsonl"]}
    assert config["model"]["init_args"] == {"init_from": "sft.pt", "kl_coef": 0.1}
    assert "no such folder" in failure(capsys, MODEL, "--to", "hf", tmp_path / "o", "--run", tmp_path / "none")


def test_a_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    assert export(MODEL, tmp_path / "m.gguf", "--to", "gguf") == 0
    assert gguf.GGUFReader(tmp_path / "m.gguf").get_field("general.name").contents() == "m"


def test_a_safetensors_file(tmp_path: Path) -> None:
    assert export(MODEL, "--to", "safetensors", tmp_path / "m.safetensors") == 0
    assert (tmp_path / "m.safetensors").stat().st_size > 1000


def test_nothing_is_overwritten_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "out", tmp_path / "m.safetensors"
    file.write_text("precious")
    error = failure(capsys, MODEL, "--to", "safetensors", file)
    assert error == f"rlchat: {file} already exists; use another name, or --force to overwrite it\n"
    assert file.read_text() == "precious"
    assert export(MODEL, "--to", "safetensors", file, "--force") == 0
    assert file.stat().st_size > 1000

    out.mkdir()
    assert export(MODEL, "--to", "hf", out) == 0  # an empty folder
    (out / "README.md").write_text("edited")
    assert "is not empty; use another folder, or --force to replace it" in failure(capsys, MODEL, "--to", "hf", out)
    assert (out / "README.md").read_text() == "edited"
    assert export(MODEL, "--to", "hf", out, "--force") == 0
    assert (out / "README.md").read_text() != "edited"
    (out / "thesis.tex").write_text("precious")
    assert "contains thesis.tex, which no export writes" in failure(capsys, MODEL, "--to", "hf", out, "--force")
    assert (out / "thesis.tex").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "out"]


def test_invalid_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the name of the file must end in .gguf" in failure(capsys, MODEL, "--to", "gguf", tmp_path / "m.bin")
    assert "no such model file" in failure(capsys, tmp_path / "none.pt", "--to", "hf", tmp_path / "o")
    reward = failure(capsys, OLD / "reward_model.pt", "--to", "hf", tmp_path / "o")
    assert "contains a reward model, expected a chat model" in reward
    license_error = failure(capsys, MODEL, "--to", "hf", tmp_path / "o", "--license", "my own")
    assert "invalid value 'my own' for --license: expected an identifier such as apache-2.0" in license_error
    assert "cannot read" in failure(capsys, MODEL, "--to", "hf", tmp_path / "o", "--figures", tmp_path / "none.json")
    assert "invalid choice: 'onnx'" in failure(capsys, MODEL, "--to", "onnx", tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


def base_folder(path: Path, name_or_path: str = "") -> Path:
    """A folder of transformers with random weights, a licence, and ``_name_or_path`` in its configuration."""
    path.mkdir(parents=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE, vocab_size=16, max_position_embeddings=66))
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"_name_or_path": name_or_path}))
    (path / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\nlicense: no\n")
    return path


@pytest.mark.parametrize(
    ("place", "written", "row", "front"),
    [
        ("mine", "", "a local model of the architecture llama", None),
        ("mine", "someone/other", "a local model of the architecture llama", None),  # an ancestor, or a path
        ("Small-1B", "someone/small-1B", "`someone/small-1B`", "someone/small-1B"),
        ("models--someone--m.1/snapshots/ab12", "", "`someone/m.1`", "someone/m.1"),
    ],
)
def test_the_card_names_no_path_of_the_machine(
    tmp_path: Path, tokenizer: ChatTokenizer, place: str, written: str, row: str, front: str | None
) -> None:
    folder = base_folder(tmp_path / place, written)
    backbone = open_base_model(str(folder), tokenizer, 64, new_embeddings=True)
    bundle = PolicyBundle(new_policy(backbone, tokenizer), tokenizer, 64)
    absolute = {"class_path": "rlchat.rewards.LearnedQuality", "init_args": {"bundle": str(tmp_path / "rm.pt")}}
    bundle.about["reward"] = [absolute]
    save_bundle(tmp_path / "m.pt", bundle)
    assert export(tmp_path / "m.pt", "--to", "hf", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"\n| Base model | {row} |\n" in card
    assert yaml.safe_load(card.split("---")[1]).get("base_model") == front
    assert "\nlicense: mit\n" in card
    assert "| License of the base model | mit |" in card
    assert '`{"bundle": "rm.pt"' in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "config.json").read_text()
    assert str(tmp_path).encode() not in (tmp_path / "m.pt").read_bytes().replace(str(tmp_path / "rm.pt").encode(), b"")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("someone/model", "`someone/model`"),
        ("/home/me/model", "a local model of the architecture llama"),
        ("../model", "a local model of the architecture llama"),
    ],
)
def test_the_card_of_a_model_file_of_an_earlier_version(tokenizer: ChatTokenizer, name: str, row: str) -> None:
    bundle = random_policy(tokenizer)
    bundle.model.backbone.transformer.config.name_or_path = name
    card = model_card(bundle, "m", CardFacts())
    assert f"| Base model | {row} |" in card
    assert "| License of the base model | not known; see the base model |" in card


def test_the_source_of_a_gguf_file() -> None:
    def of(**values: str) -> BaseSource:
        return BaseSource.of_gguf({f"general.{name.replace('__', '.')}": value for name, value in values.items()}.get)

    assert of(name="Small  1B", license="apache-2.0") == BaseSource("", "Small 1B", "apache-2.0")
    assert of(basename="Small", repo_url="https://huggingface.co/someone/small") == BaseSource("someone/small", "Small")
    assert of(base_model__0__repo_url="https://huggingface.co/a/b/") == BaseSource("a/b")
    assert of(source__huggingface__repository="a/b") == BaseSource("a/b")
    assert of(repo_url="https://example.org/a/b", license="see the page") == BaseSource()


@pytest.mark.slow
def test_the_code_in_the_card_runs(tmp_path: Path) -> None:
    assert export(MODEL, "--to", "hf", tmp_path / "out") == 0
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('"PATH"', repr(str(tmp_path / "out"))).replace("max_new_tokens=64", "max_new_tokens=4")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert load_policy(MODEL).tokenizer.vocab_size == 261
