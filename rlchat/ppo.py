"""PPO on a language model, top to bottom: the formulas, then the loop.

One training batch is one iteration: the policy replies to prompts, the replies are judged, and the policy takes
``ppo_epochs`` × ``minibatches`` steps towards what was judged better (Ziegler et al. 2019; Ouyang et al. 2022). The
details follow Huang et al. 2024, *The N+ Implementation Details of RLHF with PPO* (arXiv 2403.17031).

    rlchat fit --config demo/ppo

Shapes: B prompts, P tokens of the longest prompt, R tokens of the longest reply. ``mask`` is Bool [B, R] and True where
a token was sampled; every mean, whitening and loss goes through it, so that padding changes no number.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from rlchat.conversation import Conversation
from rlchat.data import DataNeeds, PromptBatch, SequenceBatch
from rlchat.errors import UserError
from rlchat.generation import Generated, Sampling, addressed_uniforms
from rlchat.model import RLChatModel
from rlchat.policy import (
    VALIDATION_STREAM,
    PolicyModule,
    make_optimizer,
    make_scheduler,
    open_policy,
)
from rlchat.processes import anywhere, gather_objects, global_sum, whole
from rlchat.rewards import Reply, Reward, distinct_n

KLKind = Literal["k1", "k2", "k3"]
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


# ---------------------------------------------------------------------------------------------------------------------
# The formulas
# ---------------------------------------------------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Mean of ``x`` where ``mask`` is True; 0 where it never is.

    ``count`` replaces the number of masked-in values: with all processes' tokens divided by the number of processes,
    the mean of the processes' gradients is the gradient of the global mean.
    """
    total = torch.where(mask, x, 0.0).sum()
    divisor = torch.as_tensor(mask.sum() if count is None else count, device=x.device)
    return total / torch.where(divisor > 0, divisor, 1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Reduce = lambda t: t) -> Tensor:
    """``(x - μ) / sqrt(σ² + 1e-8)`` over the mask, 0 outside of it; σ² is the biased variance.

    ``shift_mean=False`` adds μ back: only the scale changes (lm-human-preferences).
    """
    keep = mask.to(x.dtype)
    count = reduce(keep.sum()).clamp(min=1)
    mean = reduce((x * keep).sum()) / count
    variance = reduce(((x - mean) ** 2 * keep).sum()) / count
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean) * keep


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind = "k1") -> Tensor:
    """Per-token estimates of KL(policy ‖ reference) from sampled tokens (Schulman, *Approximating KL Divergence*).

    With d = logprobs - ref_logprobs: k1 is d, unbiased; k2 is d²/2, biased, never negative; k3 is exp(-d) - 1 + d,
    unbiased and never negative.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    if kind == "k3":
        return torch.exp(-d) - 1 + d
    raise ValueError(f"unknown KL estimator {kind!r}; choose k1, k2 or k3")


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float, kind: KLKind = "k1"
) -> Tensor:
    """Per-token rewards [B, R]: ``-kl_coef · KL`` on each sampled token, the score [B] on the last (InstructGPT).

    The score belongs on one token: put on every token, it would pay for length.
    """
    rewards = -kl_coef * kl_estimate(logprobs, ref_logprobs, kind) * mask
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = torch.where(mask, places, -1).amax(1, keepdim=True)
    return rewards + torch.where((places == last) & mask, scores[:, None].to(rewards.dtype), 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, R], 0 outside the mask (generalized advantage estimation, Schulman et al. 2015).

    δ = r + γ·V_next - V and A = δ + γλ·A_next, where *next* is the next masked-in token, whatever lies between (another
    speaker's turn), and the value after the last is 0. The returns are A + V.
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(here, advantage, 0.0)
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
    return advantages, torch.where(mask, advantages + values, 0.0)


class PolicyLoss(NamedTuple):
    """The clipped surrogate and what one watches beside it; scalars."""

    loss: Tensor
    clipfrac: Tensor  # share of tokens on which the clip decides
    approx_kl: Tensor  # to the old policy: mean of (log ratio)² / 2


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_eps: float = 0.2,
    count: Tensor | float | None = None,
) -> PolicyLoss:
    """Masked mean of ``max(-A·r, -A·clip(r, 1 ± ε))`` with r = exp(logprobs - old) (Schulman et al. 2017)."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return PolicyLoss(
        loss=masked_mean(torch.maximum(plain, clipped), mask, count),
        clipfrac=masked_mean((clipped > plain).to(plain.dtype), mask, count).detach(),
        approx_kl=masked_mean(log_ratio.detach() ** 2 / 2, mask, count),
    )


class ValueLoss(NamedTuple):
    """The clipped squared error of the critic; scalars."""

    loss: Tensor
    clipfrac: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    value_clip: float = 0.2,
    count: Tensor | float | None = None,
) -> ValueLoss:
    """Half the masked mean of ``max((v - R)², (clip(v, old ± c) - R)²)`` (lm-human-preferences)."""
    clipped_values = torch.maximum(torch.minimum(values, old_values + value_clip), old_values - value_clip)
    plain, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return ValueLoss(
        loss=0.5 * masked_mean(torch.maximum(plain, clipped), mask, count),
        clipfrac=masked_mean((clipped > plain).to(plain.dtype), mask, count).detach(),
    )


class AdaptiveKL:
    """A KL coefficient that is steered towards a target in nats per reply (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, initial: float, target: float, horizon: int) -> None:
        self.coef = initial
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> float:
        """The new coefficient, after ``episodes`` replies whose mean KL was ``kl``."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * episodes / self.horizon
        return self.coef


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rollout:
    """What was said in one iteration, and what everybody thought of it before anything was learnt."""

    conversations: Sequence[Conversation]  # [B] the prompts
    replies: Sequence[Reply]  # [B] what was said to them
    ids: Tensor  # Long [B, T] prompt and reply without a gap, padded on the right
    attention_mask: Tensor  # Bool [B, T]
    said: Tensor  # Bool [B, T] True where ids holds a sampled token
    mask: Tensor  # Bool [B, R] the same, counted from the start of the reply
    logprobs: Tensor  # [B, R] of the policy that sampled
    ref_logprobs: Tensor  # [B, R] of the frozen reference
    values: Tensor  # [B, R] the critic's, before each token

    @property
    def kl(self) -> Tensor:
        """[B] nats between policy and reference, summed over each reply."""
        return (kl_estimate(self.logprobs, self.ref_logprobs) * self.mask).sum(1)


class Judged(NamedTuple):
    """Per-token targets of one iteration, [B, R], 0 outside the mask."""

    advantages: Tensor
    returns: Tensor


class PPOModule(PolicyModule):
    """PPO as a LightningModule with manual optimization.

    Args:
        base_model: a transformers model by name or path, or an inline configuration (random weights).
        tiktoken_encoding: a tiktoken or packaged encoding by name, or the path of a rank file.
        max_length: tokens that a conversation holds at most, the reply included.
        hidden_dim: units of the value head's hidden layer; 0: a linear head.
        init_from: the bundle of an SFT model to start from, in place of base_model.
        reward: judges the replies; without one, the rule factors of :class:`rlchat.rewards.Reward`.
        max_new_tokens: tokens that a reply has at most.
        temperature: of sampling, and so of every log-prob.
        learning_rate: of AdamW at the start.
        schedule: how the learning rate goes over the run.
        warmup: share of the iterations in which the learning rate rises.
        weight_decay: of AdamW, on matrices.
        adam_eps: of AdamW.
        ppo_epochs: passes over each rollout.
        minibatches: optimizer steps in each pass.
        clip_eps: the ratio is clipped to 1 ± this.
        value_clip: a value may move by this from the old one before its error is clipped.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        kl_coef: price of a nat of KL to the reference; the initial one where kl_target is set.
        kl_kind: the estimator of the KL in the reward.
        kl_target: nats per reply to which kl_coef adapts; None keeps it fixed.
        kl_horizon: episodes in which the adaptive kl_coef may move by its own size.
        gamma: discount per token.
        lam: λ of generalized advantage estimation.
        whiten_rewards: bring per-token rewards to unit variance, their mean kept.
        target_kl: stop the passes over a rollout where approx_kl to the old policy exceeds this; None never stops.
        max_grad_norm: gradients are scaled down to this norm.
        sft_coef: weight of an SFT loss on human conversations that is mixed in (PPO-ptx of InstructGPT).
        seed: of all noise.
    """

    stage = "ppo"
    bundle_name = "rl_chat_model_tiktoken.pt"
    monitor = ("val/reward", "max")

    def __init__(
        self,
        base_model: str | dict[str, Any] | None = None,
        tiktoken_encoding: str | None = None,
        max_length: int | None = None,
        hidden_dim: int | None = None,
        init_from: str | None = None,
        reward: Reward | None = None,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        learning_rate: float = 1e-4,
        schedule: Literal["constant", "linear", "cosine"] = "linear",
        warmup: float = 0.0,
        weight_decay: float = 0.0,
        adam_eps: float = 1e-5,
        ppo_epochs: int = 4,
        minibatches: int = 4,
        clip_eps: float = 0.2,
        value_clip: float = 0.2,
        value_coef: float = 0.1,
        entropy_coef: float = 0.0,
        kl_coef: float = 0.05,
        kl_kind: KLKind = "k1",
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten_rewards: bool = False,
        target_kl: float | None = None,
        max_grad_norm: float = 1.0,
        sft_coef: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(open_policy(base_model, tiktoken_encoding, max_length, hidden_dim, init_from))
        if not 0 < max_new_tokens < self.max_length:
            raise UserError(
                f"max_new_tokens {max_new_tokens} leaves no room for a prompt in max_length {self.max_length}; lower it"
            )
        if temperature <= 0:
            raise UserError(f"temperature {temperature}: rollouts are sampled, it must be above 0")
        for name, count in (("ppo_epochs", ppo_epochs), ("minibatches", minibatches), ("kl_horizon", kl_horizon)):
            if count < 1:
                raise UserError(f"{name} is {count}; it must be at least 1")
        for name, size in (("clip_eps", clip_eps), ("value_clip", value_clip), ("max_grad_norm", max_grad_norm)):
            if not size >= 0:
                raise UserError(f"{name} is {size}; it must be 0 or more")
        if kl_target is not None and not kl_target > 0:
            raise UserError(f"kl_target is {kl_target}; it must be above 0, or null for a fixed kl_coef")
        self.save_hyperparameters(ignore=["reward"])
        self.automatic_optimization = False
        self.options: Any = self.hparams  # the arguments above, by name
        self.reward = reward or Reward()
        self.sampling = Sampling(max_new_tokens, temperature)
        self.reference: RLChatModel = copy.deepcopy(self.model).requires_grad_(False)
        self.adaptive_kl = AdaptiveKL(kl_coef, kl_target, kl_horizon) if kl_target is not None else None
        self.kl_coef = kl_coef
        self.iterations = self.episodes = self.tokens = 0

    @property
    def data_needs(self) -> DataNeeds:
        """What the data module serves to this stage."""
        return DataNeeds(
            task="ppo",
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            max_new_tokens=self.options.max_new_tokens,
            mix_sequences=self.options.sft_coef > 0,
        )

    # One iteration --------------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Rollout → score → shape → advantages → minibatch steps → log."""
        started = time.perf_counter()
        rollout = self.roll_out(batch, self.noise_rows(len(batch.ids)), stream=self.iterations)
        rolled_out = time.perf_counter()
        factors = self.reward.breakdown(rollout.conversations, rollout.replies)
        scores = torch.stack(list(factors.values())).sum(0).to(self.device)
        scored = time.perf_counter()
        judged = self.judge(rollout, scores)
        learnt = self.improve(rollout, judged, batch.sequences)
        improved = time.perf_counter()

        kl = self.global_mean(rollout.kl)
        episodes, tokens = int(self.global_sum(len(scores))), int(self.global_sum(rollout.mask.sum()))
        self.log_iteration(rollout, scores, factors, judged, learnt, kl)
        self.log_dict(
            {
                "time/rollout_s": rolled_out - started,
                "time/score_s": scored - rolled_out,
                "time/update_s": improved - scored,
                "perf/tokens_per_s": tokens / (improved - started),
            }
        )
        self.iterations += 1
        self.episodes += episodes
        self.tokens += tokens
        if self.adaptive_kl is not None:
            self.kl_coef = self.adaptive_kl.update(kl, episodes)
        if (scheduler := self.lr_schedulers()) is not None:
            scheduler.step()  # type: ignore[union-attr]

    @torch.no_grad()
    def roll_out(self, batch: PromptBatch, rows: Tensor, stream: int) -> Rollout:
        """Replies to ``batch``, with the log-probs and values that the update starts from."""
        noise = addressed_uniforms(self.options.seed, stream, rows)
        said = self.generate(batch.ids, batch.attention_mask, self.sampling, noise)
        return self.recall(batch, said)

    def recall(self, batch: PromptBatch, said: Generated) -> Rollout:
        """What policy, reference and critic think of ``said``, by the same forward pass that the update will use.

        Not the log-probs that sampling saw: in low precision they differ, and the first ratio would not be 1.
        """
        ids = torch.cat([batch.ids, said.ids], 1)
        attention_mask = torch.cat([batch.attention_mask, said.mask], 1)
        places = torch.cat([torch.zeros_like(batch.attention_mask), said.mask], 1)
        # Real tokens to the left, in their order: prompts were padded on the left to be sampled from side by side, and
        # those columns would be computed for nothing in every pass from here on.
        order = (~attention_mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(attention_mask.sum(1).max())]
        ids, attention_mask, places = (x.gather(1, order) for x in (ids, attention_mask, places))
        self.model.eval()
        logprobs, _, values = self.read_replies(self.model, ids, attention_mask, places, said.mask)
        ref_logprobs, _, _ = self.read_replies(self.reference.eval(), ids, attention_mask, places, said.mask)
        return Rollout(
            conversations=batch.conversations,
            replies=self.read(said),
            ids=ids,
            attention_mask=attention_mask,
            said=places,
            mask=said.mask,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
        )

    def read_replies(
        self, model: RLChatModel, ids: Tensor, attention_mask: Tensor, said: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, entropies and values [B, R] of the ``said`` tokens of ``ids`` [B, T]; 0 outside ``mask`` [B, R].

        Logits are made for these alone: the vocabulary is by far the widest layer.
        """
        hidden = model(ids, attention_mask)
        before = hidden[:, :-1][said[:, 1:]]  # [tokens, hidden]: what each sampled token was drawn from
        stats = model.token_stats(before, ids[said], self.options.temperature)
        blank = torch.zeros(mask.shape, device=ids.device)

        def unpacked(x: Tensor) -> Tensor:
            return blank.masked_scatter(mask, x)

        return unpacked(stats.logprobs), unpacked(stats.entropy), unpacked(model.values(before))

    def judge(self, rollout: Rollout, scores: Tensor) -> Judged:
        """Scores become per-token rewards, rewards advantages and returns."""
        o = self.options
        mask = rollout.mask
        rewards = shape_rewards(scores, rollout.logprobs, rollout.ref_logprobs, mask, self.kl_coef, o.kl_kind)
        if o.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False, reduce=self.global_sum)
        advantages, returns = gae(rewards, rollout.values, mask, o.gamma, o.lam)
        return Judged(masked_whiten(advantages, mask, reduce=self.global_sum), returns)

    def improve(self, rollout: Rollout, judged: Judged, sequences: SequenceBatch | None) -> dict[str, float]:
        """``ppo_epochs`` passes of ``minibatches`` steps; the means of what was logged on the way."""
        optimizer = self.optimizers()
        logged: list[dict[str, float]] = []
        for epoch in range(self.options.ppo_epochs):
            for rows in self.minibatch_rows(len(rollout.ids), epoch):
                loss, stats = self.minibatch_loss(rollout, judged, rows)
                if sequences is not None:
                    sft_loss = self.mixed_in_loss(sequences)
                    loss, stats["sft_loss"] = loss + self.options.sft_coef * sft_loss, sft_loss.detach()
                optimizer.zero_grad()  # type: ignore[union-attr]
                self.manual_backward(loss)
                optimizer.step()  # type: ignore[union-attr]
                logged.append(
                    {name: float(self.global_sum(value)) / self.trainer.world_size for name, value in stats.items()}
                )
                logged[-1]["grad_norm"] = self.grad_norm
            if self.options.target_kl is not None and logged[-1]["approx_kl"] > self.options.target_kl:
                break
        means = {name: sum(step[name] for step in logged) / len(logged) for name in logged[0]}
        return {**means, "ratio_residual": logged[0]["ratio_residual"], "optimizer_steps": float(len(logged))}

    def minibatch_rows(self, batch: int, epoch: int) -> list[Tensor]:
        """This process's rows of each minibatch. All processes together shuffle the global rows as one would."""
        world, rank = self.trainer.world_size, self.global_rank
        noise = addressed_uniforms(self.options.seed, self.iterations, torch.arange(batch * world))
        order = noise(-1 - epoch).argsort()  # positions from 0 on are those of sampled tokens
        return [
            part[part % world == rank] // world
            for part in order.tensor_split(min(self.options.minibatches, len(order)))
        ]

    def minibatch_loss(self, rollout: Rollout, judged: Judged, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on ``rows`` of the rollout, and what is logged of it.

        Means are over the global minibatch: each process divides by its share of all processes' tokens, and a process
        that has no row of this minibatch takes part with one that is masked out.
        """
        o = self.options
        blank = len(rows) == 0
        rows = (torch.zeros(1, dtype=torch.long) if blank else rows).to(self.device)
        mask = rollout.mask[rows] & (not blank)
        count = self.global_sum(mask.sum()) / self.trainer.world_size
        logprobs, entropy, values = self.read_replies(
            self.model, rollout.ids[rows], rollout.attention_mask[rows], rollout.said[rows], rollout.mask[rows]
        )
        old = rollout.logprobs[rows]
        surrogate = policy_loss(logprobs, old, judged.advantages[rows], mask, o.clip_eps, count)
        critic = value_loss(values, rollout.values[rows], judged.returns[rows], mask, o.value_clip, count)
        mean_entropy = masked_mean(entropy, mask, count)
        loss = surrogate.loss + o.value_coef * critic.loss - o.entropy_coef * mean_entropy
        return loss, {
            "policy_loss": surrogate.loss.detach(),
            "value_loss": critic.loss.detach(),
            "entropy": mean_entropy.detach(),
            "approx_kl": surrogate.approx_kl,
            "clip_fraction": surrogate.clipfrac,
            "value_clip_fraction": critic.clipfrac,
            "ratio_residual": masked_mean(((logprobs - old).exp() - 1).abs().detach(), mask, count),
        }

    def mixed_in_loss(self, sequences: SequenceBatch) -> Tensor:
        """Mean negative log-prob of the human replies in ``sequences``, over all processes."""
        logprobs = self.token_stats(sequences).logprobs
        return -logprobs.sum() * self.trainer.world_size / self.global_sum(len(logprobs)).clamp(min=1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips here, where gradients are unscaled in every precision."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self.grad_norm = float(whole(norm))

    # What is seen of it ---------------------------------------------------------------------------------------------

    def log_iteration(
        self,
        rollout: Rollout,
        scores: Tensor,
        factors: dict[str, Tensor],
        judged: Judged,
        learnt: dict[str, float],
        kl: float,
    ) -> None:
        """One row of metrics, over all processes."""
        mask, lengths = rollout.mask, rollout.mask.sum(1).float()
        ended = torch.tensor([reply.ended for reply in rollout.replies], device=self.device)
        count = self.global_sum(mask.sum()).clamp(min=1)

        def variance(x: Tensor) -> Tensor:
            mean = self.global_sum((x * mask).sum()) / count
            return self.global_sum(((x - mean) ** 2 * mask).sum()) / count

        unexplained = variance(judged.returns - rollout.values) / variance(judged.returns).clamp(min=1e-8)
        values = {
            **learnt,
            "reward": self.global_mean(scores),
            "kl": kl,
            "explained_variance": float(1 - unexplained),
            "response_length": self.global_mean(lengths),
            "truncated_fraction": self.global_mean((~ended).float()),
            "kl_coef": self.kl_coef,
            "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
            "episodes": float(self.episodes + self.global_sum(len(scores))),
        }
        self.log_dict({f"train/{name}": value for name, value in values.items()})
        self.log_dict({f"reward/{name}": self.global_mean(value) for name, value in factors.items()})
        for name in ("reward", "kl"):
            self.log(name, values[name], prog_bar=True, logger=False)

    def global_sum(self, value: Tensor | float) -> Tensor:
        """``value`` summed over all processes."""
        return global_sum(self, value)

    def global_mean(self, values: Tensor) -> float:
        """Mean of the rows [B] of all processes."""
        return float(self.global_sum(values.float().sum().to(self.device)) / self.global_sum(len(values)))

    # Held-out conversations -----------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Starts to collect replies."""
        self.held_out_replies: list[str] = []

    def validation_step(self, batch: PromptBatch | SequenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Conversations give accuracy and perplexity; prompts are replied to and judged."""
        if isinstance(batch, SequenceBatch):
            self.tally_sequences(batch)
            return
        # Always the same noise, so that two validations differ by the model alone.
        first = len(self.held_out_replies)
        rollout = self.roll_out(batch, self.noise_rows(len(batch.ids), first), stream=VALIDATION_STREAM)
        self.held_out_replies += [reply.text for reply in rollout.replies]
        factors = self.reward.breakdown(rollout.conversations, rollout.replies)
        self.tally.add("reward", torch.stack(list(factors.values())).sum(0))
        for name, value in factors.items():
            self.tally.add(f"reward_{name}", value)
        self.tally.add("kl", rollout.kl)
        self.tally.add("response_length", rollout.mask.sum(1))
        self.tally.add("truncated_fraction", torch.tensor([not reply.ended for reply in rollout.replies]))
        self.tally_answers("answer_accuracy", rollout.conversations, rollout.replies)
        if not self.trainer.training and anywhere(self, any(c.check for c in rollout.conversations)):
            greedy = Sampling(self.options.max_new_tokens, temperature=0.0)
            noise = addressed_uniforms(0, 0, torch.arange(len(batch.ids)))
            said = self.read(self.generate(batch.ids, batch.attention_mask, greedy, noise))
            self.tally_answers("answer_accuracy_greedy", rollout.conversations, said)

    def tally_answers(self, name: str, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> None:
        """Share of right replies among the prompts that can be checked."""
        right = [float(p.check.passes(r.text)) for p, r in zip(prompts, replies, strict=True) if p.check]
        if right:
            self.tally.add(name, torch.tensor(right))

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out figures, over all processes."""
        self.log_held_out("val")

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: PromptBatch | SequenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As for validation, on the conversations that chose nothing."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Logs the test figures, over all processes."""
        self.log_held_out("test")

    def log_held_out(self, stage: str) -> None:
        """Means over every row of every process."""
        values = self.tally.means(self.device)
        replies = [reply for part in gather_objects(self.held_out_replies) for reply in part]
        if replies:
            values["distinct_2"] = distinct_n(replies, 2)
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()})

    def judgements(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[dict[str, Any]]:
        """The reward of each predicted reply, whole and by factor."""
        factors = self.reward.breakdown(prompts, replies)
        rows = [{name: float(value[i]) for name, value in factors.items()} for i in range(len(replies))]
        return [{"reward": sum(row.values()), "factors": row} for row in rows]

    # Optimizer and state --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a learning rate that goes over the run's iterations."""
        o = self.options
        optimizer = make_optimizer(self.model.parameters(), o.learning_rate, o.weight_decay, o.adam_eps)
        iterations = self.trainer.estimated_stepping_batches
        return {"optimizer": optimizer, "lr_scheduler": make_scheduler(optimizer, o.schedule, o.warmup, iterations)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counters and the adaptive coefficient, which no tensor holds."""
        names = ("iterations", "episodes", "tokens", "kl_coef")
        checkpoint["rlchat"] = {name: getattr(self, name) for name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of :meth:`on_save_checkpoint`."""
        for name, value in checkpoint["rlchat"].items():
            setattr(self, name, value)
        if self.adaptive_kl is not None:
            self.adaptive_kl.coef = self.kl_coef
