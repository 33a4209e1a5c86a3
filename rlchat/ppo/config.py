"""The options of PPO and their checks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rlchat.errors import UserError
from rlchat.ppo.advantages import ESTIMATORS, AdvantageEstimator
from rlchat.ppo.engines import EngineName
from rlchat.ppo.losses import KLKind
from rlchat.training.options import StageOptions
from rlchat.utils.ranges import check_room, fractions, not_negative, positive, positive_integers

_log = logging.getLogger("rlchat")

CriticKind = Literal["shared", "separate", "none"]

_LOWEST_IN_VLLM = 0.01  # temperature; vLLM replaces lower ones by it


@dataclass(kw_only=True)
class PPOConfig(StageOptions):
    """The arguments of :class:`rlchat.ppo.module.PPOModule` without the reward; its docstring describes them.

    Raises:
        UserError: for an option that is out of range or contradicts another.
    """

    # The model
    hidden_dim: int | None
    # Rollouts
    max_new_tokens: int
    turns: int
    group_size: int
    temperature: float
    rollout_engine: EngineName = "rlchat"
    vllm_memory: float = 0.3
    # Optimization
    ppo_epochs: int
    minibatches: int
    micro_batch_size: int | None
    # Advantages and critic
    advantage: str
    critic: Literal["shared", "separate"]
    critic_init: str | None
    critic_warmup: int
    gamma: float
    lam: float
    lam_critic: float | None
    whiten_rewards: bool
    # The loss
    clip_eps: float
    clip_eps_high: float | None
    dual_clip: float | None
    value_clip: float
    value_coef: float
    entropy_coef: float
    sft_coef: float
    # KL to the reference model
    kl_coef: float
    kl_in: Literal["reward", "loss"]
    kl_kind: KLKind | None
    kl_target: float | None
    kl_horizon: int
    # Limits
    target_kl: float | None
    max_grad_norm: float
    seed: int

    def __post_init__(self) -> None:
        StageOptions.__post_init__(self)
        positive_integers(
            max_new_tokens=self.max_new_tokens,
            turns=self.turns,
            group_size=self.group_size,
            ppo_epochs=self.ppo_epochs,
            minibatches=self.minibatches,
            micro_batch_size=self.micro_batch_size,
            kl_horizon=self.kl_horizon,
        )
        not_negative(
            critic_warmup=self.critic_warmup,
            clip_eps=self.clip_eps,
            clip_eps_high=self.clip_eps_high,
            value_clip=self.value_clip,
            value_coef=self.value_coef,
            sft_coef=self.sft_coef,
            kl_coef=self.kl_coef,
        )
        fractions(gamma=self.gamma, lam=self.lam)
        if self.lam_critic is not None:
            fractions(lam_critic=self.lam_critic)
        positive(max_grad_norm=self.max_grad_norm, kl_target=self.kl_target)
        if not 1e-6 <= self.temperature <= 1e6:
            raise UserError(f"invalid value {self.temperature} for temperature: expected a number from 1e-6 to 1e6")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise UserError(f"invalid value {self.dual_clip} for dual_clip: expected a number above 1, or null")
        self._check_engine()
        self._check_kl()
        self._check_advantage()

    @property
    def start(self) -> tuple[Any, ...]:
        """The first arguments of :func:`rlchat.training.initial_model.open_policy`."""
        return self.base_model, self.tiktoken_encoding, self.max_length, self.hidden_dim, self.init_from

    @property
    def estimator(self) -> AdvantageEstimator:
        """The advantage estimator that ``advantage`` names."""
        return ESTIMATORS[self.advantage]

    @property
    def critic_kind(self) -> CriticKind:
        """The kind of critic; ``none`` if the estimator does not use one."""
        return self.critic if self.estimator.needs_critic else "none"

    @property
    def kl_estimator(self) -> KLKind:
        """``kl_kind`` or its default: k1 in the reward, k3 in the loss."""
        return self.kl_kind or ("k1" if self.kl_in == "reward" else "k3")

    def check_length(self, max_length: int) -> None:
        """Raises :class:`UserError` if a response can fill the whole ``max_length`` of the model."""
        check_room(self.max_new_tokens, max_length)

    def _check_engine(self) -> None:
        if self.rollout_engine not in get_args(EngineName):
            names = ", ".join(get_args(EngineName))
            raise UserError(f"invalid value '{self.rollout_engine}' for rollout_engine: expected one of {names}")
        if not 0 < self.vllm_memory <= 1:
            raise UserError(
                f"invalid value {self.vllm_memory} for vllm_memory: expected a number above 0 and at most 1"
            )
        if self.rollout_engine == "vllm" and self.temperature < _LOWEST_IN_VLLM:
            raise UserError(
                f"invalid value {self.temperature} for temperature: rollout_engine vllm does not sample below "
                f"{_LOWEST_IN_VLLM}; raise it, or set --model.rollout_engine rlchat"
            )

    def _check_kl(self) -> None:
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError(
                "kl_target adapts kl_coef by multiplication, so kl_coef 0 would stay 0; set --model.kl_coef above 0"
            )
        if (self.kl_in, self.kl_estimator) == ("loss", "k1"):
            _log.warning(
                "kl_kind k1 in the loss has a gradient of 0 on average, so there is no KL penalty: use k2 or k3"
            )

    def _check_advantage(self) -> None:
        if self.advantage not in ESTIMATORS:
            choices = ", ".join(ESTIMATORS)
            raise UserError(f"invalid value '{self.advantage}' for advantage: expected one of {choices}")
        estimator = self.estimator
        if estimator.needs_group and self.group_size < 2:
            raise UserError(
                f"advantage {self.advantage} compares responses to the same prompt; set --model.group_size to 2 or more"
            )
        if not estimator.allows_turns and self.turns > 1:
            raise UserError(f"advantage {self.advantage} does not support turns; set --model.turns 1, or use gae")
        if not estimator.allows_whiten_rewards and self.whiten_rewards:
            raise UserError(
                f"advantage {self.advantage} does not support whiten_rewards; "
                f"set --model.whiten_rewards false, or use gae"
            )
        if not estimator.needs_critic and (self.critic == "separate" or self.critic_init or self.critic_warmup):
            raise UserError(
                f"advantage {self.advantage} has no critic; set --model.critic shared, --model.critic_init null and "
                f"--model.critic_warmup 0, or use gae"
            )
        if not estimator.needs_critic and self.lam_critic is not None:
            raise UserError(
                f"advantage {self.advantage} has no critic; set --model.lam_critic null, or --model.advantage gae"
            )
        if self.critic_init is not None and self.critic != "separate":
            raise UserError("critic_init requires a separate critic; set --model.critic separate")


def refuse_max_steps(max_steps: int) -> None:
    """Raises :class:`UserError` if a trainer limits the number of optimizer steps; an iteration takes many of them."""
    if max_steps > 0:
        raise UserError(
            "trainer.max_steps is not supported by PPO, which takes many optimizer steps per iteration; set "
            "--trainer.max_epochs and --trainer.limit_train_batches instead"
        )
