"""The base classes of all stages: options, optimizer, test hooks, checkpoints and model files in one place."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rlchat.conversation import Conversation
from rlchat.data.datamodule import DataNeeds, PromptBatch, SequenceBatch, described_data
from rlchat.distributed.collectives import anywhere, global_sum, is_first, whole
from rlchat.errors import NonFiniteError, UserError
from rlchat.models.model_file import PolicyBundle, RewardBundle, save_bundle
from rlchat.models.networks import RewardModel, RLChatModel, TokenStats
from rlchat.models.sampling import Generated, Sampling, Uniforms, addressed_uniforms, generate
from rlchat.rewards import Reply
from rlchat.rewards.best_of import best_of
from rlchat.training.guard import NonFiniteGuard
from rlchat.training.optimizers import follow_schedule, make_optimizer, make_scheduler
from rlchat.training.options import StageOptions
from rlchat.training.parts import PartCheckpoint, prepare_backbone
from rlchat.training.sharded import ShardableModule
from rlchat.training.tally import Tally
from rlchat.utils.padding import pad

_log = logging.getLogger("rlchat")

# Streams of random numbers for evaluation; those of the training iterations are 0, 1, 2, …
VALIDATION_STREAM = -1
PREDICTION_STREAM = -2

# A resumed run takes these from its checkpoint: they are in the states of the optimizer and the scheduler.
_KEPT_ON_RESUME = ("learning_rate", "weight_decay", "adam_eps", "adam_beta2")

# A validation loss above this many times the first training loss (or 1, if that is less) is reported as divergence.
_DIVERGED = 3.0


class StageModule(ShardableModule):
    """A LightningModule with rlchat's options, optimizer, held-out metrics and model file.

    Subclasses set the class attributes and implement ``training_step``, ``validation_step``, ``data_needs`` and
    ``bundle``. The test loop is the validation loop on the held-out test split.

    Args:
        start: the network of the stage, with its tokenizer and the maximum number of tokens in a conversation.
        options: the typed options of the stage.
    """

    stage: str
    """The run's folder is lightning_logs/<stage>/version_N."""
    bundle_name: str
    """The best model of this stage is the model file checkpoints/<bundle_name>."""
    monitor: tuple[str, str]
    """The metric that selects the best model, and whether the best is its max or min."""

    def __init__(self, start: PolicyBundle | RewardBundle, options: StageOptions) -> None:
        super().__init__()
        options.check_base(start.base)
        self.base = start.base if options.adapter else None
        prepare_backbone(start.model.backbone, options)
        self.model: RLChatModel | RewardModel = start.model.train()
        self.options = options
        self.partly = PartCheckpoint(self.model, options)
        self.strict_loading = options.trained_part.is_everything
        self.tokenizer = start.tokenizer
        self.max_length = start.max_length
        self.tally = Tally()
        self.guard = NonFiniteGuard()
        self.first_loss: float | None = None
        """The training loss before the first optimizer step."""
        self._microbatch_counts: list[Tensor] = []

    @property
    @abstractmethod
    def data_needs(self) -> DataNeeds:
        """What this stage needs from the data module."""

    @abstractmethod
    def bundle(self) -> PolicyBundle | RewardBundle:
        """The model in its current state, with everything that is needed to use it."""

    def about(self) -> dict[str, Any]:
        """The origin of the model file, as plain values."""
        batches = int(self.trainer.fit_loop.total_batch_idx + 1)
        return {"stage": type(self).__name__, "batches": batches, **described_data(self.trainer)}

    def save_bundle(self, path: str | Path) -> None:
        """Writes the model file; see :mod:`rlchat.models.model_file`. A collective."""
        save_bundle(path, self.bundle(), self.options.merge_adapter)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a learning rate schedule over the batches of the run."""
        o = self.options
        # For a fused optimizer, Lightning clips no gradients in mixed precision, and does not unscale those of float16.
        precision = self.trainer.precision_plugin
        may_fuse = not isinstance(precision, MixedPrecision) or (
            not self.automatic_optimization and precision.scaler is None
        )
        numbers = (o.learning_rate, o.weight_decay, o.adam_eps, o.adam_beta2)
        optimizer = make_optimizer(self.parameters(), *numbers, may_fuse, o.optimizer)
        scheduler = make_scheduler(optimizer, o.schedule, o.warmup, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def current_learning_rate(self) -> float:
        """The learning rate of the next optimizer step."""
        return float(self.trainer.optimizers[0].param_groups[0]["lr"])

    @property
    def logs_this_step(self) -> bool:
        """Whether this batch logs all metrics: every ``log_every_n_steps`` optimizer steps, when Lightning writes them,
        and at the end of an epoch, for callbacks that monitor them.

        The other batches log the loss only: a call of ``log`` takes about a millisecond, as much as a layer of a small
        model.
        """
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
        return self.trainer.is_last_batch or (every > 0 and (self.trainer.global_step + 1) % every == 0)

    def global_sum(self, value: Tensor | float) -> Tensor:
        """``value`` summed over all processes, without a gradient."""
        return global_sum(self, value)

    def global_mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` [N] over all processes, whose N may differ; 0 if there is none."""
        return self.global_sum(values.sum()) / self.global_sum(len(values)).clamp(min=1)

    def mean_loss(self, name: str, total: Tensor, count: Tensor) -> Tensor:
        """The loss to return from ``training_step``: its gradient is that of the global mean over a whole batch.

        With ``accumulate_grad_batches`` N, the batch of an optimizer step is N microbatches, and the mean is over all
        their terms. Lightning divides each returned loss by N and adds the gradients. Here, each microbatch is divided
        by the count of the first one, and :meth:`on_before_optimizer_step` corrects the sum.

        Example: 2 microbatches with 1 and 3 tokens and summed losses a and b. This returns a/1 and b/1, Lightning
        accumulates (a + b)/2, and the factor 2·1/(1 + 3) makes it (a + b)/4.

        Args:
            name: the name of the metric that the loss is logged as.
            total: the sum of the loss over the terms (tokens, prompts) of this process's microbatch.
            count: the number of terms in this microbatch, over all processes.
        """
        mean = self.global_sum(total) / count.clamp(min=1)
        self.log(name, mean, prog_bar=True)
        self.guard.check_losses({name: float(mean)})
        if self.first_loss is None:
            self.first_loss = float(mean)
        self._microbatch_counts.append(count)
        # DDP averages gradients over processes, but these losses have to be added.
        return total / self._microbatch_counts[0].clamp(min=1) * self.trainer.world_size

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the norm of the gradient; skips a step that is not finite. The trainer clips the gradient after this.

        Raises:
            UserError: after too many skipped steps in a row.
        """
        counts, self._microbatch_counts = self._microbatch_counts, []
        if len(counts) > 1 or self.trainer.accumulate_grad_batches > 1:
            factor = self.trainer.accumulate_grad_batches * counts[0].clamp(min=1) / sum(counts).clamp(min=1)  # type: ignore[union-attr]
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        norm = self.check_gradients()
        self.guard.drop_gradients(self.parameters())
        self.guard.count(f"optimizer step {self.trainer.global_step + 1}", log=self.trainer.is_global_zero)
        if self.logs_this_step:
            self.log_dict({"train/grad_norm": whole(norm), "train/skipped_steps": float(self.guard.skipped_steps)})
        if self.guard.must_stop:
            raise NonFiniteError(
                f"optimizer step {self.trainer.global_step + 1}: {self.guard.last_culprit} was not finite in "
                f"{self.guard.skipped_in_a_row} optimizer steps in a row; lower --model.learning_rate"
            )

    def check_gradients(self) -> Tensor:
        """The norm of all gradients, which are already unscaled here; the guard finds the one that is not finite."""
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        # In fp16, overflows are normal: the gradient scaler skips the step and lowers its scale.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            self.guard.check_gradients(gradients, float(whole(norm)))
        return norm

    def on_train_start(self) -> None:
        """Makes a resumed run follow the schedule of its options, and logs if that changes the learning rate.

        If epochs are added, the learning rate is the same as if the run had had all epochs from the start.
        """
        scheduler = next((config.scheduler for config in self.trainer.lr_scheduler_configs), None)
        changed = follow_schedule(scheduler) if isinstance(scheduler, LambdaLR) else None
        if changed and is_first():
            _log.info(
                "the learning rate continues at %.3g, as in the %s schedule over all %d steps of the run; it "
                "was %.3g in the checkpoint",
                changed[1],
                self.options.schedule,
                self.trainer.estimated_stepping_batches,
                changed[0],
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds PyTorch's generator for this batch and process.

        Dropout uses it, and a checkpoint does not contain its state. With this seed, a resumed run drops the same units
        as the uninterrupted run.
        """
        seed = os.environ.get("PL_GLOBAL_SEED", "0")  # of seed_everything
        address = f"{seed}/{self.trainer.fit_loop.total_batch_idx}/{self.global_rank}/dropout"
        number = int.from_bytes(hashlib.sha256(address.encode()).digest()[:7], "big")
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(number)
        else:  # this also seeds the generators of accelerators, and takes milliseconds where there is none
            torch.manual_seed(number)

    def held_out_metrics(self) -> dict[str, float]:
        """The metrics of the current validation or test, over all processes. A collective."""
        return self.tally.means(self.device)

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out metrics under ``val/``."""
        for name, value in self.held_out_metrics().items():
            self.log(f"val/{name}", value, prog_bar=self.automatic_optimization and f"val/{name}" == self.monitor[0])

    def on_train_end(self) -> None:
        """Warns if training has diverged.

        Raises:
            UserError: if the monitored metric is not finite and no best model was selected.
        """
        score = self.trainer.callback_metrics.get(self.monitor[0])
        selected = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if score is not None and not selected and not score.isfinite():
            raise UserError(
                f"{self.monitor[0]} is {float(score)}, so no model file was written; lower --model.learning_rate and "
                f"train again"
            )
        before, after = self.first_loss, self.validation_loss()
        if before is not None and after is not None and after > _DIVERGED * max(before, 1.0) and is_first():
            _log.warning(
                "training has diverged: the loss of the first batch was %.3g and the validation loss is %.3g; lower "
                "--model.learning_rate",
                before,
                after,
            )

    def validation_loss(self) -> float | None:
        """The loss of the last validation, comparable with the training loss; None if there is none."""
        return None

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As for validation, on the held-out test split."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Logs the held-out metrics under ``test/``."""
        self.log_dict({f"test/{name}": value for name, value in self.held_out_metrics().items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counters of skipped steps, and removes frozen weights."""
        guard = self.guard
        checkpoint["rlchat"] = {"skipped_steps": guard.skipped_steps, "skipped_in_a_row": guard.skipped_in_a_row}
        self.partly.on_save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores them, and warns of options that a resumed run keeps from its checkpoint, whatever is set."""
        self.partly.on_load(self, checkpoint)
        saved = checkpoint.get("rlchat", {})  # SFT and the reward model of version 0.1 had no counters
        self.guard.skipped_steps = saved.get("skipped_steps", 0)
        self.guard.skipped_in_a_row = saved.get("skipped_in_a_row", 0)
        before = checkpoint.get("hyper_parameters", {})
        kept = [
            f"{name} {before[name]}, not {self.hparams[name]}"
            for name in _KEPT_ON_RESUME
            if name in before and name in self.hparams and before[name] != self.hparams[name]
        ]
        if kept and is_first():
            _log.warning(
                "the resumed run keeps %s; to change it, start a new run with --model.init_from", "; ".join(kept)
            )


class PolicyModule(StageModule):
    """A stage that trains a chat model: it can be measured on conversations, and it can respond to prompts."""

    model: RLChatModel

    def __init__(self, bundle: PolicyBundle, options: StageOptions, sampling: Sampling, seed: int) -> None:
        super().__init__(bundle, options)
        self.sampling = sampling
        self.best_of = 1  # responses per prompt in validate, test and predict; see the callback Predictions
        self.seed = seed

    def token_stats(self, batch: SequenceBatch) -> TokenStats:
        """Log-probs, entropies and hits [tokens] of the assistant's tokens, each predicted from those before it."""
        hidden = self.model(batch.ids, batch.attention_mask)
        targets = batch.loss_mask[:, 1:]
        return self.model.token_stats(hidden[:, :-1][targets], batch.ids[:, 1:][targets])

    def tally_sequences(self, batch: SequenceBatch) -> None:
        """Adds token accuracy and nats per token (for the perplexity) on held-out conversations to the tally."""
        stats = self.token_stats(batch)
        self.tally.add("accuracy", stats.correct)
        self.tally.add("nll", -stats.logprobs)

    def generate(self, ids: Tensor, attention_mask: Tensor, sampling: Sampling, uniforms: Uniforms) -> Generated:
        """Samples responses to left-padded prompts, in eval mode because dropout would change the distribution.

        If the processes hold the model in shards, all of them continue until the last response has ended.
        """
        mode = self.model.training
        self.model.eval()
        more: dict[str, Any] = {"end_id": self.tokenizer.end_id, "pad_id": self.tokenizer.pad_id}
        if self.device_mesh is not None:
            more["goes_on"] = lambda alive: anywhere(self, alive)
        try:
            return generate(self.model, ids, attention_mask, sampling, uniforms, **more)
        finally:
            self.model.train(mode)

    def decode(self, generated: Generated) -> list[Reply]:
        """The responses as text."""
        lengths = generated.mask.sum(1).tolist()
        return [
            Reply(text=self.tokenizer.decode(row[:length]).strip(), tokens=length, ended=ended)
            for row, length, ended in zip(generated.ids.tolist(), lengths, generated.ended.tolist(), strict=True)
        ]

    def on_predict_start(self) -> None:
        """Resets the number of prompts seen, which addresses the random numbers of sampling."""
        self.predicted_prompts = 0

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One row of plain values per prompt: the prompt, the response and, in a stage with a reward, its reward."""
        n = self.best_of
        rows = self.global_rows(len(batch.ids), self.predicted_prompts, copies=n)
        self.predicted_prompts += len(batch.ids)
        uniforms = addressed_uniforms(self.seed, PREDICTION_STREAM, rows)
        batch = batch.repeated(n)
        replies = self.decode(self.generate(batch.ids, batch.attention_mask, self.sampling, uniforms))
        prompts = batch.conversations
        rewards = self.predicted_rewards(prompts, replies)
        correct = [prompt.passes(reply.text) for prompt, reply in zip(prompts, replies, strict=True)]
        totals = [reward.get("reward", 0.0) for reward in rewards]  # SFT has none, and keeps its only response
        kept = best_of(totals, n)
        for i in kept if n > 1 else ():
            group = slice(i - i % n, i - i % n + n)
            rewards[i] |= {"best_of": n, "mean_reward": sum(totals[group]) / n}
            rewards[i] |= {} if correct[i] is None else {"correct_of_n": correct[group].count(True)}
        return [
            {
                "messages": [{"role": m.role, "content": m.text} for m in prompts[i].messages],
                "reply": replies[i].text,
                "tokens": replies[i].tokens,
                "ended": replies[i].ended,
                **rewards[i],
                **({} if correct[i] is None else {"correct": correct[i]}),
            }
            for i in kept
        ]

    def predicted_rewards(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[dict[str, Any]]:
        """The rewards that a stage with a reward adds to each row of a prediction."""
        return [{} for _ in replies]

    def global_rows(self, count: int, first: int = 0, copies: int = 1) -> Tensor:
        """The global row numbers of this process's rows, which address their random numbers; Long [count · copies].

        With N processes, row i of process r is global row i·N + r. With ``copies`` rows per prompt, the copies of a
        prompt are adjacent.

        Example: 2 processes, 2 prompts each, 2 copies: process 0 has rows 0 1 4 5, process 1 has rows 2 3 6 7.
        """
        prompts = (first + torch.arange(count)) * self.trainer.world_size + self.global_rank
        return (prompts[:, None] * copies + torch.arange(copies)).flatten()

    def respond(self, prompts: Sequence[Conversation]) -> list[Reply]:
        """Responses with the same random numbers in each call, so that differences come from the model."""
        rows = [self.tokenizer.render_prompt(p, self.max_length - self.sampling.max_new_tokens).ids for p in prompts]
        ids, mask = pad(rows, self.tokenizer.pad_id, "left")
        uniforms = addressed_uniforms(self.seed, VALIDATION_STREAM, torch.arange(len(prompts)))
        return self.decode(self.generate(ids.to(self.device), mask.to(self.device), self.sampling, uniforms))

    def bundle(self) -> PolicyBundle:
        """The chat model in its current state, with everything that is needed to chat with it."""
        return PolicyBundle(self.model, self.tokenizer, self.max_length, self.about(), base=self.base)
