"""Runs with made-up rollouts for the tests of `rlchat look`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENS = {
    "text": ["Hel", "lo", "<|end|>"],
    "logprob": [-1.0, -2.0, -0.5],
    "kl": [0.5, -0.25, 0.0],
    "entropy": [1.5, 0.5, 0.25],
    "advantage": [2.0, -1.0, 0.0],
    "value": [0.25, 0.5, 0.75],
}


def rollout(**changes: Any) -> dict[str, Any]:
    """A row of ``rollouts.jsonl``."""
    return {
        "version": 2,
        "iteration": 1,
        "prompt_id": "a",
        "prompt": [{"role": "user", "content": "Say hello."}],
        "reply": "Hello",
        "tokens": 3,
        "ended_by": "end of turn",
        "reward": 1.5,
        "factors": {"quality": 1.0, "polite": 0.5},
        "kl": 0.25,
        "value": 0.25,
        "per_token": TOKENS,
        **changes,
    }


def old_rollout(**changes: Any) -> dict[str, Any]:
    """A row of the first version, without token data."""
    row = rollout(**changes)
    return {name: row[name] for name in row if name not in ("version", "prompt_id", "per_token")}


def write_run(folder: Path, rows: Sequence[dict[str, Any] | str], curves: str | None = None) -> Path:
    """A run with ``rows``, or lines as they are, and the table of metrics ``curves``; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    add_rows(folder, rows)
    if curves is not None:
        (folder / "metrics.csv").write_text(curves)
    return folder


def add_rows(folder: Path, rows: Sequence[dict[str, Any] | str]) -> None:
    """Appends ``rows`` as a run does."""
    with (folder / "rollouts.jsonl").open("a", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
