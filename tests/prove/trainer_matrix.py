"""Every trainer option that a Lightning user might set, with each of the four stages: it works, or gives one error.

    python -m prove.trainer_matrix --out docs/trainer-options.md

Each cell is one `rlchat` command on tiny models and data, in a separate process (forked after the imports, so that a
cell takes about a second). A cell passes if the command succeeds, or if it fails with exit code 2 and one sentence
on stderr. A traceback or any other exit code fails the cell, and then the script exits with 1.

With --keep FILE, the outcomes are kept in FILE, and cells in it are not run again: --only A, then --only B and so on
make the table in parts. --out writes all options that FILE has, and needs no run for them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpers.command_line import BRIEF, TINY, train_bundles

STAGES = ("sft", "reward", "dpo", "ppo")
RECIPES = {stage: ["--config", f"demo/{stage}"] for stage in STAGES}
RECIPES["dpo"] = ["--config", "dpo", "--data.path", "data/demo.jsonl"]
SECONDS_PER_CELL = 120

CALLBACK = "lightning.pytorch.callbacks"
LOGGER = "lightning.pytorch.loggers"


@dataclass(frozen=True)
class Option:
    """One row of the table: the words after ``rlchat fit --config demo/STAGE``."""

    group: str
    words: tuple[str, ...]
    command: str = "fit"


def _options(group: str, *rows: str, command: str = "fit") -> list[Option]:
    return [Option(group, tuple(row.split()), command) for row in rows]


OPTIONS = [
    *_options(
        "duration",
        "--trainer.max_epochs 1",
        "--trainer.max_epochs 2",
        "--trainer.max_epochs 0",
        "--trainer.max_epochs -1 --trainer.max_time 00:00:00:03",
        "--trainer.min_epochs 1",
        "--trainer.max_steps 1",
        "--trainer.max_steps 6",
        "--trainer.min_steps 1",
        "--trainer.max_time 00:00:00:05",
        "--trainer.max_time nonsense",
        "--trainer.fast_dev_run true",
        "--trainer.fast_dev_run 2",
        "--trainer.overfit_batches 1",
        "--trainer.overfit_batches 2",
        "--trainer.overfit_batches 0.5",
    ),
    *_options(
        "limits",
        "--trainer.limit_train_batches 1",
        "--trainer.limit_train_batches 0.5",
        "--trainer.limit_train_batches 0",
        "--trainer.limit_train_batches 1.0",
        "--trainer.limit_val_batches 1",
        "--trainer.limit_val_batches 0",
        "--trainer.limit_val_batches 0.5",
        "--trainer.limit_train_batches -1",
    ),
    *_options(
        "validation",
        "--trainer.val_check_interval 1",
        "--trainer.val_check_interval 0.5",
        "--trainer.val_check_interval 1000",
        "--trainer.check_val_every_n_epoch 1",
        "--trainer.check_val_every_n_epoch 2",
        "--trainer.check_val_every_n_epoch null --trainer.val_check_interval 2",
        "--trainer.num_sanity_val_steps 1",
        "--trainer.num_sanity_val_steps -1",
        "--data.val_fraction 0 --data.test_fraction 0",
    ),
    *_options(
        "optimization",
        "--trainer.gradient_clip_val 0.5",
        "--trainer.gradient_clip_val 0.5 --trainer.gradient_clip_algorithm value",
        "--trainer.accumulate_grad_batches 2",
        "--trainer.accumulate_grad_batches 1",
        "--trainer.detect_anomaly true",
        "--trainer.deterministic true",
        "--trainer.deterministic warn",
        "--trainer.benchmark true",
        "--model.learning_rate 0",
        "--model.learning_rate 1e30",
        "--model.learning_rate -1",
    ),
    *_options(
        "precision",
        "--trainer.precision 32-true",
        "--trainer.precision bf16-mixed",
        "--trainer.precision bf16-true",
        "--trainer.precision 16-mixed",
        "--trainer.precision 16-true",
        "--trainer.precision 64-true",
        "--trainer.precision transformer-engine",
        "--trainer.precision nonsense",
    ),
    *_options(
        "devices and strategies",
        "--trainer.accelerator cpu",
        "--trainer.accelerator auto",
        "--trainer.accelerator gpu",
        "--trainer.accelerator tpu",
        "--trainer.accelerator nonsense",
        "--trainer.devices 0",
        "--trainer.devices auto",
        "--trainer.strategy auto",
        "--trainer.strategy ddp --trainer.devices 1 --trainer.accelerator cpu",
        "--trainer.strategy fsdp",
        "--trainer.strategy deepspeed",
        "--trainer.strategy nonsense",
        "--trainer.num_nodes 1",
        "--trainer.sync_batchnorm true",
        "--trainer.use_distributed_sampler false",
        "--trainer.use_distributed_sampler true",
        "--trainer.inference_mode false",
        "--trainer.model_registry nonsense",
    ),
    *_options(
        "loggers",
        "--trainer.logger true",
        "--trainer.logger false",
        f"--trainer.logger {LOGGER}.TensorBoardLogger --trainer.logger.save_dir elsewhere",
        f"--trainer.logger {LOGGER}.CSVLogger --trainer.logger.save_dir elsewhere",
        f"--trainer.logger {LOGGER}.WandbLogger",
        f"--trainer.logger {LOGGER}.MLFlowLogger",
        f"--trainer.logger {LOGGER}.CometLogger",
        f"--trainer.logger {LOGGER}.NeptuneLogger",
        "--trainer.logger nonsense",
        "--trainer.log_every_n_steps 1",
        "--trainer.log_every_n_steps 0",
        "--trainer.default_root_dir elsewhere",
    ),
    *_options(
        "checkpoints",
        "--trainer.enable_checkpointing true",
        "--trainer.enable_checkpointing false",
        f"--trainer.callbacks+={CALLBACK}.ModelCheckpoint",
        f"--trainer.callbacks+={CALLBACK}.ModelCheckpoint --trainer.callbacks.monitor val/nothing",
        f"--trainer.callbacks+={CALLBACK}.ModelCheckpoint --trainer.callbacks.every_n_train_steps 1",
        f"--trainer.callbacks+={CALLBACK}.OnExceptionCheckpoint --trainer.callbacks.dirpath elsewhere",
        f"--trainer.callbacks+={CALLBACK}.WeightAveraging",
        f"--trainer.callbacks+={CALLBACK}.EMAWeightAveraging",
        f"--trainer.callbacks+={CALLBACK}.StochasticWeightAveraging --trainer.callbacks.swa_lrs 1e-4",
        "--best_model.save_last_every 1",
        "--best_model.folder elsewhere",
    ),
    *_options(
        "callbacks",
        f"--trainer.callbacks+={CALLBACK}.EarlyStopping --trainer.callbacks.monitor val/nothing",
        f"--trainer.callbacks+={CALLBACK}.EarlyStopping --trainer.callbacks.monitor val/perplexity",
        f"--trainer.callbacks+={CALLBACK}.EarlyStopping --trainer.callbacks.monitor val/pair_accuracy",
        f"--trainer.callbacks+={CALLBACK}.EarlyStopping --trainer.callbacks.monitor val/reward",
        f"--trainer.callbacks+={CALLBACK}.LearningRateMonitor",
        f"--trainer.callbacks+={CALLBACK}.DeviceStatsMonitor",
        f"--trainer.callbacks+={CALLBACK}.Timer --trainer.callbacks.duration 00:00:00:05",
        f"--trainer.callbacks+={CALLBACK}.Timer",
        f"--trainer.callbacks+={CALLBACK}.ThroughputMonitor",
        f"--trainer.callbacks+={CALLBACK}.ModelSummary",
        f"--trainer.callbacks+={CALLBACK}.RichModelSummary",
        f"--trainer.callbacks+={CALLBACK}.RichProgressBar",
        f"--trainer.callbacks+={CALLBACK}.TQDMProgressBar",
        f'--trainer.callbacks+={CALLBACK}.GradientAccumulationScheduler --trainer.callbacks.scheduling={{"0":2}}',
        f"--trainer.callbacks+={CALLBACK}.BackboneFinetuning",
        f"--trainer.callbacks+={CALLBACK}.LearningRateFinder --trainer.callbacks.num_training_steps 3",
        f"--trainer.callbacks+={CALLBACK}.BatchSizeFinder --trainer.callbacks.max_trials 1",
        f"--trainer.callbacks+={CALLBACK}.LambdaCallback",
        f"--trainer.callbacks+={CALLBACK}.SpikeDetection",
        f"--trainer.callbacks+={CALLBACK}.ModelPruning --trainer.callbacks.pruning_fn l1_unstructured",
        "--trainer.callbacks+=nonsense",
        "--trainer.callbacks null",
    ),
    *_options(
        "display and debugging",
        "--trainer.enable_progress_bar false",
        "--trainer.enable_model_summary true",
        "--trainer.enable_model_summary false",
        "--trainer.profiler simple",
        "--trainer.profiler advanced",
        "--trainer.profiler pytorch",
        "--trainer.profiler nonsense",
        "--trainer.barebones true",
        "--trainer.reload_dataloaders_every_n_epochs 1",
        "--trainer.enable_autolog_hparams false",
        "--trainer.plugins+=lightning.pytorch.plugins.io.AsyncCheckpointIO",
        "--trainer.nonsense 1",
        "--model.nonsense 1",
        "--data.nonsense 1",
    ),
    *_options(
        "resume",
        "--ckpt_path last",
        "--ckpt_path best",
        "--ckpt_path last --trainer.max_epochs 2",
        "--ckpt_path hpc",
        "--ckpt_path registry",
        "--ckpt_path nothing.ckpt",
        "--ckpt_path last --model.learning_rate 1e-5",
        "--optimizer torch.optim.SGD --optimizer.lr 0.1",
        "--lr_scheduler torch.optim.lr_scheduler.StepLR --lr_scheduler.step_size 1",
        "--seed_everything 7",
        "--seed_everything nonsense",
        "--data lightning.pytorch.demos.boring_classes.BoringDataModule",
        "--model lightning.pytorch.demos.boring_classes.BoringModel",
    ),
    *_options(
        "validate", "--ckpt_path best", "--ckpt_path last", "", "--trainer.limit_val_batches 0", command="validate"
    ),
    *_options("test", "--ckpt_path best", "--ckpt_path last", "--trainer.limit_test_batches 1", command="test"),
    *_options(
        "predict",
        "--ckpt_path best --data.predict_path questions.txt --predictions.path out.jsonl",
        "--ckpt_path last --data.predict_path questions.txt",
        "--ckpt_path last",
        command="predict",
    ),
]


@dataclass(frozen=True)
class Outcome:
    """The result of one cell. ``text`` is the error message, or the last line of a failure."""

    kind: str  # "runs", "refused" or "FAILS"
    text: str
    seconds: float


def run_cell(option: Option, stage: str, prepared: Path) -> Outcome:
    """Runs one command in a copy of ``prepared`` and returns its outcome."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "work"
        shutil.copytree(prepared, folder)
        began = time.monotonic()
        code, output = _forked(RECIPES[stage], option, stage, folder)
        seconds = time.monotonic() - began
    sentences = [line for line in output.splitlines() if line.startswith("rlchat: ")]
    if code == 0 and "Traceback" not in output:
        return Outcome("runs", "", seconds)
    if code == 2 and len(sentences) == 1 and "Traceback" not in output:
        return Outcome("refused", sentences[0].removeprefix("rlchat: "), seconds)
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
    return Outcome("FAILS", f"exit {code}: {last.strip()}", seconds)


def _forked(recipe: list[str], option: Option, stage: str, folder: Path) -> tuple[int, str]:
    """Exit code and combined output of the command, run in a fork of this process."""
    log = folder / "cell.log"
    model = [] if stage == "reward" else TINY if stage == "sft" else []
    words = [option.command, *recipe, *model, *BRIEF, *option.words]
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(folder)
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            from rlchat.__main__ import main

            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + SECONDS_PER_CELL
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace") if log.exists() else ""
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return -9, f"no end after {SECONDS_PER_CELL} s"
        time.sleep(0.05)


def prepare(folder: Path) -> None:
    """A working directory in which each stage has a finished tiny run."""
    from helpers.command_line import rlchat

    os.chdir(folder)
    train_bundles(folder)
    (folder / "questions.txt").write_text("What comes after 2?\nHow do you spell cat?\n", encoding="utf-8")
    for stage in ("ppo", "dpo"):
        rlchat("fit", *RECIPES[stage], *BRIEF)


def as_markdown(table: dict[Option, dict[str, Outcome]]) -> str:
    """The table, with the error messages as footnotes."""
    notes: list[str] = []
    lines = [
        "# Trainer options",
        "",
        "What each option does on each stage. This page is generated: `make trainer_matrix`.",
        "A number refers to the message below the table.",
        "",
    ]
    group = None
    for option, row in table.items():
        if option.group != group:
            group = option.group
            lines += [
                "",
                f"## {group.capitalize()}",
                "",
                "| option | SFT | reward model | DPO | PPO |",
                "|---|---|---|---|---|",
            ]
        cells = []
        for stage in STAGES:
            outcome = row[stage]
            if outcome.kind == "runs":
                cells.append("runs")
                continue
            if outcome.text not in notes:
                notes.append(outcome.text)
            cells.append(f"{outcome.kind} [{notes.index(outcome.text) + 1}]")
        command = "" if option.command == "fit" else f"{option.command} "
        name = f"{command}{' '.join(option.words)}".strip().replace("|", "\\|")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "## Messages", ""]
    lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs all cells; returns 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--only", default="", help="only options that match this regular expression")
    parser.add_argument("--keep", type=Path, help="keep the outcomes in this JSON file, and do not run its cells again")
    options = parser.parse_args()
    out, keep = (path.resolve() if path else None for path in (options.out, options.keep))
    chosen = [o for o in OPTIONS if re.search(options.only, " ".join((o.command, *o.words)))]
    kept = json.loads(keep.read_text()) if keep and keep.is_file() else {}
    run_missing(chosen, kept, keep)
    table = {o: {s: Outcome(**kept[key(o)][s]) for s in STAGES} for o in OPTIONS if key(o) in kept}
    failed = [outcome for row in table.values() for outcome in row.values() if outcome.kind == "FAILS"]
    print(f"{len(table) * len(STAGES) - len(failed)} cells passed, {len(failed)} failed")
    if out is not None:
        out.write_text(as_markdown(table), encoding="utf-8")
    return 1 if failed else 0


def key(option: Option) -> str:
    """The command of a row, by which its outcomes are kept."""
    return " ".join((option.command, *option.words))


def run_missing(chosen: list[Option], kept: dict[str, dict[str, Any]], keep: Path | None) -> None:
    """Runs the cells of ``chosen`` that are not in ``kept``, adds their outcomes to it and writes it to ``keep``."""
    missing = [option for option in chosen if key(option) not in kept]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared"
        prepared.mkdir()
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        prepare(prepared)
        for option in missing:
            row = {stage: run_cell(option, stage, prepared) for stage in STAGES}
            kept[key(option)] = {stage: asdict(outcome) for stage, outcome in row.items()}
            if keep:
                keep.write_text(json.dumps(kept))
            kinds = "  ".join(f"{stage}: {row[stage].kind}" for stage in STAGES)
            print(f"{option.command} {' '.join(option.words):<90} {kinds}", flush=True)
            for stage in STAGES:
                if row[stage].kind == "FAILS":
                    print(f"    {stage}: {row[stage].text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
