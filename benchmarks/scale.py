"""How time and memory of an iteration of PPO grow with batch, length, vocabulary, layers and processes.

    python benchmarks/scale.py --json scale.json --plot scale.png
    python benchmarks/scale.py --vary vocabulary

One quantity varies at a time. The others are those of a GPT-2 with a vocabulary of 8,192 and 4 layers of width 128, a
shared critic, and 32 prompts of 8 to 32 tokens with responses of 64 tokens, which are trained on once in a single
minibatch. For the vocabulary, it is 8 prompts with responses of 512 tokens. Every run is a separate process with one
thread, or several with DDP; the first iteration of three is left out, and medians are taken.

The update grows by the memory that its peak is above the memory before it, in which gradients and optimizer states
already are. Logits of all tokens at once would add 4 bytes × tokens × vocabulary, several times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "against_trl")]


@dataclass(frozen=True)
class Run:
    """The sizes of a run."""

    batch: int = 32
    length: int = 64  # tokens of each response
    vocabulary: int = 8192
    layers: int = 4
    processes: int = 1


VALUES: dict[str, tuple[Run, list[int]]] = {
    "batch": (Run(), [8, 16, 32, 64, 128]),
    "length": (Run(batch=8), [32, 64, 128, 256, 512]),
    "vocabulary": (Run(batch=8, length=512), [4096, 16_384, 50_257, 100_277]),
    "layers": (Run(), [2, 4, 8, 16]),
    "processes": (Run(batch=64), [1, 2]),
}
LABELS = {"batch": "responses", "length": "tokens per response"}  # of the axes
ITERATIONS = 3
COLUMNS = {
    "cpu_s": "CPU s",
    "wall_s": "wall s",
    "rollout_s": "rollout",
    "update_s": "update",
    "peak_mb": "peak MB",
    "grown_mb": "update grows MB",
    "logits_mb": "logits MB",
}


def status_mb(name: str) -> float:
    """A field of /proc/self/status in MB; NaN where there is no such file."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), float("nan"))


def reset_peak() -> None:
    """VmHWM starts again from the memory that is used now (Linux)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def measure(run: Run) -> None:
    """Runs the iterations and prints a line of JSON for each."""
    import lightning as L
    import torch
    from common import SIZES, Hyperparameters, initial_model, make_prompts
    from rlchat_side import IdPPO, fit, make_batches, options_of

    from rlchat.data.batches import PromptBatch
    from rlchat.ppo.module import Iteration

    class Measured(IdPPO):
        def update(self, iteration: Iteration, sequences: Any) -> dict[str, float]:
            reset_peak()
            self.before_mb = status_mb("VmRSS")
            return super().update(iteration, sequences)

    class Printer(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.cpu, self.wall = time.process_time(), time.perf_counter()

        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            logged = trainer.callback_metrics
            row = {
                "cpu_s": time.process_time() - self.cpu,
                "wall_s": time.perf_counter() - self.wall,
                **{name: float(logged[f"time/{name}"]) for name in ("rollout_s", "update_s")},
                "peak_mb": status_mb("VmHWM"),
                "grown_mb": status_mb("VmHWM") - module.before_mb,
                "logits_mb": 4 * len(module.last_iteration.rollout.ids) * run.length * run.vocabulary / 2**20,
            }
            if trainer.is_global_zero:
                print(json.dumps(row), flush=True)

    torch.set_num_threads(1)
    size = SIZES["S"]._replace(vocabulary=run.vocabulary, layers=run.layers, response=run.length)
    h = Hyperparameters(1e-3, ITERATIONS, run.batch, ppo_epochs=1, minibatches=1)
    folder = Path(tempfile.mkdtemp())
    module = Measured(**options_of(h, size, 0, "shared", initial_model(size, 0), folder))
    batches = make_batches(make_prompts(size, 0, ITERATIONS * run.batch), size, run.batch)
    rank, world = int(os.environ.get("LOCAL_RANK", "0")), run.processes
    mine = [
        PromptBatch(batch.ids[rank::world], batch.attention_mask[rank::world], batch.conversations[rank::world])
        for batch in batches
    ]
    strategy = "ddp" if world > 1 else "auto"
    fit(module, mine, Printer(), devices=world, strategy=strategy, use_distributed_sampler=False)


def measured(run: Run) -> dict[str, float]:
    """The medians of a run, from a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, __file__, "--one", json.dumps(asdict(run))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")][1:]
    if done.returncode or not rows:
        raise SystemExit(f"{run} failed:\n{done.stderr[-2000:]}")
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def draw(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Time and memory against each quantity, on logarithmic scales."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(3 * len(results), 5.8), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False, sharex="col")
    for column, (name, rows) in enumerate(results.items()):
        at = [row[name] for row in rows]
        for key, label in (("wall_s", "iteration"), ("rollout_s", "rollout"), ("update_s", "update")):
            axes[0][column].loglog(at, [row[key] for row in rows], marker=".", label=label)
        axes[1][column].loglog(
            at, [row["peak_mb"] for row in rows], marker=".", color="C3", label="peak of the process"
        )
        axes[1][column].loglog(at, [row["logits_mb"] for row in rows], "k:", label="logits of all tokens")
        axes[1][column].set_xlabel(LABELS.get(name, name))
        axes[1][column].set_xticks(at, [f"{value / 1000:.0f}k" if value > 1000 else f"{value:g}" for value in at])
        for panel in (axes[0][column], axes[1][column]):
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            low, high = panel.get_ylim()
            panel.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
            panel.yaxis.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("MB")
    curves = [line for row in axes for line in row[0].get_lines()]
    figure.legend(curves, [str(line.get_label()) for line in curves], loc="outside upper center", ncols=len(curves))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of an iteration of PPO against its sizes.")
    parser.add_argument("--vary", choices=VALUES, nargs="+", default=list(VALUES))
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--plot", type=Path, help="draw the curves to this PNG file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(Run(**json.loads(options.one)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.vary}
    for name, rows in results.items():
        base, values = VALUES[name]
        print(f"{name:>10s} {' '.join(f'{title:>15s}' for title in COLUMNS.values())}")
        for value in values:
            rows.append({name: value, **measured(replace(base, **{name: value}))})
            print(f"{value:10d} {' '.join(f'{rows[-1][key]:15.2f}' for key in COLUMNS)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
