"""`rlchat fit|validate|test|predict` on the command line: results, files and error messages."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from helpers.command_line import BRIEF, SHAPE, TINY, rlchat, working_in, write_talk
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, LearningRateMonitor

from rlchat.__main__ import _with_homes, main
from rlchat.callbacks import SampleResponses, StatsPlot
from rlchat.callbacks.best_model import BestModel
from rlchat.callbacks.predictions import Predictions
from rlchat.callbacks.progress_bar import OneLineProgressBar
from rlchat.cli import main as cli
from rlchat.cli.settings import with_home
from rlchat.errors import UserError

SMOKE = ["fit", "--config", "smoke", "--data.path", "talk.jsonl", "--data.batch_size", "2"]
RUN = Path("lightning_logs/ppo/version_0")


@pytest.fixture
def here(workplace: Path) -> Path:
    """A working directory with a small data file."""
    write_talk(workplace / "talk.jsonl")
    return workplace


def error_message(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error message of a command, which must fail with exactly one sentence on stderr."""
    capsys.readouterr()
    assert main(words) == 2, words
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert [line[:8] for line in lines] == ["rlchat: "], err
    assert "usage:" not in out
    assert len(lines[0]) < 500
    assert lines[0][-1] != ":"
    return lines[0]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--model.clip_epz", "1"], r"--model.clip_epz: no such option of PPOModule; did you mean clip_eps\?"),
        (["--model.init_args.clip_epz=1"], r"--model.clip_epz: no such option of PPOModule; did you mean clip_eps\?"),
        (["--modle.clip_eps", "1"], r"--modle.clip_eps: no such option; did you mean --model.clip_eps\?"),
        (["--clip_eps", "1"], r"--clip_eps: no such option; did you mean --model.clip_eps\?"),
        (["--trainer.max_epoch", "1"], r"--trainer.max_epoch: no such option; did you mean --trainer.max_epochs\?"),
        (["--data.pat", "x"], r"--data.pat: no such option; did you mean --data.path\?"),
        (["--best_model.foldr=x"], r"--best_model.foldr: no such option; did you mean --best_model.folder\?"),
        (["--weights_only", "false"], r"--weights_only: no such option; add --print_config to see all options"),
        (["--model.clip_eps", "abc"], r"invalid value 'abc' for --model.clip_eps: expected a number$"),
        (["--model.temperature", "nan"], r"invalid value 'nan' for --model.temperature: expected a number$"),
        (["--model.kl_target", "high"], r"invalid value 'high' for --model.kl_target: expected a number$"),
        (["--model.max_new_tokens", "1.5"], r"invalid value '1.5' for --model.max_new_tokens: expected an integer$"),
        (
            ["--model.schedule", "cubic"],
            r"invalid value 'cubic' for --model.schedule: expected one of constant, linear, cosine$",
        ),
        (
            ["--data.on_bad_line", "ignore"],
            r"invalid value 'ignore' for --data.on_bad_line: expected one of error, skip$",
        ),
        (["--trainer.max_epochs", "many"], r"invalid value 'many' for --trainer.max_epochs: expected an integer$"),
        (["--trainer.precision", "17"], r"invalid value '17' for --trainer.precision: expected one of .*32-true"),
        (["--model.reward.factors", "5"], r"invalid value '5' for --model.reward.factors: expected a list$"),
        (["--model.reward", "Foo"], r"--model.reward: Foo is not a known class; specify its import path"),
        (["--trainer.callbacks+=Foo"], r"--trainer.callbacks: Foo is not a known class; specify its import path"),
        (["--model", "rlchat.PPOModul"], r"--model: rlchat has no PPOModul;"),
        (["--trainer.devices"], r"--trainer.devices: expected a value: --trainer.devices VALUE$"),
        (["words"], r"'words' is not an option; options are written --group.name VALUE$"),
        (["--config"], r"no file and no recipe named ''; the recipes are demo/ppo"),
        (["--config", "nope"], r"no file and no recipe named 'nope'; the recipes are demo/ppo"),
    ],
)
def test_an_invalid_option(words: list[str], answer: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(f"^rlchat: {answer}", error_message(capsys, *SMOKE, *words))


def factor(text: str) -> str:
    return "model: {class_path: rlchat.PPOModule, init_args: {reward: {class_path: rlchat.Reward, " + (
        f"init_args: {{factors: [{text}]}}}}}}}}\n"
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("model: {class_path: rlchat.PPOModule, init_args: {clip_epz: 1}}\n", r"model.clip_epz: no such option of PPO"),
        ("modle: 1\n", r"--modle: no such option; did you mean --model\?"),
        ("trainer: {max_epochz: 5}\n", r"--trainer.max_epochz: no such option; did you mean --trainer.max_epochs\?"),
        ("data: {path: 5}\n", r"invalid value '5' for data.path: expected a string or a list$"),
        (
            "model: {class_path: rlchat.ChatTokenizer}\n",
            r"model: rlchat.ChatTokenizer is not a LightningModule; specify a",
        ),
        ("data: {path: talk.jsonl}\n", r"no model is specified; set --config to a recipe or a file"),
        (
            factor("{class_path: rlchat.rewards.TooShort, init_args: {min_wordz: 3}}"),
            r"model.reward.factors.min_wordz: no such option of TooShort; did you mean min_words\?",
        ),
        (
            factor("{class_path: rlchat.rewards.TooShort, init_args: {foo: 3}}"),
            r"model.reward.factors.foo: no such option of TooShort; it has weight, min_words$",
        ),
        (
            factor("{class_path: rlchat.rewards.TooShort, init_args: {min_words: many}}"),
            r"invalid value 'many' for model.reward.factors.min_words: expected an integer$",
        ),
        (
            factor("{class_path: rlchat.rewards.TooShort, init_args: {min_words: 0}}"),
            r"invalid value 0 for TooShort.min_words: expected a positive integer$",
        ),
        (
            factor("{class_path: rlchat.rewards.TooShrt}"),
            r"model.reward.factors: rlchat.rewards has no TooShrt; did you mean rlchat.rewards.TooShort\?",
        ),
        (
            factor("{class_path: my_rewards.Polite}"),
            r"model.reward.factors: my_rewards.Polite cannot be imported: there is no module my_rewards; put its file",
        ),
        (
            factor("{class_path: rlchat.PPOModule}"),
            r"model.reward.factors: rlchat.PPOModule is not a Factor; specify a subclass of Factor",
        ),
        (
            factor("{class_path: rlchat.LearnedQuality, init_args: {bundle: no.pt}}"),
            r"no.pt: no such model file; train one with `rlchat demo` or `rlchat fit`, or fix the path$",
        ),
        ("model: [1, 2\n", r"mine.yaml:2: not YAML"),
    ],
)
def test_an_invalid_configuration(text: str, answer: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.yaml").write_text(text)
    assert re.search(f"^rlchat: {answer}", error_message(capsys, "fit", "--config", "mine.yaml"))


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--trainer.accelerator", "warp"], r"trainer: You selected an invalid accelerator name"),
        (["--trainer.strategy", "fsdp"], r"trainer.strategy fsdp: FSDP1 is not supported, because .*; use fsdp2$"),
        (
            ["--trainer.strategy", "lightning.pytorch.strategies.FSDPStrategy"],
            r"trainer.strategy lightning.pytorch.strategies.FSDPStrategy: FSDP1 is not supported, .*; use fsdp2$",
        ),
        (
            ["--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"],
            r"trainer.strategy lightning.pytorch.strategies.ModelParallelStrategy is not supported; use fsdp2",
        ),
        (["--trainer.strategy", "foo"], r"trainer: You selected an invalid strategy name"),
        (
            ["--trainer.gradient_clip_val", "1"],
            r"trainer.gradient_clip_val is not .* by PPO; set --model.max_grad_norm instead$",
        ),
        (
            ["--trainer.accumulate_grad_batches", "2"],
            r"trainer.accumulate_grad_batches is not .*; set --model.micro_b",
        ),
        (
            ["--trainer.max_steps", "40"],
            r"trainer.max_steps is not .*; set --trainer.max_epochs and --trainer.limit_t",
        ),
        (["--trainer.max_epochs", "-5"], r"trainer: `max_epochs` must be a non-negative integer or -1"),
        (
            ["--trainer.val_check_interval", "99"],
            r"trainer.val_check_interval exceeds .*--trainer.val_check_interval 1.0",
        ),
        (["--trainer.default_root_dir", "talk.jsonl"], r"\S*talk.jsonl\S*: Not a directory; specify a path"),
        (["--best_model.folder", "talk.jsonl/x"], r"best_model.folder talk.jsonl/x: cannot be written \(Not a dir"),
        (["--model.base_model", "no-such-folder/model"], r"base_model no-such-folder/model is neither a folder nor"),
        (
            ["--model.base_model", "."],
            r"base_model .: the folder contains no config.json, expected a model",
        ),
        (["--model.base_model", "{model_type: foo}"], r"base_model: unknown model_type 'foo'; expected a model family"),
        (["--model.base_model", "{model_type: llama, hidden_sice: 8}"], r"base_model: llama has no option 'hidden_si"),
        (["--model.tiktoken_encoding", "foo"], r"unknown encoding 'foo'; choose one of rlchat_1k, gpt2"),
        (["--model.tiktoken_encoding", "no.tiktoken"], r"no.tiktoken: no such rank file; give its path, or make one"),
        (
            ["--model.tiktoken_encoding", "cl100k_base"],
            r"the encoding cl100k_base is not on this machine.*TIKTOKEN_",
        ),
        (["--model.max_new_tokens", "96"], r"invalid value 96 for max_new_tokens: it leaves no room"),
        (["--model.temperature", "0"], r"invalid value 0.0 for temperature: expected a number from 1e-6"),
        (["--model.clip_eps", "-1"], r"invalid value -1.0 for clip_eps: expected a non-negative number"),
        (["--model.minibatches", "0"], r"invalid value 0 for minibatches: expected a positive integer"),
        (["--model.learning_rate", "-1"], r"invalid value -1.0 for learning_rate: expected a non-negative number"),
        (["--data.batch_size", "0"], r"invalid value 0 for data.batch_size: expected a positive integer"),
        (["--data.val_fraction", "2"], r"data.val_fraction 2.0 and data.test_fraction 0.05 leave nothing to train on"),
        (
            ["--data.lang", "fr", "--data.path", "tree.jsonl"],
            r"no usable conversation in tree.jsonl: .*1 trees in an",
        ),
        (["--model.init_from", "m.pt"], r"base_model and init_from m.pt cannot be combined, .*_model null"),
        (["--ckpt_path", "no.ckpt"], r"no.ckpt: no such checkpoint; specify a file, or `best` or `last`"),
        (["--ckpt_path", "best"], r"no best.ckpt under lightning_logs/ppo; train first with `rlchat fit`"),
        (["--ckpt_path", "last"], r"no last.ckpt under lightning_logs/ppo; train first with `rlchat fit`"),
        (["--ckpt_path", "talk.jsonl"], r"talk.jsonl: (damaged, or not a checkpoint|contains something other)"),
    ],
)
def test_an_invalid_value_of_a_valid_option(
    words: list[str], answer: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.setenv(place, str(here / "nothing"))
    monkeypatch.setattr("tiktoken.load.read_file", unreachable)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    message = {"message_id": "1", "text": "Bonjour", "role": "prompter", "lang": "fr", "replies": []}
    tree = {"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": {**message, "lang": "de"}}
    (here / "tree.jsonl").write_text(json.dumps(tree) + "\n")
    assert re.search(f"^rlchat: {answer}", error_message(capsys, *SMOKE, *words))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--config", "gpt2"], "gpt2"),
        (["--config", "smollm2-lora"], "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (["--config", "sft"], "distilbert-base-uncased"),
        (["--config", "sft", "--model.base_model", "/nope/folder"], "/nope/folder"),
    ],
)
def test_a_base_model_that_cannot_be_downloaded(
    words: list[str], name: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one request, and the model is named; its tokenizer and cl100k_base are not looked for."""
    monkeypatch.setattr("rlchat.models.base_models.try_to_load_from_cache", lambda *_: None)
    request = mock.Mock(side_effect=ConnectionError)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", request)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", mock.Mock(side_effect=AssertionError))
    message = error_message(capsys, "fit", *words, "--data.path", "talk.jsonl")
    assert message.startswith(f"rlchat: base_model {name} is neither a folder nor a model that could be downloaded")
    assert message.rstrip().endswith(
        "; download its config.json, .safetensors files, tokenizer.json and tokenizer_config.json into one folder, "
        "and set --model.base_model to it"
    )
    assert request.call_count == (name != "/nope/folder")


def unreachable(*_: Any, **__: Any) -> bytes:
    raise ConnectionError("no network in a test")


INVALID_LINES = {
    '{"messages": [': r"not JSON",
    '{"foo": 1}': r"no known format: it has the keys \['foo'\]",
    '{"text": 5}': r"text is not a string: got 5",
    '{"text": "a\\u0000b"}': r"text contains a NUL character",
    '{"text": "  "}': r".*empty",
    '["text"]': r".*not an object|.*object",
}


@pytest.mark.parametrize(("line", "answer"), INVALID_LINES.items())
def test_an_invalid_line_of_data(line: str, answer: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (here / "talk.jsonl").open("a") as file:
        file.write(line + "\n")
    message = error_message(capsys, *SMOKE)
    assert re.search(rf"^rlchat: talk.jsonl:13: ({answer}).*; fix the line or set data.on_bad_line=skip$", message)


def test_invalid_lines_of_data_are_skipped(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (here / "talk.jsonl").open("a") as file:
        file.writelines(line + "\n" for line in INVALID_LINES)
    rlchat(*SMOKE, "--data.on_bad_line", "skip", "--trainer.fast_dev_run=1")
    assert "12 prompts from 18 lines" in caplog.text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data.path", "#1.jsonl"], ['--data.path=["#1.jsonl"]']),
        (["--data.path=#1.jsonl"], ['--data.path=["#1.jsonl"]']),
        (["--data.path", "part #1.jsonl"], ['--data.path=["part #1.jsonl"]']),
        (["--data.path", "#1.jsonl", "b"], ['--data.path=["#1.jsonl", "b"]']),
        (["--data.path", "['#1.jsonl']"], ["--data.path", "['#1.jsonl']"]),
        (["--data.path", "plain.jsonl", "--x", "#"], ["--data.path", "plain.jsonl", "--x", "#"]),
    ],
)
def test_a_path_with_a_number_sign_is_not_a_yaml_comment(words: list[str], expected: list[str]) -> None:
    assert cli.with_recipes(["fit", *words]) == ["fit", *expected]


def test_missing_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no data file is specified; pass a file of conversations with --data.path FILE" in error_message(
        capsys, "fit", "--config", "smoke"
    )
    assert re.search(r"no such data file: no.jsonl; ", error_message(capsys, *SMOKE, "--data.path", "no.jsonl"))
    (here / "empty.jsonl").touch()
    message = error_message(capsys, *SMOKE, "--data.path", "empty.jsonl")
    assert re.search(r"no usable conversation in empty.jsonl: .* from 0 lines; check that", message)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--model.init_from", "no.pt"], r"no.pt: no such model file; train one with"),
        (["--model.init_from", "evil.pt"], r"evil.pt: contains something other than tensors.*; it was not loaded$"),
        (["--model.init_from", "half.pt"], r"half.pt: (damaged|contains something other)"),
        (["--model.init_from", "other.pt"], r"other.pt: not an rlchat model file"),
        (["--model.tiktoken_encoding", "mine.tiktoken"], r".* was trained with the encoding rlchat_1k, not mine.tikto"),
        (["--model.max_length", "4096"], r"invalid value 4096 for max_length: the model file \S+ has 64"),
        (
            ["--ckpt_path", "checkpoints/sft_model.pt"],
            r"checkpoints/sft_model.pt: not a checkpoint; .*init_",
        ),
        (["--ckpt_path", "evil.pt"], r"evil.pt: contains something other than tensors.*; it was not loaded$"),
        (["--ckpt_path", "sft.ckpt"], r"sft.ckpt: a checkpoint of SFTModule, but the configuration is for RewardModel"),
        (
            ["--ckpt_path", "reward.ckpt", "--model.init_from", "wide.pt"],
            r"the checkpoint's weight \S+ has shape \(\d+, \d+\), expected \(\d+, 24\); leave out --config",
        ),
    ],
)
def test_a_model_file_or_checkpoint_that_does_not_match(
    words: list[str], answer: str, here: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "checkpoints", here / "checkpoints")
    bundle = here / "checkpoints" / "sft_model.pt"
    (here / "half.pt").write_bytes(bundle.read_bytes()[:5000])
    torch.save({"a": 1}, here / "other.pt")
    torch.save({"format": "rlchat-bundle", "version": 1, "kind": "policy", "about": Evil()}, here / "evil.pt")
    (here / "mine.tiktoken").write_bytes(b"".join(f"{b} {i}\n".encode() for i, b in enumerate(all_bytes())))
    for stage in ("sft", "reward"):
        shutil.copy(newest(trained, stage) / "checkpoints" / "last.ckpt", here / f"{stage}.ckpt")
    if "wide.pt" in words:
        wide = {**SHAPE, "hidden_size": 24}
        rlchat("fit", "--config", "demo/sft", "--data.path", "talk.jsonl", *TINY[2:], "--trainer.max_epochs=1",
               "--model.base_model", json.dumps(wide), "--best_model.folder", "wide")  # fmt: skip
        shutil.copy("wide/sft_model.pt", "wide.pt")
    message = error_message(capsys, "fit", "--config", "demo/reward", "--data.path", "talk.jsonl", *words)
    assert re.search(f"^rlchat: {answer}", message)
    assert not (here / "executed").exists()


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def all_bytes() -> list[str]:
    from base64 import b64encode

    return [b64encode(bytes([byte])).decode() for byte in range(256)]


def newest(folder: Path, stage: str) -> Path:
    return max((folder / "lightning_logs" / stage).iterdir(), key=lambda path: path.stat().st_mtime)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_bare_command_lists_the_recipes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    out, err = capsys.readouterr()
    assert not out
    for name in ("demo/ppo", "demo/reward", "demo/sft", "ppo", "reward", "sft", "smoke"):
        assert re.search(rf"^  --config {name} +\S", err, re.MULTILINE)


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_message(capsys, "fti").startswith(
        "rlchat: unknown command 'fti'; choose one of demo, fit, validate, test,"
    )


def test_help_of_a_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rlchat("fit", "--help")
    out = capsys.readouterr().out
    assert out.startswith("usage: rlchat fit --config RECIPE_OR_FILE [--data.path FILE [FILE ...]]")
    assert "--weights_only" not in out
    rlchat("fit", "--model.help", "rlchat.PPOModule")
    assert "ε, the clip range of the ratio: 1 ± ε" in capsys.readouterr().out


# ---- how options combine ---------------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    rlchat(*words, "--print_config")
    return yaml.safe_load(capsys.readouterr().out)


def test_flags_override_configurations_and_later_configurations_override_earlier_ones(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine.yaml").write_text("model: {init_args: {clip_eps: 0.3, temperature: 0.9}}\ndata: {batch_size: 3}\n")
    config = printed(capsys, "fit", "--config", "smoke", "--config=mine.yaml", "--model.clip_eps", "0.1")
    init_args = config["model"]["init_args"]
    assert [init_args[name] for name in ("clip_eps", "temperature", "max_length")] == [0.1, 0.9, 96]
    assert config["data"]["batch_size"] == 3


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["--data.path", "a.jsonl"], "a.jsonl"),
        (["--data.path=a.jsonl"], "a.jsonl"),
        (["--data.path", "a.jsonl", "b c.jsonl"], ["a.jsonl", "b c.jsonl"]),
        (["--data.path", "a.jsonl", "b.jsonl", "c.gz", "--seed_everything", "1"], ["a.jsonl", "b.jsonl", "c.gz"]),
        (["--data.path", "[a.jsonl, b.jsonl]"], ["a.jsonl", "b.jsonl"]),
        (["--data.path+=a.jsonl", "--data.path+=b.jsonl"], ["a.jsonl", "b.jsonl"]),
    ],
)
def test_one_data_file_or_several(words: list[str], path: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "fit", "--config", "smoke", *words)["data"]["path"] == path


def test_callbacks_of_the_user_are_added_to_ours(here: Path) -> None:
    (here / "watch.py").write_text(
        "from lightning.pytorch.callbacks import Callback\nclass Watch(Callback):\n    seen = 0\n"
        "    def on_train_batch_end(self, *_):\n        Watch.seen += 1\n"
    )
    theirs = ["--trainer.callbacks+=watch.Watch", "--trainer.callbacks+=LearningRateMonitor"]
    ran = cli.run([*SMOKE, *theirs, "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"])
    kinds = [type(callback) for callback in ran.trainer.callbacks]
    ours: list[type[Callback]] = [BestModel, SampleResponses, StatsPlot, Predictions, OneLineProgressBar]
    assert all(kinds.count(kind) == 1 for kind in (*ours, LearningRateMonitor))
    assert sys.modules["watch"].Watch.seen == 1
    assert (here / "checkpoints" / "rl_chat_model_tiktoken.pt").is_file()


def test_a_progress_bar_of_the_user_replaces_ours(here: Path) -> None:
    words = [*SMOKE, "--trainer.fast_dev_run=1"]
    other = cli.run([*words, "--trainer.callbacks=TQDMProgressBar"]).trainer
    assert type(other.progress_bar_callback).__name__ == "TQDMProgressBar"
    assert cli.run([*words, "--trainer.enable_progress_bar=false"]).trainer.progress_bar_callback is None


def test_fast_dev_run_leaves_no_files(here: Path) -> None:
    rlchat(*SMOKE, "--trainer.fast_dev_run=1")
    assert [path.name for path in here.iterdir()] == ["talk.jsonl"]


def test_a_reward_of_the_users_own(here: Path) -> None:
    (here / "my_rewards.py").write_text(
        "from rlchat.rewards import ReplyFactor\n\n\nclass Polite(ReplyFactor):\n"
        "    def __init__(self, weight: float = 1.0, word: str = 'please') -> None:\n"
        "        super().__init__(weight)\n        self.word = word\n\n"
        "    def score(self, prompt, reply):\n        return 0.25 if self.word == 'thanks' else 0.0\n"
    )
    polite = "{class_path: my_rewards.Polite, init_args: {weight: 2.0, word: thanks}}"
    (here / "mine.yaml").write_text(factor(polite + ", {class_path: rlchat.rewards.MissingEnd}"))
    rlchat("fit", "--config", "smoke", "--config", "mine.yaml", *SMOKE[3:], "--trainer.limit_train_batches=1")
    assert metrics(RUN, "reward/polite") == [0.5]
    assert {"polite", "missing_end"} == set(rows(RUN / "samples.jsonl")[0]["factors"])
    # The run's own configuration finds it as well.
    (here / "prompts.txt").write_text("Hi\n")
    rlchat("predict", "--ckpt_path", "best", "--data.predict_path", "prompts.txt")
    assert rows(here / "replies.jsonl")[0]["factors"]["polite"] == 0.5


# ---- the files of a run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `smoke` ran on ``talk.jsonl``; copy it to continue from there."""
    folder = tmp_path_factory.mktemp("ran")
    write_talk(folder / "talk.jsonl")
    with working_in(folder):
        rlchat(*SMOKE)
    return folder


@pytest.fixture
def after(ran: Path, here: Path) -> Path:
    """The working directory after that run."""
    shutil.copytree(ran, here, dirs_exist_ok=True)
    return here


def test_a_run_writes_all_its_logs_to_one_folder(after: Path) -> None:
    left = {path.name.partition(".tfevents")[0] for path in RUN.iterdir()}
    names = "events.out metrics.csv hparams.yaml config.yaml versions.json samples.jsonl rollouts.jsonl alarms.jsonl"
    names += " held_out.jsonl"
    assert left == {*names.split(), "checkpoints"}
    assert json.loads((RUN / "versions.json").read_text())["torch"] == torch.__version__
    assert {path.name for path in (RUN / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert [path.name for path in Path("lightning_logs/ppo").iterdir()] == ["version_0"]
    recorded = json.loads(Path("lightning_logs/checkpoint_folders.json").read_text())
    assert {stage: len(folders) for stage, folders in recorded.items()} == {"ppo": 1}
    assert {path.name for path in Path("checkpoints").iterdir()} == {
        "rl_chat_model_tiktoken.pt",
        "rl_chat_model_tiktoken_stats.png",
    }
    assert yaml.safe_load((RUN / "hparams.yaml").read_text())["clip_eps"] == 0.2
    with (RUN / "metrics.csv").open() as file:
        numbers = [float(cell) for row in csv.DictReader(file) for cell in row.values() if cell]
    assert len(numbers) > 50
    assert all(torch.tensor(numbers).isfinite())


def test_the_configuration_of_a_run_repeats_it(after: Path) -> None:
    rlchat("fit", "--config", str(RUN / "config.yaml"))
    again = Path("lightning_logs/ppo/version_1")
    for name in ("train/reward", "train/policy_loss", "train/kl", "val/reward", "val/perplexity"):
        assert metrics(again, name) == metrics(RUN, name) != []


def test_validate_and_test_take_the_runs_own_configuration(after: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rlchat("validate", "--ckpt_path", "best")
    out = capsys.readouterr().out
    shown = re.search(r"reward +│ +(-?[\d.]+)", out)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(max(metrics(RUN, "val/reward")), rel=1e-3)
    assert "perplexity" in out
    assert "accuracy" in out
    assert "DataLoader" not in out
    rlchat("test", "--ckpt_path", "last", "--verbose", "false")
    assert "perplexity" not in capsys.readouterr().out
    assert metrics(Path("lightning_logs/ppo_test/version_0"), "test/perplexity") != []


@pytest.mark.slow
def test_best_and_last_are_of_the_newest_run_wherever_its_logs_are(
    after: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest run used another logger, or another folder; each command names the checkpoint that it loads."""
    brief = [*SMOKE, "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    rlchat(*brief, "--trainer.default_root_dir", "elsewhere")
    capsys.readouterr()
    rlchat("validate", "--ckpt_path", "best")
    assert re.search(r"^checkpoint: \S*elsewhere/lightning_logs/ppo/version_0/checkpoints/best.ckpt$",
                     capsys.readouterr().out, re.MULTILINE)  # fmt: skip
    logger = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: mine, name: other}}"
    rlchat(*brief, "--trainer.logger", logger)
    capsys.readouterr()
    rlchat("test", "--ckpt_path", "last")
    assert "checkpoint: mine/other/version_0/checkpoints/last.ckpt" in capsys.readouterr().out


def test_validate_without_its_configuration(after: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(RUN / "checkpoints" / "best.ckpt", "best.ckpt")
    message = error_message(capsys, "validate", "--ckpt_path", "best.ckpt")
    assert "best.ckpt: the configuration of its run was not found; set --config" in message


def test_resuming_a_complete_run_logs_that_it_is_complete(after: Path, caplog: pytest.LogCaptureFixture) -> None:
    rlchat("fit", "--ckpt_path", "last")
    assert "resuming from lightning_logs/ppo/version_0/checkpoints/last.ckpt" in caplog.text
    assert "the run is already complete after 1 epochs; raise --trainer.max_epochs to continue it" in caplog.text


def test_predict_answers_each_row_in_the_order_of_the_file(after: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = ["Hi", "Why?", "Hi", "Hi", "What is it?", "Why?"]
    (after / "prompts.txt").write_text("Hi\nWhy?\n\nHi\nHi\nWhat is it?\nWhy?\n")
    words = ["predict", "--ckpt_path", "best", "--data.val_batch_size", "4"]
    rlchat(*words, "--data.predict_path", "prompts.txt")
    assert "wrote 6 responses to replies.jsonl" in capsys.readouterr().out
    replies = rows(after / "replies.jsonl")
    assert [reply["messages"][-1] for reply in replies] == [{"role": "user", "content": text} for text in questions]
    for reply in replies:
        assert isinstance(reply["reply"], str)
        assert reply["reward"] == pytest.approx(sum(reply["factors"].values()))
        assert {"quality_similarity", "missing_end"} < set(reply["factors"])

    message = error_message(capsys, *words, "--data.predict_path", "prompts.txt")
    assert "replies.jsonl already exists; set another --predictions.path, or --predictions.overwrite true" in message
    assert rows(after / "replies.jsonl") == replies

    turns = [{"content": "Hi"}, {"content": "Hello!"}, {"content": "Why?"}]
    prompts = [{"prompt": "Hi"}, {"messages": turns}, {"prompt": "Hi"}]
    (after / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    rlchat(*words, "--data.predict_path", "prompts.jsonl", "--predictions.overwrite", "true")
    asked = [[m["content"] for m in reply["messages"]] for reply in rows(after / "replies.jsonl")]
    assert asked == [["Hi"], ["Hi", "Hello!", "Why?"], ["Hi"]]


def test_predict_writes_the_best_of_several(after: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (after / "prompts.txt").write_text("Hi\nWhy?\nWhat is it?\n")
    words = ["predict", "--ckpt_path", "best", "--data.val_batch_size", "2", "--data.predict_path", "prompts.txt"]
    rlchat(*words, "--best_of", "4")
    assert "the best of 4 have a mean reward of" in (printed := capsys.readouterr().out)
    assert "KL to the model at most 0.64 nats per response" in printed  # log 4 - 3/4
    replies = rows(after / "replies.jsonl")
    assert [reply["messages"][-1]["content"] for reply in replies] == ["Hi", "Why?", "What is it?"]
    assert all(reply["best_of"] == 4 and reply["reward"] >= reply["mean_reward"] for reply in replies)
    assert any(reply["reward"] > reply["mean_reward"] for reply in replies)
    checked = [
        {"prompt": "Hi", "answer": ".", "check": "regex"},
        {"prompt": "Why?", "answer": "(?!)", "check": "regex"},
    ]
    (after / "prompts.txt").rename("prompts.jsonl")
    text = "".join(json.dumps(row) + "\n" for row in [*checked, {"prompt": "What is it?"}])
    (after / "prompts.jsonl").write_text(text)
    words[-1] = "prompts.jsonl"
    rlchat(*words, "--best_of", "2", "--predictions.path", "checked.jsonl")
    assert "1 of 2 that have an answer are correct, pass@1 0.500, pass@2 0.500" in capsys.readouterr().out
    replies = rows(after / "checked.jsonl")
    assert [row.get("correct_of_n") for row in replies] == [2, 0, None]
    assert [row.get("correct") for row in replies] == [True, False, None]
    sft = newest(trained, "sft") / "checkpoints" / "best.ckpt"
    message = error_message(capsys, *words[:2], str(sft), *words[3:], "--best_of", "2", "--predictions.path", "x")
    assert "--best_of 2 needs a reward, and SFTModule has none" in message


def test_predict_without_prompts(after: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_message(capsys, "predict", "--ckpt_path", "best")
    assert "no prompts are specified; pass a file of prompts with --data.predict_path FILE" in message
    assert "no.txt" in error_message(capsys, "predict", "--ckpt_path", "best", "--data.predict_path", "no.txt")
    message = error_message(capsys, "predict", "--config", str(newest(trained, "reward") / "config.yaml"))
    assert "RewardModelModule does not generate responses; set --config to the configuration of a chat model" in message


# ---- interruption ----------------------------------------------------------------------------------------------------

CTRL_C = """
import os, signal
from pathlib import Path
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback

class CtrlC(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1 and Path("stop").exists():
            Path("stop").unlink()
            os.kill(os.getpid(), signal.SIGINT)
"""


def test_ctrl_c_saves_the_run(after: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped in the second of four iterations and resumed, a run ends with the weights of the uninterrupted one."""
    (after / "ctrl_c.py").write_text(CTRL_C)
    (after / "stop").touch()
    handler = signal.getsignal(signal.SIGINT)
    assert main([*SMOKE, "--trainer.callbacks+=ctrl_c.CtrlC"]) == 130
    assert signal.getsignal(signal.SIGINT) in (handler, signal.SIG_IGN)  # Lightning leaves it ignored
    signal.signal(signal.SIGINT, handler)
    err = capsys.readouterr().err
    assert "stopping after this batch; press Ctrl-C again to stop immediately" in err
    assert "rlchat: stopped; the run is saved. Resume it with `rlchat fit --ckpt_path last`" in err
    assert "Traceback" not in err

    stopped = Path("lightning_logs/ppo/version_1")
    kept = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["rlchat"]["iterations"] == 2
    rlchat("fit", "--ckpt_path", "last")
    resumed = Path("lightning_logs/ppo/version_2")
    ended = torch.load(resumed / "checkpoints" / "last.ckpt", weights_only=True)
    whole = torch.load(RUN / "checkpoints" / "last.ckpt", weights_only=True)
    assert torch.equal(*(content["rlchat"]["model"]["tokenizer"].pop("ranks") for content in (ended, whole)))
    assert ended["rlchat"] == whole["rlchat"]
    assert ended["rlchat"]["iterations"] == 4
    assert all(torch.equal(value, whole["state_dict"][name]) for name, value in ended["state_dict"].items())
    assert metrics(stopped, "train/reward") + metrics(resumed, "train/reward") == metrics(RUN, "train/reward")


@pytest.mark.slow
def test_ctrl_c_in_a_stage_that_lightning_optimizes(here: Path) -> None:
    (here / "ctrl_c.py").write_text(CTRL_C)
    words = ["fit", "--config", "demo/sft", "--data.path", "talk.jsonl", *TINY, "--data.batch_size=2"]
    words += ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--trainer.callbacks+=ctrl_c.CtrlC"]
    rlchat(*words)
    (here / "stop").touch()
    handler = signal.getsignal(signal.SIGINT)
    assert main(words) == 130
    signal.signal(signal.SIGINT, handler)
    rlchat("fit", "--ckpt_path", "last")
    whole, stopped, resumed = (metrics(Path(f"lightning_logs/sft/version_{n}"), "train/loss") for n in range(3))
    assert (len(whole), len(stopped)) == (10, 2)
    assert stopped + resumed == whole


def test_a_run_stopped_by_sigterm_can_be_resumed(here: Path) -> None:
    (here / "terminated.py").write_text(CTRL_C.replace("SIGINT", "SIGTERM"))
    (here / "stop").touch()
    assert main([*SMOKE, "--trainer.callbacks+=terminated.CtrlC"]) == 143
    rlchat("fit", "--ckpt_path", "last")
    stopped, resumed = (metrics(Path(f"lightning_logs/ppo/version_{n}"), "train/reward") for n in range(2))
    assert (len(stopped), len(resumed)) == (2, 2)


def test_ctrl_c_before_the_first_batch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "ctrl_c.py").write_text("def stop(*_, **__):\n    raise KeyboardInterrupt\n")
    (here / "mine.yaml").write_text(factor("{class_path: slow.Slow}"))
    (here / "slow.py").write_text(
        "from rlchat.rewards import MissingEnd\nclass Slow(MissingEnd):\n"
        "    def __init__(self, weight: float = 1.0):\n        raise KeyboardInterrupt\n"
    )
    assert main(["fit", "--config", "smoke", "--config", "mine.yaml", *SMOKE[3:]]) == 130
    assert capsys.readouterr().err == "\nrlchat: stopped\n"


# ---- errors of users' code and of libraries --------------------------------------------------------------------------


@pytest.mark.slow
def test_every_path_may_begin_with_the_home_folder(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    (here / "talk.jsonl").rename(home / "talk.jsonl")
    assert main(["tokenizer", "train", "~/talk.jsonl", "--vocab-size", "256", "--output=~/own.tiktoken"]) == 0
    options = {"data": {"path": ["~/talk.jsonl"]}, "stats_plot": {"path": "~/plot.png"}}
    (home / "mine.yaml").write_text(yaml.safe_dump(options))
    monkeypatch.setenv("PL_FIT__BEST_MODEL__FOLDER", "~/models")
    first = ["fit", "--config", "smoke", "--config=~/mine.yaml", *BRIEF, "--model.tiktoken_encoding", "~/own.tiktoken"]
    assert main([*first, "--trainer.default_root_dir=~/runs"]) == 0
    (checkpoint,) = (home / "runs").glob("lightning_logs/*/*/checkpoints/last.ckpt")
    again = "~/" + str(checkpoint.relative_to(home))
    assert main(["validate", "--ckpt_path", again, "--data.path", "~/talk.jsonl"]) == 0
    (home / "ask.txt").write_text("Hi\n")
    model = "~/models/rl_chat_model_tiktoken.pt"
    assert main(["chat", model, "--prompts=~/ask.txt", "--out=~/replies.json", "--max_new_tokens=2"]) == 0
    assert main(["export", model, "--to=safetensors", "~/weights.safetensors"]) == 0
    written = {"own.tiktoken", "models", "runs", "plot.png", "replies.json", "weights.safetensors"}
    assert written <= {path.name for path in home.iterdir()}
    assert not (here / "~").exists()


def test_the_home_folder_in_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written = Namespace(data=Namespace(path=["~/a", "b", {"c": "~/d"}]), url="http://a//b", seed=0, empty=None)
    assert with_home(written) == Namespace(
        data=Namespace(path=[f"{tmp_path}/a", "b", {"c": f"{tmp_path}/d"}]), url="http://a//b", seed=0, empty=None
    )


@pytest.mark.parametrize(
    ("words", "expanded"),
    [
        (["~/a b?"], ["~/a b?"]),  # a sentence, unless there is such a file
        (["~/there is.pt"], ["HOME/there is.pt"]),
        (["~/a.pt", "~/b"], ["HOME/a.pt", "HOME/b"]),
        (["--out", "~/my replies.json"], ["--out", "HOME/my replies.json"]),
        (["--out=~/my page.html", "~/a b?"], ["--out=HOME/my page.html", "~/a b?"]),
        (["a~/b", "-"], ["a~/b", "-"]),
        ([], []),
    ],
)
def test_the_home_folder_on_the_command_line(
    words: list[str], expanded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there is.pt").touch()
    assert _with_homes(words) == [word.replace("HOME", str(tmp_path)) for word in expanded]


BROKEN = """from rlchat.rewards import FunctionReward, ReplyFactor

def ratio(prompt, reply):
    return inner(0)

def inner(number):
    return 1 / number

class Broken(ReplyFactor):
    def score(self, prompt, reply):
        raise OSError(2, "no such lexicon")

class Unready(ReplyFactor):
    def __init__(self, weight: float = 1.0):
        self.words = {}["words"]

    def score(self, prompt, reply):
        return 0.0

class Unmoved(ReplyFactor):
    def to(self, device):
        raise AssertionError

    def score(self, prompt, reply):
        return 0.0
"""


@pytest.mark.parametrize(
    ("command", "described", "frames", "last"),
    [
        (
            "fit",
            "{class_path: rlchat.rewards.FunctionReward, init_args: {function: broken.ratio}}",
            ["ratio", "inner"],
            "'ratio' (broken.ratio) failed: ZeroDivisionError: division by zero; see line 7 of broken.py",
        ),
        (
            "validate",
            "{class_path: broken.Broken}",
            ["score"],
            "'broken' (broken.Broken) failed: FileNotFoundError: [Errno 2] no such lexicon; see line 11 of broken.py",
        ),
        (
            "fit",
            "{class_path: broken.Unready}",
            ["__init__"],
            "'unready' (broken.Unready) failed: KeyError: 'words'; see line 15 of broken.py",
        ),
        (
            "fit",
            "{class_path: broken.Unmoved}",
            ["to"],
            "'unmoved' (broken.Unmoved) failed: AssertionError; see line 22 of broken.py",
        ),
    ],
)
def test_an_error_in_a_users_own_factor_shows_the_traceback_of_its_code(
    here: Path, capsys: pytest.CaptureFixture[str], command: str, described: str, frames: list[str], last: str
) -> None:
    (here / "broken.py").write_text(BROKEN)
    (here / "mine.yaml").write_text(factor(described))
    sys.modules.pop("broken", None)
    assert main([command, "--config", "smoke", "--config", "mine.yaml", *SMOKE[3:]]) == 2
    err = capsys.readouterr().err
    trace = err[err.index("Traceback (most recent call last):") :].splitlines()
    assert [line.rpartition(" in ")[2] for line in trace if line.startswith("  File ")] == frames
    assert trace[-1] == f"rlchat: reward factor {last}"


def test_a_user_error_is_found_inside_the_error_of_a_library() -> None:
    error = RuntimeError("wrapped")
    error.__cause__ = UserError("no such thing; make one")
    assert str(cli.user_error_in(error)) == "no such thing; make one"
    assert cli.user_error_in(RuntimeError("a bug")) is None
    assert cli.user_error_in(ValueError("a bug")) is None
    assert "another process" in str(cli.user_error_in(RuntimeError("gloo: Connection closed by peer [127.0.0.1]")))


def test_a_limit_of_1_means_one_batch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of other libraries make `typing` list float first, and 1 would become 1.0."""
    annotations = cli.L.Trainer.__init__.__annotations__
    monkeypatch.setitem(annotations, "limit_train_batches", float | int | None)
    rlchat(*SMOKE, "--trainer.limit_train_batches=1")
    assert len(metrics(RUN, "train/reward")) == 1
