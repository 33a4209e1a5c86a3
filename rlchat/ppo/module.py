"""PPO on a language model, from top to bottom.

One training batch is one iteration: the policy responds to prompts, the responses are scored, and the policy takes
``ppo_epochs`` × ``minibatches`` optimizer steps (Ziegler et al. 2019; Ouyang et al. 2022). The details follow Huang et
al. 2024, *The N+ Implementation Details of RLHF with PPO* (arXiv 2403.17031).

    rlchat fit --config demo/ppo

Start with :meth:`PPOModule.training_step`, :meth:`PPOModule.update` and :meth:`PPOModule.minibatch_loss`. The formulas
are in :mod:`rlchat.ppo.advantages` and :mod:`rlchat.ppo.losses`, sampling is in :mod:`rlchat.ppo.rollouts`.

Shapes: B rows, N responses (one per row, or one per turn if the policy answers whole conversations), R columns from the
first to the last sampled token of a row. ``response_mask`` is Bool [B, R] and True where a token was sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from rlchat.data.datamodule import DataNeeds, PromptBatch, SequenceBatch
from rlchat.distributed.collectives import whole
from rlchat.models.adapters import AdapterKind
from rlchat.models.model_file import PolicyBundle
from rlchat.ppo.accumulation import LossAndMetrics, accumulate_gradients
from rlchat.ppo.advantages import Advantages, EstimatorInputs, masked_whiten, place_scores, shape_rewards
from rlchat.ppo.checkpoint import ResumableModule
from rlchat.ppo.config import PPOConfig, refuse_max_steps
from rlchat.ppo.engines import EngineName
from rlchat.ppo.losses import KLKind, kl_estimate, masked_mean, policy_loss, value_loss
from rlchat.ppo.metrics import Stopwatch, global_mean, iteration_metrics, mean_of_steps
from rlchat.ppo.minibatches import local_minibatches, not_empty, shuffled_rows
from rlchat.ppo.rollouts import Rollout
from rlchat.ppo.state import saving_last_good, stop_run
from rlchat.rewards import Reward
from rlchat.training.optimizers import OptimizerName
from rlchat.training.options import ChatFormatName, Schedule


@dataclass(frozen=True, slots=True)
class Iteration:
    """The rollout of one iteration on this process and the values computed from it, for the update and callbacks."""

    rollout: Rollout
    factors: dict[str, Tensor]  # [N] each: the weighted terms of the reward
    scores: Tensor  # [N] the reward of each response: the sum of the factors
    rewards: Tensor  # [B, R] per-token rewards, 0 outside the response mask
    advantages: Tensor  # [B, R], 0 outside the response mask
    returns: Tensor  # [B, R], the targets of the critic; 0 without one


class PPOModule(ResumableModule):
    """PPO as a LightningModule with manual optimization.

    Args:
        base_model: a transformers model by name or path, a GGUF file, or an inline configuration (random weights).
        tiktoken_encoding: a tiktoken or packaged encoding by name, the path of a rank file, or a folder or model whose
            tokenizer is converted exactly; by default the base model's own.
        max_length: the maximum number of tokens in a conversation, responses included.
        hidden_dim: units in the hidden layer of the value head; 0 for a linear head.
        init_from: the model file of an SFT model to start from instead of base_model.
        reward: scores the responses; by default the rule factors of :class:`rlchat.rewards.Reward`.
        max_new_tokens: the maximum number of tokens in a response.
        turns: the number of user turns per conversation that the policy answers, one after the other; each response
            gets a reward. With 1, every prefix that ends with a user message is a separate prompt.
        group_size: the number of responses to each prompt.
        temperature: the sampling temperature, which also applies to all log-probs.
        rollout_engine: what samples the responses: rlchat itself, or vllm, on one CUDA GPU.
        vllm_memory: the share of the GPU's memory that vLLM may use during a rollout.
        learning_rate: the peak learning rate of AdamW.
        schedule: the learning rate schedule after the warm-up.
        warmup: the fraction of the iterations in which the learning rate rises from 0.
        weight_decay: the weight decay of AdamW, on matrices only.
        adam_eps: ε of AdamW.
        adam_beta2: β₂ of AdamW; rewards are noisy, so it averages squared gradients over more steps than in the other
            stages.
        optimizer: adamw, or adamw_8bit or paged_adamw_8bit of bitsandbytes, whose state needs a quarter of the memory;
            the paged one moves it to the CPU's memory if the GPU has none left.
        ppo_epochs: passes over each rollout.
        minibatches: optimizer steps in each pass.
        micro_batch_size: rows per forward pass on each device; gradients accumulate over a minibatch. None: all, or
            on a CPU as many as have 48 MiB of logits.
        advantage: the advantage estimator: gae uses a critic; rloo and grpo compare the responses to the same prompt
            instead; reinforce_pp compares each token's rewards to go with those of the whole batch.
        critic: a value head on the policy's backbone (shared), or a separate network (separate).
        critic_init: the model file of a reward model that initializes a separate critic; by default it is a copy of the
            policy's backbone.
        critic_warmup: the number of initial iterations in which only the critic is trained.
        clip_eps: ε, the clip range of the ratio: 1 ± ε.
        clip_eps_high: the upper clip range, if it differs from clip_eps.
        dual_clip: an upper bound (above 1) on the ratio where the advantage is negative; None: no bound.
        value_clip: the clip range of the values around the old values, in the value loss.
        value_coef: the weight of the value loss.
        entropy_coef: the weight of the entropy bonus.
        kl_coef: β, the coefficient of the KL penalty; its initial value if kl_target is set.
        kl_in: where to apply the KL penalty: subtract it from the reward of each token, or add it to the loss.
        kl_kind: the KL estimator: k1, k2 or k3. None: k1 in the reward, k3 in the loss.
        kl_target: kl_coef adapts to reach this KL, in nats per response; None keeps kl_coef fixed.
        kl_horizon: the number of episodes in which the adaptive kl_coef can change by about 20 %.
        gamma: γ, the discount per token.
        lam: λ of generalized advantage estimation.
        lam_critic: λ of the returns that the critic is trained on; None: lam, as for the advantages.
        whiten_rewards: scale the per-token rewards to unit variance, without changing their mean.
        target_kl: stop training on a rollout when approx_kl, the KL to the old policy, exceeds this; None: never.
        max_grad_norm: the maximum norm of the gradients, which are clipped to it.
        sft_coef: the weight of an additional SFT loss on human conversations (PPO-ptx of InstructGPT).
        seed: the seed of sampling and of the order of minibatches.
        adapter: lora trains low-rank adapters of the linear layers and freezes the backbone's weights; by default, all
            weights are trained.
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
        turns: int = 1,
        group_size: int = 1,
        temperature: float = 1.0,
        rollout_engine: EngineName = "rlchat",
        vllm_memory: float = 0.3,
        learning_rate: float = 1e-4,
        schedule: Schedule = "linear",
        warmup: float = 0.0,
        weight_decay: float = 0.0,
        adam_eps: float = 1e-5,
        adam_beta2: float = 0.999,
        optimizer: OptimizerName = "adamw",
        ppo_epochs: int = 4,
        minibatches: int = 4,
        micro_batch_size: int | None = None,
        advantage: str = "gae",
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
        lam_critic: float | None = None,
        whiten_rewards: bool = False,
        target_kl: float | None = None,
        max_grad_norm: float = 1.0,
        sft_coef: float = 0.0,
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
        super().__init__(PPOConfig.of(locals()), reward or Reward())
        self.save_hyperparameters(ignore=["reward"])

    def setup(self, stage: str) -> None:
        """Rejects ``max_steps``, also of a Trainer in a script. ``fast_dev_run`` N runs N iterations.

        Raises:
            UserError: if the trainer limits the number of optimizer steps; an iteration takes many of them.
        """
        if stage != "fit":
            return
        if getattr(self.trainer, "fast_dev_run", False):  # Lightning sets max_steps to N, and limit_train_batches too
            self.trainer.fit_loop.epoch_loop.max_steps = -1
        refuse_max_steps(self.trainer.max_steps)

    # ---- the algorithm -----------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration of PPO on the prompts of ``batch``."""
        o, clock = self.options, Stopwatch()
        self.good_weights.due = True
        # 1. Rollout: sample responses; compute old_logprobs, ref_logprobs and values of every sampled token [B, R].
        rows = self.global_rows(len(batch.ids), copies=o.group_size)
        with saving_last_good(self):
            self.rollout_engine.synchronize(self)
            rollout = self.roll_out(batch.repeated(o.group_size), rows, stream=self.iterations)
        clock.lap("rollout_s")
        # 2. Score each response as text [N]. The reward is a sum of factors.
        factors = self.score_responses(rollout.conversations, rollout.replies)
        scores = torch.stack(list(factors.values())).sum(0).to(self.device)
        clock.lap("score_s")
        # 3. Per-token rewards (score and KL penalty), from these advantages and returns [B, R].
        rewards = self.token_rewards(rollout, scores)
        advantages, returns = self.compute_advantages(rollout, rewards)
        self.last_iteration = Iteration(rollout, factors, scores, rewards, advantages, returns)
        # 4. Update the policy and the critic.
        update = self.update(self.last_iteration, batch.sequences)
        rollout.kept.release()
        clock.lap("update_s")
        # 5. Log.
        self.episodes += int(self.global_sum(len(scores)))
        metrics = iteration_metrics(self, self.last_iteration, update)
        self.log_iteration(metrics, factors, clock)
        # 6. Adapt the KL coefficient and the learning rate for the next iteration.
        self.iterations += 1
        if self.adaptive_kl is not None and self.iterations > o.critic_warmup:
            # With more episodes than the horizon, one step could make the coefficient negative.
            episodes = min(int(self.global_sum(len(scores))), o.kl_horizon)
            self.kl_coef = self.adaptive_kl.update(metrics["kl"], episodes)
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def token_rewards(self, rollout: Rollout, scores: Tensor) -> Tensor:
        """Per-token rewards [B, R] from the scores [N] of the responses, before any whitening."""
        o = self.options
        kl_coef = self.kl_coef if o.kl_in == "reward" else 0.0
        placed, mask = place_scores(scores, rollout.response_index), rollout.response_mask
        return shape_rewards(placed, rollout.old_logprobs, rollout.ref_logprobs, mask, kl_coef, o.kl_estimator)

    def compute_advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        """Advantages and returns [B, R] from the per-token rewards [B, R]."""
        o, mask = self.options, rollout.response_mask
        if o.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False, reduce=self.global_sum)
        numbers = (o.group_size, o.gamma, o.lam, self.global_sum, o.lam_critic)
        return o.estimator.compute(EstimatorInputs(rewards, rollout.values, mask, *numbers))

    def update(self, iteration: Iteration, sequences: SequenceBatch | None) -> dict[str, float]:
        """``ppo_epochs`` passes of ``minibatches`` optimizer steps over the rollout; returns their mean metrics."""
        optimizer, steps = self.optimizers(), []
        for epoch in range(self.options.ppo_epochs):
            for minibatch in self.minibatches(len(iteration.rollout.ids), epoch):
                # a. The gradient of the mean loss over the tokens of the minibatch.
                optimizer.zero_grad()  # type: ignore[union-attr]
                metrics = accumulate_gradients(self, self.minibatch_losses(iteration, minibatch, sequences))
                # b. One optimizer step, which is skipped if the loss or the gradient is not finite.
                self.guard.check_losses(metrics)
                optimizer.step()  # type: ignore[union-attr]  # on_before_optimizer_step clips the gradient
                steps.append({**metrics, "grad_norm": self.grad_norm})
                self.count_skipped_steps()
            # c. Stop early if the policy has moved too far from the old policy.
            if self.options.target_kl is not None and steps[-1]["approx_kl"] > self.options.target_kl:
                break
        optimizer.zero_grad()  # type: ignore[union-attr]  # the next rollout needs the memory
        return {**mean_of_steps(steps), "gradient_residual": self.gradient_check.pop()}

    def minibatch_loss(self, iteration: Iteration, rows: Tensor, tokens: Tensor) -> LossAndMetrics:
        """The PPO loss on ``rows`` (Long) of the rollout, and its metrics: sums over tokens, divided by ``tokens``."""
        o, rollout = self.options, iteration.rollout
        rows, mask = not_empty(rows, rollout.response_mask)
        new = self.evaluate_tokens(
            self.model,
            rollout.ids[rows],
            rollout.attention_mask[rows],
            rollout.sampled[rows],
            rollout.response_mask[rows],
            rollout.kept.rows(rows),
        )
        self.gradient_check.watch(self, new, iteration, rows, mask, tokens)
        old_logprobs, advantages = rollout.old_logprobs[rows], iteration.advantages[rows]
        # a. Policy: clipped surrogate, entropy bonus, and the KL penalty if it is not in the reward.
        ratio = (new.logprobs - old_logprobs).exp().detach()
        clips: dict[str, Any] = {"clip_eps_high": o.clip_eps_high, "dual_clip": o.dual_clip}
        policy = policy_loss(new.logprobs, old_logprobs, advantages, mask, o.clip_eps, tokens, **clips)
        entropy = masked_mean(new.entropy, mask, tokens)
        loss = policy.loss
        if o.entropy_coef:  # otherwise, the gradient of the entropy is not computed
            loss = loss - o.entropy_coef * entropy
        if o.kl_in == "loss":
            kl = kl_estimate(new.logprobs, rollout.ref_logprobs[rows], o.kl_estimator)
            loss = loss + self.kl_coef * masked_mean(kl, mask, tokens)
        metrics = {
            "policy_loss": policy.loss.detach(),
            "entropy": entropy.detach(),
            "approx_kl": policy.approx_kl,
            "clip_fraction": policy.clipfrac,
            "ratio_residual": masked_mean((ratio - 1).abs(), mask, tokens),
        }
        # b. Critic: clipped squared error.
        if self.critic_kind != "none":
            critic = value_loss(new.values, rollout.values[rows], iteration.returns[rows], mask, o.value_clip, tokens)
            loss = loss + o.value_coef * critic.loss
            metrics |= {"value_loss": critic.loss.detach(), "value_clip_fraction": critic.clipfrac}
            metrics["value_residual"] = masked_mean((new.values.detach() - rollout.values[rows]).abs(), mask, tokens)
        return loss, metrics

    # ---- minibatches and processes -----------------------------------------------------------------------------------

    def minibatches(self, rows: int, epoch: int) -> list[list[Tensor]]:
        """Which of its ``rows`` a process has in each minibatch, by microbatch; see :mod:`rlchat.ppo.minibatches`."""
        o, world_size = self.options, self.trainer.world_size
        order = shuffled_rows(rows * world_size, o.seed, self.iterations, epoch)
        sizes = (o.minibatches, self.micro_batch_size, o.group_size)
        return local_minibatches(order, *sizes, world_size, self.global_rank)

    def minibatch_losses(
        self, iteration: Iteration, minibatch: list[Tensor], sequences: SequenceBatch | None
    ) -> list[Callable[[], LossAndMetrics]]:
        """Functions that compute the losses of a minibatch: SFT losses, then one PPO loss per microbatch.

        Each loss is a sum over tokens, divided by the number of tokens per process (global tokens of the minibatch /
        processes).
        """
        rows = torch.cat(minibatch).to(self.device)
        tokens = self.global_sum(iteration.rollout.response_mask[rows].sum()) / self.trainer.world_size
        losses = [partial(self.minibatch_loss, iteration, part.to(self.device), tokens) for part in minibatch]
        if sequences is None:
            return [*losses]
        targets = self.global_sum(sequences.loss_mask[:, 1:].sum()).clamp(min=1) / self.trainer.world_size
        parts = sequences.split(self.micro_batch_size or len(sequences.ids))
        return [*(partial(self.sft_loss, part, targets) for part in parts), *losses]

    def sft_loss(self, sequences: SequenceBatch, tokens: Tensor) -> LossAndMetrics:
        """``sft_coef`` times the negative log-prob of the human responses in ``sequences``, divided by ``tokens``."""
        loss = -self.token_stats(sequences).logprobs.sum() / tokens
        return self.options.sft_coef * loss, {"sft_loss": loss.detach()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the gradients, which are already unscaled here.

        During the critic's warm-up, the policy has no gradients, so its weights and optimizer state do not change.
        """
        if self.iterations < self.options.critic_warmup:
            for name, parameter in self.named_parameters():
                if not name.startswith(("critic.", "model.value_head.")):
                    parameter.grad = None
        norm = self.check_gradients()
        self.good_weights.remember(self, self.guard)
        self.grad_norm = float(whole(norm))
        torch.nn.utils.clip_grads_with_norm_(self.parameters(), self.options.max_grad_norm, norm)
        self.guard.drop_gradients(self.parameters())

    def count_skipped_steps(self) -> None:
        """Counts the step if it was skipped. Raises :class:`UserError` after too many in a row."""
        self.guard.count(f"iteration {self.iterations + 1}", log=self.trainer.is_global_zero)
        if self.guard.must_stop:
            stop_run(self)

    # ---- logs, data and files ----------------------------------------------------------------------------------------

    def log_iteration(self, metrics: dict[str, float], factors: dict[str, Tensor], clock: Stopwatch) -> None:
        """Logs the metrics of an iteration by their public names."""
        rollout = self.last_iteration.rollout  # type: ignore[union-attr]
        tokens = int(self.global_sum(rollout.response_mask.sum()))
        self.log_dict({f"train/{name}": value for name, value in metrics.items()})
        self.log_dict({f"reward/{name}": global_mean(self, value) for name, value in factors.items()})
        self.log_dict({f"time/{name}": seconds for name, seconds in clock.seconds.items()})
        self.log("perf/tokens_per_s", tokens / sum(clock.seconds.values()))
        for name in ("reward", "kl"):
            self.log(name, metrics[name], prog_bar=True, logger=False)

    @property
    def data_needs(self) -> DataNeeds:
        """Prompts, and conversations for the SFT loss if there is one."""
        return DataNeeds(
            task="ppo",
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            max_new_tokens=self.options.max_new_tokens,
            mix_sequences=self.options.sft_coef > 0,
            whole_conversations=self.options.turns > 1,
        )

    def bundle(self) -> PolicyBundle:
        """The chat model as in every stage, with the critic and a description of the reward."""
        bundle = super().bundle()
        bundle.critic = self.critic
        bundle.about |= {"critic": self.critic_kind, "reward": self.reward.describe()}
        return bundle
