"""Learning curves of PPO with LoRA beside full fine-tuning: the same prompts, reward and random numbers.

    python benchmarks/lora_curve.py FOLDER --seeds 0 1 2 --plot lora_curve.png

Each run is a separate process with one thread. The prompts are those of `rlchat demo --real`. The reward is minus the
mean number of letters in a word: every response has one, so a few iterations show whether the policy learns. The
advantage is RLOO, which needs no critic. Two learning rates of each kind are run, because reward can be compared at
equal KL only. A line is printed per iteration, and at the end the means of the last iterations.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

LORA: dict[str, Any] = {"adapter": "lora", "lora_rank": 16}
RUNS: dict[str, dict[str, Any]] = {
    "full 3e-5": {"learning_rate": 3e-5},
    "full 1e-4": {"learning_rate": 1e-4},
    "LoRA 3e-4": {"learning_rate": 3e-4, **LORA},
    "LoRA 1e-3": {"learning_rate": 1e-3, **LORA},
}
LAST = 3  # iterations whose mean is the result of a run


def short_words(prompt: Any, reply: Any) -> float:
    """Minus the mean number of letters in the words of a response; -10 if it has no word."""
    lengths = [len(word) for word in re.findall(r"[^\W\d_]+", reply.text)]
    return -statistics.fmean(lengths) if lengths else -10.0


def train(run: str, options: argparse.Namespace) -> None:
    """Runs PPO and prints reward, KL and CPU seconds of each iteration."""
    import lightning as L
    import torch

    from rlchat import OASST2DataModule, PPOModule
    from rlchat.rewards import Reward

    class Curve(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            metrics = trainer.callback_metrics
            row = {name: float(metrics[f"train/{name}"]) for name in ("reward", "kl", "entropy")}
            print(json.dumps({**row, "cpu_s": time.process_time()}), flush=True)

    torch.set_num_threads(1)
    L.seed_everything(options.one_seed, verbose=False)
    module = PPOModule(
        options.base_model,
        max_length=128,
        max_new_tokens=options.new_tokens,
        group_size=options.group_size,
        advantage="rloo",
        ppo_epochs=1,
        minibatches=2,
        schedule="constant",
        kl_coef=0.01,
        reward=Reward([short_words]),
        seed=options.one_seed,
        **RUNS[run],
    )
    path = str(files("rlchat.demo.real") / "data" / "train.jsonl")
    data = OASST2DataModule(
        [path], batch_size=options.prompts, val_fraction=0.0, test_fraction=0.0, seed=options.one_seed
    )
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=1,
        limit_train_batches=options.iterations,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Curve()],
    )
    trainer.fit(module, data)


def curve(run: str, seed: int) -> list[dict[str, float]]:
    """The iterations of a run, from a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", run, "--one-seed", str(seed)]
    rows: list[dict[str, float]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("{"):
                rows.append(json.loads(line))
                numbers = " ".join(f"{value:9.3f}" for value in rows[-1].values())
                print(f"{run:<10} {seed:>4} {len(rows):>4} {numbers}", flush=True)
    if process.returncode:
        raise SystemExit(f"{run} with seed {seed} failed")
    return rows


def draw(curves: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Reward by iteration and reward by KL: the mean over seeds of each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_iteration, by_kl = figure.subplots(1, 2, sharey=True)
    for name, runs in curves.items():
        style = {"label": name, "linestyle": "-" if name.startswith("LoRA") else "--", "marker": "."}
        reward, kl = (
            [statistics.fmean(row[key] for row in rows) for rows in zip(*runs, strict=True)] for key in ("reward", "kl")
        )
        by_iteration.plot(range(1, len(reward) + 1), reward, **style)
        by_kl.plot(kl, reward, **style)
    by_iteration.set(xlabel="iteration", ylabel="reward (minus letters per word)")
    by_kl.set(xlabel="KL to the base model (nats per response)")
    by_kl.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learning curves of PPO with LoRA and with all weights.")
    parser.add_argument("base_model", help="a transformers folder or a GGUF file")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--plot", type=Path, help="draw the curves to this PNG file")
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--one-seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(options.one, options)
        return
    print(f"{'run':<10} seed  it. {'reward':>9} {'KL':>9} {'entropy':>9} {'CPU s':>9}", flush=True)
    curves: dict[str, list[list[dict[str, float]]]] = {run: [] for run in RUNS}
    for seed in options.seeds:
        for run in RUNS:
            curves[run].append(curve(run, seed))
            if options.json:
                options.json.write_text(json.dumps(curves, indent=1))
    print(f"\nmeans of the last {LAST} iterations, by seed")
    for run, runs in curves.items():
        means = [[statistics.fmean(row[key] for row in rows[-LAST:]) for key in ("reward", "kl")] for rows in runs]
        print(f"{run:<10}", ", ".join(f"reward {reward:.2f} at KL {kl:.1f}" for reward, kl in means))
    if options.plot:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
