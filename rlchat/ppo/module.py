"""PPO on a language model, from top to bottom.

One training batch is one iteration: the policy replies to prompts, the replies are judged, and the policy takes
``ppo_epochs`` × ``minibatches`` steps towards what was judged better (Ziegler et al. 2019; Ouyang et al. 2022). The
details follow Huang et al. 2024, *The N+ Implementation Details of RLHF with PPO* (arXiv 2403.17031).

    rlchat fit --config demo/ppo

The formulas are in :mod:`rlchat.ppo.formulas`, what happens before anything is learnt in :mod:`rlchat.ppo.rollouts`.

Shapes: B rows, N replies (one a row, or one a turn where the policy answers whole conversations), R columns from a
row's first sampled token to its last. ``mask`` is Bool [B, R] and True where a token was sampled; every mean, whitening
and loss goes through it, so that padding and the words of users change no number.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from rlchat.data.datamodule import DataNeeds, PromptBatch, SequenceBatch
from rlchat.distributed.collectives import gather_objects, whole
from rlchat.errors import UserError
from rlchat.models.sampling import Sampling, addressed_uniforms
from rlchat.ppo.formulas import (
    AdaptiveKL,
    KLKind,
    gae,
    grpo,
    kl_estimate,
    masked_mean,
    masked_whiten,
    place_scores,
    policy_loss,
    rloo,
    shape_rewards,
    value_loss,
)
from rlchat.ppo.rollouts import Rollout, RolloutModule
from rlchat.rewards import Reward
from rlchat.training.base import make_optimizer, make_scheduler, open_policy
from rlchat.utils.files import append_lines

__all__ = [
    "AdaptiveKL",
    "Iteration",
    "PPOModule",
    "gae",
    "grpo",
    "kl_estimate",
    "masked_mean",
    "masked_whiten",
    "place_scores",
    "policy_loss",
    "rloo",
    "shape_rewards",
    "value_loss",
]

_log = logging.getLogger("rlchat")


class Judged(NamedTuple):
    """Per-token targets of one iteration, [B, R], 0 outside the mask."""

    advantages: Tensor
    returns: Tensor  # what the critic should have said; 0 where there is none


@dataclass(frozen=True, slots=True)
class Iteration:
    """One iteration on this process, for callbacks to look at."""

    rollout: Rollout
    factors: dict[str, Tensor]  # [N] each: what the reward consists of, weights included
    judged: Judged


class PPOModule(RolloutModule):
    """PPO as a LightningModule with manual optimization.

    Args:
        base_model: a transformers model by name or path, or an inline configuration (random weights).
        tiktoken_encoding: a tiktoken or packaged encoding by name, or the path of a rank file.
        max_length: tokens that a conversation holds at most, the reply included.
        hidden_dim: units of the value head's hidden layer; 0: a linear head.
        init_from: the bundle of an SFT model to start from, in place of base_model.
        reward: judges the replies; without one, the rule factors of :class:`rlchat.rewards.Reward`.
        max_new_tokens: tokens that a reply has at most.
        turns: user turns of a conversation that the policy answers, one after the other, each reply rewarded; 1 answers
            every prefix that ends on a user message as a prompt of its own.
        group_size: replies to each prompt.
        temperature: of sampling, and so of every log-prob.
        learning_rate: of AdamW at the start.
        schedule: how the learning rate goes over the run.
        warmup: share of the iterations in which the learning rate rises.
        weight_decay: of AdamW, on matrices.
        adam_eps: of AdamW.
        adam_beta2: of AdamW; rewards are noisy, so its squares are remembered for longer than in the other stages.
        ppo_epochs: passes over each rollout.
        minibatches: optimizer steps in each pass.
        micro_batch_size: rows that a device learns from at one time; gradients accumulate over a minibatch. None: all.
        advantage: gae with a critic; or rloo or grpo without one, which compare the replies of a group.
        critic: a value head on the policy's trunk (shared), or a network of its own (separate).
        critic_init: the bundle of a reward model as which a separate critic begins; else it copies the policy's trunk.
        critic_warmup: iterations in which only the critic learns.
        clip_eps: the ratio is clipped to 1 ± this.
        clip_eps_high: the bound above, where it is to be another.
        dual_clip: bound on the ratio where the advantage is negative, above 1; None: none.
        value_clip: a value may move by this from the old one before its error is clipped.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        kl_coef: price of a nat of KL to the reference; the initial one where kl_target is set.
        kl_in: where that price is paid: in each token's reward, or as a term of the loss.
        kl_kind: the estimator of that KL. None: k1 in the reward, k3 in the loss, where k1 has no gradient on average.
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

    # So many steps in a row without a finite gradient, and the run stops.
    MOST_SKIPPED = 3

    def __init__(
        self,
        base_model: str | dict[str, Any] | None = None,
        tiktoken_encoding: str | None = None,
        max_length: int | None = None,
        hidden_dim: int | None = None,
        init_from: str | None = None,
        reward: Reward | None = None,
        max_new_tokens: int = 100,
        turns: int = 1,
        group_size: int = 1,
        temperature: float = 1.0,
        learning_rate: float = 1e-4,
        schedule: Literal["constant", "linear", "cosine"] = "linear",
        warmup: float = 0.0,
        weight_decay: float = 0.0,
        adam_eps: float = 1e-5,
        adam_beta2: float = 0.999,
        ppo_epochs: int = 4,
        minibatches: int = 4,
        micro_batch_size: int | None = None,
        advantage: Literal["gae", "rloo", "grpo"] = "gae",
        critic: Literal["shared", "separate"] = "shared",
        critic_init: str | None = None,
        critic_warmup: int = 0,
        clip_eps: float = 0.2,
        clip_eps_high: float | None = None,
        dual_clip: float | None = None,
        value_clip: float = 0.2,
        value_coef: float = 0.1,
        entropy_coef: float = 0.0,
        kl_coef: float = 0.05,
        kl_in: Literal["reward", "loss"] = "reward",
        kl_kind: KLKind | None = None,
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
        bundle = open_policy(base_model, tiktoken_encoding, max_length, hidden_dim, init_from)
        if not 0 < max_new_tokens < bundle.max_length:
            raise UserError(
                f"max_new_tokens {max_new_tokens} leaves no room for a prompt in max_length {bundle.max_length}; "
                f"lower it"
            )
        if not 1e-6 <= temperature <= 1e6:
            raise UserError(f"temperature {temperature}: rollouts are sampled, it must be above 0, from 1e-6 to 1e6")
        counts = {
            "ppo_epochs": ppo_epochs,
            "minibatches": minibatches,
            "kl_horizon": kl_horizon,
            "turns": turns,
            "group_size": group_size,
            "micro_batch_size": 1 if micro_batch_size is None else micro_batch_size,
        }
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"{name} is {count}; it must be at least 1")
        sizes = {
            "clip_eps": clip_eps,
            "clip_eps_high": clip_eps_high or 0.0,
            "value_clip": value_clip,
            "value_coef": value_coef,
            "kl_coef": kl_coef,
            "sft_coef": sft_coef,
            "critic_warmup": critic_warmup,
        }
        for name, size in sizes.items():
            if not size >= 0:
                raise UserError(f"{name} is {size}; it must be 0 or more")
        for name, share in (("gamma", gamma), ("lam", lam), ("warmup", warmup)):
            if not 0 <= share <= 1:
                raise UserError(f"{name} is {share}; it must be from 0 to 1")
        if not max_grad_norm > 0:
            raise UserError(f"max_grad_norm is {max_grad_norm}; it must be above 0")
        if kl_target is not None and not kl_target > 0:
            raise UserError(f"kl_target is {kl_target}; it must be above 0, or null for a fixed kl_coef")
        if kl_target is not None and kl_coef == 0:
            raise UserError("kl_target steers kl_coef by shares of itself, and 0 stays 0; give kl_coef a size above 0")
        if dual_clip is not None and not dual_clip > 1:
            raise UserError(f"dual_clip is {dual_clip}; it must be above 1, or null for none")
        if advantage != "gae":
            if group_size < 2:
                raise UserError(f"advantage {advantage} compares replies to one prompt; set group_size to 2 or more")
            if turns > 1:
                raise UserError(f"advantage {advantage} knows no turns; set turns to 1, or advantage to gae")
            if whiten_rewards:  # whitening adds a constant to each token, and their sum would pay for length
                raise UserError(
                    f"advantage {advantage} takes rewards as they are; leave out whiten_rewards, or use gae"
                )
            if critic == "separate" or critic_warmup:
                raise UserError(f"advantage {advantage} has no critic; leave out critic and critic_warmup, or use gae")
        sampling = Sampling(max_new_tokens, temperature)
        super().__init__(
            bundle, reward or Reward(), critic if advantage == "gae" else "none", critic_init, sampling, turns, seed
        )
        self.save_hyperparameters(ignore=["reward"])
        self.automatic_optimization = False
        self.options: Any = self.hparams  # the arguments above, by name
        self.kl_kind: KLKind = kl_kind or ("k1" if kl_in == "reward" else "k3")
        if (kl_in, self.kl_kind) == ("loss", "k1"):
            _log.warning("kl_kind k1 has no gradient on average in the loss and will hold nothing; take k2 or k3")
        self.adaptive_kl = AdaptiveKL(kl_coef, kl_target, kl_horizon) if kl_target is not None else None
        self.kl_coef = kl_coef
        self.iterations = self.episodes = self.tokens = 0
        self.skipped_steps = self.skipped_in_a_row = 0
        self.not_finite: str | None = None
        """What kept the last step from being taken."""
        self.last_iteration: Iteration | None = None

    @property
    def data_needs(self) -> DataNeeds:
        """What the data module serves to this stage."""
        return DataNeeds(
            task="ppo",
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            max_new_tokens=self.options.max_new_tokens,
            mix_sequences=self.options.sft_coef > 0,
            whole_conversations=self.options.turns > 1,
        )

    # One iteration --------------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Rollout → score → shape → advantages → minibatch steps → log."""
        started = time.perf_counter()
        group_size = self.options.group_size
        rows = self.noise_rows(len(batch.ids), copies=group_size)
        rollout = self.roll_out(batch.repeated(group_size), rows, stream=self.iterations)
        rolled_out = time.perf_counter()
        factors = self.reward.breakdown(rollout.conversations, rollout.replies)
        scores = torch.stack(list(factors.values())).sum(0).to(self.device)
        scored = time.perf_counter()
        judged = self.judge(rollout, scores)
        self.last_iteration = Iteration(rollout, factors, judged)
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
        if self.adaptive_kl is not None and self.iterations > self.options.critic_warmup:
            # Beyond its horizon, the step of one iteration would turn the coefficient's sign.
            self.kl_coef = self.adaptive_kl.update(kl, min(episodes, self.options.kl_horizon))
        if (scheduler := self.lr_schedulers()) is not None:
            scheduler.step()  # type: ignore[union-attr]

    def judge(self, rollout: Rollout, scores: Tensor) -> Judged:
        """Scores [N] become per-token rewards, rewards advantages and returns."""
        o, mask = self.options, rollout.mask
        kl_coef = self.kl_coef if o.kl_in == "reward" else 0.0
        placed = place_scores(scores, rollout.reply_of)
        rewards = shape_rewards(placed, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef, self.kl_kind)
        if o.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False, reduce=self.global_sum)
        if o.advantage == "gae":
            advantages, returns = gae(rewards, rollout.values, mask, o.gamma, o.lam)
            return Judged(masked_whiten(advantages, mask, reduce=self.global_sum), returns)
        compare = rloo if o.advantage == "rloo" else grpo
        advantages = compare(rewards.sum(1), o.group_size)[:, None] * mask
        return Judged(advantages, torch.zeros_like(advantages))

    def improve(self, rollout: Rollout, judged: Judged, sequences: SequenceBatch | None) -> dict[str, float]:
        """``ppo_epochs`` passes of ``minibatches`` steps; the means of what was logged on the way.

        A step whose loss or gradient is not finite changes nothing, and is counted.
        """
        optimizer = self.optimizers()
        steps: list[dict[str, float]] = []
        for epoch in range(self.options.ppo_epochs):
            for minibatch in self.minibatches(len(rollout.ids), epoch):
                optimizer.zero_grad()  # type: ignore[union-attr]
                steps.append(self.accumulate(rollout, judged, minibatch, sequences))
                self.not_finite = next((name for name, value in steps[-1].items() if not math.isfinite(value)), None)
                optimizer.step()  # type: ignore[union-attr]
                steps[-1]["grad_norm"] = self.grad_norm
                self.count_skipped(rollout)
            if self.options.target_kl is not None and steps[-1]["approx_kl"] > self.options.target_kl:
                break
        taken = [step for step in steps if all(map(math.isfinite, step.values()))]
        means = {name: sum(step[name] for step in taken) / len(taken) for name in steps[0] if taken}
        return {**means, "ratio_residual": steps[0]["ratio_residual"], "optimizer_steps": float(len(taken))}

    def minibatches(self, rows: int, epoch: int) -> list[list[Tensor]]:
        """This process's rows of each minibatch, in micro batches, of which all processes have as many.

        All processes together shuffle the global rows as one would. A micro batch may be empty.
        """
        world, rank, copies = self.trainer.world_size, self.global_rank, self.options.group_size
        noise = addressed_uniforms(self.noise_seed, self.iterations, torch.arange(rows * world))
        order = noise(-1 - epoch).argsort()  # positions from 0 on are those of sampled tokens
        result = []
        for part in order.tensor_split(min(self.options.minibatches, len(order))):
            prompt, copy_number = part // copies, part % copies
            owner = prompt % world
            mine = (prompt // world * copies + copy_number)[owner == rank]
            most = int(owner.bincount().max())
            size = self.options.micro_batch_size or most
            result.append([mine[start : start + size] for start in range(0, most, size)])
        return result

    def accumulate(
        self, rollout: Rollout, judged: Judged, minibatch: list[Tensor], sequences: SequenceBatch | None
    ) -> dict[str, float]:
        """Adds the gradient of the loss on ``minibatch`` to the parameters'; what is logged of it, of all processes."""
        rows = torch.cat(minibatch).to(self.device)
        tokens = self.global_sum(rollout.mask[rows].sum()) / self.trainer.world_size
        losses = [partial(self.minibatch_loss, rollout, judged, micro_batch, tokens) for micro_batch in minibatch]
        if sequences is not None:
            words = self.global_sum(sequences.loss_mask[:, 1:].sum()).clamp(min=1) / self.trainer.world_size
            threads = sequences.split(self.options.micro_batch_size or len(sequences.ids))
            losses = [*(partial(self.mixed_in_loss, part, words) for part in threads), *losses]
        totals: dict[str, Tensor] = {}
        for loss_of in losses:
            # Gradients cross between processes once, with the last loss, which reaches every parameter.
            silence = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
            quiet: AbstractContextManager[Any] = nullcontext() if loss_of is losses[-1] else silence()
            loss, stats = loss_of()
            with quiet:
                self.manual_backward(loss)
            for name, value in stats.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value
        sums = self.global_sum(torch.stack(list(totals.values()))) / self.trainer.world_size
        return dict(zip(totals, sums.tolist(), strict=True))

    def minibatch_loss(
        self, rollout: Rollout, judged: Judged, rows: Tensor, tokens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on ``rows`` of the rollout, and what is logged of it.

        Means are over the global minibatch: each process divides by its share ``tokens`` of all processes' tokens. A
        process that has no row takes part with one that is masked out.
        """
        o = self.options
        blank = len(rows) == 0
        rows = (torch.zeros(1, dtype=torch.long) if blank else rows).to(self.device)
        mask = rollout.mask[rows] & (not blank)
        warming_up = self.iterations < o.critic_warmup
        new = self.read_replies(
            self.model,
            rollout.ids[rows],
            rollout.attention_mask[rows],
            rollout.said[rows],
            rollout.mask[rows],
            critic_alone=warming_up,
        )
        old_logprobs = rollout.logprobs[rows]
        surrogate = policy_loss(
            new.logprobs,
            old_logprobs,
            judged.advantages[rows],
            mask,
            o.clip_eps,
            tokens,
            clip_eps_high=o.clip_eps_high,
            dual_clip=o.dual_clip,
        )
        entropy = masked_mean(new.entropy, mask, tokens)
        loss = surrogate.loss - o.entropy_coef * entropy
        if o.kl_in == "loss":
            nats = kl_estimate(new.logprobs, rollout.ref_logprobs[rows], self.kl_kind)
            loss = loss + self.kl_coef * masked_mean(nats, mask, tokens)
        if warming_up:
            loss = loss * 0.0  # every parameter keeps a gradient, as DDP wants it
        stats = {
            "policy_loss": surrogate.loss.detach(),
            "entropy": entropy.detach(),
            "approx_kl": surrogate.approx_kl,
            "clip_fraction": surrogate.clipfrac,
            "ratio_residual": masked_mean(((new.logprobs - old_logprobs).exp() - 1).abs().detach(), mask, tokens),
        }
        if self.critic_kind != "none":
            critic = value_loss(new.values, rollout.values[rows], judged.returns[rows], mask, o.value_clip, tokens)
            loss = loss + o.value_coef * critic.loss
            stats |= {"value_loss": critic.loss.detach(), "value_clip_fraction": critic.clipfrac}
        return loss, stats

    def mixed_in_loss(self, sequences: SequenceBatch, words: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative log-prob of the human replies in ``sequences``, a share of the mean over all ``words``."""
        loss = -self.token_stats(sequences).logprobs.sum() / words
        return self.options.sft_coef * loss, {"sft_loss": loss.detach()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips here, where gradients are unscaled in every precision; without a gradient, the step does nothing."""
        if self.iterations < self.options.critic_warmup:
            for name, parameter in self.named_parameters():
                if not name.startswith(("critic.", "model.value_head.")):
                    parameter.grad = None  # the policy waits, and so do its momentum and weight decay
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        self.grad_norm = float(whole(norm))
        if self.not_finite is None and not math.isfinite(self.grad_norm):
            if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
                return  # fp16: the scaler has seen it, skips the step by itself, and scales less from now on
            broken = (name for name, gradient in gradients.items() if not whole(gradient).isfinite().all())
            self.not_finite = f"the gradient of {next(broken, 'all weights together')}"
        if self.not_finite is None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), self.options.max_grad_norm, norm)
        else:
            for parameter in self.parameters():
                parameter.grad = None

    def count_skipped(self, rollout: Rollout) -> None:
        """Keeps count of steps that were skipped. Raises :class:`UserError` where that goes on."""
        if self.not_finite is None:
            self.skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        where = f"iteration {self.iterations + 1}"
        if self.trainer.is_global_zero:
            _log.warning("%s: %s is not a finite number, so this step was skipped", where, self.not_finite)
        if self.skipped_in_a_row < self.MOST_SKIPPED:
            return
        assert self.last_iteration is not None
        folder = Path(self.trainer.log_dir or ".")  # asks the other processes, so all of them have to ask
        dump = folder / f"not_finite_{self.global_rank}.jsonl"
        append_lines(dump, rollout.rows(self.last_iteration.factors))
        saved = getattr(self.trainer.checkpoint_callback, "last_model_path", "")
        if not saved:  # the weights are as good as they were: only steps that were not taken came since
            saved = str(folder / "last_good.ckpt")
            self.trainer.save_checkpoint(saved)
        raise UserError(
            f"{where}: {self.not_finite} is not a finite number, in {self.skipped_in_a_row} steps in a row; the batch "
            f"is in {dump}, the last good state in {saved}; lower --model.learning_rate, or "
            f"look at the rewards"
        )

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
        mask = rollout.mask
        count = self.global_sum(mask.sum()).clamp(min=1)
        texts = [text for part in gather_objects([reply.text for reply in rollout.replies]) for text in part]
        off = (rollout.sampling_logprobs - rollout.logprobs).exp() - 1
        values = {
            **learnt,
            "reward": self.global_mean(scores),
            "kl": kl,
            "sampling_residual": float(self.global_sum(off.abs()[mask].sum()) / count),
            "response_length": self.global_mean(torch.tensor([reply.tokens for reply in rollout.replies])),
            "truncated_fraction": self.global_mean(torch.tensor([not reply.ended for reply in rollout.replies])),
            "distinct_replies": len(set(texts)) / len(texts),
            "skipped_steps": float(self.skipped_steps),
            "kl_coef": self.kl_coef,
            "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
            "episodes": float(self.episodes + self.global_sum(len(scores))),
        }
        if self.critic_kind != "none":

            def variance(x: Tensor) -> Tensor:
                mean = self.global_sum((x * mask).sum()) / count
                return self.global_sum(((x - mean) ** 2 * mask).sum()) / count

            spread = float(variance(judged.returns))
            unexplained = float(variance(judged.returns - rollout.values))
            values["explained_variance"] = 1 - unexplained / spread if spread > 1e-8 else 0.0  # nothing to explain
        self.log_dict({f"train/{name}": value for name, value in values.items()})
        self.log_dict({f"reward/{name}": self.global_mean(value) for name, value in factors.items()})
        for name in ("reward", "kl"):
            self.log(name, values[name], prog_bar=True, logger=False)

    # Optimizer and state --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over policy and critic, and a learning rate that goes over the run's iterations."""
        o = self.options
        optimizer = make_optimizer(self.parameters(), o.learning_rate, o.weight_decay, o.adam_eps, o.adam_beta2)
        iterations = self.trainer.estimated_stepping_batches
        return {"optimizer": optimizer, "lr_scheduler": make_scheduler(optimizer, o.schedule, o.warmup, iterations)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counters and the adaptive coefficient, which no tensor holds."""
        names = ("iterations", "episodes", "tokens", "kl_coef", "skipped_steps", "skipped_in_a_row")
        checkpoint["rlchat"] = {name: getattr(self, name) for name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of :meth:`on_save_checkpoint`; a fixed kl_coef is what the options say now."""
        super().on_load_checkpoint(checkpoint)
        for name, value in checkpoint["rlchat"].items():
            if name != "kl_coef" or self.adaptive_kl is not None:
                setattr(self, name, value)
        if self.adaptive_kl is not None:
            self.adaptive_kl.coef = self.kl_coef
