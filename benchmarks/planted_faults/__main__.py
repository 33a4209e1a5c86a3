"""Plants each fault in a small PPO run, and counts false alarms of healthy runs.

    python -m benchmarks.planted_faults --out docs/planted-faults.md
    python -m benchmarks.planted_faults --faults "end token off by one" --healthy 0

A run ends with its first alarm, or after 20 iterations. It uses the alarms with their default options.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.planted_faults.faults import FAULTS
from benchmarks.planted_faults.small_run import VARIANTS, make_module, run, write_start


@dataclass(frozen=True)
class Result:
    """The outcome of a run."""

    name: str  # of the fault, or of the variant of a healthy run
    seed: int
    alarms: list[str]
    iterations: int


def faulty_run(name: str, seed: int, iterations: int, start: Path) -> Result:
    """A run with the fault ``name``."""
    module = make_module(start, seed, **FAULTS[name].options)
    with FAULTS[name].plant(module):
        return Result(name, seed, *run(module, seed, iterations))


def healthy_run(number: int, iterations: int, start: Path) -> Result:
    """The run ``number`` without a fault; it is the seed, and the variants take turns."""
    name = list(VARIANTS)[number % len(VARIANTS)]
    return Result(name, number, *run(make_module(start, number, **VARIANTS[name]), number, iterations))


def measure(
    names: Sequence[str], seeds: Sequence[int], healthy: int, iterations: int = 20, show: bool = True
) -> tuple[list[Result], list[Result]]:
    """The runs with the faults ``names``, one for each of ``seeds``, and ``healthy`` runs."""
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder, "start.pt")
        write_start(start)
        jobs: list[tuple[str | None, int]] = [(name, seed) for name in names for seed in seeds]
        jobs += [(None, number) for number in range(healthy)]
        results: dict[bool, list[Result]] = {True: [], False: []}
        console = Console(stderr=True, quiet=not show)
        for name, seed in track(jobs, "runs", console=console):
            done = faulty_run(name, seed, iterations, start) if name else healthy_run(seed, iterations, start)
            results[name is not None].append(done)
            console.print(
                f"{done.name}: {', '.join(done.alarms) or 'no alarm'} after {done.iterations} iterations",
                soft_wrap=True,
            )
    return results[True], results[False]


def table(faulty: Sequence[Result], healthy: Sequence[Result], seconds: float, command: str) -> str:
    """The results as Markdown."""
    noticed = {name: [r for r in faulty if r.name == name] for name in dict.fromkeys(r.name for r in faulty)}
    rows = [
        f"| {FAULTS[name].what[:-1]} | [{_label(FAULTS[name].source)}]({FAULTS[name].source}) | {_who(found)} | "
        f"{_when(found)} |"
        for name, found in noticed.items()
    ]
    found = sum(all(r.alarms for r in results) for results in noticed.values())
    false = [r for r in healthy if r.alarms]
    names = ", ".join(f"{', '.join(r.alarms)} ({r.name}, seed {r.seed})" for r in false)
    lines = [
        f"{found} of {len(noticed)} faults are noticed. {len(false)} of {len(healthy)} healthy runs raise an alarm"
        + (f": {names}." if false else "."),
        "",
        "| fault | report | noticed by | after iterations |",
        "|---|---|---|---|",
        *rows,
        "",
        f"`{command}`, {seconds:.0f} s of CPU time.",
    ]
    return "\n".join(lines)


def _label(source: str) -> str:
    _, name, _, number = source.removeprefix("https://github.com/").split("/")
    return f"{name} #{number}"


def _who(results: Sequence[Result]) -> str:
    return ", ".join(dict.fromkeys(alarm for r in results for alarm in r.alarms)) or "nothing"


def _when(results: Sequence[Result]) -> str:
    numbers = sorted({r.iterations for r in results if r.alarms})
    return "–" if not numbers else str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _write_between_marks(path: Path, text: str) -> None:
    """Replaces what is between the two marks in the file ``path``."""
    begin, end = "<!-- results -->", "<!-- end of results -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor log messages below errors."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "rlchat")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=[*FAULTS], metavar="NAME", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs with faults")
    parser.add_argument("--healthy", type=int, default=20, help="number of runs without a fault")
    parser.add_argument("--iterations", type=int, default=20, help="the most iterations of a run")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--out", type=Path, help="replace the results in this Markdown file")
    options = parser.parse_args(argv)
    began = time.process_time()
    with quiet():
        faulty, healthy = measure(options.faults, options.seeds, options.healthy, options.iterations)
    command = "python -m benchmarks.planted_faults"
    text = table(faulty, healthy, time.process_time() - began, command)
    print(text)
    if options.json:
        rows: dict[str, Any] = {"faults": [vars(r) for r in faulty], "healthy": [vars(r) for r in healthy]}
        options.json.write_text(json.dumps(rows, indent=1))
    if options.out:
        _write_between_marks(options.out, text)


if __name__ == "__main__":
    main()
