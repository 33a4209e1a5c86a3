"""Warns about problems of a PPO run that its training reward does not show, and about broken invariants."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlchat.callbacks.best_model import BestModel
from rlchat.callbacks.run_state import batches_seen, is_fast_dev_run
from rlchat.distributed.collectives import gather_objects, greatest
from rlchat.errors import UserError, at_least_one
from rlchat.ppo.checks.invariants import INVARIANTS, InvariantChecks, is_precise
from rlchat.ppo.checks.residuals import broken_prompts, fingerprint, prompt_header
from rlchat.ppo.checks.sampler import CERTAIN, MANY_DEVIATIONS, PreviousTokens, Surprisal
from rlchat.ppo.module import PPOModule
from rlchat.utils.files import append_lines

ChecksMode = Literal["warn", "strict"]

_log = logging.getLogger("rlchat")

# Consecutive validations in which the training reward rose and the held-out reward fell. Four random values are in a
# given order with probability 1/24, and both series with probability 1/576.
_FALLS = 3

# Consecutive validations that must show a hacked reward.
_HACKED = 2
# What counts as clearly worse than the best: a drop in answer accuracy, a growth in perplexity, and a drop in a factor
# relative to the rise of the reward.
_ACCURACY_DROP, _PERPLEXITY_GROWTH, _FACTOR_DROP = 0.1, 1.5, 0.5

# The usual KL: 0.5 nats per token of a response, at least 10 nats. Gao et al. 2022 (arXiv 2210.10760) find that the
# true reward declines between 10 and 100 nats, depending on the size of the reward model.
_USUAL_KL_PER_TOKEN, _USUAL_KL = 0.5, 10.0


def reward_hacking(history: Sequence[Mapping[str, float]]) -> str | None:
    """What has become worse while the held-out reward rose, as a clause; None if nothing has.

    The latest validation is compared with the earlier one in which the other quantity was best. The reward must
    have risen since then. The quantities are the answer accuracy, the perplexity on conversations, and each factor of
    the reward.

    Args:
        history: the metrics of each validation by name without ``val/``: ``reward``, and if available
            ``answer_accuracy``, ``perplexity`` and ``reward_<factor>``.
    """
    now, before = history[-1], history[:-1]

    def since(name: str, best: Callable[..., Mapping[str, float]]) -> Mapping[str, float] | None:
        """The validation with the ``best`` value of ``name``, if the reward has risen since."""
        known = [metrics for metrics in before if name in metrics]
        if name not in now or not known:
            return None
        then = best(known, key=lambda metrics: metrics[name])
        return then if now["reward"] > then["reward"] else None

    then = since("answer_accuracy", max)
    if then is not None and then["answer_accuracy"] - now["answer_accuracy"] >= _ACCURACY_DROP:
        return f"the answer accuracy has fallen from {then['answer_accuracy']:.2f} to {now['answer_accuracy']:.2f}"
    then = since("perplexity", min)
    if then is not None and now["perplexity"] >= _PERPLEXITY_GROWTH * then["perplexity"]:
        return f"the perplexity on conversations has grown from {then['perplexity']:.3g} to {now['perplexity']:.3g}"
    for name in now:
        then = since(name, max) if name.startswith("reward_") else None
        if then is not None and then[name] - now[name] >= _FACTOR_DROP * (now["reward"] - then["reward"]):
            factor = name.removeprefix("reward_")
            return f"the factor {factor} has fallen from {then[name]:.3g} to {now[name]:.3g}"
    return None


# Mean distance from 1 of the ratio between the policy and what sampled. In bfloat16, rounding gives a few hundredths.
_OTHER_SAMPLER = 0.2

# Mean KL to the old policy over the steps of an update, in nats per token. In runs that learn it is below 0.05.
_LARGE_UPDATE = 0.5
# Explained variance of a critic that is worse than none by far: its error has this many times the variance of returns.
_FAR_CRITIC = 10.0
# Surprisal minus entropy, in nats per token, that rounding may explain in low precision or with another engine.
_SURPRISAL_BIAS = 0.01
# Consecutive iterations in which these two, and weights that do not change, must show.
_SOON = 3


class Alarms(Callback):
    """Watches PPO and warns once about each problem, with advice.

    It warns about reward hacking: the training reward rises while the held-out reward falls, or the held-out reward
    while answer accuracy, perplexity or another factor of the reward worsens. It also warns when the responses become
    identical, the KL to the reference model exceeds a bound, the explained variance stays negative, most responses are
    truncated, a reward factor is constant, the rollout engine samples from another distribution than the policy or
    repeats its random numbers, a prompt has no end, an update moves the policy too far or not at all, or the critic's
    values are far off.

    Apart from these signs, it checks the invariants of PPO, which hold in every correct run: for example, the ratio is
    1 before the first optimizer step, and the reference model does not change. See
    :mod:`rlchat.ppo.checks.invariants`. ``alarms.jsonl`` in the run's log folder records all of them.

    Args:
        kl_bound: warn above this KL to the reference model, in nats per response. By default 0.5 nats per token
            at the mean response length, and at least 10.
        min_distinct: warn below this fraction of distinct responses in an iteration.
        max_truncated: warn above this fraction of responses truncated at ``max_new_tokens``.
        patience: the number of consecutive iterations that a problem must last.
        checks: what a broken invariant does: warn once, or stop the run after this iteration (strict), with
            ``last.ckpt`` and exit code 2. ``--checks`` is short for ``--alarms.checks``.
    """

    def __init__(
        self,
        kl_bound: float | None = None,
        min_distinct: float = 0.1,
        max_truncated: float = 0.5,
        patience: int = 20,
        checks: ChecksMode = "warn",
    ) -> None:
        if checks not in get_args(ChecksMode):
            raise UserError(f"invalid value '{checks}' for Alarms.checks: expected warn or strict")
        if kl_bound is not None and not kl_bound > 0:
            raise UserError(f"invalid value {kl_bound} for Alarms.kl_bound: expected a positive number")
        for name, share in (("min_distinct", min_distinct), ("max_truncated", max_truncated)):
            if not 0 <= share <= 1:
                raise UserError(f"invalid value {share} for Alarms.{name}: expected a fraction from 0 to 1")
        self.kl_bound = kl_bound
        self.min_distinct = min_distinct
        self.max_truncated = max_truncated
        self.patience = at_least_one("Alarms", "patience", patience)
        self.checks = checks
        self.invariants = InvariantChecks()
        self.raised: list[str] = []
        """The problems that it has warned about, in order."""
        self.notes: list[dict[str, Any]] = []  # the rows of alarms.jsonl
        self._record: Path | None = None  # this file, on the first process
        self._lasting: dict[str, int] = {}
        self._weights: list[int] = []  # a fingerprint of the policy after the last iteration
        self._header: list[int] = []  # the last ids of every prompt
        self._tokens = PreviousTokens()
        self._surprisal = Surprisal()
        self._rewards: list[float] = []  # of the iterations since the last validation
        self._trained: list[float] = []  # their mean at each validation
        self._held_out: list[float] = []
        self._validations: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "raised": [*self.raised],
            "lasting": {**self._lasting},
            "rewards": [*self._rewards],
            "trained": [*self._trained],
            "held_out": [*self._held_out],
            "validations": [{**metrics} for metrics in self._validations],
            "surprisal": [*astuple(self._surprisal)],
            "notes": [{**note} for note in self.notes],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.raised, self._lasting = state_dict["raised"], state_dict["lasting"]
        self._rewards, self._trained = state_dict["rewards"], state_dict["trained"]
        self._held_out = state_dict["held_out"]
        self._validations = state_dict.get("validations", [])  # version 0.1 did not save them
        self._surprisal = Surprisal(*state_dict.get("surprisal", []))  # nor this
        self.notes = state_dict.get("notes", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers the weights of the reference model and of the policy, and starts the record of alarms."""
        log_dir = trainer.log_dir  # a collective
        if isinstance(pl_module, PPOModule):
            if log_dir is not None and trainer.loggers and trainer.is_global_zero and not is_fast_dev_run(trainer):
                self._record = Path(log_dir, "alarms.jsonl")
                append_lines(self._record, self.notes)  # of the run that this one resumes
            self.invariants.start(pl_module)
            self._weights = fingerprint(pl_module.model, trained_only=True)
            self._header = prompt_header(pl_module.tokenizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(pl_module, PPOModule) or pl_module.last_iteration is None:
            return
        seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._check_update(trainer, pl_module, seen)
        self._check_sampler(trainer, pl_module)
        self._check_invariants(trainer, pl_module, seen)
        self._rewards.append(seen["train/reward"])
        usual = max(_USUAL_KL, _USUAL_KL_PER_TOKEN * seen.get("train/response_length", 0.0))
        bound = usual if self.kl_bound is None else self.kl_bound
        if seen["train/kl"] > bound:
            self._warn(
                trainer,
                "kl",
                f"the KL to the reference model is {seen['train/kl']:.0f} nats per response, above {bound:g}: raise "
                f"--model.kl_coef, or set --model.kl_target",
            )
        replies = len(pl_module.last_iteration.rollout.replies) * trainer.world_size
        distinct = seen["train/distinct_replies"]
        if replies > 1 and (distinct < self.min_distinct or round(distinct * replies) == 1):
            self._warn(
                trainer,
                "collapse",
                f"only {distinct:.1%} of the responses of an iteration are distinct: the policy has collapsed; raise "
                f"--model.kl_coef or --model.entropy_coef, and check what the reward favors",
            )
        if self._lasts("truncated", seen["train/truncated_fraction"] > self.max_truncated):
            self._warn(
                trainer,
                "truncated",
                f"{seen['train/truncated_fraction']:.0%} of the responses are truncated: raise --model.max_new_tokens, "
                f"or raise the weight of rlchat.rewards.MissingEnd",
            )
        learning = pl_module.iterations > pl_module.options.critic_warmup
        if self._lasts("critic", learning and seen.get("train/explained_variance", 0.0) < 0):
            self._warn(
                trainer,
                "critic",
                f"explained variance has been negative for {self.patience} iterations: raise --model.value_coef, set "
                f"--model.critic_warmup, or train a separate network with --model.critic separate",
            )
        self._check_sampling(trainer, seen.get("train/sampling_residual", 0.0))
        for name in self._constant(pl_module.last_iteration.factors):
            self._warn(
                trainer,
                f"reward/{name}",
                f"the reward factor {name} has been the same for every response for {self.patience} iterations, so it "
                f"has no effect; change its bounds, or remove it",
            )

    def _check_invariants(self, trainer: Trainer, module: PPOModule, seen: Mapping[str, float]) -> None:
        """Warns of each invariant that does not hold, or stops the run because of the first."""
        assert module.last_iteration is not None
        metrics = {name.removeprefix("train/"): value for name, value in seen.items()}
        for name in self.invariants.broken(module, module.last_iteration, metrics):
            invariant = INVARIANTS[name]
            where = f"iteration {module.iterations}: {invariant.broken}"
            if self.checks == "strict":
                self._note(trainer, name, f"{where}; {invariant.fix}")
                stop_after_this_batch(trainer, UserError(f"{where}; {invariant.fix}, or set --checks warn"))
                return
            self._warn(trainer, name, f"{where}; {invariant.fix}")

    def _check_update(self, trainer: Trainer, module: PPOModule, seen: Mapping[str, float]) -> None:
        """Warns if the update moves the policy too far or not at all, or if the critic is far off."""
        before, self._weights = self._weights, fingerprint(module.model, trained_only=True)
        learning = module.iterations > module.options.critic_warmup
        trains = learning and seen.get("train/learning_rate", 0.0) > 0 and seen.get("train/optimizer_steps", 1.0) > 0
        assert module.last_iteration is not None
        is_signal = bool(module.last_iteration.advantages.any())  # not if all responses have the same reward
        same = trains and not greatest(module, int(before != self._weights or not is_signal))
        if self._lasts("frozen", same, _SOON):
            norm = seen.get("train/grad_norm", math.nan)
            message = (
                f"the weights of the policy have not changed in {_SOON} iterations, at a gradient norm of {norm:.2g}; "
                f"check --model.max_grad_norm, the optimizer's parameters, and the precision of the weights"
            )
            self._warn(trainer, "frozen", message)
        if self._lasts("large update", seen.get("train/approx_kl", 0.0) > _LARGE_UPDATE, _SOON):
            self._warn(
                trainer,
                "large update",
                f"an update moves the policy by {seen['train/approx_kl']:.2g} nats per token from what sampled: lower "
                f"--model.learning_rate, or set --model.target_kl",
            )
        if self._lasts("far critic", learning and seen.get("train/explained_variance", 0.0) < -_FAR_CRITIC, _SOON):
            self._warn(
                trainer,
                "far critic",
                f"the critic's values vary far more than the returns (explained variance "
                f"{seen['train/explained_variance']:.3g}): start the value head at 0, set --model.critic_warmup, or "
                f"check the scale of the reward",
            )

    def _check_sampler(self, trainer: Trainer, module: PPOModule) -> None:
        """Warns of wrong prompts, and of tokens that are not independent draws, which log-probs alone do not show."""
        assert module.last_iteration is not None
        rollout, mask = module.last_iteration.rollout, module.last_iteration.rollout.response_mask
        if greatest(module, broken_prompts(rollout.ids, rollout.sampled, self._header)):
            self._warn(
                trainer,
                "prompts",
                "a response does not follow the header of an assistant message in the policy's chat format: cut long "
                "prompts at their beginning, and render prompts with the policy's tokenizer",
            )
        if greatest(module, int(self._tokens.evidence(rollout) > CERTAIN)):
            self._warn(
                trainer,
                "repetition",
                "responses repeat those of the last iteration, or of other rows, far more often than chance: the "
                "random numbers of sampling repeat; use another seed in each iteration and row",
            )
        self._surprisal.add(rollout.old_logprobs[mask], rollout.entropy[mask])
        # Where sampling and training round differently, a small bias adds up over millions of tokens.
        exact = is_precise(module) and module.options.rollout_engine == "rlchat"
        differs = exact or abs(self._surprisal.mean) > _SURPRISAL_BIAS
        if greatest(module, int(differs and abs(self._surprisal.deviations) > MANY_DEVIATIONS)):
            self._warn(
                trainer,
                "surprisal",
                f"sampled tokens are {'less' if self._surprisal.difference < 0 else 'more'} surprising than the "
                f"entropy of the policy: something changes the distribution while sampling, such as top-k, top-p or "
                f"another temperature; sample without it",
            )

    def _check_sampling(self, trainer: Trainer, residual: float) -> None:
        """Warns if responses were sampled from another distribution than the policy's."""
        if residual > _OTHER_SAMPLER:
            self._warn(
                trainer,
                "sampling",
                f"responses are sampled from another distribution than the policy's: sampling_residual is "
                f"{residual:.2g}; set --model.rollout_engine rlchat, or a higher precision",
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._rewards or "val/reward" not in trainer.callback_metrics:
            return
        self._check_held_out(trainer)
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
                f"the training reward rises while the reward on validation prompts has fallen {_FALLS} times in a row "
                f"({held_out[0]:.3g} → {held_out[-1]:.3g}): the policy overfits the training prompts; use the best "
                f"model so far, more prompts, or a higher --model.kl_coef",
            )

    def _check_held_out(self, trainer: Trainer) -> None:
        """Warns if the held-out reward has risen while another held-out measure has become worse."""
        names = ("val/reward", "val/answer_accuracy", "val/perplexity")
        metrics = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name in names or name.startswith("val/reward_")
        }
        self._validations.append(metrics)
        worse = reward_hacking(self._validations)
        hacked = self._lasting["hacked"] = self._lasting.get("hacked", 0) + 1 if worse else 0
        if hacked >= _HACKED:
            self._warn(
                trainer,
                "held-out hacking",
                f"the reward on validation prompts rises, but {worse}: the policy exploits the reward; raise "
                f"--model.kl_coef, change the reward, or select the model by another metric, such as "
                f"--best_model.select_by reward-kl",
            )

    def _lasts(self, what: str, now: bool, iterations: int | None = None) -> bool:
        """Whether the problem ``what`` has lasted for a number of iterations, by default ``patience``."""
        self._lasting[what] = self._lasting.get(what, 0) + 1 if now else 0
        return self._lasting[what] >= (iterations or self.patience)

    def _constant(self, factors: dict[str, torch.Tensor]) -> list[str]:
        """The factors that have been constant over all responses of all processes for ``patience`` iterations."""
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
        self._note(trainer, what, message)
        if trainer.is_global_zero:
            _log.warning("alarm: %s", message)

    def _note(self, trainer: Trainer, what: str, message: str) -> None:
        """Adds a problem to the record of the run."""
        self.notes.append({"iteration": batches_seen(trainer), "what": what, "message": message})
        if self._record is not None:
            append_lines(self._record, self.notes[-1:])


def stop_after_this_batch(trainer: Trainer, error: UserError) -> None:
    """Ends the run with ``error``, after :class:`BestModel` has written ``last.ckpt``; at once if there is none.

    All processes must call it for the same batch.
    """
    saver = next((callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestModel)), None)
    if saver is None:
        raise error
    saver.stop_with(error)
