"""Runs all three stages on real files, one after the other, and prints held-out figures.

    TIKTOKEN_CACHE_DIR=… python benchmarks/real_data.py --encoding cl100k_base --batches 40 FILE [FILE ...]
    python benchmarks/real_data.py --base-model SmolLM2-135M-Instruct --batches 8 --max_length 128 FILE [FILE ...]

The model is small and starts from random weights, so this takes minutes on two cores. With a base model, each stage
trains a LoRA adapter. The script prints one row per stage and writes to `benchmarks/.real_data/`.
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
    parser.add_argument("--base-model", help="a pretrained model, with its own encoding, in place of the small one")
    parser.add_argument("--test_batches", type=int, default=20, help="batches of each validation and test")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--batches", type=int, default=40, help="training batches of each stage")
    options = parser.parse_args()
    paths = [str(path.resolve()) for path in options.path]
    base = options.base_model and str(Path(options.base_model).resolve())
    encoding = Path(base).stem if base else options.encoding
    folder = Path(__file__).parent.resolve() / ".real_data" / f"{options.path[0].name.split('.')[0]}-{encoding}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    common = ["--data.path", *paths, f"--trainer.limit_train_batches={options.batches}", "--trainer.max_epochs=1"]
    common += [f"--trainer.limit_{split}_batches={options.test_batches}" for split in ("val", "test")]
    common += ["--trainer.val_check_interval=1.0"]
    stages = {
        "sft": ["--config", "sft", "--model.hidden_dim=0", f"--model.max_length={options.max_length}"],
        "reward": ["--config", "reward", "--data.contrast=true"],
        "ppo": ["--config", "ppo", "--data.batch_size=16", "--model.max_new_tokens=48"],
    }
    if base:
        common += [
            "--model.adapter=lora",
            "--model.learning_rate=5e-4",
            "--data.batch_size=4",
            "--data.val_batch_size=4",
        ]
        stages["sft"] += ["--model.base_model", base]
    else:
        stages["sft"] += ["--model.base_model", MODEL, f"--model.tiktoken_encoding={encoding}"]
        stages["sft"] += ["--model.learning_rate=3e-3"]
    for stage, argv in stages.items():
        began = time.monotonic()
        cli.run(["fit", *argv, *common])
        seconds = time.monotonic() - began
        tested = cli.run(["test", *argv, *common, "--ckpt_path=best", "--verbose=false"])
        figures = {k.removeprefix("test/"): float(v) for k, v in tested.trainer.callback_metrics.items()}
        row = "  ".join(f"{name} {figures[name]:.3g}" for name in SHOWN if name in figures)
        print(f"{encoding:<12} {stage:<7} {seconds:4.0f} s  {row}", flush=True)


if __name__ == "__main__":
    main()
