"""The gate: whether a new version may replace the model, judged on data that did not train it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlchat.chat.learning.settings import Bounds
from rlchat.learn.measure import Figures

ENOUGH_HELD_BACK = 10
"""With as many held-back verdicts, what a version has learned from the others must carry over to them. Verdicts that
contradict each other teach nothing, and are no reason for a change."""


@dataclass(frozen=True)
class Decision:
    """Whether the version is accepted: only without ``reasons`` against it. ``notes`` say what was not measured."""

    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        """Whether nothing speaks against the version."""
        return not self.reasons


def judge(
    original: Figures, current: Figures, new: Figures, bounds: Bounds, none_held_back: str, alarms: Sequence[str]
) -> Decision:
    """The decision on a version with the figures ``new``.

    Args:
        original: the figures of the original model, from which perplexity, controls and KL must not move too far.
        current: the figures of the model that the version would replace, whose agreement must not fall.
        new: the figures of the version.
        bounds: how far is too far.
        none_held_back: if no verdict is held back, why, as a clause.
        alarms: the problems that were noticed in training, as sentences.
    """
    reasons = [*alarms]
    notes = []
    if new.agrees is None or current.agrees is None:
        notes.append(f"agreement is not part of the gate: {none_held_back}")
    else:
        reasons += _against_learning(current.agrees, new.agrees, new, bounds)
    if new.perplexity is None or original.perplexity is None:
        notes.append("perplexity is not part of the gate: there are no held-out human replies; pass --replay FILE")
    elif not new.perplexity <= original.perplexity * (1 + bounds.perplexity_rise):
        reasons.append(
            f"the perplexity on human replies rose from {original.perplexity:.4g} to {new.perplexity:.4g}, more than "
            f"{bounds.perplexity_rise:.3g} of it"
        )
    kl = kl_between(original, new)
    if (new.correct is None or original.correct is None) and kl is not None:
        notes.append(
            "no control has an answer that can be checked: the gate only measures how far responses have moved from "
            "those of the original model (the KL)"
        )
    elif new.correct is None or original.correct is None:
        notes.append("there are no controls: neither correct answers nor the KL are part of the gate")
    elif original.correct - new.correct > bounds.controls_to_lose(new.controls):
        reasons.append(
            f"{new.correct} of {new.controls} controls are correct, before: {original.correct}, a drop of more than "
            f"{bounds.control_drop:.3g}"
        )
    if kl is None and (new.perplexity is None or original.perplexity is None):
        reasons.append("there are no prompts or replies to measure it on; pass --replay FILE with other conversations")
    if kl is not None and not kl <= bounds.kl:
        reasons.append(
            f"its responses to controls have moved too far from those of the original model: the KL is {kl:.3g} nats "
            f"per token, above {bounds.kl:.3g}"
        )
    return Decision(reasons, notes)


def kl_between(original: Figures, new: Figures) -> float | None:
    """The estimated KL from the original model to the new one, in nats per token; None without controls."""
    if original.original_nll is None or new.original_nll is None:
        return None
    return new.original_nll - original.original_nll


def _against_learning(before: int, after: int, new: Figures, bounds: Bounds) -> list[str]:
    """What the held-back verdicts say against a version that agrees with ``after`` of them."""
    reasons = []
    if after < before:
        reasons.append(f"it agrees with {after} of {new.verdicts} held-back verdicts, before: {before}")
    accuracy = new.reward_accuracy
    if new.verdicts >= ENOUGH_HELD_BACK and accuracy is not None and accuracy < bounds.reward_accuracy:
        reasons.append(
            f"what it has learned does not carry over to the {new.verdicts} held-back verdicts: the reward accuracy is "
            f"{accuracy:.0%}, below {bounds.reward_accuracy:.0%}"
        )
    return reasons
