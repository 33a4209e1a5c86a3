"""What a round of learning says about its verdicts, and what it records of a version."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rlchat.errors import counted
from rlchat.learn.stages import Trained

_UNUSED = {"replaced": "replaced by a later verdict", "withdrawn": "taken back"}


def describe(counts: dict[str, Any]) -> str:
    """The numbers of verdicts, in one line."""
    kinds = counts["kinds"]
    found = [f"{kinds[kind]} {kind}" for kind in ("good", "bad", "corrected") if kind in kinds]
    text = f"{counted(counts['verdicts'], 'verdict')}: {', '.join(found)}"
    if counts["held_back"]:
        text += f"; {counts['held_back']} of them held back for the gate"
    extra = [f"{counts[name]} {what}" for name, what in _UNUSED.items() if counts[name]]
    extra += [counted(counts["bad_lines"], "damaged line")] if counts["bad_lines"] else []
    extra += [f"{count} {reason}" for reason, count in counts["left_out"].items()]
    return text + (f" (left out: {', '.join(extra)})" if extra else "")


def reward_with_model(trained: Trained, path: Path) -> list[dict[str, Any]]:
    """The reward that ``trained`` was trained with, with its reward model at ``path``.

    It is found beside the version too, so a path outside the working directory, which tells about the user, is not
    recorded.
    """
    absolute, here = path.absolute(), Path.cwd()
    inside = absolute.is_relative_to(here) and ".." not in absolute.parts
    bundle = str(absolute.relative_to(here)) if inside else path.name
    return [
        {**row, "init_args": {**row["init_args"], "bundle": bundle}}
        if row["init_args"].get("bundle") == str(trained.reward_file)
        else row
        for row in trained.policy.about["reward"]
    ]


def finite(value: Any) -> Any:
    """``value`` with null in place of infinity and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
