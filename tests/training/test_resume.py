"""In every stage, a run that resumes from any of its checkpoints equals an uninterrupted run."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import rlchat, working_in
from prove.kill_and_resume import PPO, RESUME, compare, kill_and_resume
from prove.runs import (
    KEEPER,
    QUIET,
    differences,
    finish,
    fit_words,
    last_checkpoint,
    metrics,
    prepare,
    start,
    trace,
    write_talk,
)

# Two epochs of five batches, saved after each of them and around validations.
FIT = ["--data.path=talk.jsonl", "--data.batch_size=8", "--data.val_fraction=0.2", "--trainer.limit_train_batches=5"]
FIT += ["--trainer.max_epochs=2", "--best_model.save_last_every=1", "--trainer.num_sanity_val_steps=0"]
FIT += ["--trainer.enable_model_summary=false", "--model.schedule=linear"]
ENCODER = {"model_type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}  # with dropout
SMALL = ["--model.base_model", json.dumps(ENCODER), "--model.tiktoken_encoding=rlchat_1k", "--model.max_length=64"]
STAGES = {
    "sft": ["--model=rlchat.SFTModule", *SMALL],
    "reward": ["--model=rlchat.RewardModelModule", *SMALL],
    "dpo": ["--model=rlchat.DPOModule", *SMALL],
    "ppo": ["--config=smoke", "--model.kl_target=0.5", "--model.kl_horizon=100", "--model.max_new_tokens=6"],
}
LORA = ["--model.adapter=lora", "--model.lora_rank=4"]
STAGES["sft_lora"] = [*STAGES["sft"], *LORA, "--model.lora_dropout=0.2"]
STAGES["reward_lora"] = [*STAGES["reward"], *LORA, "--model.gradient_checkpointing=true"]
STAGES["dpo_lora"] = [*STAGES["dpo"], *LORA]
STAGES["dpo_layers"] = [*STAGES["dpo"], "--model.train_layers=1"]
STAGES["ppo_lora"] = [*STAGES["ppo"], *LORA, "--model.critic=separate"]
STAGES["ppo_layers"] = [*STAGES["ppo"], "--model.train_layers=1", "--model.gradient_checkpointing=true"]


def slow(*values: Any) -> Any:
    """A case of the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "validate_every", "tried"),
    [
        # After the third batch.
        ("sft", 2, [3]),
        ("dpo", 2, [3]),
        ("ppo", 2, [3]),
        # Before and after the first validation, after an epoch that ends without a validation.
        slow("sft", 2, [1, 2, 6]),
        slow("ppo", 2, [1, 2, 6]),
        # Before the last batch of an epoch, before and after the validation at its end, before the very last one.
        slow("reward", 5, [3, 4, 5, 10]),
        slow("dpo", 5, [3, 4, 5, 10]),
        slow("ppo", 5, [3, 4, 5, 10]),
        slow("sft_lora", 2, [3]),
        slow("reward_lora", 2, [3]),
        slow("dpo_lora", 2, [3]),
        slow("dpo_layers", 2, [3]),
        slow("ppo_lora", 2, [3]),
        slow("ppo_layers", 2, [3]),
    ],
)
def test_resuming_from_any_checkpoint_gives_the_same_result(
    stage: str, validate_every: int, tried: list[int], workplace: Path
) -> None:
    write_talk(workplace / "talk.jsonl", 60)
    (workplace / "keeper.py").write_text(KEEPER)
    words = ["fit", *STAGES[stage], *FIT, *QUIET, f"--trainer.val_check_interval={validate_every}"]
    rlchat(*words, "--trainer.plugins+=keeper.Keeper")
    end, logged = last_checkpoint(workplace), {(step, name): value for step, name, value in metrics(workplace)}
    kept = sorted(Path().glob("lightning_logs/*/version_0/checkpoints/kept/*"))
    assert len(kept) == {2: 14, 5: 12}[validate_every]
    for number in tried:
        rlchat(*words, "--ckpt_path", str(kept[number]))
        assert differences(end, last_checkpoint(workplace)) == [], number
    for step, name, value in metrics(workplace):
        assert logged[step, name] == value, (step, name)


@pytest.mark.parametrize("stage", ["sft", slow("ppo")])
def test_more_epochs_continue_the_schedule(stage: str, workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A linear schedule over 5 steps ends at 0; over 10 steps, its sixth step has half of the peak."""
    write_talk(workplace / "talk.jsonl", 60)
    options = [*FIT, "--model.learning_rate=0.001", "--model.warmup=0", "--trainer.log_every_n_steps=1"]
    words = ["fit", *STAGES[stage], *options, *QUIET]
    rlchat(*words, "--trainer.max_epochs=1")
    assert rates(workplace) == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    assert "the learning rate continues" not in caplog.text
    rlchat(*words, "--ckpt_path=last")
    assert rates(workplace)[5:] == pytest.approx([5e-4, 4e-4, 3e-4, 2e-4, 1e-4])
    says = "the learning rate continues at 0.0005, as in the linear schedule over all 10 steps of the run; it was 0"
    assert says in caplog.text


def rates(folder: Path) -> list[float]:
    """The learning rates of all batches in ``folder``, in their order."""
    return [value for _, name, value in sorted(metrics(folder)) if name == "train/learning_rate"]


KILLER = """
import os, signal
from pathlib import Path
from lightning.pytorch import Callback

class Killer(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 3 and Path("kill").exists():
            Path("kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_is_resumed_exactly(tmp_path: Path) -> None:
    """Killed without cleanup in the fourth batch, one batch after the last checkpoint."""
    words = [*(word.format(batch=8) for word in PPO), "--trainer.max_epochs=1", "--trainer.callbacks+=killer.Killer"]
    whole, broken = prepare(tmp_path / "whole"), prepare(tmp_path / "broken")
    for folder in (whole, broken):
        (folder / "killer.py").write_text(KILLER)
    (broken / "kill").touch()
    assert finish(start(broken, fit_words(words)), broken) == -signal.SIGKILL
    assert [line["batch"] for line in trace(broken)] == [1, 2, 3]
    for folder, more in ((whole, []), (broken, RESUME)):
        with working_in(folder):
            torch.set_num_threads(1)  # as in the other process
            rlchat(*fit_words(words), *more)
    report = compare(whole, broken, ranks=1, kills=1)
    assert (report.batches, report.repeated) == (5, 1)
    assert report.compared > 100


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path) -> None:
    """A short version of the 20 kills in `make prove`: real processes, killed without cleanup."""
    words = [*(word.format(batch=8) for word in PPO), "--trainer.max_epochs=6"]
    report = kill_and_resume(tmp_path, words, kills=2)
    assert report.batches == 30
    assert report.compared > 500
