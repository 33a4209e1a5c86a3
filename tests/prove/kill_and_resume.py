"""Kills runs at random moments and resumes them; the results equal those of an uninterrupted run bit for bit.

python -m prove.kill_and_resume --kills 20 --ranks 2      (`make prove` runs it)
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prove.runs import (
    boards,
    complete,
    differences,
    finish,
    fit_words,
    kill,
    last_checkpoint,
    metrics,
    prepare,
    start,
    tail,
    trace,
)

RESUME = ["--ckpt_path", "last"]
# Iterations of about 0.1 s, two validations per epoch, and all options with a state.
PPO = [
    "--config=smoke",
    "--model.kl_target=0.5",
    "--model.kl_horizon=200",
    "--data.batch_size={batch}",
    "--data.val_fraction=0.2",
    "--data.max_val_prompts=8",
    "--trainer.limit_train_batches=1.0",
    "--trainer.val_check_interval=0.5",
    "--best_model.save_last_every=2",
    "--sample_responses.count=2",
]


@dataclass
class Report:
    """The figures of a successful run of this script."""

    kills: int
    batches: int  # of the uninterrupted run
    repeated: int  # batches that were trained again because they came after the last checkpoint
    compared: int  # logged values that were compared with another attempt or with the uninterrupted run


def kill_and_resume(
    folder: Path, words: Sequence[str], *, kills: int, ranks: int = 1, strategy: str = "ddp", seed: int = 0
) -> Report:
    """Trains once without interruption and once with ``kills`` kills; raises AssertionError if anything differs."""
    fit = fit_words(words, ranks, strategy)
    whole, broken = prepare(folder / "whole"), prepare(folder / "broken")
    complete(whole, fit, 600)
    chance, killed = random.Random(seed), 0
    while killed < kills:
        seen = len(trace(broken))
        run = start(broken, fit + resume(broken))
        try:
            while len(trace(broken)) == seen:  # it has not trained a batch yet
                assert run.poll() is None, f"ended by itself after {killed} kills:\n{tail(broken)}"
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 1.5))
            assert run.poll() is None, f"ended by itself after {killed} kills: train for longer\n{tail(broken)}"
        finally:
            kill(run)
        killed += 1
        print(f"kill {killed}: after batch {trace(broken)[-1]['batch']}", flush=True)
    code = finish(start(broken, fit + resume(broken)), broken, 600)
    assert code == 0, tail(broken)
    return compare(whole, broken, ranks, kills)


def resume(folder: Path) -> list[str]:
    """The flags to add to the command line: a run that was killed before its first checkpoint starts again."""
    return RESUME if list(folder.rglob("last.ckpt")) else []


def compare(whole: Path, broken: Path, ranks: int, kills: int) -> Report:
    """Checks that weights, optimizer, counters, metrics and logs of two runs are equal bit for bit."""
    found = differences(last_checkpoint(whole), last_checkpoint(broken))
    assert not found, "the last checkpoints differ:\n" + "\n".join(found)
    expected = {line["batch"]: line for line in trace(whole)}
    lives = trace(broken)
    for line in [line for rank in range(ranks) for line in trace(broken, rank)]:
        there = expected[line["batch"]]
        assert (line["weights"], line["optimizer"]) == (there["weights"], there["optimizer"]), line["batch"]
    assert {line["batch"] for line in lives} == set(expected)
    compared = 0
    for read in (metrics, boards):
        logged = {(step, name): value for step, name, value in read(whole)}
        again = list(read(broken))
        for step, name, value in again:
            assert logged[step, name] == value, f"{name} at step {step}: {logged[step, name]} and {value}"
        compared += len(again)
    return Report(kills, len(expected), len(lives) - len(expected), compared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    words = [*(word.format(batch=8 // options.ranks) for word in PPO), f"--trainer.max_epochs={options.epochs}"]
    with tempfile.TemporaryDirectory() as folder:
        report = kill_and_resume(
            Path(folder),
            words,
            kills=options.kills,
            ranks=options.ranks,
            strategy=options.strategy,
            seed=options.seed,
        )
    where = f"{options.ranks} ranks ({options.strategy})" if options.ranks > 1 else "one process"
    print(
        f"{where}: {report.kills} kills at random moments of {report.batches} PPO iterations; {report.repeated} "
        f"iterations repeated, {report.compared} logged values compared: not a bit differs"
    )


if __name__ == "__main__":
    main()
