"""Runs the lessons in full, each seed in a process of its own, and prints the figures beside their bands.

python -m benchmarks.lessons
python -m benchmarks.lessons 1 3 --seeds 0 1 2 3 4 --keep FOLDER --write

With --keep, what is finished is not run again: seeds can be measured one after the other, and shown together. The exit
code is 1 if a figure is outside its band.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.lessons.bands import write_bands
from benchmarks.lessons.lesson import Lesson, lessons
from benchmarks.lessons.running import run_lesson

FRESH_SEEDS = [200, 201, 202]
FRESH_SEEDS_OF = {"5-kl": [300, 301, 302]}  # its bands were measured with the others too


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lessons", description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", type=int, help="lessons to run; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, help="by default seeds that no band was measured with")
    parser.add_argument("--short", action="store_true", help="the short form, whose figures mean nothing")
    parser.add_argument("--keep", type=Path, help="keep what the lessons write here; continues there")
    parser.add_argument("--write", action="store_true", help="fill in the bands that are ? in the lessons")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # of a process that runs one lesson
    args = parser.parse_args()
    chosen = [lesson for lesson in lessons() if not args.numbers or int(lesson.name.split("-")[0]) in args.numbers]
    if args.result:
        ((lesson,), (seed,)) = chosen, args.seeds
        args.result.write_text(json.dumps(run_lesson(lesson, Path.cwd(), seed, args.short)))
        return 0

    def seeds_of(lesson: Lesson) -> list[int]:
        return args.seeds or FRESH_SEEDS_OF.get(lesson.name, FRESH_SEEDS)

    console = Console()
    failed = False
    with Progress(console=console) as progress:
        task = progress.add_task("lessons", total=sum(len(seeds_of(lesson)) for lesson in chosen))
        for lesson in chosen:
            values, seconds = {}, []
            for seed in seeds_of(lesson):
                progress.update(task, description=f"{lesson.name}, seed {seed}")
                values[seed], used = run_apart(lesson, seed, args.short, args.keep)
                seconds.append(used)
                progress.advance(task)
            table, outside = result_table(lesson, values, seconds)
            progress.console.print(table)
            failed |= outside and not args.short
            if args.write:
                write_bands(lesson, list(values.values()))
    return int(failed)


def run_apart(lesson: Lesson, seed: int, short: bool, keep: Path | None) -> tuple[dict[str, float], float]:
    """The figures of a lesson that runs in a process of its own, and its CPU time in seconds.

    A result in ``keep`` is read instead. The output of the process is shown only if it fails, which ends this program
    too.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = (keep / f"{lesson.name}-{seed}").resolve() if keep else Path(temporary) / "lesson"
        result, kept = folder / "figures.json", folder / "kept.json"
        code = code_digest(lesson, short)
        if folder.exists():
            stored = json.loads(kept.read_text()) if kept.is_file() else {}
            if stored.get("code") != code:
                sys.exit(f"{folder} is not a finished run of this lesson; delete it, or set another --keep")
            return stored["figures"], stored["cpu_s"]
        folder.mkdir(parents=True)
        number = lesson.name.split("-")[0]
        command = [sys.executable, "-m", "benchmarks.lessons", number, "--seeds", str(seed), "--result", str(result)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run(
            [*command, *(["--short"] if short else [])],
            cwd=folder, env=_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if keep:
            (folder / "output.txt").write_text(run.stdout)
        if run.returncode:
            sys.exit(f"{run.stdout}\n{lesson.name} failed with seed {seed}")
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        figures = json.loads(result.read_text())
        kept.write_text(json.dumps({"code": code, "figures": figures, "cpu_s": used}))
        return figures, used


def code_digest(lesson: Lesson, short: bool) -> str:
    """A digest of everything in the lesson that its figures depend on; its text and bands do not count."""
    parts = [lesson.parameters, [block.code for block in lesson.blocks], [f.expression for f in lesson.figures]]
    parts += [lesson.short, lesson.short_options] if short else []
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def result_table(lesson: Lesson, values: dict[int, dict[str, float]], seconds: list[float]) -> tuple[Table, bool]:
    """The figures of a lesson with each seed, and whether one of them is outside its band."""
    seeds = ", ".join(map(str, values))
    used = ", ".join(f"{value:.0f}" for value in seconds)
    table = Table(title=f"{lesson.title} ({used} s of CPU time)", title_justify="left")
    for column in ("figure", "expected", "band", f"seeds {seeds}", ""):
        table.add_column(column)
    outside = False
    for figure in lesson.figures:
        found = [of_seed[figure.name] for of_seed in values.values()]
        inside = all(map(figure.contains, found))
        outside |= not inside
        band = f"{figure.low:g} to {figure.high:g}"
        shown = ", ".join(f"{value:.4g}" for value in found)
        table.add_row(figure.name, f"{figure.expected:g}", band, shown, "in" if inside else "[red]out[/]")
    return table, outside


def _environment() -> dict[str, str]:
    """One thread and no windows; this repository's code whatever the working directory."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    settings = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {**os.environ, **settings}


if __name__ == "__main__":
    sys.exit(main())
