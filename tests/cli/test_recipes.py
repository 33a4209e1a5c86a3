"""The shipped configurations: each parses, shows only options that exist, and every option has an effect."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import textwrap
from functools import cache
from pathlib import Path
from pkgutil import resolve_name as import_object
from typing import Any

import pytest
import yaml
from helpers.command_line import BRIEF, rlchat, write_talk
from helpers.hf_tokenizers import tokenizer_folder, tokenizer_json
from transformers import LlamaConfig, LlamaForCausalLM

import rlchat as package
from rlchat.callbacks import SampleResponses, StatsPlot
from rlchat.callbacks.alarms import Alarms
from rlchat.callbacks.best_model import BestModel
from rlchat.callbacks.predictions import Predictions
from rlchat.callbacks.rollout_log import RolloutLog
from rlchat.cli.recipes import FOLDER, checked_recipe, describe_recipes, find_recipe, recipes
from rlchat.cli.settings import with_own_tokenizer
from rlchat.data.datamodule import OASST2DataModule
from rlchat.errors import UserError
from rlchat.models.model_file import load_policy
from rlchat.ppo.module import PPOModule
from rlchat.rewards import (
    AppropriateLength,
    DistinctNgrams,
    MissingEnd,
    QualitySimilarity,
    Repetition,
    Reward,
    TooLong,
    TooManySentences,
    TooShort,
)
from rlchat.rewards.learned import LearnedQuality
from rlchat.training.dpo import DPOModule
from rlchat.training.reward_model import RewardModelModule
from rlchat.training.sft import SFTModule

SCALE = ["scale/ddp", "scale/fsdp2", "scale/nodes"]
"""These have no model: they extend another recipe."""
MODELS = ["distilbert", "from-scratch", "gpt2", "llama-lora", "qwen-lora", "smollm2-lora"]
"""These start from a certain base model; tests/cli/test_model_recipes.py runs them."""
DEMOS = [
    "demo/ppo",
    "demo/rankings-ppo",
    "demo/rankings-reward",
    "demo/rankings-sft",
    "demo/real",
    "demo/reward",
    "demo/sft",
]
REASONING = ["reasoning/ppo", "reasoning/sft"]
NAMES = sorted([*DEMOS, "dpo", *MODELS, "ppo", *REASONING, "reward", *SCALE, "sft", "smoke"])
MODULES = [SFTModule, RewardModelModule, DPOModule, PPOModule]
CALLBACKS = {
    "alarms": Alarms,
    "rollout_log": RolloutLog,
    "best_model": BestModel,
    "sample_responses": SampleResponses,
    "stats_plot": StatsPlot,
    "predictions": Predictions,
}
FACTORS = [
    LearnedQuality, QualitySimilarity, TooShort, TooLong, TooManySentences, AppropriateLength, DistinctNgrams,
    Repetition, MissingEnd
]  # fmt: skip
SOURCE = Path(inspect.getfile(package)).parent


def content(name: str) -> dict[str, Any]:
    return yaml.safe_load(recipes()[name].read_text(encoding="utf-8"))


def options_of(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_the_recipes() -> None:
    assert sorted(recipes()) == NAMES


def test_a_file_takes_precedence_over_a_recipe_of_that_name(workplace: Path) -> None:
    assert find_recipe("smoke") == recipes()["smoke"]
    (workplace / "smoke").write_text("seed_everything: 1\n")
    assert find_recipe("smoke") == Path("smoke")


def test_neither_file_nor_recipe() -> None:
    with pytest.raises(UserError, match="no file and no recipe named 'demo/pop'; the recipes are demo/ppo, demo/ra"):
        find_recipe("demo/pop")


def test_the_list_describes_each_recipe() -> None:
    lines = describe_recipes().splitlines()
    assert [line.split()[:2] for line in lines] == [["--config", name] for name in NAMES]
    assert all(len(line.split()) > 5 for line in lines)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: [1, 2\n", r"mine.yaml:2: not YAML: expected"),
        ("a: 1\nb: c: 2\n", r"mine.yaml:2: not YAML: mapping values are not allowed here"),
        ("just text\n", "mine.yaml: has no options"),
        ("", "mine.yaml: has no options"),
        ("a: \0\n", "mine.yaml: cannot be read as YAML"),
    ],
)
def test_a_file_without_options(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        checked_recipe(str(path))


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_option_in_a_recipe_exists_and_takes_effect(
    name: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rlchat("fit", *(["--config", "ppo"] if name in SCALE else []), "--config", name, "--print_config")
    assert_holds(yaml.safe_load(capsys.readouterr().out), content(name), name)


def assert_holds(printed: Any, shown: Any, place: str) -> None:
    if isinstance(shown, dict):
        for key, value in shown.items():
            assert key in printed, f"{place}.{key}"
            assert_holds(printed[key], value, f"{place}.{key}")
    elif isinstance(shown, list):
        for i, (one, other) in enumerate(zip(printed, shown, strict=True)):
            assert_holds(one, other, f"{place}[{i}]")
    else:
        assert printed == shown, place


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
def test_full_recipes_show_every_option(name: str) -> None:
    shown = content(name)
    module = import_object(shown["model"]["class_path"])
    assert set(shown["model"]["init_args"]) == options_of(module)
    assert set(shown["data"]) == options_of(OASST2DataModule)
    # A reward model generates no text, so it has no samples or predictions.
    groups = {"best_model", "stats_plot"}
    groups |= set() if name == "reward" else {"sample_responses", "predictions"}
    groups |= {"alarms", "rollout_log"} if name == "ppo" else set()
    assert groups == set(CALLBACKS) & set(shown)
    for group in groups:
        assert set(shown[group]) == options_of(CALLBACKS[group]), group


def test_the_ppo_recipe_shows_every_option_of_its_factors() -> None:
    factors = content("ppo")["model"]["init_args"]["reward"]["init_args"]["factors"]
    assert len(factors) == 7
    for factor in factors:
        assert set(factor["init_args"]) == options_of(import_object(factor["class_path"])), factor["class_path"]


@pytest.mark.parametrize("name", MODELS)
def test_recipes_for_a_model_explain_their_options(name: str) -> None:
    text = recipes()[name].read_text(encoding="utf-8")
    lines = text.split("\nmodel:")[1].split("\ntrainer:")[0].splitlines()
    options = [line.strip() for line in lines if re.match(r"\s+[a-z_]+: \S", line)]
    assert [line for line in options if "#" not in line and not line.startswith(("init_args", "class_path"))] == [
        "model_type: llama"
    ] * (name == "from-scratch")
    assert f"rlchat fit --config {name} --data.path" in text
    assert f"rlchat fit --config {name} --config scale/ddp" in text


def test_full_recipes_have_the_documented_defaults() -> None:
    model, ppo = content("sft")["model"]["init_args"], content("ppo")["model"]["init_args"]
    assert model["base_model"] == "distilbert-base-uncased"
    assert model["tiktoken_encoding"] is None  # --model.base_model keeps its own tokens
    assert {"max_length", "hidden_dim", "learning_rate"} <= set(model)
    assert {"clip_eps", "max_new_tokens", "temperature"} <= set(ppo)


@pytest.mark.parametrize("cls", [*MODULES, OASST2DataModule, *CALLBACKS.values(), Reward, *FACTORS])
def test_every_option_is_read_by_something(cls: type) -> None:
    missing = [name for name in options_of(cls) if not is_read(cls, name)]
    assert not missing


def test_an_option_that_is_only_stored_is_not_read() -> None:
    class Idle:
        def __init__(self, kept: int, kept_for_others: int, read: int, used: int = 0) -> None:
            """All of kept, read and used."""
            self.never_read = kept
            self.path = kept_for_others  # `.path` is read in the package
            self.used = read
            print(used)

        def use(self) -> int:
            return self.used

    assert {name: is_read(Idle, name) for name in options_of(Idle)} == {
        "kept": False,
        "kept_for_others": True,
        "read": True,
        "used": True,
    }


def is_read(cls: type, option: str) -> bool:
    """Whether code uses the argument ``option`` of ``cls``, or reads what it is kept as.

    Kept as an attribute of another name, or among Lightning's hyper-parameters, which are read by name: ``o.option``,
    ``o["option"]``.
    """
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    source, tree = parsed(owner)
    kept_as, used = set(), False
    stored: set[ast.expr] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute) and is_name(node.value, option):
            kept_as.add(node.targets[0].attr)
            stored.add(node.value)
    for node in ast.walk(tree):
        used |= is_name(node, option) and node not in stored
    if "save_hyperparameters" in source or ".of(locals())" in source:  # typed options have a field of that name
        kept_as.add(option)
    return used or bool(kept_as & (attributes_read(tree) | package_attributes()))


@cache
def parsed(cls: type) -> tuple[str, ast.Module]:
    """The source of ``cls`` as text and as a tree."""
    source = textwrap.dedent(inspect.getsource(cls))
    return source, ast.parse(source)


def is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)


def attributes_read(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            found.add(str(node.slice.value))
    return found


@cache
def package_attributes() -> set[str]:
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        found |= attributes_read(ast.parse(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("name", SCALE)
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_a_scale_recipe_extends_another_recipe(
    name: str, stage: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It sets where the run takes place, and does not change what is trained."""
    assert set(content(name)) == {"trainer"}
    assert set(content(name)["trainer"]) == {"accelerator", "devices", "num_nodes", "strategy"}
    rlchat("fit", "--config", stage, "--config", name, "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert_holds(printed["trainer"], content(name)["trainer"], name)
    assert_holds(printed["model"], content(stage)["model"], stage)
    assert_holds(printed["trainer"]["max_epochs"], content(stage)["trainer"]["max_epochs"], stage)


def test_the_batch_script_parses_and_matches_its_recipe(tmp_path: Path) -> None:
    """SLURM is not available here, so the test checks the shell syntax, the resources and the names of recipes."""
    script = FOLDER / "scale" / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    asked = re.findall(r"^#SBATCH --(nodes|ntasks-per-node)=(\d+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    trainer = content("scale/nodes")["trainer"]
    assert dict(asked) == {"nodes": str(trainer["num_nodes"]), "ntasks-per-node": str(trainer["devices"])}
    assert set(re.findall(r"--config (\S+)", script.read_text(encoding="utf-8"))) <= set(recipes())


@pytest.mark.parametrize("recipe", ["smoke", "from-scratch", "demo/sft"])
def test_a_base_model_of_the_user_keeps_its_tokenizer_under_a_recipe_from_scratch(recipe: str, tmp_path: Path) -> None:
    path = str(recipes()[recipe])
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {init_args: {base_model: folder}}")
    encoded = tmp_path / "encoded.yaml"
    encoded.write_text("model: {init_args: {base_model: folder, tiktoken_encoding: rlchat_1k}}")
    reset = "--model.tiktoken_encoding=null"
    base = ["--model.base_model", "folder"]
    for words in (["--config", path, *base], ["--config", path, "--config", str(mine)]):
        assert with_own_tokenizer(["fit", *words]) == ["fit", *words, reset]
    for words in (
        ["--config", path],
        ["--config", path, "--model.base_model", "{model_type: gpt2}"],
        ["--config", path, *base, "--model.tiktoken_encoding", "rlchat_1k"],
        ["--config", path, "--config", str(encoded)],
        ["--config", str(recipes()["distilbert"]), *base],  # its encoding is for a pretrained model
    ):
        assert with_own_tokenizer(["fit", *words]) == ["fit", *words]


def test_smoke_with_a_base_model_trains_under_its_own_tokenizer(workplace: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=420, max_position_embeddings=128)).save_pretrained("base")
    tokenizer_folder(workplace / "base", tokenizer_json())
    talk = str(write_talk(workplace / "talk.jsonl"))
    rlchat("fit", "--config", "smoke", "--model.base_model", "base", "--data.path", talk, *BRIEF)
    assert load_policy("checkpoints/rl_chat_model_tiktoken.pt").tokenizer.has_own_format
