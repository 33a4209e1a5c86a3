"""One run of the demo with a real model under other settings: PPO, and the figures before and after as a line of JSON.

    python benchmarks/real_demo.py SmolLM2-135M-Instruct --learning-rate 1e-3 --iterations 40

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
from rlchat.cli.recipes import find_recipe
from rlchat.demo.real import measure
from rlchat.models.model_file import PolicyBundle, load_policy
from rlchat.rewards import Reward
from rlchat.training.initial_model import open_policy
from rlchat.utils.devices import choose_device

MODEL_OPTIONS = {
    "learning_rate": float,
    "kl_coef": float,
    "group_size": int,
    "ppo_epochs": int,
    "minibatches": int,
    "max_new_tokens": int,
    "lora_rank": int,
    "train_layers": int,
}
"""Options of PPOModule that can be set; by default, they are those of the recipe."""
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
    trained = cli.run(["fit", "--config", "settings.yaml", *options.more])
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
    for name, kind in MODEL_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.add_argument("--no-adapter", action="store_true", help="train weights of the model instead of adapters")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--prompts", type=int, help="prompts of an iteration")
    parser.add_argument("--weights", type=json.loads, default={}, help='weights of factors: {"Verified": 1}')
    parser.add_argument("--no-facts", action="store_true", help="leave out the questions with an answer")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--held-out", type=int, help="measure on this many held-out prompts only")
    parser.add_argument("--more", type=shlex.split, default=[], help="more options of `rlchat fit`, as one text")
    return parser


def settings(options: argparse.Namespace, base_model: str) -> dict[str, Any]:
    """The recipe ``demo/real`` with the options that are given."""
    recipe: dict[str, Any] = yaml.safe_load(find_recipe("demo/real").read_text(encoding="utf-8"))
    model, data, trainer = recipe["model"]["init_args"], recipe["data"], recipe["trainer"]
    model |= {name: getattr(options, name) for name in MODEL_OPTIONS if getattr(options, name) is not None}
    model |= {"base_model": base_model, "seed": options.seed}
    if options.no_adapter:
        model["adapter"] = None
    factors = model["reward"]["init_args"]["factors"]
    for factor in factors:
        name = factor["class_path"].rpartition(".")[2]
        factor["init_args"]["weight"] = float(options.weights.get(name, factor["init_args"]["weight"]))
    model["reward"]["init_args"]["factors"] = [factor for factor in factors if factor["init_args"]["weight"]]
    names = ["train.jsonl", *([] if options.no_facts else ["facts.jsonl"])]
    data |= {"path": [str(files("rlchat.demo.real") / "data" / name) for name in names], "seed": options.seed}
    data["batch_size"] = options.prompts or data["batch_size"]
    if options.iterations:  # an epoch has fewer than 50
        trainer["max_epochs"] = -(-options.iterations // 40)
        trainer["limit_train_batches"] = -(-options.iterations // trainer["max_epochs"])
    return {**recipe, "seed_everything": options.seed}


def on_device(bundle: PolicyBundle) -> PolicyBundle:
    bundle.model.to(choose_device(None)).eval()
    return bundle


if __name__ == "__main__":
    main()
