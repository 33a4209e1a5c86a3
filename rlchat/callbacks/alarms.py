"""Says so when a run goes wrong in a way that its reward does not show."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlchat.distributed.collectives import gather_objects
from rlchat.errors import UserError, at_least_one
from rlchat.ppo.module import PPOModule

_log = logging.getLogger("rlchat")

# Validations in a row in which the training reward rose and the held-out reward fell. Chance puts four values into a
# given order once in 24 times, and both once in 576.
_FALLS = 3


class Alarms(Callback):
    """Watches PPO and warns, once for each thing that goes wrong, with what to do about it.

    It warns where the reward rises while the held-out reward falls, the replies become one, the KL to the reference
    passes a bound, the critic explains less than nothing for long, most replies are cut off, or a reward factor gives
    every reply the same.

    Args:
        kl_bound: nats a reply beyond which the policy has left its reference.
        min_distinct: share of an iteration's replies that differ, at least.
        max_truncated: share of the replies that run out of tokens, at most.
        patience: iterations in a row that something has to last, where one says little.
    """

    def __init__(
        self, kl_bound: float = 50.0, min_distinct: float = 0.1, max_truncated: float = 0.5, patience: int = 20
    ) -> None:
        if not kl_bound > 0:
            raise UserError(f"Alarms: kl_bound is {kl_bound}, it must be above 0")
        for name, share in (("min_distinct", min_distinct), ("max_truncated", max_truncated)):
            if not 0 <= share <= 1:
                raise UserError(f"Alarms: {name} is {share}, it must be a share from 0 to 1")
        self.kl_bound = kl_bound
        self.min_distinct = min_distinct
        self.max_truncated = max_truncated
        self.patience = at_least_one("Alarms", "patience", patience)
        self.raised: list[str] = []
        """What was warned of, in that order."""
        self._lasting: dict[str, int] = {}
        self._rewards: list[float] = []  # of the iterations since the last validation
        self._trained: list[float] = []  # their mean, for each validation
        self._held_out: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "raised": [*self.raised],
            "lasting": {**self._lasting},
            "rewards": [*self._rewards],
            "trained": [*self._trained],
            "held_out": [*self._held_out],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.raised, self._lasting = state_dict["raised"], state_dict["lasting"]
        self._rewards, self._trained = state_dict["rewards"], state_dict["trained"]
        self._held_out = state_dict["held_out"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(pl_module, PPOModule) or pl_module.last_iteration is None:
            return
        seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._rewards.append(seen["train/reward"])
        if seen["train/kl"] > self.kl_bound:
            self._warn(
                trainer,
                "kl",
                f"the KL to the reference is {seen['train/kl']:.0f} nats a reply, beyond {self.kl_bound:g}: raise "
                f"--model.kl_coef, or set --model.kl_target",
            )
        replies = len(pl_module.last_iteration.rollout.replies) * trainer.world_size
        distinct = seen["train/distinct_replies"]
        if replies > 1 and (distinct < self.min_distinct or round(distinct * replies) == 1):
            self._warn(
                trainer,
                "collapse",
                f"only {distinct:.1%} of an iteration's replies differ: the policy says one thing to everybody; raise "
                f"--model.kl_coef or --model.entropy_coef, and look at what the reward likes",
            )
        if self._lasts("truncated", seen["train/truncated_fraction"] > self.max_truncated):
            self._warn(
                trainer,
                "truncated",
                f"{seen['train/truncated_fraction']:.0%} of the replies run out of tokens: raise "
                f"--model.max_new_tokens, or give rlchat.rewards.MissingEnd more weight",
            )
        learning = pl_module.iterations > pl_module.options.critic_warmup
        if self._lasts("critic", learning and seen.get("train/explained_variance", 0.0) < 0):
            self._warn(
                trainer,
                "critic",
                f"the critic has explained less than nothing for {self.patience} iterations: raise --model.value_coef, "
                f"give it --model.critic_warmup, or a network of its own with --model.critic separate",
            )
        for name in self._constant(pl_module.last_iteration.factors):
            self._warn(
                trainer,
                f"reward/{name}",
                f"the reward factor {name} has given every reply the same for {self.patience} iterations: it teaches "
                f"nothing; change its bounds, or leave it out",
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._rewards or "val/reward" not in trainer.callback_metrics:
            return
        self._held_out.append(float(trainer.callback_metrics["val/reward"]))
        self._trained.append(sum(self._rewards) / len(self._rewards))
        self._rewards = []
        trained, held_out = (series[-_FALLS - 1 :] for series in (self._trained, self._held_out))
        rose = all(after > before for before, after in pairwise(trained))
        fell = all(after < before for before, after in pairwise(held_out))
        if len(held_out) > _FALLS and rose and fell:
            self._warn(
                trainer,
                "hacking",
                f"the reward rises in training and has fallen on held-out prompts {_FALLS} times in a row "
                f"({held_out[0]:.3g} → {held_out[-1]:.3g}): the policy learns these prompts by heart, or a flaw of the "
                f"reward; use the best model so far, more prompts, or a higher --model.kl_coef",
            )

    def _lasts(self, what: str, now: bool) -> bool:
        """Whether ``what`` has been so for as long as it takes."""
        self._lasting[what] = self._lasting.get(what, 0) + 1 if now else 0
        return self._lasting[what] >= self.patience

    def _constant(self, factors: dict[str, torch.Tensor]) -> list[str]:
        """The factors that have given all replies of all processes the same for as long as it takes."""
        mine = {name: (float(x.min()), float(x.max())) for name, x in factors.items() if len(x)}
        everyone = gather_objects(mine)
        found = []
        for name in factors:
            spans = [part[name] for part in everyone if name in part]
            low, high = min(low for low, _ in spans), max(high for _, high in spans)
            if self._lasts(f"constant {name}", low == high):
                found.append(name)
        return found

    def _warn(self, trainer: Trainer, what: str, message: str) -> None:
        if what in self.raised:
            return
        self.raised.append(what)
        if trainer.is_global_zero:
            _log.warning("alarm: %s", message)
