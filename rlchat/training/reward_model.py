"""Stage 2, the reward model: learns from human ranks and quality labels, and scores responses in PPO.

rlchat fit --config demo/reward
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlchat.data.datamodule import DataNeeds, RankedBatch
from rlchat.distributed.collectives import gather_objects, is_first
from rlchat.models.adapters import AdapterKind
from rlchat.models.file_content import kind_of
from rlchat.models.model_file import RewardBundle
from rlchat.models.networks import RewardModel
from rlchat.training.base import StageModule
from rlchat.training.initial_model import base_options, open_policy, open_reward_model
from rlchat.training.optimizers import OptimizerName
from rlchat.training.options import ChatFormatName, Schedule, SupervisedOptions

_log = logging.getLogger("rlchat")

# Without validation, the scores are standardized on the responses to this many training prompts.
_STANDARDIZING_PROMPTS = 512


def preferred_pairs(group: Tensor, worth: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs (better, worse) of rows in the same group, as row numbers Long [pairs] each.

    Args:
        group: Long [rows].
        worth: Float [rows], higher is better. A row whose worth is NaN is in no pair, and equal rows form no pair.
    """
    better = (group[:, None] == group[None, :]) & (worth[:, None] > worth[None, :])
    first, second = better.nonzero(as_tuple=True)
    return first, second


class RankingLoss(NamedTuple):
    """Losses per prompt, which are means over the pairs and labels of that prompt."""

    pair_loss: Tensor  # [P] mean of -log σ(better - worse), of the prompts that have a pair
    label_loss: Tensor  # [L] mean cross-entropy between σ(score) and the label, of the prompts that have a label
    prompts: int  # those with a pair or a label


def ranking_loss(scores: Tensor, batch: RankedBatch) -> RankingLoss:
    """Bradley–Terry loss on ranked responses, and regression on quality labels.

    The pair loss is that of Bradley and Terry 1952, and of Ouyang et al. 2022 (eq. 1): the pairs of a prompt are
    averaged, so all prompts have the same weight, whatever their number of responses. K responses with different ranks
    have K(K-1)/2 pairs.

    Args:
        scores: [N], of the rows of ``batch``.
        batch: responses with their ranks and labels.
    """
    better, worse = preferred_pairs(batch.group, -_known(batch.rank))
    labelled = ~batch.quality.isnan()
    pair_losses = -F.logsigmoid(scores[better] - scores[worse])
    label_losses = F.binary_cross_entropy_with_logits(scores[labelled], batch.quality[labelled], reduction="none")
    return RankingLoss(
        pair_loss=_mean_per_group(pair_losses, batch.group[better]),
        label_loss=_mean_per_group(label_losses, batch.group[labelled]),
        prompts=len(torch.cat([batch.group[better], batch.group[labelled]]).unique()),
    )


def _mean_per_group(values: Tensor, group: Tensor) -> Tensor:
    """Means [groups] of ``values`` [N] with the same ``group`` (Long [N])."""
    _, index, counts = group.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(counts), dtype=values.dtype, device=values.device).index_add(0, index, values) / counts


class RewardModelModule(StageModule):
    """A reward model: a scalar score at the end of a response, trained on human ranks and quality labels.

    The model stores the mean and the standard deviation of its scores on the validation split, with which
    :class:`rlchat.LearnedQuality` standardizes scores. Without a validation, they are computed on a
    sample of the training split.

    Args:
        base_model: a transformers model by name or path, a GGUF file, or an inline configuration (random weights).
        tiktoken_encoding: a tiktoken or packaged encoding by name, the path of a rank file, or a folder or model whose
            tokenizer is converted exactly; by default the base model's own.
        max_length: the maximum number of tokens in a conversation, responses included.
        init_from: instead of base_model, the model file of an SFT model whose backbone initializes the reward model; or
            of a reward model, which is trained further.
        label_coef: the weight of the regression loss on quality labels, relative to the ranking loss.
        learning_rate: the peak learning rate of AdamW.
        schedule: the learning rate schedule after the warm-up.
        warmup: the fraction of the steps in which the learning rate rises from 0.
        weight_decay: the weight decay of AdamW, on matrices only.
        optimizer: adamw, or adamw_8bit or paged_adamw_8bit of bitsandbytes, whose state needs a quarter of the memory;
            the paged one moves it to the CPU's memory if the GPU has none left.
        adapter: lora trains low-rank adapters of the linear layers and freezes the backbone's weights; by default, all
            weights are trained.
        lora_rank: the rank of the adapters.
        lora_alpha: the outputs of the adapters are scaled by lora_alpha / lora_rank.
        lora_targets: the linear layers that get an adapter, such as [q_proj, v_proj]; by default all.
        lora_dropout: the dropout probability of the adapters' inputs in training.
        train_layers: train the last N layers of the backbone only, or their adapters; by default all layers.
        merge_adapter: merge the adapter into the weights of model files; false: model files contain the adapter alone,
            and are loaded together with base_model or init_from.
        gradient_checkpointing: compute activations again in the backward pass, which needs less memory and more time.
        chat_format: own for the chat template of the base model, rlchat for rlchat's markers; by default own where the
            base model has a template.
        new_embeddings: start every row of the embedding from random values, not from the base model's tokens.
        attn_implementation: an attention implementation of transformers, such as eager or sdpa; by default sdpa where
            the model family has it.
    """

    stage = "reward"
    bundle_name = "reward_model.pt"
    monitor = ("val/pair_accuracy", "max")
    model: RewardModel

    def __init__(
        self,
        base_model: str | dict[str, Any] | None = None,
        tiktoken_encoding: str | None = None,
        max_length: int | None = None,
        init_from: str | None = None,
        label_coef: float = 0.5,
        learning_rate: float = 5e-5,
        schedule: Schedule = "cosine",
        warmup: float = 0.02,
        weight_decay: float = 0.01,
        optimizer: OptimizerName = "adamw",
        adapter: AdapterKind | None = None,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_targets: list[str] | None = None,
        lora_dropout: float = 0.0,
        train_layers: int | None = None,
        merge_adapter: bool = True,
        gradient_checkpointing: bool = False,
        chat_format: ChatFormatName | None = None,
        new_embeddings: bool = False,
        attn_implementation: str | None = None,
    ) -> None:
        options = SupervisedOptions.of(locals())
        if init_from is not None and kind_of(init_from) == "reward":
            bundle = open_reward_model(base_model, tiktoken_encoding, max_length, init_from, **base_options(options))
        else:
            start = open_policy(base_model, tiktoken_encoding, max_length, None, init_from, **base_options(options))
            model = RewardModel(start.model.backbone)
            bundle = RewardBundle(model, start.tokenizer, start.max_length, base=start.base)
        super().__init__(bundle, options)
        self.save_hyperparameters()
        self.label_coef = label_coef
        if self.model.backbone.head is not None:  # an untied policy head gets no gradient from a score
            self.model.backbone.head.requires_grad_(False)
        self.held_out_scores: list[float] = []
        self.validated = False
        """Whether a validation has set the mean and the standard deviation of the scores."""
        self.standardized_by = 0
        """The number of training responses that the scores were standardized on; 0 if they were not."""

    @property
    def data_needs(self) -> DataNeeds:
        """Responses with ranks or labels, grouped by prompt."""
        return DataNeeds(task="reward", tokenizer=self.tokenizer, max_length=self.max_length)

    def training_step(self, batch: RankedBatch, batch_idx: int) -> Tensor:
        """Mean over prompts of their pair loss plus ``label_coef`` times their label loss, over all processes."""
        scores = self.model(batch.ids, batch.attention_mask)
        part = ranking_loss(scores, batch)
        total = part.pair_loss.sum() + self.label_coef * part.label_loss.sum()
        if self.logs_this_step:
            better, worse = preferred_pairs(batch.group, -_known(batch.rank))
            self.log_dict(
                {
                    "train/pair_loss": self.global_mean(part.pair_loss),
                    "train/label_loss": self.global_mean(part.label_loss),
                    "train/pair_accuracy": self.global_mean((scores[better] > scores[worse]).float()),
                    "train/learning_rate": self.current_learning_rate(),
                }
            )
        return self.mean_loss("train/loss", total, self.global_sum(part.prompts))

    def on_train_epoch_end(self) -> None:
        """Standardizes the scores on a sample of the training data, unless a validation has standardized them."""
        if not self.validated:
            self.standardized_by = self.standardize(self.training_scores())

    @torch.no_grad()
    def training_scores(self) -> list[float]:
        """Scores of a fixed sample of training responses on this process; it is the same in a resumed run.

        Empty without a data module that has a ``training_sample``.
        """
        sample = getattr(getattr(self.trainer, "datamodule", None), "training_sample", None)
        if sample is None:
            return []
        self.model.eval()
        scores: list[float] = []
        for batch in sample(_STANDARDIZING_PROMPTS):
            with self.trainer.precision_plugin.forward_context():
                found = self.model(batch.ids.to(self.device), batch.attention_mask.to(self.device))
            scores += found.tolist()
        self.model.train()
        return scores

    def standardize(self, scores: list[float]) -> int:
        """Sets mean and standard deviation to those of ``scores`` of all processes; returns their number.

        A collective. Returns 0 and changes nothing for fewer than two scores, or if one is not finite.
        """
        together = torch.tensor([s for part in gather_objects(scores) for s in part])
        if len(together) < 2 or not together.isfinite().all():
            return 0
        self.model.mean.fill_(float(together.mean()))
        self.model.std.fill_(max(float(together.std()), 1e-3))
        return len(together)

    def on_train_end(self) -> None:
        """As in every stage; also warns if no validation has standardized the scores."""
        super().on_train_end()
        if self.validated or not is_first():
            return
        if self.standardized_by:
            how = f"standardized on {self.standardized_by} training responses"
        else:
            how = "not standardized (mean 0, standard deviation 1)"
        _log.warning("no validation was run, so the reward model's scores are %s", how)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds whether the scores are standardized on held-out data."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rlchat"]["validated"] = self.validated

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores it."""
        super().on_load_checkpoint(checkpoint)
        self.validated = checkpoint.get("rlchat", {}).get("validated", False)

    def validation_step(self, batch: RankedBatch, batch_idx: int) -> None:
        """Accuracy on held-out pairs: by human rank (``pair_accuracy``) and by correctness (``right_over_wrong``)."""
        scores = self.model(batch.ids, batch.attention_mask)
        self.held_out_scores += scores.tolist()
        for name, worth in (("pair_accuracy", -_known(batch.rank)), ("right_over_wrong", _known(batch.right))):
            better, worse = preferred_pairs(batch.group, worth)
            margin = scores[better] - scores[worse]
            if len(better):
                self.tally.add(name, (margin > 0).where(~margin.isnan(), torch.nan))
            if len(better) and name == "pair_accuracy":
                self.tally.add("pair_loss", -F.logsigmoid(margin))
        labelled = ~batch.quality.isnan()
        if labelled.any():
            self.tally.add("label_error", (scores[labelled].sigmoid() - batch.quality[labelled]).abs())

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out metrics, and keeps mean and standard deviation of held-out scores with the model."""
        if not self.trainer.sanity_checking and self.standardize(self.held_out_scores):
            self.validated = True
        self.held_out_scores.clear()
        super().on_validation_epoch_end()

    def validation_loss(self) -> float | None:
        """The mean loss of held-out pairs."""
        loss = self.trainer.callback_metrics.get("val/pair_loss")
        return None if loss is None else float(loss)

    def on_test_epoch_end(self) -> None:
        """Logs the held-out metrics; mean and standard deviation stay as validation left them."""
        self.held_out_scores.clear()
        super().on_test_epoch_end()

    def bundle(self) -> RewardBundle:
        """The reward model in its current state, with its tokenizer."""
        return RewardBundle(self.model, self.tokenizer, self.max_length, self.about(), self.base)


def _known(x: Tensor) -> Tensor:
    """``x`` as float, with NaN for negative values, which mean unranked or without a check."""
    return torch.where(x >= 0, x.float(), torch.nan)
