"""SFT and reward model: losses and gradients that are not finite, and accumulated gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.command_line import TINY, write_talk
from helpers.small_ppo import Log, sequences, serve, trainer
from prove.runs import write_talk as write_pairs
from torch import Tensor
from training.test_reward_model import LLAMA, replies_batch

from rlchat.__main__ import main
from rlchat.data.datamodule import RankedBatch, SequenceBatch
from rlchat.errors import UserError
from rlchat.training.reward_model import RewardModelModule
from rlchat.training.sft import SFTModule

TALK = [("Hi", "Hello."), ("Who?", "A machine of words"), ("x", "y"), ("Why", "So.")]
REPLIES = [("a plum", "a stone"), ("plum it is", "it is not"), ("one plum", "one nail", "one", "no"), ("my", "shoe")]
OPTIONS: dict[str, Any] = {"max_length": 32, "learning_rate": 1e-2, "schedule": "constant", "warmup": 0.0}


def module_of(stage: str, encoding: str) -> SFTModule | RewardModelModule:
    torch.manual_seed(0)
    if stage == "sft":
        return SFTModule(LLAMA, encoding, **OPTIONS)
    module = RewardModelModule(LLAMA, encoding, **OPTIONS)
    torch.nn.init.normal_(module.model.score_head.weight)  # type: ignore[arg-type]
    return module


def batch_of(module: SFTModule | RewardModelModule, rows: slice) -> SequenceBatch | RankedBatch:
    if isinstance(module, SFTModule):
        return sequences(module.tokenizer, TALK[rows])
    whole = replies_batch(module.tokenizer, REPLIES, labelled=True)
    labelled = torch.arange(len(whole.quality)) % 3 > 0  # unequal numbers of labels per prompt and microbatch
    whole = whole._replace(quality=whole.quality.where(labelled, torch.nan))
    chosen = [group in range(*rows.indices(len(REPLIES))) for group in whole.group.tolist()]
    return RankedBatch(*(values[chosen] for values in whole))


def keep_gradients(module: L.LightningModule) -> list[list[Tensor]]:
    """The gradients of each optimizer step, as the optimizer will get them."""
    steps: list[list[Tensor]] = []
    original = module.on_before_optimizer_step

    def watched(optimizer: torch.optim.Optimizer) -> None:
        original(optimizer)
        steps.append([p.grad.clone() for p in module.parameters() if p.grad is not None])

    module.on_before_optimizer_step = watched  # type: ignore[method-assign]
    return steps


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("cuts", [[1, 3], [1, 1, 2], [2, 2]], ids=str)
def test_accumulated_gradients_are_those_of_one_large_batch(encoding: str, stage: str, cuts: Sequence[int]) -> None:
    found = []
    for sizes in ([4], cuts):
        module = module_of(stage, encoding)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        batches = [batch_of(module, slice(start, start + n)) for start, n in zip(starts, sizes, strict=True)]
        steps = keep_gradients(module)
        trainer(accumulate_grad_batches=len(sizes)).fit(module, serve(batches))
        (step,) = steps
        found.append(step)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_an_incomplete_last_accumulation_is_a_mean_over_its_microbatches(encoding: str, stage: str) -> None:
    """Three microbatches with an accumulation of 2: the second step has one only, and Lightning still divides by 2."""
    module = module_of(stage, encoding)
    module.options.learning_rate = 0.0
    steps = keep_gradients(module)
    trainer(accumulate_grad_batches=2).fit(module, serve([batch_of(module, slice(i, i + 1)) for i in (0, 1, 2)]))
    alone = module_of(stage, encoding)
    single = keep_gradients(alone)
    trainer().fit(alone, serve([batch_of(alone, slice(2, 3))]))
    for one, other in zip(steps[1], single[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def break_losses(module: L.LightningModule, batches: set[int]) -> None:
    """Makes the losses of these training batches NaN."""
    original = module.mean_loss

    def broken(name: str, total: Tensor, count: Tensor) -> Tensor:
        factor = math.nan if module.trainer.fit_loop.total_batch_idx in batches else 1.0
        return original(name, total * factor, count)  # type: ignore[operator,no-any-return]

    module.mean_loss = broken  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    encoding: str, stage: str, accumulate: int, caplog: pytest.LogCaptureFixture
) -> None:
    module, log = module_of(stage, encoding), Log()
    break_losses(module, {2})
    before = [p.detach().clone() for p in module.parameters()]
    batch = batch_of(module, slice(0, 4))
    trainer(callbacks=[log], accumulate_grad_batches=accumulate).fit(module, serve([batch] * 6))
    assert module.guard.skipped_steps == log.rows[-1]["train/skipped_steps"] == 1
    assert all(p.isfinite().all() for p in module.parameters())
    assert any(not torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))
    step = {1: 3, 2: 2}[accumulate]
    assert f"optimizer step {step}: train/loss is not finite, so this step was skipped" in caplog.text


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_three_skipped_steps_in_a_row_stop_the_run(encoding: str, stage: str) -> None:
    module = module_of(stage, encoding)
    break_losses(module, {0, 1, 3, 4, 5})
    batch = batch_of(module, slice(0, 4))
    says = "optimizer step 6: train/loss was not finite in 3 optimizer steps in a row; lower --model.learning_rate"
    with pytest.raises(UserError, match=says):
        trainer().fit(module, serve([batch] * 8))
    assert module.guard.skipped_steps == 5


RUNS = {
    "sft": ["--model=rlchat.SFTModule", *TINY],
    "reward": ["--model=rlchat.RewardModelModule", *TINY, "--data.contrast=true"],
    "dpo": ["--model=rlchat.DPOModule", *TINY],
    "ppo": ["--config=smoke"],
}


@pytest.mark.parametrize(
    ("stage", "batches"), [("sft", 1), ("sft", 2), ("sft", 12), ("reward", 1), ("reward", 12), ("dpo", 12), ("ppo", 12)]
)
def test_a_run_that_diverges_ends_with_one_sentence_and_no_model(
    stage: str, batches: int, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (write_pairs if stage == "dpo" else write_talk)(workplace / "talk.jsonl", 60)
    words = ["fit", *RUNS[stage], "--data.path=talk.jsonl", "--data.batch_size=2", "--model.warmup=0"]
    words += ["--model.learning_rate=1e30", "--data.val_fraction=0.2", "--trainer.enable_progress_bar=false"]
    words += [f"--trainer.limit_train_batches={batches}", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
    assert main(words) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rlchat: ")]
    assert len(errors) == 1
    assert "lower --model.learning_rate" in errors[0]
    assert not list(Path("checkpoints").glob("*.pt"))
    for path in workplace.rglob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(bool(value.isfinite().all()) for value in state.values()), path


@pytest.mark.parametrize(("learning_rate", "diverges"), [(2.0, True), (0.01, False)])
def test_a_validation_loss_far_above_the_first_loss_is_reported(
    encoding: str, learning_rate: float, diverges: bool, caplog: pytest.LogCaptureFixture
) -> None:
    module = module_of("sft", encoding)
    module.options.learning_rate = learning_rate
    batch = batch_of(module, slice(0, 4))
    trainer().fit(module, serve([batch] * 4), serve([batch]))
    assert module.first_loss == pytest.approx(math.log(module.tokenizer.vocab_size), abs=0.2)
    loss = math.log(float(module.trainer.callback_metrics["val/perplexity"]))
    assert diverges == (loss > 3 * module.first_loss) == ("training has diverged" in caplog.text)
