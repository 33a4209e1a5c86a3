"""rlchat's PPO against TRL's: reward against episodes and against CPU seconds, over the seeds.

    python benchmarks/against_trl/compare.py curves --figure docs/against_trl.png

reads the curves that `trl_side.py` and `rlchat_side.py` wrote (each one's docstring says how to run it; `make
against_trl` runs all), refuses those that did not begin alike, prints a table, and writes the figure and
`benchmarks/against_trl/results.json`. Intervals are Student's, 95%, over the seeds; differences are taken seed by
seed, since a seed's runs share initial weights and prompts.

Both sides have: GPT-2 with random weights, tied embeddings, no dropout; a reference that is the initial model; k1 KL in
the per-token reward, the score on the last token; GAE; whitened advantages; clipped policy and value losses; a critic
that begins as a copy of the policy's trunk under a head of zeros; AdamW with the same betas and epsilon; a learning
rate that falls linearly over the iterations; no gradient clipping; special ids that cannot be said. What is left:

- TRL draws with `torch.multinomial`, rlchat by its addressed noise: other replies from the first token on.
- TRL's old log-probs are those of generation with a cache, rlchat's of the pass that is trained: 1e-6 in float32.
- TRL whitens with the unbiased variance of 1,024 tokens, rlchat with the biased one: 0.05%.
- TRL's value head has no bias.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
LABELS = {
    "trl": "TRL",
    "separate": "rlchat, critic: separate",
    "shared": "rlchat, critic: shared",
}
COLOURS = {"trl": "#777777", "separate": "#1f6fb4", "shared": "#d1700f"}
LAST = 5  # iterations whose mean is the final reward
GOAL = 0.8
# Student's t, 97.5%, by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its 95% interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.half:.2g}"


def estimate(values: Sequence[float]) -> Estimate:
    """Over at least two seeds, at most ten."""
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), half)


class Run:
    """One curve, as columns."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.contestant: str = content["contestant"]
        self.seed: int = content["seed"]
        self.content = {name: value for name, value in content.items() if name != "curve"}
        self.columns = {name: [row[name] for row in content["curve"]] for name in content["curve"][0]}

    @property
    def final(self) -> float:
        return statistics.fmean(self.columns["reward"][-LAST:])

    @property
    def over_all(self) -> float:
        """Mean reward of every episode of the run."""
        return statistics.fmean(self.columns["reward"])

    def reaches(self, column: str) -> float:
        """``column`` at the end of the first iteration whose replies earned :data:`GOAL`; nan where none did."""
        places = (i for i, reward in enumerate(self.columns["reward"]) if reward >= GOAL)
        return next((float(self.columns[column][i]) for i in places), math.nan)


def read_runs(folder: Path, size: str) -> dict[str, list[Run]]:
    """The runs of ``size``, by contestant, in the order of their seeds.

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
            raise SystemExit(f"{folder}: {name} has other seeds than TRL's {seeds}; run what is missing")
        for run, peer in zip(found, runs["trl"], strict=True):
            if run.content["digest"] != peer.content["digest"]:
                raise SystemExit(f"{name}, seed {run.seed}: other initial weights or prompts than TRL's; run both anew")
            if len(run.columns["reward"]) != run.content["hyperparameters"]["iterations"]:
                raise SystemExit(f"{name}, seed {run.seed}: the run is not finished")
            if name != "shared" and run.content["hyperparameters"] != peer.content["hyperparameters"]:
                raise SystemExit(f"{name}, seed {run.seed}: other hyper-parameters than TRL's; run both anew")
    return runs


def summary(runs: dict[str, list[Run]]) -> dict[str, dict[str, Estimate]]:
    """The figures of the table, by contestant."""
    table = {}
    for name, found in runs.items():
        pairs = list(zip(found, runs["trl"], strict=True))
        table[name] = {
            "final reward": estimate([run.final for run in found]),
            "less TRL's": estimate([run.final - peer.final for run, peer in pairs]),
            "reward of all episodes": estimate([run.over_all for run in found]),
            f"episodes to {GOAL}": estimate([run.reaches("episodes") for run in found]),
            f"CPU s to {GOAL}": estimate([run.reaches("cpu_s") for run in found]),
            "CPU s an iteration": estimate([run.columns["cpu_s"][-1] / len(run.columns["cpu_s"]) for run in found]),
        }
    return table


def print_table(table: dict[str, dict[str, Estimate]]) -> None:
    """As Markdown."""
    names = list(table["trl"])
    print("| |", " | ".join(names), "|")
    print("|---" * (len(names) + 1) + "|")
    for contestant, row in table.items():
        cells = ("" if contestant == "trl" and name == "less TRL's" else str(row[name]) for name in names)
        print(f"| {LABELS[contestant]} |", " | ".join(cells), "|")


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Mean and 95% band of the reward, against episodes and against CPU seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
    for axis, column, label in zip(axes, ("episodes", "cpu_s"), ("episodes", "CPU seconds, one thread"), strict=True):
        for name, found in runs.items():
            first = max(run.columns[column][0] for run in found)
            last = min(run.columns[column][-1] for run in found)
            grid = np.linspace(first, last, 200)
            rewards = np.array([np.interp(grid, run.columns[column], run.columns["reward"]) for run in found])
            mean, half = np.array([estimate(at.tolist()) for at in rewards.T]).T
            axis.fill_between(grid, mean - half, mean + half, color=COLOURS[name], alpha=0.15, linewidth=0)
            axis.plot(grid, mean, color=COLOURS[name], linewidth=2, label=LABELS[name])
            for run in found:
                axis.plot(run.columns[column], run.columns["reward"], color=COLOURS[name], linewidth=0.6, alpha=0.6)
        axis.set(xlabel=label, xlim=(0, None), ylim=(0, 1))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("reward of the sampled replies")
    axes[0].legend(loc="upper left", frameon=False)
    figure.suptitle(f"Mean, seeds and 95% interval over {len(runs['trl'])} seeds", fontsize=10)
    figure.savefig(path, dpi=110)


def write_results(runs: dict[str, list[Run]], table: dict[str, dict[str, Estimate]], path: Path) -> None:
    """Curves, configurations, versions and the table, as JSON of a line a column."""
    content = {
        "table": {LABELS[name]: {k: [round(x, 4) for x in v] for k, v in row.items()} for name, row in table.items()},
        "runs": [run.content | run.columns for found in runs.values() for run in found],
    }
    lines = ",\n".join("  " + json.dumps(run) for run in content["runs"])
    path.write_text(f'{{"table": {json.dumps(content["table"], indent=1)},\n"runs": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path, help="the folder that holds the curves")
    parser.add_argument("--size", default="S")
    parser.add_argument("--figure", type=Path, default=HERE.parent.parent / "docs" / "against_trl.png")
    parser.add_argument("--json", type=Path, default=HERE / "results.json")
    options = parser.parse_args()
    runs = read_runs(options.curves, options.size)
    table = summary(runs)
    print_table(table)
    draw(runs, options.figure)
    write_results(runs, table, options.json)


if __name__ == "__main__":
    main()
