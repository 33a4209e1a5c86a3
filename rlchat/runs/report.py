"""What the files of a run tell about it: figures before and after with intervals, samples, alarms, versions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlchat.errors import UserError
from rlchat.runs.curves import Curves, log_files, read_curves
from rlchat.utils.bootstrap import bootstrap_interval

LOGS = Path("lightning_logs")
SAMPLES = 4  # of the best, of the worst, and of the held-out responses

_NOT_TRAINING = ("_validate", "_test", "_predict")  # the folders of these commands
_PAIRED = 10  # prompts that both rollouts must have in common for a comparison of the same prompts
_FIELDS = ("prompt", "reply", "reward", "factors", "kl", "tokens", "ended_by")  # of a response
_IN_ROWS = ("reward", "kl", "response_length", "truncated_fraction")  # metrics of validation that responses tell too

_SHOWN_OPTIONS = (
    *("init_from", "base_model", "tiktoken_encoding", "adapter", "train_layers", "learning_rate"),
    *("advantage", "critic", "kl_coef", "ppo_epochs", "minibatches", "group_size", "max_new_tokens"),
    *("loss_type", "beta"),
)


def find_run(given: Path | None) -> Path:
    """The folder ``given``, or that of the newest training run. It has metrics. Raises :class:`UserError`."""
    if given is None:
        stages = (folder for folder in LOGS.glob("*/version_*") if not folder.parent.name.endswith(_NOT_TRAINING))
        dated = {folder: max((f.stat().st_mtime for f in log_files(folder)), default=0.0) for folder in stages}
        newest = max(dated, key=lambda folder: dated[folder], default=None)
        if newest is None or not dated[newest]:
            raise UserError(f"no run under {LOGS}; train a model with `rlchat fit`, or specify the folder of a run")
        return newest
    if not given.is_dir():
        raise UserError(f"{given}: no such folder; specify that of a run, such as {LOGS}/ppo/version_0")
    if not log_files(given):
        raise UserError(
            f"{given}: it has neither metrics.csv nor TensorBoard's event files; specify the folder of a run, such as "
            f"{LOGS}/ppo/version_0"
        )
    return given


@dataclass(frozen=True)
class Change:
    """A quantity before and after. ``low`` and ``high`` bound the difference (95 %); None without an interval."""

    name: str
    before: float
    after: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The mean changes from the first to the last logged rollout, or validation, and what they were measured on."""

    changes: list[Change] = field(default_factory=list)
    prompts: tuple[int, int] = (0, 0)  # of the first and of the last rollout
    iterations: tuple[int, int] = (0, 0)
    paired: bool = False  # the same prompts in both

    def measured_on(self, split: str) -> str:
        """One sentence about the changes; the prompts are those of ``split``, such as "training"."""
        first, last = self.iterations
        old, new = self.prompts
        prompts = f"the same {old} {split} prompts" if self.paired else f"{old} {split} prompts, then {new} others"
        return f"Iterations {first} and {last}, {prompts}; 95 % bootstrap intervals of the difference over prompts."


@dataclass(frozen=True)
class Report:
    """What a page about a run shows. All texts are plain text."""

    run: Path
    curves: Curves
    options: dict[str, Any]  # the configuration of the run; empty if there is none
    rollouts: Comparison
    held_out: Comparison = field(default_factory=Comparison)
    best: list[dict[str, Any]] = field(default_factory=list)  # responses of the last rollout
    worst: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)  # held-out, first and last
    alarms: list[dict[str, Any]] | None = None  # None: not recorded
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Stage and version."""
        return "/".join(self.run.resolve().parts[-2:])

    @property
    def validation(self) -> list[Change]:
        """The first and last value of each validation metric that has more than one, but those in ``held_out``."""
        found = {name: ys for name, (_, ys) in self.curves.items() if name.startswith("val/") and len(ys) > 1}
        changes = [Change(name.removeprefix("val/"), ys[0], ys[-1]) for name, ys in found.items()]
        measured = _IN_ROWS if self.held_out.changes else ()
        return [change for change in changes if not change.name.startswith(measured)]

    @property
    def data_paths(self) -> list[str]:
        """The files that the run was trained on, as they were specified."""
        data = self.options.get("data") or {}
        paths = data.get("init_args", data).get("path")  # a data module of the user has a class_path
        return [str(path) for path in paths] if isinstance(paths, list) else [str(paths)] if paths else []

    @property
    def setup(self) -> list[tuple[str, str]]:
        """Name and value of the options that matter most: stage, model, reward, data, seed."""
        model = self.options.get("model") or {}
        arguments = model.get("init_args") or {}
        rows = [("stage", str(model.get("class_path", "")))]
        rows += [(name, str(arguments[name])) for name in _SHOWN_OPTIONS if arguments.get(name) is not None]
        rows += [("reward", factor) for factor in _factors(arguments.get("reward"))]
        rows += [("data", ", ".join(self.data_paths))] if self.data_paths else []
        return [*rows, ("seed", str(self.options.get("seed_everything")))]


def read_report(run: Path) -> Report:
    """Reads the files of a run. A file that is missing leaves its section out."""
    rollouts = _rows(run / "rollouts.jsonl", *_FIELDS)
    last = max((row["iteration"] for row in rollouts), default=0)
    scored = (row for row in rollouts if row["iteration"] == last and row["reward"] is not None)
    ranked = sorted(scored, key=lambda row: -float(row["reward"]))
    config = run / "config.yaml"
    alarms = run / "alarms.jsonl"
    versions = run / "versions.json"
    return Report(
        run=run,
        curves=read_curves(run),
        options=yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {},
        rollouts=compare_rollouts(rollouts),
        held_out=compare_rollouts(_rows(run / "held_out.jsonl", *_FIELDS)),
        best=ranked[:SAMPLES],
        worst=ranked[SAMPLES:][-SAMPLES:],
        samples=_first_and_last(_rows(run / "samples.jsonl", "prompt", "reply"))[:SAMPLES],
        alarms=_rows(alarms, "message") if alarms.is_file() else None,
        versions=json.loads(versions.read_text(encoding="utf-8")) if versions.is_file() else {},
    )


def compare_rollouts(rollouts: Sequence[dict[str, Any]]) -> Comparison:
    """Compares the first with the last logged rollout; nothing to compare if there is only one.

    The responses to a prompt are averaged first. If both rollouts have ``_PAIRED`` prompts in common, only these are
    compared, and the intervals are those of the paired difference. Otherwise each rollout stands for its own prompts.
    """
    logged = {row["iteration"] for row in rollouts}
    if len(logged) < 2:
        return Comparison()
    iterations = min(logged), max(logged)
    old, new = (_by_prompt(rollouts, iteration) for iteration in iterations)
    shared = [prompt for prompt in old if prompt in new]
    paired = len(shared) >= _PAIRED
    if paired:
        old, new = ({prompt: side[prompt] for prompt in shared} for side in (old, new))
    changes = []
    for name in next(iter(new.values())):
        before, after = (np.array([row.get(name, np.nan) for row in side.values()]) for side in (old, new))
        if paired:
            known = np.isfinite(before) & np.isfinite(after)
            before, after = before[known], after[known]
        else:
            before, after = before[np.isfinite(before)], after[np.isfinite(after)]
        if len(before) and len(after):
            low, high = difference_interval(before, after, paired)
            changes.append(Change(name, float(before.mean()), float(after.mean()), low, high))
    return Comparison(changes, (len(old), len(new)), iterations, paired)


def difference_interval(before: np.ndarray, after: np.ndarray, paired: bool, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of mean(after) - mean(before).

    Args:
        before: [n].
        after: [m], with m = n and the same order if ``paired``: then pairs are resampled.
        paired: whether the entries are of the same prompts.
        seed: of the resampling.
    """
    if paired:
        return bootstrap_interval(lambda change: change.mean(1), after - before, seed=seed)
    return bootstrap_interval(lambda new, old: new.mean(1) - old.mean(1), after, before, seed=seed)


def _by_prompt(rollouts: Sequence[dict[str, Any]], iteration: int) -> dict[str, dict[str, float]]:
    """Prompt → the mean measures of the responses to it in ``iteration``."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in rollouts:
        if row["iteration"] == iteration:
            found[row.get("prompt_id") or json.dumps(row["prompt"], sort_keys=True)].append(_measures(row))
    return {
        prompt: {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        for prompt, rows in found.items()
    }


def _measures(row: dict[str, Any]) -> dict[str, float]:
    factors = {f"reward/{name}": _number(score) for name, score in row["factors"].items()}
    return {
        "reward": _number(row["reward"]),
        **(factors if len(factors) > 1 else {}),
        "KL to the reference model, nats": _number(row["kl"]),
        "response length, tokens": _number(row["tokens"]),
        "truncated responses, fraction": float(row["ended_by"] != "end of turn"),
    }


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _first_and_last(samples: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each prompt, its first and its last sampled response, if these come from different validations."""
    by_prompt: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in samples:
        by_prompt[json.dumps(row["prompt"], sort_keys=True)].append(row)
    pairs = [(rows[0], rows[-1]) for rows in by_prompt.values()]
    return [(old, new) for old, new in pairs if old["iteration"] != new["iteration"]]


def _factors(reward: Any) -> list[str]:
    """One line for each factor of the reward: its class and its options."""
    given = reward.get("init_args", {}).get("factors") if isinstance(reward, dict) else reward
    lines = []
    for factor in given if isinstance(given, list) else []:
        if isinstance(factor, dict):
            name, values = str(factor.get("class_path", "")), factor.get("init_args") or {}
            lines.append(f"{name}({', '.join(f'{key}={value}' for key, value in values.items())})")
        else:
            lines.append(str(factor))
    return lines


def _rows(path: Path, *required: str) -> list[dict[str, Any]]:
    """The JSON objects with the fields ``required`` in the lines of ``path``; none if it is missing.

    Other lines, such as one that is still being written, are left out.
    """
    found = []
    # Not splitlines(): texts contain characters that it would take for ends of lines.
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and all(name in row for name in required) and type(row.get("iteration")) is int:
            found.append(row)
    return found
