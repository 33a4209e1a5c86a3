"""Which verdicts train a version, and which ones are held back for the gate."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlchat.chat.verdicts import JudgedResponse
from rlchat.data.splits import unit_hash
from rlchat.errors import counted

HELD_BACK_FRACTION = 0.2
MIN_VERDICTS = 10
"""With fewer verdicts, none is held back, and the gate does not use agreement."""
_SPLIT_SEED = 0  # the same in every run, so that a prompt that was held back once is again


@dataclass(frozen=True)
class Split:
    """The verdicts that train a version, and those that measure it.

    Attributes:
        training: the verdicts that train.
        held_back: the others. Neither the version nor the one in use is trained on their prompts.
        why_none: why none is held back, as a clause; empty if some are.
    """

    training: list[JudgedResponse]
    held_back: list[JudgedResponse]
    why_none: str = ""

    @property
    def trained_prompts(self) -> list[str]:
        """The ids of the prompts that train, to be recorded with the version."""
        return sorted({verdict.opening_id for verdict in self.training})


def in_held_back_fifth(verdict: JudgedResponse) -> bool:
    """Whether ``verdict`` is in the fifth that may be held back. It depends on the first user message only."""
    return unit_hash(_SPLIT_SEED, f"learn/{verdict.opening_id}") < HELD_BACK_FRACTION


def split(verdicts: Sequence[JudgedResponse], trained: Collection[str] = ()) -> Split:
    """Holds back a fifth of ``verdicts``, by prompt.

    What trained the version in use goes on training. To hold it back would compare the versions on data that one of
    them was trained on, and the new version would forget it.

    Args:
        verdicts: all verdicts that count.
        trained: the ids of the prompts that trained the version in use.
    """
    fifth = [verdict for verdict in verdicts if in_held_back_fifth(verdict)]
    held_back = [verdict for verdict in fifth if verdict.opening_id not in trained]
    if len(verdicts) < MIN_VERDICTS:
        is_one = len(verdicts) == 1
        why = f"{counted(len(verdicts), 'verdict')} {'is' if is_one else 'are'} fewer than {MIN_VERDICTS}"
    elif not fifth:
        why = "all verdicts are on prompts of the four fifths that train"
    elif not held_back:
        why = "all verdicts of the fifth to hold back trained the version in use"
    elif len(held_back) == len(verdicts):
        why = "all verdicts are on prompts of the fifth to hold back, and something must train"
    else:
        ids = {verdict.feedback_id for verdict in held_back}
        return Split([verdict for verdict in verdicts if verdict.feedback_id not in ids], held_back)
    return Split([*verdicts], [], why)


def trained_prompts(version: Path) -> list[str] | None:
    """The ids of the prompts that trained ``version``, from the file of its figures; None if they are not known."""
    try:
        figures = json.loads(version.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = figures.get("trained_prompts") if isinstance(figures, dict) else None
    return [entry for entry in found if isinstance(entry, str)] if isinstance(found, list) else None
