"""Peak memory of each process while a stage is built and sharded with FSDP2, before training starts.

    python benchmarks/fsdp2_memory.py
    python benchmarks/fsdp2_memory.py --processes 4 --layers 28

PPO starts from a base model folder or from model files, with a separate critic, on CPUs with gloo (Linux). It is built
in two ways: with whole networks in every process (``trainer.init_module(empty_init=False)``), and with whole weights in
the first process only, as the command line does. The peak is the resident memory of a process minus that after the
imports; pages of mapped files are part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LAYERS = 14  # with the width below: 99 million weights
SHAPE = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "max_position_embeddings": 128,
}
ENCODING = {"tiktoken_encoding": "rlchat_1k", "max_length": 128}
SOURCES: dict[str, dict[str, Any]] = {
    "base model folder": {**ENCODING, "base_model": "base", "new_embeddings": True},
    "model file": {"init_from": "policy.pt"},
    "model file, critic_init": {"init_from": "policy.pt", "critic_init": "reward.pt"},
}


def memory_mb(entry: str) -> float:
    """``VmRSS`` or its peak ``VmHWM``. The peak of ``getrusage`` would contain the memory of the starting process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(entry)).split()[1]) / 1024


def build(name: str, everywhere: bool, layers: int, processes: int, folder: Path) -> None:
    """Builds and shards one configuration; each process writes its peak memory in MB to a file."""
    import lightning as L
    import torch
    from torch.distributed.checkpoint.state_dict import set_model_state_dict  # noqa: F401  # imports take memory too
    from torch.distributed.fsdp import fully_shard  # noqa: F401

    from rlchat import PPOModule
    from rlchat.distributed.strategies import FSDP2Strategy

    class Peak(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            (folder / f"{trainer.global_rank}.json").write_text(json.dumps(memory_mb("VmHWM") - before))
            trainer.strategy.barrier()
            os._exit(0)

    os.chdir(folder)
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    before = memory_mb("VmRSS")
    trainer = L.Trainer(
        accelerator="cpu", devices=processes, strategy=FSDP2Strategy(), max_epochs=1, callbacks=[Peak()], **quiet
    )
    torch.manual_seed(0)
    with trainer.init_module(empty_init=False if everywhere else None):
        module = PPOModule(**SOURCES[name], critic="separate", max_new_tokens=16)
    trainer.fit(module, torch.utils.data.DataLoader([0]))  # type: ignore[arg-type]


def write_files(folder: Path, layers: int) -> int:
    """Writes the files that configurations start from; returns the number of weights of the policy."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlchat.models.model_file import RewardBundle, save_bundle
    from rlchat.models.networks import RewardModel
    from rlchat.training.initial_model import open_policy

    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=1024)).save_pretrained(folder / "base")
    bundle = open_policy({**SHAPE, "num_hidden_layers": layers}, ENCODING["tiktoken_encoding"], 128, None, None)
    save_bundle(folder / "policy.pt", bundle)
    save_bundle(folder / "reward.pt", RewardBundle(RewardModel(bundle.model.backbone), bundle.tokenizer, 128))
    return sum(weight.numel() for weight in bundle.model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--build", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        name, everywhere, folder = options.build
        build(name, everywhere == "everywhere", options.layers, options.processes, Path(folder))
        return
    sizes = ["--processes", str(options.processes), "--layers", str(options.layers)]
    with tempfile.TemporaryDirectory() as place:
        weights = write_files(Path(place), options.layers)
        size = 4 * weights / 2**20
        shards = 3 * size / options.processes
        print(
            f"{weights / 1e6:.0f} million weights, {size:.0f} MB; shards of three networks: {shards:.0f} MB per process"
        )
        print("MB of each process:", flush=True)
        for name in SOURCES:
            for where in ("everywhere", "first"):
                words = [sys.executable, __file__, *sizes, "--build", name, where, place]
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                found = [Path(place, f"{rank}.json") for rank in range(options.processes)]
                peaks = ", ".join(f"{json.loads(path.read_text()):.0f}" for path in found)
                print(
                    f"{name}: whole networks in {'every' if where == 'everywhere' else 'the first'} process: {peaks}",
                    flush=True,
                )
                for path in found:
                    path.unlink()


if __name__ == "__main__":
    main()
