"""Runs all three stages on real files, one after the other, and prints held-out figures.

    TIKTOKEN_CACHE_DIR=… python benchmarks/real_data.py --encoding cl100k_base --batches 40 FILE [FILE ...]

The model is small and starts from random weights, so this takes minutes on two cores. It prints one row per stage and
writes to `benchmarks/.real_data/`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

from rlchat.cli import main as cli

MODEL = (
    "{model_type: llama, hidden_size: 128, intermediate_size: 344, num_hidden_layers: 2, num_attention_heads: 4, "
    "initializer_range: 0.05}"
)
SHOWN = ("perplexity", "accuracy", "pair_accuracy", "reward", "kl", "answer_accuracy", "distinct_2", "response_length")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run all three stages on real files.")
    parser.add_argument("path", nargs="+", type=Path, help="conversation files")
    parser.add_argument("--encoding", default="rlchat_1k")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--batches", type=int, default=40, help="training batches of each stage")
    options = parser.parse_args()
    paths = [str(path.resolve()) for path in options.path]
    folder = Path(__file__).parent.resolve() / ".real_data" / f"{options.path[0].name.split('.')[0]}-{options.encoding}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    common = ["--data.path", *paths, f"--trainer.limit_train_batches={options.batches}", "--trainer.max_epochs=1"]
    common += ["--trainer.limit_val_batches=20", "--trainer.val_check_interval=1.0", "--trainer.limit_test_batches=20"]
    stages = {
        "sft": ["--config", "sft", "--model.base_model", MODEL, f"--model.tiktoken_encoding={options.encoding}"],
        "reward": ["--config", "reward", "--data.contrast=true"],
        "ppo": ["--config", "ppo", "--data.batch_size=16", "--model.max_new_tokens=48"],
    }
    stages["sft"] += [f"--model.max_length={options.max_length}", "--model.hidden_dim=0", "--model.learning_rate=3e-3"]
    for stage, argv in stages.items():
        began = time.monotonic()
        cli.run(["fit", *argv, *common])
        seconds = time.monotonic() - began
        tested = cli.run(["test", *argv, *common, "--ckpt_path=best", "--verbose=false"])
        figures = {k.removeprefix("test/"): float(v) for k, v in tested.trainer.callback_metrics.items()}
        row = "  ".join(f"{name} {figures[name]:.3g}" for name in SHOWN if name in figures)
        print(f"{options.encoding:<12} {stage:<7} {seconds:4.0f} s  {row}", flush=True)


if __name__ == "__main__":
    main()
