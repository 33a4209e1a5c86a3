"""A verifiable task from data to pass@8: words spelled backward, SFT, and PPO on answers that a program checks.

    make reasoning SEED=0
    python -m benchmarks.reasoning --seed 0 --out reasoning-0
    python -m benchmarks.reasoning --table reasoning-0 reasoning-1 reasoning-2

It runs the commands of docs/reasoning.md in the folder --out and prints the accuracy on held-out questions before and
after PPO. A command that has run before is not repeated. `--table` prints the table of docs/reasoning.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rlchat.utils.files import write_atomically

ROOT = Path(__file__).parents[1]
DATA = "data/spelling.jsonl"
FIGURES = {
    "sampled": "test/answer_accuracy",
    "greedy": "test/answer_accuracy_greedy",
    "pass@2": "test/pass@2",
    "pass@4": "test/pass@4",
    "pass@8": "test/pass@8",
}
"""What the table shows, and the metric of `rlchat test` that it is."""


def steps(seed: int) -> dict[str, list[str]]:
    """The commands of a seed, by name. The seed is that of the weights, the order, the sampling and the splits."""
    seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
    ppo = ["--config", "reasoning/ppo", *seeds, "--model.seed", str(seed)]
    words = ["--set", "min_word_len=5", "max_word_len=5", "--responses"]
    return {
        "data": ["data", "reasoning-gym", "spell_backward", "-n", "9000", *words, "-o", DATA],
        "tokenizer": ["tokenizer", "train", DATA, "--vocab-size", "256", "-o", "data/bytes.tiktoken"],
        "sft": ["fit", "--config", "reasoning/sft", *seeds],
        "start": ["test", *ppo, "--best_of", "8"],
        "ppo": ["fit", *ppo],
        "end": ["test", *ppo, "--best_of", "8", "--ckpt_path", "best"],
    }


def run(seed: int, folder: Path) -> None:
    """Runs the commands of ``seed`` in ``folder``; ``seconds.json`` there records those that are done.

    Raises :class:`subprocess.CalledProcessError` if a command fails.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    times = folder / "seconds.json"
    seconds: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for name, words in steps(seed).items():
        if name in seconds:
            continue
        print("rlchat", *words, flush=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "rlchat", *words], cwd=folder, env=environment, check=True)
        seconds[name] = time.perf_counter() - start
        if name in ("start", "end"):
            _write(folder / f"{name}.json", latest_test(folder))
        _write(times, seconds)


def latest_test(folder: Path) -> dict[str, float]:
    """The metrics of the last `rlchat test` in ``folder``, by name."""
    files = (folder / "lightning_logs" / "ppo_test").glob("version_*/metrics.csv")
    with max(files, key=lambda path: int(path.parent.name.partition("_")[2])).open() as file:
        (row,) = csv.DictReader(file)
    return {name: float(value) for name, value in row.items() if name.startswith("test/")}


def table(folders: Sequence[Path]) -> str:
    """A Markdown table of the runs in ``folders``, one row each: figures before → after PPO, and minutes."""
    lines = ["| run | " + " | ".join(FIGURES) + " | minutes |", "|---" * (len(FIGURES) + 2) + "|"]
    for folder in folders:
        before, after = (json.loads((folder / f"{name}.json").read_text()) for name in ("start", "end"))
        cells = [f"{before[name]:.1%} → {after[name]:.1%}" for name in FIGURES.values()]
        minutes = sum(json.loads((folder / "seconds.json").read_text()).values()) / 60
        lines.append(f"| {folder.name} | " + " | ".join(cells) + f" | {minutes:.1f} |")
    return "\n".join(lines)


def _write(path: Path, values: dict[str, float]) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(values, indent=1).encode()))


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the folder of the run (default: reasoning-SEED)")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FOLDER", help="only print the table of these runs")
    options = parser.parse_args(args)
    folders = options.table or [options.out or Path(f"reasoning-{options.seed}")]
    if not options.table:
        run(options.seed, folders[0])
    print(table(folders))


if __name__ == "__main__":
    main()
