"""Options of Lightning's Trainer: what they show, and one sentence where they are not supported."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from helpers.command_line import BRIEF, TINY, rlchat, write_talk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlchat.__main__ import main
from rlchat.cli import main as cli
from rlchat.cli.messages import is_informative

CALLBACK = "lightning.pytorch.callbacks"
SFT = ["fit", "--config", "demo/sft", "--data.path", "talk.jsonl", *TINY, *BRIEF]
SMOKE = ["fit", "--config", "smoke", "--data.path", "talk.jsonl", "--data.batch_size", "2"]
SHORT = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]


@pytest.fixture
def here(workplace: Path) -> Path:
    """A working directory with a small data file."""
    write_talk(workplace / "talk.jsonl")
    return workplace


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence with which a command fails."""
    capsys.readouterr()
    assert main(words) == 2, words
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlchat: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("rlchat: ")


# ---- refused, with what to do instead --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_a_precision_with_clipped_gradients(precision: str, here: Path) -> None:
    rlchat(*SFT, "--trainer.precision", precision, "--trainer.gradient_clip_val=0.5")
    assert Path("checkpoints/sft_model.pt").is_file()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--trainer.enable_checkpointing=false"], r"trainer.enable_checkpointing false .*; set --best_model.folder"),
        (["--trainer.barebones=true"], r"trainer.barebones is not supported.* set --trainer.logger false"),
        ([f"--trainer.callbacks+={CALLBACK}.Timer"], r"trainer.callbacks: Timer has no duration; set one with"),
        ([f"--trainer.callbacks+={CALLBACK}.BackboneFinetuning"], r"trainer.callbacks: BackboneFinetuning is not"),
        (
            [f"--trainer.callbacks+={CALLBACK}.GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 2}"],
            r"trainer.callbacks: GradientAccumulationScheduler is not supported by PPO; set --model.micro_batch_size",
        ),
        (
            [f"--trainer.callbacks+={CALLBACK}.LearningRateFinder"],
            r"trainer.callbacks: LearningRateFinder is not supported by PPO; set --model.learning_rate",
        ),
        (
            [f"--trainer.callbacks+={CALLBACK}.SpikeDetection"],
            r"trainer.callbacks: SpikeDetection is not supported by PPO; steps that are not finite are skipped",
        ),
        (
            ["--trainer.precision", "transformer-engine"],
            r"trainer: Requirement 'transformer_engine\S*' not met. HINT: ",
        ),
        (["--trainer.accelerator", "tpu"], r"trainer: Requirement 'torch_xla\S*' not met. HINT: Try running `pip"),
        (["--ckpt_path", "hpc"], r"ckpt_path hpc is not supported: .*; set --ckpt_path last"),
        (["--ckpt_path", "registry:mine"], r"ckpt_path registry is not supported; set --ckpt_path to best, last or"),
        (
            ["--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.1"],
            r"--optimizer is not supported: .*--model.learning_rate.* override configure_optimizers",
        ),
        (["--data", "nonsense.DataModule"], r"--data: nonsense.DataModule cannot be imported: there is no module"),
        (["--data", "rlchat.PPOModule"], r"--data: rlchat.PPOModule is not a LightningDataModule"),
        (
            ["--data", "lightning.pytorch.demos.boring_classes.BoringDataModule"],
            r".*the data module returns batches of type Tensor, but PPOModule expects rlchat.data.batches",
        ),
        (
            ["--model", "lightning.pytorch.demos.boring_classes.BoringModel"],
            r"BoringModel has no data_needs attribute, .* or set --data to your own data module",
        ),
    ],
)
def test_an_option_that_is_not_supported(
    words: list[str], answer: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if any("boring_classes.BoringDataModule" in word for word in words):
        words = [*words, "--trainer.num_sanity_val_steps=0"]
        command = ["fit", "--config", "smoke"]
    else:
        command = SMOKE
    assert re.match(answer, error_of(capsys, *command, *words))


def test_early_stopping_lists_the_metrics_that_exist(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopping = [f"--trainer.callbacks+={CALLBACK}.EarlyStopping", "--trainer.callbacks.monitor=val/nothing"]
    message = error_of(capsys, *SFT, *stopping)
    assert "val/nothing" in message
    assert "`val/perplexity`" in message


def test_a_logger_names_the_package_that_it_lacks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("comet_ml") is not None:
        pytest.skip("the package is installed")
    message = error_of(capsys, *SFT, "--trainer.logger", "lightning.pytorch.loggers.CometLogger")
    assert re.match(r"trainer.logger: Requirement 'comet-ml\S*' not met. HINT: Try running `pip install", message)


# ---- what the user asked to see --------------------------------------------------------------------------------------


def test_a_profiler_reports_and_routine_messages_do_not(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    rlchat(*SFT, "--trainer.profiler=simple")
    shown = "\n".join(record.getMessage() for record in caplog.records if is_informative(record))
    assert "FIT Profiler Report" in shown
    assert "GPU available" in caplog.text
    assert "GPU available" not in shown
    assert "`Trainer.fit` stopped" not in shown


@pytest.mark.slow
def test_hyperparameters_of_data_and_reward_are_logged_with_the_final_metrics(here: Path) -> None:
    factor = "{class_path: rlchat.rewards.TooShort, init_args: {min_words: 4}}"
    rlchat(*SMOKE, *SHORT, "--model.reward", f"{{class_path: rlchat.Reward, init_args: {{factors: [{factor}]}}}}")
    run = Path("lightning_logs/ppo/version_0")
    logged = yaml.safe_load((run / "hparams.yaml").read_text())
    assert logged["clip_eps"] == 0.2
    assert logged["data"]["batch_size"] == 2
    assert logged["reward"]["TooShort"]["min_words"] == 4
    events = EventAccumulator(str(run))
    events.Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata
    shown = str(events.summary_metadata["_hparams_/session_start_info"].plugin_data.content)
    assert "data/batch_size" in shown
    assert "reward/TooShort/min_words" in shown
    assert "stats" in events.Tags()["images"]


@pytest.mark.slow
def test_measuring_does_not_add_to_the_training_runs(here: Path) -> None:
    rlchat(*SMOKE, *SHORT)
    for command in ("validate", "test"):
        rlchat(command, "--ckpt_path", "last")
    (here / "prompts.txt").write_text("Hi\n")
    rlchat("predict", "--ckpt_path", "last", "--data.predict_path", "prompts.txt")
    assert sorted(path.name for path in Path("lightning_logs").iterdir()) == [
        "checkpoint_folders.json",
        "ppo",
        "ppo_test",
        "ppo_validate",
    ]
    assert [path.name for path in Path("lightning_logs/ppo").iterdir()] == ["version_0"]


def test_environment_variables_set_options_that_the_recipe_leaves_open(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PL_FIT__BEST_MODEL__SAVE_LAST_EVERY", "7")
    rlchat(*SMOKE, "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["best_model"]["save_last_every"] == 7


# ---- data and files --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_data_module_of_the_user(here: Path) -> None:
    """A subclass takes the recipe's options and its own; its configuration is part of the run's."""
    (here / "mine.py").write_text(
        "from rlchat import OASST2DataModule\n"
        "class Mine(OASST2DataModule):\n"
        "    def __init__(self, path: str = '', batch_size: int = 8, extra: int = 1, max_val_prompts: int = 2):\n"
        "        super().__init__(path, batch_size=batch_size, max_val_prompts=max_val_prompts)\n"
        "        self.extra = extra\n"
    )
    ran = cli.run(["fit", "--config", "smoke", "--data", "mine.Mine", "--data.path=talk.jsonl", "--data.extra=5",
                   "--data.batch_size=2", *SHORT])  # fmt: skip
    assert type(ran.datamodule).__name__ == "Mine"
    assert (ran.datamodule.extra, ran.datamodule.batch_size, ran.datamodule.max_val_prompts) == (5, 2, 16)
    saved = yaml.safe_load(Path("lightning_logs/ppo/version_0/config.yaml").read_text())
    assert saved["data"]["class_path"] == "mine.Mine"
    rlchat("validate", "--ckpt_path", "last")


def test_any_model_with_any_data_module(here: Path) -> None:
    boring = "lightning.pytorch.demos.boring_classes"
    rlchat("fit", "--model", f"{boring}.BoringModel", "--data", f"{boring}.BoringDataModule", *BRIEF[:3])
    assert list(Path("lightning_logs").rglob("last.ckpt"))


def test_metrics_of_any_name_are_printed_and_an_empty_table_is_not(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    boring = "lightning.pytorch.demos.boring_classes"
    words = ["--data", f"{boring}.BoringDataModule", "--trainer.limit_val_batches=1"]
    Path("loud.py").write_text(
        f"from {boring} import BoringModel\n\n\nclass Loud(BoringModel):\n"
        "    def validation_step(self, batch, batch_idx):\n        self.log('height', 2.5)\n"
    )
    rlchat("validate", "--model", "loud.Loud", *words)
    assert "height" in capsys.readouterr().out
    rlchat("validate", "--model", f"{boring}.BoringModel", *words)
    assert "metric" not in capsys.readouterr().out
    assert "there are no metrics: the validation split has no rows for this stage" in caplog.text


@pytest.mark.slow
def test_checkpoints_of_the_last_runs_only(here: Path) -> None:
    for _ in range(3):
        rlchat(*SMOKE, *SHORT, "--best_model.keep_runs=2")
    folders = json.loads(Path("lightning_logs/checkpoint_folders.json").read_text())["ppo"]
    assert [sorted(path.name for path in Path(folder).iterdir()) for folder in folders] == [
        [],
        ["best.ckpt", "last.ckpt"],
        ["best.ckpt", "last.ckpt"],
    ]


@pytest.mark.slow
def test_the_best_model_by_another_metric(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = cli.run([*SMOKE, *SHORT, "--best_model.select_by=reward-kl", "--best_model.kl_weight=2.0"])
    metrics = ran.trainer.callback_metrics
    best = next(callback for callback in ran.trainer.callbacks if type(callback).__name__ == "BestModel")
    expected = float(metrics["val/reward"]) - 2.0 * float(metrics["val/kl"])
    assert float(best.best_model_score) == pytest.approx(expected)
    assert "it logs val/" in error_of(capsys, *SMOKE, *SHORT, "--best_model.select_by=val/nothing")


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (["EarlyStopping", "monitor=val/perplexity", "min_delta=1e9"], "did not improve in the last 1 records"),
        (["EarlyStopping", "monitor=val/perplexity", "verbose=true", "min_delta=1e9"], "did not improve in the last 1"),
        (["EarlyStopping", "monitor=val/perplexity", "stopping_threshold=1e9"], "Stopping threshold reached"),
        (["Timer", "duration=00:00:00:00"], "Time limit reached. Elapsed time is 0:00:00"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_reason_for_an_early_end_reaches_the_terminal_once(
    callback: list[str], reason: str, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, *options = callback
    words = [f"--trainer.callbacks+={CALLBACK}.{name}", *(f"--trainer.callbacks.{option}" for option in options)]
    words += ["--trainer.callbacks.patience=1"] if name == "EarlyStopping" else []
    rlchat(*SFT, *words, "--trainer.max_epochs=4")
    shown = [record.getMessage() for record in caplog.records if is_informative(record)]
    assert sum(reason in line for line in shown) == 1
