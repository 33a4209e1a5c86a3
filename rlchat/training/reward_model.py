"""Stage 2, the reward model: learns from human ranks and labels what a good reply is, and judges for PPO.

rlchat fit --config demo/reward
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from rlchat.data.datamodule import DataNeeds, RankedBatch
from rlchat.distributed.collectives import gather_objects, global_sum, shard_networks
from rlchat.models.model_file import RewardBundle, save_bundle
from rlchat.models.networks import RewardModel
from rlchat.training.base import Tally, make_optimizer, make_scheduler, open_policy, seed_dropout, warn_of_kept_options


def preferred_pairs(group: Tensor, worth: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (better, worse), Long [pairs] each, of the same ``group`` [rows] where ``worth`` [rows] is higher.

    Rows whose worth is NaN are in no pair.
    """
    better = (group[:, None] == group[None, :]) & (worth[:, None] > worth[None, :])
    first, second = better.nonzero(as_tuple=True)
    return first, second


class RankingLoss(NamedTuple):
    """Sums over a batch, with what they are sums over."""

    pair_loss: Tensor  # of -log σ(better - worse)
    pairs: int
    label_loss: Tensor  # of the cross-entropy between σ(score) and the quality label
    labels: int


def ranking_loss(scores: Tensor, batch: RankedBatch) -> RankingLoss:
    """Bradley–Terry on ranked replies (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1), and regression on labels."""
    better, worse = preferred_pairs(batch.group, -_known(batch.rank))
    labelled = ~batch.quality.isnan()
    return RankingLoss(
        pair_loss=-F.logsigmoid(scores[better] - scores[worse]).sum(),
        pairs=len(better),
        label_loss=F.binary_cross_entropy_with_logits(scores[labelled], batch.quality[labelled], reduction="sum"),
        labels=int(labelled.sum()),
    )


class RewardModelModule(L.LightningModule):
    """A scalar on the end of a reply, trained on which of two replies people ranked higher, and on quality labels.

    Args:
        base_model: a transformers model by name or path, or an inline configuration (random weights).
        tiktoken_encoding: a tiktoken or packaged encoding by name, or the path of a rank file.
        max_length: tokens that a conversation holds at most, the reply included.
        init_from: the bundle of an SFT model whose backbone to start from, in place of base_model.
        label_coef: weight of the regression on quality labels beside the ranks.
        learning_rate: of AdamW at its highest.
        schedule: how the learning rate goes over the run.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: of AdamW, on matrices.
    """

    stage = "reward"
    bundle_name = "reward_model.pt"
    monitor = ("val/pair_accuracy", "max")

    def __init__(
        self,
        base_model: str | dict[str, Any] | None = None,
        tiktoken_encoding: str | None = None,
        max_length: int | None = None,
        init_from: str | None = None,
        label_coef: float = 0.5,
        learning_rate: float = 5e-5,
        schedule: Literal["constant", "linear", "cosine"] = "cosine",
        warmup: float = 0.02,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        start = open_policy(base_model, tiktoken_encoding, max_length, None, init_from)
        self.save_hyperparameters()
        self.tokenizer = start.tokenizer
        self.max_length = start.max_length
        self.model = RewardModel(start.model.backbone).train()
        if self.model.backbone.head is not None:  # an untied policy head has no part in a score
            self.model.backbone.head.requires_grad_(False)
        self.tally = Tally()
        self.held_out_scores: list[float] = []

    def configure_model(self) -> None:
        """Leaves this process a part of the network, where the strategy says so."""
        shard_networks(self)

    @property
    def data_needs(self) -> DataNeeds:
        """What the data module serves to this stage."""
        return DataNeeds(task="reward", tokenizer=self.tokenizer, max_length=self.max_length)

    def on_train_batch_start(self, batch: RankedBatch, batch_idx: int) -> None:
        """Makes dropout a matter of the batch, and not of what came before."""
        seed_dropout(self)

    def training_step(self, batch: RankedBatch, batch_idx: int) -> Tensor:
        """Mean loss of pairs plus ``label_coef`` times that of labels, over all processes."""
        scores = self.model(batch.ids, batch.attention_mask)
        part = ranking_loss(scores, batch)
        pairs, labels = (global_sum(self, n).clamp(min=1) for n in (part.pairs, part.labels))
        pair_loss, label_loss = part.pair_loss / pairs, part.label_loss / labels
        loss = pair_loss + self.hparams["label_coef"] * label_loss
        better, worse = preferred_pairs(batch.group, -_known(batch.rank))
        self.log("train/loss", global_sum(self, loss.detach()), prog_bar=True)
        self.log_dict(
            {
                "train/pair_loss": global_sum(self, pair_loss.detach()),
                "train/label_loss": global_sum(self, label_loss.detach()),
                "train/pair_accuracy": global_sum(self, (scores[better] > scores[worse]).float().sum()) / pairs,
                "train/learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
            }
        )
        return loss * self.trainer.world_size  # gradients are averaged over processes, and this one is a share of a sum

    def validation_step(self, batch: RankedBatch, batch_idx: int) -> None:
        """Which of two held-out replies scores higher: by people's ranks, and by what is right."""
        scores = self.model(batch.ids, batch.attention_mask)
        self.held_out_scores += scores.tolist()
        part = ranking_loss(scores, batch)
        for name, worth in (("pair_accuracy", -_known(batch.rank)), ("right_over_wrong", _known(batch.right))):
            better, worse = preferred_pairs(batch.group, worth)
            if len(better):
                self.tally.add(name, scores[better] > scores[worse])
        if part.pairs:
            self.tally.add("pair_loss", part.pair_loss.expand(part.pairs) / part.pairs)
        if part.labels:
            labelled = ~batch.quality.isnan()
            self.tally.add("label_error", (scores[labelled].sigmoid() - batch.quality[labelled]).abs())

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out figures, and keeps the scale of held-out scores with the model."""
        scores = torch.tensor([s for part in gather_objects(self.held_out_scores) for s in part])
        self.held_out_scores.clear()
        if len(scores) > 1 and not self.trainer.sanity_checking:
            self.model.mean.fill_(float(scores.mean()))
            self.model.std.fill_(max(float(scores.std()), 1e-3))
        for name, value in self.tally.means(self.device).items():
            self.log(f"val/{name}", value, prog_bar=f"val/{name}" == self.monitor[0])

    def test_step(self, batch: RankedBatch, batch_idx: int) -> None:
        """As for validation, on the conversations that chose nothing."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Logs the test figures; the scale of the scores stays as validation left it."""
        self.held_out_scores.clear()
        self.log_dict({f"test/{k}": v for k, v in self.tally.means(self.device).items()})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a learning rate that goes over the run's steps."""
        o = self.hparams
        optimizer = make_optimizer(self.model.parameters(), o["learning_rate"], o["weight_decay"])
        scheduler = make_scheduler(optimizer, o["schedule"], o["warmup"], self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says which options a run that goes on cannot change."""
        warn_of_kept_options(self, checkpoint)

    def save_bundle(self, path: str | Path) -> None:
        """Writes the reward model as it is now; see :mod:`rlchat.models.model_file`. A collective."""
        about = {"stage": type(self).__name__, "batches": int(self.trainer.fit_loop.total_batch_idx + 1)}
        save_bundle(path, RewardBundle(self.model, self.tokenizer, self.max_length, about))


def _known(x: Tensor) -> Tensor:
    """``x`` as float, NaN where it is negative: unranked, or without a check."""
    return torch.where(x >= 0, x.float(), torch.nan)
