"""Learning curves of PPO with LoRA beside full fine-tuning: the same prompts, reward and random numbers.

    python benchmarks/lora_curve.py FOLDER

Each run is a separate process with one thread. The prompts are those of `rlchat demo --real`. The reward is minus the
mean number of letters in a word: every response has one, so a few iterations show whether the policy learns. The
advantage is RLOO, which needs no critic. Each run prints one line per iteration. The learning
rates are not tuned.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from importlib.resources import files
from typing import Any

RUNS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 3e-5},
    "lora": {"learning_rate": 1e-3, "adapter": "lora", "lora_rank": 16},
}


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
            numbers = " ".join(f"{float(metrics[f'train/{name}']):9.4f}" for name in ("reward", "kl", "entropy"))
            print(
                f"{run:<6} {trainer.fit_loop.total_batch_idx + 1:>3} {numbers} {time.process_time():8.0f}", flush=True
            )

    torch.set_num_threads(1)
    L.seed_everything(options.seed, verbose=False)
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
        seed=options.seed,
        **RUNS[run],
    )
    path = str(files("rlchat.demo.real") / "data" / "train.jsonl")
    data = OASST2DataModule([path], batch_size=options.prompts, val_fraction=0.0, test_fraction=0.0, seed=options.seed)
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Print learning curves of PPO with LoRA and with all weights.")
    parser.add_argument("base_model", help="a transformers folder or a GGUF file")
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(options.one, options)
        return
    print(f"{'run':<6} {'it.':>3} {'reward':>9} {'KL':>9} {'entropy':>9} {'CPU s':>8}", flush=True)
    for run in RUNS:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", run], check=True)


if __name__ == "__main__":
    main()
