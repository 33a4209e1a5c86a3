"""Options under the names of other libraries, and settings in every notation that a configuration allows."""

from __future__ import annotations

import inspect
from pathlib import Path

import lightning as L
import pytest

from rlchat.cli.main import CALLBACKS, STAGES
from rlchat.cli.option_aliases import ALIASES
from rlchat.cli.option_errors import explain, ignored_variables
from rlchat.cli.recipes import checked_recipe
from rlchat.data.datamodule import OASST2DataModule

GROUPS = {"trainer": L.Trainer, "data": OASST2DataModule, **CALLBACKS}
STAGE_OPTIONS = {name for stage in STAGES for name in inspect.signature(stage).parameters}
OPTIONS = {
    *(f"--{group}.{name}" for group, cls in GROUPS.items() for name in inspect.signature(cls).parameters),
    *(f"--model.{name}" for name in STAGE_OPTIONS),
    "--ckpt_path",
    "--seed_everything",
}


def error(*words: str, model: str = "rlchat.PPOModule") -> str:
    return str(explain(["fit", "--model", model, *words], GROUPS, OPTIONS, "the parser's message"))


@pytest.mark.parametrize(
    ("alias", "option"),
    [
        ("cliprange", "--model.clip_eps"),
        ("clip_coef", "--model.clip_eps"),
        ("clip_range", "--model.clip_eps"),
        ("cliprange_value", "--model.value_clip"),
        ("vf_coef", "--model.value_coef"),
        ("gae_lambda", "--model.lam"),
        ("num_minibatches", "--model.minibatches"),
        ("num_mini_batches", "--model.minibatches"),
        ("ppo_epoch", "--model.ppo_epochs"),
        ("num_ppo_epochs", "--model.ppo_epochs"),
        ("lr", "--model.learning_rate"),
        ("kl_ctl", "--model.kl_coef"),
        ("init_kl_coef", "--model.kl_coef"),
        ("response_length", "--model.max_new_tokens"),
        ("max_tokens", "--model.max_new_tokens"),
        ("model_name", "--model.base_model"),
        ("per_device_train_batch_size", "--data.batch_size"),
        ("num_train_epochs", "--trainer.max_epochs"),
        ("gradient_accumulation_steps", "--trainer.accumulate_grad_batches"),
    ],
)
def test_names_of_other_libraries(alias: str, option: str) -> None:
    assert error(f"--model.{alias}", "1") == f"--model.{alias}: no such option of PPOModule; did you mean {option}?"
    assert error(f"--{alias}=1") == f"--{alias}: no such option; did you mean {option}?"


def test_a_suggestion_is_an_option_of_the_class() -> None:
    """PPO has its own option for gradient clipping; the other stages use the trainer's."""
    assert error("--model.grad_clip", "1").endswith("did you mean --model.max_grad_norm?")
    assert error("--model.grad_clip", "1", model="rlchat.SFTModule").endswith(
        "did you mean --trainer.gradient_clip_val?"
    )
    assert error("--model.max_grad_norm=1", model="rlchat.SFTModule").endswith("mean --trainer.gradient_clip_val?")


def test_every_alias_leads_to_an_option_and_is_not_an_option_itself() -> None:
    assert {f"--{option}" for options in ALIASES.values() for option in options} <= OPTIONS
    # The option of PPO or DPO that replaces one of the trainer, or of the other stage.
    assert set(ALIASES) & {option.rpartition(".")[2].lstrip("-") for option in OPTIONS} == {"max_grad_norm", "beta"}


def test_an_alias_in_a_file_is_written_as_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {class_path: rlchat.PPOModule, init_args: {cliprange: 0.1}}\n")
    message = str(explain(["fit", "--config", str(path)], GROUPS, OPTIONS, ""))
    assert message == "model.cliprange: no such option of PPOModule; did you mean model.clip_eps?"


def test_a_flag_overrides_the_class_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {class_path: rlchat.PPOModule}\n")
    words = ["fit", "--config", str(path), "--model", "rlchat.SFTModule", "--model.clip_eps=1"]
    assert str(explain(words, GROUPS, OPTIONS, "")).startswith("--model.clip_eps: no such option of SFTModule")


def test_null_is_a_value() -> None:
    """It hides no other error: neither before nor after it."""
    unknown = "--model.lerning_rate: no such option of PPOModule; did you mean learning_rate?"
    assert error("--model.init_from", "null", "--model.lerning_rate", "3") == unknown
    assert error("--model.lerning_rate", "3", "--model.init_from=null") == unknown
    assert error("--data.cache_dir", "null", "--model.lerning_rate", "3") == unknown
    absent = "--model.reward.factors=[{class_path: nowhere.Absent}]"
    assert "nowhere.Absent cannot be imported: there is no module nowhere" in error("--model.init_from=null", absent)
    misspelled = "--model.reward.factors=[{class_path: rlchat.rewards.TooLong, init_args: {max_wrods: 3}}]"
    assert "max_wrods: no such option of TooLong; did you mean max_words?" in error(
        "--model.init_from=null", misspelled
    )


def test_null_where_a_value_is_needed() -> None:
    wrong = "invalid value 'null' for --model.learning_rate: expected a number"
    assert error("--model.init_from=null", "--model.learning_rate", "null") == wrong
    assert error("--data.batch_size", "null") == "invalid value 'null' for --data.batch_size: expected an integer"


@pytest.mark.parametrize("flag", ["--model.init_from", "--data.path", "--trainer.max_epochs"])
def test_a_flag_without_a_value(flag: str) -> None:
    assert error(flag) == f"{flag}: expected a value: {flag} VALUE"
    assert error(flag, "--model.lerning_rate", "3") == f"{flag}: expected a value: {flag} VALUE"


def test_other_errors_keep_the_message_of_the_parser() -> None:
    assert error("--model.clip_eps", "0.1", "--trainer.max_epochs=2") == "the parser's message"


def test_a_second_file_may_set_options_of_the_class_in_the_first(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: {class_path: rlchat.PPOModule}\n")
    second.write_text(
        "model: {reward: {class_path: rlchat.Reward, init_args: {factors: [{class_path: nowhere.Polite}]}}}\n"
    )
    message = str(explain(["fit", "--config", str(first), "--config", str(second)], GROUPS, OPTIONS, ""))
    assert "nowhere.Polite cannot be imported: there is no module nowhere" in message


def test_options_of_a_callback_that_a_flag_appended() -> None:
    append = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"
    wrong = "invalid value 'soon' for --trainer.callbacks.patience: expected an integer"
    assert error(append, "--trainer.callbacks.monitor=val/reward", "--trainer.callbacks.patience=soon") == wrong
    unknown = "--trainer.callbacks.patient: no such option of EarlyStopping; did you mean patience?"
    assert error(append, "--trainer.callbacks.patient=3") == unknown


def test_a_seed_that_is_no_number() -> None:
    assert error("--seed_everything", "often") == (
        "invalid value 'often' for --seed_everything: expected an integer or true or false"
    )


@pytest.mark.parametrize("recipe", ["demo/sft", "demo/reward", "demo/ppo", "sft", "reward", "ppo"])
def test_options_of_a_recipe_are_not_blamed_for_an_invalid_flag(recipe: str) -> None:
    words = ["fit", "--config", str(checked_recipe(recipe)), "--data.nothing_like_it", "1"]
    assert str(explain(words, GROUPS, OPTIONS, "")).startswith("--data.nothing_like_it: no such option")


def test_a_word_for_a_class_may_be_a_plain_string() -> None:
    flags = ("--trainer.accelerator=auto", "--trainer.strategy=ddp", "--trainer.profiler=simple")
    assert error(*flags) == "the parser's message"
    assert error("--trainer.logger=csv").startswith("--trainer.logger: csv is not a known class")


def test_environment_variables_without_effect(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("trainer:\n  max_epochs: 3\n")
    environment = {
        "PL_FIT__NOPE": "1",
        "PL_FIT__TRAINER__MAX_EPOCHS": "2",
        "PL_FIT__DATA__BATCH_SIZE": "2",
        "PL_FIT__BEST_MODEL__FOLDER": "here",
        "PL_TEST__NOPE": "1",
        "PL_GLOBAL_SEED": "0",
    }
    words = ["fit", "--config", str(path), "--data.batch_size", "4"]
    assert list(ignored_variables(environment, words, OPTIONS)) == [
        ("PL_FIT__DATA__BATCH_SIZE", "a configuration file or a flag sets --data.batch_size"),
        ("PL_FIT__NOPE", "fit has no option of that name"),
        ("PL_FIT__TRAINER__MAX_EPOCHS", "a configuration file or a flag sets --trainer.max_epochs"),
    ]
