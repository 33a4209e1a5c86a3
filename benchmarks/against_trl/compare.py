"""rlchat's PPO against TRL's: reward against episodes and against CPU seconds, over the seeds.

    make against_trl

makes TRL's environment, runs both sides for each size and seed, and ends with

    python benchmarks/against_trl/compare.py benchmarks/.against_trl

which reads the curves that `trl_side.py` and `rlchat_side.py` wrote, refuses those that did not begin alike, prints a
table a size, and writes `docs/against_trl.png` and `benchmarks/against_trl/results.json`. Intervals are Student's, 95%,
over the seeds; differences are taken seed by seed, since a seed's runs share initial weights and prompts. Exits with 1
where a final reward of rlchat's is below TRL's by more than its seeds can explain.

Both sides have: GPT-2 with random weights, tied embeddings, no dropout; a reference that is the initial model; k1 KL in
the per-token reward, the score on the last token; GAE; whitened advantages; clipped policy and value losses; a critic
that begins as a copy of the policy's trunk under a head of zeros (or is a head on that trunk, `shared`); AdamW; a
learning rate that falls linearly over the iterations; no clipping of gradients, of which TRL's PPO has none; special
ids that cannot be said. Three differences are left; `same_replies.py` shows that there is no other:

- What is sampled and how it is shuffled: TRL draws from torch's and numpy's generators, rlchat by address.
- TRL whitens with the unbiased variance of 1,024 tokens, rlchat with the biased one: 0.05%.
- rlchat's value head has a bias, TRL's has none.

CPU seconds of one thread are of the whole program, sampling and logging included; unlike seconds on the wall they mean
something on a machine that does other work too.
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
LAST = 5  # iterations whose mean is the final reward
GOAL = 0.8
# Student's t, 97.5%, by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its 95% interval."""

    mean: float
    half: float


def estimate(values: Sequence[float]) -> Estimate:
    """Over at least two seeds, at most ten."""
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
        """``column`` at the end of the first iteration whose replies earned :data:`GOAL`; nan where none did."""
        places = (i for i, reward in enumerate(self.columns["reward"]) if reward >= GOAL)
        return next((self.columns[column][i] for i in places), math.nan)


Runs = dict[str, list[Run]]  # by contestant, in the order of their seeds
Table = dict[str, dict[str, Estimate]]


def read_runs(folder: Path, size: str) -> Runs:
    """The runs of ``size``.

    Raises SystemExit where the contestants do not have the same seeds, or a seed's runs did not begin alike.
    """
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    runs = {name: [Run(c) for c in contents if c["size"] == size and c["contestant"] == name] for name in LABELS}
    runs = {name: sorted(found, key=lambda run: run.seed) for name, found in runs.items() if found}
    seeds = [run.seed for run in runs.get("trl", [])]
    if len(seeds) < 2:
        raise SystemExit(f"{folder}: fewer than two runs of TRL at size {size}; run trl_side.py for each seed first")
    for name, found in runs.items():
        if [run.seed for run in found] != seeds:
            raise SystemExit(f"{folder}: {name}, size {size}: other seeds than TRL's {seeds}; run what is missing")
        for run, peer in zip(found, runs["trl"], strict=True):
            which = f"{name}, size {size}, seed {run.seed}"
            if run.about["digest"] != peer.about["digest"]:
                raise SystemExit(f"{which}: other initial weights or prompts than TRL's; run both anew")
            if len(run.columns["reward"]) != run.about["hyperparameters"]["iterations"]:
                raise SystemExit(f"{which}: the run is not finished")
            if name != "shared" and run.about["hyperparameters"] != peer.about["hyperparameters"]:
                raise SystemExit(f"{which}: other hyper-parameters than TRL's; run both anew")
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
    """As Markdown."""
    names = list(table["trl"])
    print(f"\n| {describe(size, seeds)} |", " | ".join(names), "|")
    print("|---" * (len(names) + 1) + "|")
    for contestant, row in table.items():
        cells = ("–" if row[name] == (0, 0) else "{:.3g} ± {:.2g}".format(*row[name]) for name in names)
        print(f"| {LABELS[contestant]} |", " | ".join(cells), "|")


def describe(size: str, seeds: int) -> str:
    """In words."""
    shape = SIZES[size]
    return f"{size}: vocabulary {shape.vocabulary:,}, {shape.layers} layers × {shape.width}, {seeds} seeds"


def draw(runs_of_size: dict[str, Runs], path: Path) -> None:
    """A row a size: mean, interval and every seed's reward, against episodes and against CPU seconds."""
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
    """The seeds are brought to common places on the ``column``, as far as all of them go."""
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
    """Tables, and a line for each run with its curve, hyper-parameters and versions."""
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
    parser.add_argument("curves", type=Path, help="the folder that holds the curves")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
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
