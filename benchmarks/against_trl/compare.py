"""Compares rlchat's PPO with TRL's: reward against episodes and against CPU seconds, over several seeds.

    make against_trl

creates TRL's environment, runs both sides for each size and seed, and then runs

    python benchmarks/against_trl/compare.py benchmarks/.against_trl

which reads the curves that `trl_side.py` and `rlchat_side.py` wrote, checks that they started from the same state,
prints one table per size, and writes `docs/against_trl.png` and `benchmarks/against_trl/results.json`. Intervals are
95% Student's t intervals over the seeds. Differences are paired by seed, because runs with the same seed share initial
weights and prompts. The exit code is 1 if a final reward of rlchat is significantly below TRL's.

Common to both sides: GPT-2 with random weights, tied embeddings, no dropout; the initial model as the reference; k1 KL
in the per-token reward, the score on the last token; GAE; whitened advantages; clipped policy and value losses; a
critic initialized as a copy of the policy's backbone with a zero head (`shared`: a head on the policy's backbone);
AdamW; a learning rate that falls linearly over the iterations; no gradient clipping, which TRL's PPO does not do;
special ids that cannot be sampled. Three differences remain; `same_replies.py` shows that there are no others:

- The random numbers for sampling and shuffling: TRL uses torch's and numpy's generators, rlchat addressed numbers.
- TRL whitens with the unbiased variance of 1,024 tokens, rlchat with the biased one, a difference of 0.05%.
- rlchat's value head has a bias, TRL's does not.

CPU seconds are those of the whole program on one thread, including sampling and logging; unlike wall-clock seconds,
they are meaningful on a machine that also runs other programs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from common import SIZES

HERE = Path(__file__).parent
LABELS = {"trl": "TRL 1.12", "separate": "rlchat, critic: separate", "shared": "rlchat, critic: shared"}
COLOURS = {"trl": "#666666", "separate": "#1f6fb4", "shared": "#d1700f"}
LAST = 5  # the final reward is the mean over this many iterations
GOAL = 0.8
# The 97.5% quantile of Student's t distribution, by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its 95% interval."""

    mean: float
    half: float


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and interval of two to ten values."""
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), half)


class Run:
    """One curve, as columns."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.contestant: str = content["contestant"]
        self.seed: int = content["seed"]
        self.about = {name: value for name, value in content.items() if name != "curve"}
        self.columns: dict[str, list[float]] = {
            name: [row[name] for row in content["curve"]] for name in content["curve"][0]
        }

    @property
    def final(self) -> float:
        """Reward at the end of the run."""
        return statistics.fmean(self.columns["reward"][-LAST:])

    def reaches(self, column: str) -> float:
        """``column`` at the end of the first iteration with a reward of at least :data:`GOAL`; NaN if there is none."""
        places = (i for i, reward in enumerate(self.columns["reward"]) if reward >= GOAL)
        return next((self.columns[column][i] for i in places), math.nan)


Runs = dict[str, list[Run]]  # by contestant, in the order of their seeds
Table = dict[str, dict[str, Estimate]]


def read_runs(folder: Path, size: str) -> Runs:
    """The runs of ``size``.

    Raises SystemExit if the contestants have different seeds, or if runs with the same seed started differently.
    """
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    runs = {name: [Run(c) for c in contents if c["size"] == size and c["contestant"] == name] for name in LABELS}
    runs = {name: sorted(found, key=lambda run: run.seed) for name, found in runs.items() if found}
    seeds = [run.seed for run in runs.get("trl", [])]
    if len(seeds) < 2:
        raise SystemExit(f"{folder}: fewer than two runs of TRL at size {size}; run trl_side.py for each seed first")
    for name, found in runs.items():
        if [run.seed for run in found] != seeds:
            raise SystemExit(f"{folder}: {name}, size {size}: the seeds differ from TRL's {seeds}; run the others")
        for run, peer in zip(found, runs["trl"], strict=True):
            which = f"{name}, size {size}, seed {run.seed}"
            if run.about["digest"] != peer.about["digest"]:
                raise SystemExit(f"{which}: initial weights or prompts differ from TRL's; run both again")
            if len(run.columns["reward"]) != run.about["hyperparameters"]["iterations"]:
                raise SystemExit(f"{which}: the run is not finished")
            if name != "shared" and run.about["hyperparameters"] != peer.about["hyperparameters"]:
                raise SystemExit(f"{which}: hyperparameters differ from TRL's; run both again")
    return runs


def make_table(runs: Runs) -> Table:
    """The figures of each contestant."""

    def row(found: list[Run]) -> dict[str, Estimate]:
        pairs = list(zip(found, runs["trl"], strict=True))
        return {
            "final reward": estimate([run.final for run in found]),
            "minus TRL's": estimate([run.final - peer.final for run, peer in pairs]),
            "mean over all episodes": estimate([statistics.fmean(run.columns["reward"]) for run in found]),
            f"episodes to {GOAL}": estimate([run.reaches("episodes") for run in found]),
            f"CPU s to {GOAL}": estimate([run.reaches("cpu_s") for run in found]),
            "CPU s an iteration": estimate([run.columns["cpu_s"][-1] / len(run.columns["cpu_s"]) for run in found]),
        }

    return {name: row(found) for name, found in runs.items()}


def print_table(size: str, seeds: int, table: Table) -> None:
    """Prints the table as Markdown."""
    names = list(table["trl"])
    print(f"\n| {describe(size, seeds)} |", " | ".join(names), "|")
    print("|---" * (len(names) + 1) + "|")
    for contestant, row in table.items():
        cells = ("–" if row[name] == (0, 0) else "{:.3g} ± {:.2g}".format(*row[name]) for name in names)
        print(f"| {LABELS[contestant]} |", " | ".join(cells), "|")


def describe(size: str, seeds: int) -> str:
    """A description of the size and the number of seeds."""
    shape = SIZES[size]
    return f"{size}: vocabulary {shape.vocabulary:,}, {shape.layers} layers × {shape.width}, {seeds} seeds"


def draw(runs_of_size: dict[str, Runs], path: Path) -> None:
    """One row per size: mean, interval and the reward of every seed, against episodes and against CPU seconds."""
    figure, grid = plt.subplots(
        len(runs_of_size), 2, figsize=(9.5, 3.4 * len(runs_of_size)), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (size, runs) in zip(grid, runs_of_size.items(), strict=True):
        for axis, column, unit in zip(axes, ("episodes", "cpu_s"), ("episodes", "CPU seconds"), strict=True):
            for name, found in runs.items():
                draw_contestant(axis, name, found, column)
            axis.set(xlabel=unit, xlim=(0, None), ylim=(0, 1.02))
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("reward of the sampled replies")
        axes[0].set_title(describe(size, len(runs["trl"])), loc="left", fontsize=10)
        axes[1].legend(loc="lower right", frameon=False, fontsize=9)
    figure.savefig(path, dpi=85)


def draw_contestant(axis: Any, name: str, found: list[Run], column: str) -> None:
    """Draws one contestant, with its seeds interpolated at common values of ``column``."""
    first = max(run.columns[column][0] for run in found)
    last = min(run.columns[column][-1] for run in found)
    places = np.linspace(first, last, 200)
    rewards = np.array([np.interp(places, run.columns[column], run.columns["reward"]) for run in found])
    mean, half = np.array([estimate(at.tolist()) for at in rewards.T]).T
    axis.fill_between(places, mean - half, mean + half, color=COLOURS[name], alpha=0.15, linewidth=0)
    axis.plot(places, mean, color=COLOURS[name], linewidth=2, label=LABELS[name])
    for run in found:
        axis.plot(run.columns[column], run.columns["reward"], color=COLOURS[name], linewidth=0.5, alpha=0.5)


def write_results(runs_of_size: dict[str, Runs], tables: dict[str, Table], path: Path) -> None:
    """Writes the tables, and for each run its curve, hyperparameters and versions."""
    rounded = {
        size: {name: {k: [round(x, 4) for x in v] for k, v in row.items()} for name, row in table.items()}
        for size, table in tables.items()
    }
    runs = [run for runs in runs_of_size.values() for found in runs.values() for run in found]
    lines = ",\n".join("  " + json.dumps(run.about | run.columns) for run in runs)
    path.write_text(
        f'{{"mean and half of the 95% interval": {json.dumps(rounded, indent=1)},\n"runs": [\n{lines}\n]}}\n'
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path, help="folder of the curves")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["T", "S"])
    parser.add_argument("--figure", type=Path, default=HERE.parent.parent / "docs" / "against_trl.png")
    parser.add_argument("--json", type=Path, default=HERE / "results.json")
    options = parser.parse_args()
    runs_of_size = {size: read_runs(options.curves, size) for size in options.sizes}
    tables = {size: make_table(runs) for size, runs in runs_of_size.items()}
    for size, table in tables.items():
        print_table(size, len(runs_of_size[size]["trl"]), table)
    draw(runs_of_size, options.figure)
    write_results(runs_of_size, tables, options.json)
    below = False
    for size, table in tables.items():
        for name, row in table.items():
            difference = row["minus TRL's"]
            if difference.mean + difference.half < 0:
                print(f"{size}: {LABELS[name]} ends below TRL")
                below = True
    return int(below)


if __name__ == "__main__":
    sys.exit(main())
