"""A run goes on from any of its checkpoints as if nothing had been, in every stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command_line import rlchat
from prove.kill_and_resume import PPO, kill_and_resume
from prove.runs import KEEPER, QUIET, differences, last_checkpoint, metrics, write_talk

# Two epochs of five batches, saved after each of them and around validations.
FIT = ["--data.path=talk.jsonl", "--data.batch_size=8", "--data.val_fraction=0.2", "--trainer.limit_train_batches=5"]
FIT += ["--trainer.max_epochs=2", "--best_model.save_last_every=1", "--trainer.num_sanity_val_steps=0"]
FIT += ["--trainer.enable_model_summary=false", "--model.schedule=linear"]
ENCODER = {"model_type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}  # with dropout
SMALL = ["--model.base_model", json.dumps(ENCODER), "--model.tiktoken_encoding=rlchat_1k", "--model.max_length=64"]
STAGES = {
    "sft": ["--model=rlchat.SFTModule", *SMALL],
    "reward": ["--model=rlchat.RewardModelModule", *SMALL],
    "ppo": ["--config=smoke", "--model.kl_target=0.5", "--model.kl_horizon=100", "--model.max_new_tokens=6"],
}


@pytest.mark.parametrize(
    ("stage", "validate_every", "tried"),
    [
        # Before and after the first validation, after the third batch, after an epoch that ends without a validation.
        ("sft", 2, [1, 2, 3, 6]),
        ("ppo", 2, [1, 2, 3, 6]),
        # Before the last batch of an epoch, before and after the validation at its end, before the very last one.
        ("reward", 5, [3, 4, 5, 10]),
        ("ppo", 5, [3, 4, 5, 10]),
    ],
)
def test_every_checkpoint_leads_to_the_same_end(
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


def test_kills_at_random_moments(tmp_path: Path) -> None:
    """A short form of `make prove`'s 20 kills: real processes, killed without a chance to tidy up."""
    words = [*(word.format(batch=8) for word in PPO), "--trainer.max_epochs=6"]
    report = kill_and_resume(tmp_path, words, kills=2)
    assert report.batches == 30
    assert report.compared > 500
