"""DPO: learns from human ranks directly, without a reward model (Rafailov et al. 2023). Only validation samples.

rlchat fit --config dpo --data.path FILE
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rlchat.data.datamodule import DataNeeds, JudgedBatch, PreferenceBatch, PromptBatch, SequenceBatch
from rlchat.errors import UserError
from rlchat.models.adapters import AdapterKind, copy_sharing_frozen, freeze
from rlchat.models.networks import RLChatModel, response_log_ratios
from rlchat.models.sampling import Sampling, addressed_uniforms
from rlchat.training.base import VALIDATION_STREAM, PolicyModule
from rlchat.training.initial_model import base_options, open_policy
from rlchat.training.optimizers import OptimizerName
from rlchat.training.options import (
    ChatFormatName,
    Schedule,
    StageOptions,
    check_sampling,
    sampling_within,
)
from rlchat.training.reward_model import preferred_pairs
from rlchat.utils.ranges import not_negative, positive

LossType = Literal["sigmoid", "ipo", "sigmoid_norm"]


def implicit_rewards(
    logprobs: Tensor, ref_logprobs: Tensor, tokens: Tensor, beta: float, loss_type: LossType = "sigmoid"
) -> Tensor:
    """β · log(π / π_ref) of each response [N], in nats; divided by its number of tokens unless the loss is sigmoid.

    Args:
        logprobs: [N], of the policy, summed over the tokens of a response.
        ref_logprobs: [N], of the reference model.
        tokens: [N], the number of tokens in each response.
        beta: β.
        loss_type: the loss that compares the rewards.
    """
    log_ratio = logprobs - ref_logprobs
    return beta * (log_ratio if loss_type == "sigmoid" else log_ratio / tokens.clamp(min=1))


def dpo_loss(margin: Tensor, beta: float, loss_type: LossType = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """The loss of each pair [P], in nats for the sigmoid losses; the names and the formulas are those of TRL 1.12.

    - sigmoid: ``-log σ(margin)`` (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).
    - sigmoid_norm: the same with rewards per token (as in SimPO, Meng et al. 2024, but with a reference model).
    - ipo: ``(margin / β - 1 / 2β)²`` with rewards per token (Azar et al. 2023, arXiv 2310.12036, eq. 17, τ = β; per
      token as in TRL, where the authors confirmed it).

    Args:
        margin: [P], the implicit reward of the better response minus that of the worse one.
        beta: β.
        loss_type: the loss.
        label_smoothing: ε, the assumed probability that a rank is wrong: the sigmoid losses are then
            ``-(1 - ε) log σ(margin) - ε log σ(-margin)`` (conservative DPO, Mitchell 2023).
    """
    if loss_type == "ipo":
        return (margin / beta - 1 / (2 * beta)) ** 2
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


class Preferences(NamedTuple):
    """What DPO computes for the pairs of a batch: [P] each, without a gradient except for the losses and the margin."""

    loss: Tensor
    label_loss: Tensor  # [labelled responses] cross-entropy between σ(implicit reward) and the label
    sft_loss: Tensor  # [responses of rank 0] mean negative log-prob per token
    margin: Tensor  # implicit reward of the better response minus that of the worse one
    chosen_reward: Tensor
    rejected_reward: Tensor
    chosen_logprob: Tensor  # of the whole response under the policy
    rejected_logprob: Tensor

    @property
    def accuracy(self) -> Tensor:
        """1 where the better response has the higher implicit reward, else 0; NaN if the margin is."""
        return (self.margin > 0).where(~self.margin.isnan(), torch.nan)


@dataclass(kw_only=True)
class DPOOptions(StageOptions):
    """The options of DPO that :class:`StageOptions` lacks; the module's docstring describes them.

    Raises:
        UserError: for an option that is out of range or contradicts another.
    """

    loss_type: LossType
    beta: float
    label_smoothing: float
    label_coef: float
    sft_coef: float
    keep_ref_logprobs: bool

    def __post_init__(self) -> None:
        StageOptions.__post_init__(self)
        positive(beta=self.beta)
        not_negative(label_coef=self.label_coef, sft_coef=self.sft_coef)
        if self.loss_type not in get_args(LossType):
            names = ", ".join(get_args(LossType))
            raise UserError(f"invalid value '{self.loss_type}' for loss_type: expected one of {names}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"invalid value {self.label_smoothing} for label_smoothing: expected a number in [0, 0.5)")
        if self.loss_type == "ipo" and self.label_smoothing:
            raise UserError("loss_type ipo has no label_smoothing; set --model.label_smoothing 0")
        if self.loss_type != "sigmoid" and self.label_coef:
            raise UserError(f"label_coef needs loss_type sigmoid, not {self.loss_type}; set --model.label_coef 0")


class DPOModule(PolicyModule):
    """Direct preference optimization: the policy itself is the reward model, compared with its initial weights.

    The reference model is the policy at the start of the run. Checkpoints do not contain it.

    Args:
        base_model: a transformers model by name or path, a GGUF file, or an inline configuration (random weights).
        tiktoken_encoding: a tiktoken or packaged encoding by name, the path of a rank file, or a folder or model whose
            tokenizer is converted exactly; by default the base model's own.
        max_length: the maximum number of tokens in a conversation, responses included.
        hidden_dim: units in the hidden layer of the value head, which PPO trains; 0 for a linear head.
        init_from: the model file of an SFT model to start from instead of base_model.
        loss_type: sigmoid, the loss of DPO; ipo, whose optimum is a finite margin; or sigmoid_norm, which compares
            log-probs per token, so that longer responses have no advantage.
        beta: β, which keeps the policy close to the reference model: the higher, the closer. For ipo, it is τ.
        label_smoothing: the assumed probability that a rank is wrong, below 0.5; not for ipo.
        label_coef: the weight of a loss on quality labels of responses, also of those without a pair: the cross-entropy
            between σ(implicit reward) and the label. It is the label loss of the reward model, with the implicit reward
            as the score (binary classifier optimization, Jung et al. 2024, arXiv 2404.04656, without its shift).
        sft_coef: the weight of an SFT loss on the responses of rank 0, also of those without a pair: their mean
            negative log-prob per token, as in RPO (Pang et al. 2024, arXiv 2404.19733, eq. 1).
        keep_ref_logprobs: compute the reference model's log-prob of each response once, in the first epoch, and keep it
            (precompute_ref_log_probs of TRL). The same up to rounding, so a resumed run is not bit-exact.
        learning_rate: the peak learning rate of AdamW.
        schedule: the learning rate schedule after the warm-up.
        warmup: the fraction of the steps in which the learning rate rises from 0.
        weight_decay: the weight decay of AdamW, on matrices only.
        optimizer: adamw, or adamw_8bit or paged_adamw_8bit of bitsandbytes, whose state needs a quarter of the memory;
            the paged one moves it to the CPU's memory if the GPU has none left.
        max_new_tokens: the maximum number of tokens in a response of `rlchat predict`, a sample or a validation; by
            default 100, or half of max_length if that is less. Training does not sample.
        temperature: the sampling temperature of predictions and samples; 0 selects the most likely token. Validation
            samples at temperature 1, at which its responses estimate the KL.
        seed: the seed of sampling.
        adapter: lora trains low-rank adapters of the linear layers and freezes the backbone's weights, which the
            reference model shares; by default, all weights are trained.
        lora_rank: the rank of the adapters.
        lora_alpha: the outputs of the adapters are scaled by lora_alpha / lora_rank.
        lora_targets: the linear layers that get an adapter, such as [q_proj, v_proj]; by default all.
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

    stage = "dpo"
    bundle_name = "rl_chat_model_tiktoken.pt"
    monitor = ("val/pair_accuracy", "max")
    options: DPOOptions

    def __init__(
        self,
        base_model: str | dict[str, Any] | None = None,
        tiktoken_encoding: str | None = None,
        max_length: int | None = None,
        hidden_dim: int | None = None,
        init_from: str | None = None,
        loss_type: LossType = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        label_coef: float = 0.0,
        sft_coef: float = 0.0,
        keep_ref_logprobs: bool = False,
        learning_rate: float = 5e-6,
        schedule: Schedule = "linear",
        warmup: float = 0.1,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        adapter: AdapterKind | None = None,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_targets: list[str] | None = None,
        train_layers: int | None = None,
        merge_adapter: bool = True,
        gradient_checkpointing: bool = False,
        chat_format: ChatFormatName | None = None,
        new_embeddings: bool = False,
        attn_implementation: str | None = None,
    ) -> None:
        options = DPOOptions.of(locals())
        check_sampling(max_new_tokens, temperature)
        bundle = open_policy(base_model, tiktoken_encoding, max_length, hidden_dim, init_from, **base_options(options))
        # Before the policy gets an adapter, it is copied: the reference model shares frozen weights.
        freeze(bundle.model.backbone, options.trained_part)
        reference = copy_sharing_frozen(bundle.model).requires_grad_(False)
        super().__init__(bundle, options, sampling_within(bundle.max_length, max_new_tokens, temperature), seed)
        self.save_hyperparameters()
        self.model.value_head.requires_grad_(False)  # DPO does not train it; DDP fails on a parameter without gradient
        self.reference: RLChatModel = reference.train()
        self._known_ref_logprobs: dict[bytes, float] = {}  # by the tokens of a response with its prompt
        self.partly.leave_out(reference, self.model)
        if options.label_coef or options.sft_coef:
            self.monitor = ("val/loss", "min")  # the validation split may have no pair
        self.strict_loading = False  # checkpoints lack the reference model; partly checks the rest

    @property
    def data_needs(self) -> DataNeeds:
        """Ranked responses, and prompts that are truncated to leave room for a response."""
        room = self.sampling.max_new_tokens
        unpaired = self.options.label_coef > 0 or self.options.sft_coef > 0
        return DataNeeds("dpo", self.tokenizer, self.max_length, max_new_tokens=room, unpaired=unpaired)

    def training_step(self, batch: PreferenceBatch | JudgedBatch, batch_idx: int) -> Tensor:
        """Mean loss of all pairs of responses to the same prompt with different ranks, over all processes.

        With ``label_coef`` and ``sft_coef``, labelled responses and those of rank 0 are further terms of the mean.
        """
        pairs = self.preferences(batch)
        if self.logs_this_step:
            numbers = {
                "pair_accuracy": pairs.accuracy,
                "reward_margin": pairs.margin,
                "chosen_reward": pairs.chosen_reward,
                "rejected_reward": pairs.rejected_reward,
                "chosen_logprob": pairs.chosen_logprob,
                "rejected_logprob": pairs.rejected_logprob,
            }
            self.log_dict({f"train/{name}": self.global_mean(values.detach()) for name, values in numbers.items()})
            self.log("train/learning_rate", self.current_learning_rate())
        terms = [weight * losses for weight, losses in self.weighted(pairs)]
        return self.mean_loss("train/loss", torch.cat(terms).sum(), self.global_sum(sum(map(len, terms))))

    def preferences(self, batch: PreferenceBatch | JudgedBatch) -> Preferences:
        """The loss of each pair in ``batch``, and what it is made of."""
        o = self.options
        logprobs = self.response_logprobs(self.model, batch)
        ref_logprobs = self.ref_logprobs(batch)
        tokens = batch.response_mask.sum(1)
        rewards = implicit_rewards(logprobs, ref_logprobs, tokens, o.beta, o.loss_type)
        rank = batch.rank.float()
        better, worse = preferred_pairs(batch.group, torch.where(rank >= 0, -rank, torch.nan))
        margin = rewards[better] - rewards[worse]
        quality = batch.quality if isinstance(batch, JudgedBatch) else torch.full_like(rewards, torch.nan)
        labelled, best = ~quality.isnan(), rank == 0
        label_loss = F.binary_cross_entropy_with_logits(rewards[labelled], quality[labelled], reduction="none")
        sft_loss = -logprobs[best] / tokens[best].clamp(min=1)
        rewards, logprobs = rewards.detach(), logprobs.detach()
        return Preferences(
            loss=dpo_loss(margin, o.beta, o.loss_type, o.label_smoothing),
            label_loss=label_loss,
            sft_loss=sft_loss,
            margin=margin,
            chosen_reward=rewards[better],
            rejected_reward=rewards[worse],
            chosen_logprob=logprobs[better],
            rejected_logprob=logprobs[worse],
        )

    def weighted(self, pairs: Preferences) -> list[tuple[float, Tensor]]:
        """The terms of the loss with their weights; those with weight 0 are left out."""
        o = self.options
        terms = [(1.0, pairs.loss), (o.label_coef, pairs.label_loss), (o.sft_coef, pairs.sft_loss)]
        return [(weight, losses) for weight, losses in terms if weight]

    def response_logprobs(self, model: RLChatModel, batch: PreferenceBatch | JudgedBatch) -> Tensor:
        """The log-prob [N] of each response: the sum over its tokens, its end marker included."""
        model.eval()  # also in training: dropout would change the policy, and the first loss would not be log 2
        return model.sequence_logprobs(batch.ids, batch.attention_mask, batch.response_mask)

    @torch.no_grad()
    def ref_logprobs(self, batch: PreferenceBatch | JudgedBatch) -> Tensor:
        """The log-prob [N] of each response under the reference model.

        With ``keep_ref_logprobs``, a batch whose responses have all been seen needs no forward pass.
        """
        if not self.options.keep_ref_logprobs:
            return self.response_logprobs(self.reference, batch)
        masks = zip(batch.ids.cpu(), batch.attention_mask.cpu(), batch.response_mask.cpu(), strict=True)
        keys = [torch.stack([ids[real], response[real].long()]).numpy().tobytes() for ids, real, response in masks]
        known = self._known_ref_logprobs
        if not all(key in known for key in keys):
            known.update(zip(keys, self.response_logprobs(self.reference, batch).tolist(), strict=True))
        return torch.tensor([known[key] for key in keys], device=self.device)

    def on_validation_epoch_start(self) -> None:
        """Resets the number of prompts seen: each validation samples with the same random numbers."""
        self.held_out_prompts = 0

    def validation_step(
        self,
        batch: PreferenceBatch | JudgedBatch | SequenceBatch | PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Loss, margin and accuracy on held-out pairs; accuracy and perplexity on conversations; KL on prompts."""
        if isinstance(batch, SequenceBatch):
            self.tally_sequences(batch)
            return
        if isinstance(batch, PromptBatch):
            self.tally_responses(batch)
            return
        pairs = self.preferences(batch)
        for weight, losses in self.weighted(pairs):
            self.tally.add("loss", weight * losses)
        self.tally.add("pair_accuracy", pairs.accuracy)
        self.tally.add("reward_margin", pairs.margin)

    def tally_responses(self, batch: PromptBatch) -> None:
        """Adds the KL to the reference model of one response to each prompt to the tally, and its length.

        The responses are sampled from the policy at temperature 1, so that the mean is an unbiased estimate of the KL.
        """
        rows = self.global_rows(len(batch.ids), self.held_out_prompts)
        self.held_out_prompts += len(batch.ids)
        prompts = batch.ids, batch.attention_mask
        sampling = Sampling(self.sampling.max_new_tokens, temperature=1.0)
        generated = self.generate(*prompts, sampling, addressed_uniforms(self.seed, VALIDATION_STREAM, rows))
        self.reference.eval()
        responses = generated.ids, generated.mask
        self.tally.add("kl", response_log_ratios(self.model, self.reference, prompts, responses))
        self.tally.add("response_length", generated.mask.sum(1))
        self.tally.add("truncated_fraction", ~generated.ended)

    def validation_loss(self) -> float | None:
        """The mean loss of held-out pairs."""
        loss = self.trainer.callback_metrics.get("val/loss")
        return None if loss is None else float(loss)
