"""Stage 1, supervised fine-tuning: the model learns to speak as people did.

rlchat fit --config demo/sft
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from rlchat.data.datamodule import DataNeeds, SequenceBatch
from rlchat.distributed.collectives import global_sum, gradient_norm
from rlchat.training.base import PolicyModule, make_optimizer, make_scheduler, open_policy, seed_dropout


class SFTModule(PolicyModule):
    """Next-token prediction on the assistant's words in human conversations.

    Args:
        base_model: a transformers model by name or path, or an inline configuration (random weights).
        tiktoken_encoding: a tiktoken or packaged encoding by name, or the path of a rank file.
        max_length: tokens that a conversation holds at most.
        hidden_dim: units of the value head's hidden layer (trained by PPO); 0: a linear head.
        init_from: a bundle to go on from, in place of base_model.
        learning_rate: of AdamW at its highest.
        schedule: how the learning rate goes over the run.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: of AdamW, on matrices.
    """

    stage = "sft"
    bundle_name = "sft_model.pt"
    monitor = ("val/perplexity", "min")

    def __init__(
        self,
        base_model: str | dict[str, Any] | None = None,
        tiktoken_encoding: str | None = None,
        max_length: int | None = None,
        hidden_dim: int | None = None,
        init_from: str | None = None,
        learning_rate: float = 1e-4,
        schedule: Literal["constant", "linear", "cosine"] = "cosine",
        warmup: float = 0.02,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(open_policy(base_model, tiktoken_encoding, max_length, hidden_dim, init_from))
        self.save_hyperparameters()
        # PPO trains the value head; here it would be a parameter without a gradient, which DDP does not forgive.
        self.model.value_head.requires_grad_(False)

    @property
    def data_needs(self) -> DataNeeds:
        """What the data module serves to this stage."""
        return DataNeeds(task="sft", tokenizer=self.tokenizer, max_length=self.max_length)

    def on_train_batch_start(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Makes dropout a matter of the batch, and not of what came before."""
        seed_dropout(self)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Mean negative log-prob of the assistant's tokens, over all processes."""
        stats = self.token_stats(batch)
        tokens = global_sum(self, len(stats.logprobs)).clamp(min=1)
        loss = -stats.logprobs.sum() / tokens
        nll, correct = global_sum(self, loss.detach()), global_sum(self, stats.correct.sum()) / tokens
        self.log("train/loss", nll, prog_bar=True)
        self.log_dict({"train/accuracy": correct, "train/perplexity": nll.exp()})
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss * self.trainer.world_size  # gradients are averaged over processes, and this one is a share of a sum

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Accuracy and perplexity on held-out conversations."""
        self.tally_sequences(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out figures, over all processes."""
        for name, value in self.tally.means(self.device).items():
            self.log(f"val/{name}", value, prog_bar=f"val/{name}" == self.monitor[0])

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """As for validation, on the conversations that chose nothing."""
        self.tally_sequences(batch)

    def on_test_epoch_end(self) -> None:
        """Logs the test figures, over all processes."""
        self.log_dict({f"test/{k}": v for k, v in self.tally.means(self.device).items()})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a learning rate that goes over the run's steps."""
        o = self.hparams
        optimizer = make_optimizer(self.model.parameters(), o["learning_rate"], o["weight_decay"])
        scheduler = make_scheduler(optimizer, o["schedule"], o["warmup"], self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the size of the gradient; clipping is the trainer's (``trainer.gradient_clip_val``)."""
        self.log("train/grad_norm", gradient_norm(self.model.parameters()))
