"""Runs the real command line on any number of processes and compares the outputs bit for bit."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]

# The outputs of a run in the folder `trainer.default_root_dir`: `trace.<rank>.jsonl` has for each training batch its
# metrics, the sampled responses, and hashes of the weights and the optimizer; with `dump`, `steps` has the
# weights before each optimizer step and after the last; `built.<rank>` has the number of weights that the process held
# when the networks were built, before they were sharded. An untrained model hardly ever ends a response: with
# `unequal`, responses are truncated at a length that depends on their global number; and in the second iteration, every
# second one (all of the second of two processes) consists of the end marker only.
WITNESS = """
import hashlib, json
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback

from rlchat.distributed.collectives import whole


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(whole(tensor.detach()).float().clone().numpy().tobytes())
    return found.hexdigest()[:16]


class Witness(Callback):
    def __init__(self, dump: bool = False, unequal: bool = False):
        self.dump, self.unequal = dump, unequal
        self.step = 0
        self.drawn = []

    def setup(self, trainer, module, stage):
        generate = getattr(module, "generate", None)
        built = Path(trainer.default_root_dir, f"built.{trainer.global_rank}")
        built.parent.mkdir(parents=True, exist_ok=True)
        built.write_text(str(sum(weight.numel() for weight in module.parameters() if not weight.is_meta)))

        def watched(ids, *rest):
            generated = generate(ids, *rest)
            if trainer.training and self.unequal:
                generated = self.cut(generated, module)
            self.drawn = [row[keep].tolist() for row, keep in zip(generated.ids, generated.mask)]
            return generated

        if generate is not None:
            module.generate = watched

    def cut(self, generated, module):
        tokenizer, copies = module.tokenizer, module.options.group_size
        rows = module.global_rows(len(generated.ids) // copies, copies=copies)
        lengths = 1 + (5 * rows + 3 * module.iterations) % generated.ids.shape[1]
        if module.iterations == 1:
            lengths = torch.where(rows % 2 == 1, 1, lengths)
        place = torch.arange(generated.ids.shape[1])
        mask = generated.mask & (place < lengths[:, None])
        ids = generated.ids.where(place < lengths[:, None] - 1, torch.where(mask, tokenizer.end_id, tokenizer.pad_id))
        longest = int(mask.sum(1).max())
        ended = (ids == tokenizer.end_id).any(1)
        ids, mask, logprobs = (x[:, :longest] for x in (ids, mask, generated.logprobs))
        return replace(generated, ids=ids, mask=mask, ended=ended, logprobs=logprobs)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.keep(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        line = {
            "batch": trainer.fit_loop.total_batch_idx + 1,
            "weights": digest(module.parameters()),
            "optimizer": digest(states),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "drawn": self.drawn,
        }
        with Path(trainer.default_root_dir, f"trace.{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\\n")

    def on_train_end(self, trainer, module):
        self.keep(trainer, module)

    def keep(self, trainer, module):
        if self.dump:
            weights = {name: whole(value.detach()).clone() for name, value in module.named_parameters()}
            path = Path(trainer.default_root_dir, "steps", f"{self.step:04}.{trainer.global_rank}.pt")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(weights, path)
            self.step += 1
"""
# Copies each version of `last.ckpt` to a numbered file.
KEEPER = """
import shutil
from pathlib import Path
from rlchat.distributed.strategies import AtomicCheckpointIO

class Keeper(AtomicCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        if path.name == "last.ckpt":
            kept = path.with_name("kept")
            kept.mkdir(exist_ok=True)
            shutil.copy(path, kept / f"{len(list(kept.iterdir())):02}.ckpt")
"""
QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
    "--sample_responses.max_rows=0",
    "--stats_plot.min_seconds=1000",
]


def write_talk(path: Path, count: int = 60) -> None:
    """``count`` conversations of different lengths, each ranked, labelled and in a separate tree."""
    rows = []
    for n in range(count):
        question = "And then? " * (n % 4) + f"What comes after {n}?"
        rows.append({"prompt": question, "chosen": f"It is {n + 1}." + " So it is." * (n % 3), "rejected": "No."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_turns(path: Path, count: int = 60) -> None:
    """``count`` conversations of one to three turns."""
    rows = []
    for n in range(count):
        turns = [{"content": text} for k in range(1 + n % 3) for text in (f"What comes after {n + k}?", "It is.")]
        rows.append({"messages": turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder: Path) -> Path:
    """A new working directory with data and the callback that writes traces."""
    folder.mkdir(parents=True)
    write_talk(folder / "talk.jsonl")
    write_turns(folder / "turns.jsonl")
    (folder / "witness.py").write_text(WITNESS)
    (folder / "keeper.py").write_text(KEEPER)
    return folder


def environment() -> dict[str, str]:
    """The environment of `make test`: this working tree, one thread per process."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**clean, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def fit_words(words: Sequence[str], ranks: int = 1, strategy: str = "ddp") -> list[str]:
    """The command line of a run on ``ranks`` processes that writes traces."""
    many = [f"--trainer.devices={ranks}"] + ([f"--trainer.strategy={strategy}"] if ranks > 1 else [])
    return ["fit", *words, *QUIET, *many, "--data.path=talk.jsonl", "--trainer.callbacks+=witness.Witness"]


def start(folder: Path, words: Sequence[str], module: str = "rlchat") -> subprocess.Popen[str]:
    """``rlchat`` in ``folder``, in a new process group; its output goes to ``output.txt``."""
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=folder,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )


def finish(run: subprocess.Popen[str], folder: Path, seconds: float = 240) -> int:
    """The exit code. A run that hangs is killed with all its processes, and the test fails."""
    try:
        return run.wait(seconds)
    except subprocess.TimeoutExpired:
        kill(run)
        raise AssertionError(f"hung for {seconds:.0f} s; its output was:\n{tail(folder)}") from None


def complete(folder: Path, words: Sequence[str], seconds: float = 240, module: str = "rlchat") -> None:
    """Runs to the end, which must succeed."""
    code = finish(start(folder, words, module), folder, seconds)
    assert code == 0, f"exit code {code}:\n{tail(folder)}"


def kill(run: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """Sends the signal ``number`` to the run and all processes that it has started."""
    os.killpg(run.pid, number)
    run.wait()


def tail(folder: Path) -> str:
    return "\n".join((folder / "output.txt").read_text().splitlines()[-30:])


# ---- outputs ---------------------------------------------------------------------------------------------------------


def trace(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Every training batch of all attempts of the run in ``folder``, in chronological order."""
    path = folder / f"trace.{rank}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_time(name: str) -> bool:
    """Whether a metric is a measurement of time, which differs in every run."""
    return name.startswith(("time/", "perf/"))


def metrics(folder: Path) -> Iterator[tuple[int, str, float]]:
    """(step, metric, value) in all ``metrics.csv`` of ``folder``, without times."""
    for path in sorted(folder.glob("lightning_logs/*/version_*/metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name not in ("step", None) and not is_time(name):
                        yield int(row["step"]), name, float(value)


def boards(folder: Path) -> Iterator[tuple[int, str, float]]:
    """The same for TensorBoard's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in sorted(folder.glob("lightning_logs/*/version_*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            if not is_time(name):
                for event in events.Scalars(name):
                    yield event.step, name, event.value


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """The newest ``last.ckpt`` of the run in ``folder``."""
    return torch.load(newest_checkpoint(folder), weights_only=True)


def newest_checkpoint(folder: Path) -> Path:
    """Its path."""
    paths = folder.glob("lightning_logs/*/version_*/checkpoints/last.ckpt")
    return max(paths, key=lambda path: path.stat().st_mtime)


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """The places where two checkpoints differ in any bit. Paths and times are not compared."""
    if place.endswith(("path", "dirpath")) or is_time(place.rpartition("history.")[2]):
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {key for key in (*one, *other) if key != "best_k_models"}  # its keys are paths
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{place}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{place}[{i}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [place]
    same = one == other or (isinstance(one, float) and isinstance(other, float) and math.isnan(one + other))
    return [] if same else [f"{place}: {one!r} and {other!r}"[:200]]


def steps(folder: Path) -> dict[int, list[dict[str, torch.Tensor]]]:
    """The weights after each optimizer step, by step, on each rank; 0 is before the first."""
    found: dict[int, list[dict[str, torch.Tensor]]] = {}
    for path in sorted(folder.glob("steps/*.pt")):
        found.setdefault(int(path.name.split(".")[0]), []).append(torch.load(path, weights_only=True))
    return found
