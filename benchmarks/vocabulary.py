"""Time and memory of an update with a large vocabulary, beside their limits: 13 CPU seconds and 600 MB.

    python benchmarks/vocabulary.py --json vocabulary.json

The model is a GPT-2 with a vocabulary of 100,277 and 4 layers of width 128. SFT updates it on 8 conversations of 512
tokens, PPO with a shared critic on 8 responses of 512 tokens, once and in a single minibatch. Each stage is a process
of its own with one thread, which prints the first two updates.

An update grows by the memory that its peak is above the memory before it, without the gradients and the optimizer
states that are not allocated before it. The logits of all tokens would add 1.6 GB, several times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "against_trl")]
from common import SIZES, Hyperparameters, Size, initial_model, make_prompts  # noqa: E402
from scale import reset_peak, status_mb  # noqa: E402

BATCH, LENGTH = 8, 512
MOST_CPU_S, MOST_MB = 13, 600
UPDATES = 2


class Meter:
    """What an update of ``module`` takes, from one :meth:`start` to its :meth:`stop`."""

    def start(self, module: Any) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        state = module.trainer.optimizers[0].state
        # AdamW keeps two numbers for each weight.
        new = sum(p.numel() * ((p.grad is None) + 2 * (p not in state)) for p in trained)
        self.allocated_mb = 4 * new / 2**20
        reset_peak()
        self.before_mb, self.cpu = status_mb("VmRSS"), time.process_time()

    def stop(self) -> None:
        row = {
            "cpu_s": time.process_time() - self.cpu,
            "before_mb": self.before_mb,
            "allocated_mb": self.allocated_mb,
            "grown_mb": status_mb("VmHWM") - self.before_mb - self.allocated_mb,
        }
        print(json.dumps({name: round(value, 2) for name, value in row.items()}), flush=True)


def run_sft(size: Size) -> None:
    """Two updates on random conversations in which every token but the first is trained on."""
    import lightning as L
    import torch
    from rlchat_side import fit, save_initial

    from rlchat.data.batches import SequenceBatch
    from rlchat.training.sft import SFTModule

    class Measured(L.Callback):
        meter = Meter()

        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            self.meter.start(module)

        def on_train_batch_end(self, *_: Any) -> None:
            self.meter.stop()

    path = Path(tempfile.mkdtemp()) / "initial.pt"
    save_initial(initial_model(size, 0), size, path)
    ids = torch.randint(0, size.sayable, (UPDATES, BATCH, LENGTH + 1))
    trained = torch.ones(BATCH, LENGTH + 1, dtype=torch.bool)
    trained[:, 0] = False
    batches = [SequenceBatch(part, torch.ones_like(trained), trained) for part in ids]
    fit(SFTModule(init_from=str(path)), batches, Measured())  # type: ignore[arg-type]


def run_ppo(size: Size) -> None:
    """Two iterations, whose updates are measured."""
    from rlchat_side import IdPPO, fit, make_batches, options_of

    from rlchat.ppo.module import Iteration

    class Measured(IdPPO):
        def update(self, iteration: Iteration, sequences: Any) -> dict[str, float]:
            meter = Meter()
            meter.start(self)
            metrics = super().update(iteration, sequences)
            meter.stop()
            return metrics

    h = Hyperparameters(1e-3, UPDATES, BATCH, ppo_epochs=1, minibatches=1)
    module = Measured(**options_of(h, size, 0, "shared", initial_model(size, 0), Path(tempfile.mkdtemp())))
    fit(module, make_batches(make_prompts(size, 0, UPDATES * BATCH), size, BATCH))


def measured(stage: str, vocabulary: int) -> list[dict[str, float]]:
    """What each update of a stage takes, from a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, __file__, "--vocabulary", str(vocabulary), "--one", stage]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(rows) != UPDATES:
        raise SystemExit(f"{stage} failed:\n{done.stderr[-2000:]}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of an update with a large vocabulary.")
    parser.add_argument("--vocabulary", type=int, default=100_277)
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--one", choices=("sft", "ppo"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        size = SIZES["S"]._replace(vocabulary=options.vocabulary, response=LENGTH)
        {"sft": run_sft, "ppo": run_ppo}[options.one](size)
        return
    results = {stage: measured(stage, options.vocabulary) for stage in ("sft", "ppo")}
    for stage, rows in results.items():
        for number, row in enumerate(rows, 1):
            print(
                f"{stage} update {number}: {row['cpu_s']:5.2f} CPU s (limit {MOST_CPU_S}), grows by "
                f"{row['grown_mb']:4.0f} MB (limit {MOST_MB}) above {row['before_mb']:.0f} MB before it and "
                f"{row['allocated_mb']:.0f} MB of new gradients and optimizer states"
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
