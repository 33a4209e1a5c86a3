"""`rlchat report`: one HTML page, and a picture for a slide, about a run.

rlchat report
rlchat report lightning_logs/ppo/version_3 --out report.html
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlchat.errors import UserError
from rlchat.look.curves import Curves, log_files, read_curves
from rlchat.utils.files import set_aside, write_atomically

LOGS = Path("lightning_logs")
SAMPLES = 4  # of the best, of the worst, and of the held-out responses

_NOT_TRAINING = ("_validate", "_test", "_predict")  # the folders of these commands
_RESAMPLES = 10_000
_PAIRED = 10  # prompts that both rollouts must have in common for a comparison of the same prompts


def main(args: list[str]) -> int:
    """Runs ``rlchat report`` with ``args``; returns the exit code. Raises :class:`UserError`."""
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    out = options.out
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"invalid value {str(out)!r} for --out: expected a file name that ends in .html")
    for path in (out, out.with_suffix(".png")):
        if path.exists() and not options.force:
            raise UserError(f"{path} already exists; set another --out, or use --force")
    page, picture = write_page(find_run(options.run), out)
    print(f"report: {page}\npicture for a slide: {picture}")
    return 0


def write_page(run: Path, out: Path, keep_older: bool = False) -> tuple[Path, Path]:
    """Writes the page ``out`` about the run in the folder ``run``, and a picture beside it; returns both paths.

    ``keep_older`` renames the page and the picture of an earlier run, instead of replacing them.
    """
    from rlchat.look.report_page import draw_slide, report_page  # Matplotlib takes a second

    report, picture = read_report(run), out.with_suffix(".png")
    for path in (out, picture) if keep_older else ():
        if path.exists():
            set_aside(path)
    write_atomically(out, lambda file: file.write(report_page(report).encode()))
    write_atomically(picture, lambda file: draw_slide(report).savefig(file, format="png", dpi=150))
    return out, picture


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
    """The mean changes from the first to the last logged rollout, and what they were measured on."""

    changes: list[Change] = field(default_factory=list)
    prompts: tuple[int, int] = (0, 0)  # of the first and of the last rollout
    iterations: tuple[int, int] = (0, 0)
    paired: bool = False  # the same prompts in both


@dataclass(frozen=True)
class Report:
    """What a page about a run shows. All texts are plain text."""

    run: Path
    curves: Curves
    options: dict[str, Any]  # the configuration of the run; empty if there is none
    rollouts: Comparison
    best: list[dict[str, Any]] = field(default_factory=list)  # responses of the last rollout
    worst: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)  # first and last response
    alarms: list[dict[str, Any]] | None = None  # None: not recorded
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Stage and version."""
        return "/".join(self.run.resolve().parts[-2:])

    @property
    def validation(self) -> list[Change]:
        """The first and last value of each validation metric that has more than one."""
        found = {name: ys for name, (_, ys) in self.curves.items() if name.startswith("val/") and len(ys) > 1}
        return [Change(name.removeprefix("val/"), ys[0], ys[-1]) for name, ys in found.items()]


def read_report(run: Path) -> Report:
    """Reads the files of a run. A file that is missing leaves its section out."""
    rollouts = _rows(run / "rollouts.jsonl", "prompt", "reply", "reward", "factors", "kl", "tokens", "ended_by")
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
        best=ranked[:SAMPLES],
        worst=ranked[SAMPLES:][-SAMPLES:],
        held_out=_first_and_last(_rows(run / "samples.jsonl", "prompt", "reply"))[:SAMPLES],
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
            low, high = bootstrap_interval(before, after, paired)
            changes.append(Change(name, float(before.mean()), float(after.mean()), low, high))
    return Comparison(changes, (len(old), len(new)), iterations, paired)


def bootstrap_interval(before: np.ndarray, after: np.ndarray, paired: bool, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval (Efron 1979) of mean(after) - mean(before).

    Args:
        before: [n].
        after: [m], with m = n and the same order if ``paired``: then pairs are resampled.
        paired: whether the entries are of the same prompts.
        seed: of the resampling.
    """
    generator = np.random.default_rng(seed)

    def means(values: np.ndarray) -> np.ndarray:
        return values[generator.integers(len(values), size=(_RESAMPLES, len(values)))].mean(1)

    differences = means(after - before) if paired else means(after) - means(before)
    low, high = np.quantile(differences, (0.025, 0.975))
    return float(low), float(high)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlchat report",
        description="Write one HTML page about a run, and a picture for a slide: what was trained on what, figures "
        "before and after with confidence intervals over prompts, plots, good and bad samples, alarms, versions, and "
        "the command that repeats the run.",
    )
    parser.add_argument(
        "run",
        nargs="?",
        type=Path,
        metavar="RUN",
        help=f"folder of a run, such as {LOGS}/ppo/version_0 (default: the newest training run under {LOGS})",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace the page and the picture if they exist")
    return parser
