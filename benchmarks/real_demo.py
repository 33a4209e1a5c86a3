"""One run of the demo with a real model under other settings: PPO, and the figures before and after as a line of JSON.

    python benchmarks/real_demo.py SmolLM2-135M-Instruct --learning-rate 1e-3 --kl-coef 0.05 --iterations 60

The model is a transformers folder or a GGUF file. It uses a GPU if there is one. Everything is written to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from rlchat.cli import main as cli
from rlchat.demo.real import measure
from rlchat.models.model_file import PolicyBundle, load_policy
from rlchat.rewards import Reward
from rlchat.training.initial_model import open_policy
from rlchat.utils.devices import choose_device

MODEL_FILE = Path("checkpoints/rl_chat_model_tiktoken.pt")


def main() -> None:
    options = arguments().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    base_model = options.base_model
    if Path(base_model).exists():
        base_model = str(Path(base_model).resolve())
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)
    seed = options.seed
    base = on_device(open_policy(base_model, None, 256, None, None))
    held_out, control = measure.read_data("held_out.jsonl"), measure.read_data("control.jsonl")
    if options.held_out:
        held_out = held_out[: options.held_out]
    before = measure.measure(base, held_out, control, seed=seed)
    del base
    Path("settings.yaml").write_text(yaml.safe_dump(settings(options, base_model)))
    began = time.monotonic()
    trained = cli.run(["fit", "--config", "demo/real", "--config", "settings.yaml", *options.more])
    seconds = time.monotonic() - began
    reward: Reward = trained.model.reward
    del trained
    tuned, base = on_device(load_policy(MODEL_FILE)), on_device(open_policy(base_model, None, 256, None, None))
    after = measure.measure(tuned, held_out, control, seed=seed)
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "base_model"}
    result: dict[str, Any] = {"settings": given, "fit_s": round(seconds, 1)}
    result |= {"before": before.figures(reward), "after": after.figures(reward)}
    result["after"]["kl"] = round(measure.mean_kl(tuned, base, after.sampled), 3)
    result["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    result["shown"] = [[row["prompt"][:80], row["after"]["reply"]] for row in before.replies_beside(after)[:12]]
    result["control"] = [row for row in before.control_beside(after) if not row["after"]["correct"]]
    print(json.dumps(result, ensure_ascii=False), flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run the demo with a real model under other settings.")
    parser.add_argument("base_model", help="a transformers folder or a GGUF file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/.real_demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1.4e-3)
    parser.add_argument("--kl-coef", type=float, default=0.1)
    parser.add_argument("--kl-in", choices=("reward", "loss"), default="reward")
    parser.add_argument("--advantage", default="rloo")
    parser.add_argument("--iterations", type=int, default=28)
    parser.add_argument("--prompts", type=int, default=8, help="prompts of an iteration")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--ppo-epochs", type=int, default=1)
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; 0: no adapters")
    parser.add_argument("--train-layers", type=int, help="train the last layers only")
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--weights", type=json.loads, default={}, help='weights of factors: {"Verified": 2}')
    parser.add_argument("--facts", type=int, default=1, help="how many times each question with an answer is used")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--held-out", type=int, help="measure on this many held-out prompts only")
    parser.add_argument("--more", type=shlex.split, default=[], help="more options of `rlchat fit`, as one text")
    return parser


def settings(options: argparse.Namespace, base_model: str) -> dict[str, Any]:
    """A configuration on top of the recipe ``demo/real``."""
    data = files("rlchat.demo.real") / "data"
    recipe = yaml.safe_load((Path(str(files("rlchat"))).parent / "configs/demo/real.yaml").read_text())
    reward = recipe["model"]["init_args"]["reward"]
    for factor in reward["init_args"]["factors"]:
        name = factor["class_path"].rpartition(".")[2]
        factor["init_args"]["weight"] = float(options.weights.get(name, factor["init_args"]["weight"]))
    kept = [factor for factor in reward["init_args"]["factors"] if factor["init_args"]["weight"]]
    reward["init_args"]["factors"] = kept
    # The reader drops rows that occur twice, so that a repeated question gets a different number of spaces behind it.
    rows = [json.loads(line) for line in (data / "facts.jsonl").read_text(encoding="utf-8").splitlines()]
    repeated = [{**row, "prompt": row["prompt"] + " " * n} for n in range(options.facts) for row in rows]
    Path("facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in repeated), encoding="utf-8")
    return {
        "seed_everything": options.seed,
        "model": {
            "class_path": "rlchat.PPOModule",
            "init_args": {
                "base_model": base_model,
                "reward": reward,
                "learning_rate": options.learning_rate,
                "schedule": options.schedule,
                "kl_coef": options.kl_coef,
                "kl_in": options.kl_in,
                "advantage": options.advantage,
                "group_size": options.group_size,
                "ppo_epochs": options.ppo_epochs,
                "minibatches": options.minibatches,
                "max_new_tokens": options.max_new_tokens,
                "adapter": "lora" if options.rank else None,
                "lora_rank": options.rank or 16,
                "lora_alpha": 2.0 * (options.rank or 16),
                "train_layers": options.train_layers,
                "seed": options.seed,
            },
        },
        "data": {
            "path": [str(data / "train.jsonl"), *(["facts.jsonl"] if options.facts else [])],
            "batch_size": options.prompts,
            "seed": options.seed,
        },
        "trainer": {
            "limit_train_batches": min(options.iterations, 40),
            "max_epochs": -(-options.iterations // 40),
            "precision": options.precision,
        },
    }


def on_device(bundle: PolicyBundle) -> PolicyBundle:
    bundle.model.to(choose_device(None)).eval()
    return bundle


if __name__ == "__main__":
    main()
