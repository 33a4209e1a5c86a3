"""`rlchat study overoptimization`: a proxy reward is optimized until the gold reward, the true one, falls.

It repeats Gao, Schulman and Hilton 2022 on a small world whose gold reward is a known function of the text. Each
finished piece is kept in the folder of the study, so the same command continues a study that was stopped.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from rlchat.errors import UserError
from rlchat.study.pieces import Piece, all_pieces, read_json, write_json
from rlchat.study.schedule import run_pieces
from rlchat.study.settings import QUICK, Settings
from rlchat.utils.files import write_atomically

SETTINGS_FILE = "study.json"
_QUICK_OUT, _OUT = Path("overoptimization_quick"), Path("overoptimization")


def main(args: list[str]) -> int:
    """Runs ``rlchat study`` with ``args``; returns the exit code. Raises :class:`UserError`."""
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    settings = QUICK if options.quick else Settings()
    folder = options.out or (_QUICK_OUT if options.quick else _OUT)
    seeds = tuple(dict.fromkeys(options.seeds or ((0,) if options.quick else (0, 1, 2))))
    console = Console()
    open_folder(folder, settings)
    pieces = all_pieces(settings, seeds)
    missing = [piece for piece in pieces if not (folder / f"{piece.name}.json").is_file()]
    if len(missing) < len(pieces):
        console.print(f"{folder}: {len(pieces) - len(missing)} of {len(pieces)} pieces are finished")
    began = time.monotonic()
    run_all(folder, settings, missing, options.jobs, console)
    report(folder, settings, seeds, console)
    if missing:
        minutes = (time.monotonic() - began) / 60
        console.print(f"{len(missing)} pieces took {minutes:.1f} minutes with --jobs {options.jobs}", highlight=False)
    return 0


def open_folder(folder: Path, settings: Settings) -> None:
    """Makes ``folder`` the folder of a study with ``settings``; one that it already is stays as it is.

    Raises:
        UserError: it has other files, or those of a study with other settings.
    """
    file, values = folder / SETTINGS_FILE, settings.values()
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not the folder of a study; set another --out")
        write_json(file, values)
        return
    try:
        before = read_json(file)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise UserError(f"{file} does not hold the settings of a study; set another --out")
    other = [name for name in {**before, **values} if before.get(name) != values.get(name)]
    if other:
        name = other[0]
        raise UserError(
            f"{folder} holds a study with other settings: {name} is {before.get(name)} there and {values.get(name)} "
            f"here; set another --out, or start it as before (with or without --quick, and with the same rlchat)"
        )


def run_all(folder: Path, settings: Settings, pieces: list[Piece], jobs: int, console: Console) -> None:
    """Does ``pieces``, ``jobs`` at a time, with a progress bar; each starts when what it needs is finished."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[done]} of {task.fields[pieces]} pieces"),
        TimeElapsedColumn(),
        TextColumn("elapsed, about"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    total = sum(piece.cost for piece in pieces)
    with Progress(*columns, console=console, disable=not pieces, speed_estimate_period=3600) as progress:
        bar = progress.add_task("starting", total=total, done=0, pieces=len(pieces))
        for done, (piece, seconds) in enumerate(run_pieces(folder, settings, pieces, jobs), start=1):
            progress.update(bar, advance=piece.cost, description=f"finished {piece.name}", done=done)
            if not console.is_terminal:
                console.print(f"{piece.name}: {seconds:.0f} s ({done} of {len(pieces)} pieces)", highlight=False)


def report(folder: Path, settings: Settings, seeds: tuple[int, ...], console: Console) -> None:
    """Prints the table of a finished study, and writes it with the figure and all numbers to ``folder``."""
    from rlchat.study.figure import draw
    from rlchat.study.results import collect
    from rlchat.study.tables import as_values, markdown, terminal_table

    groups = collect(folder, settings, seeds)
    console.print("Rewards are in standard deviations above the initial policy; last is the end of a run.")
    console.print(terminal_table(groups))
    write_json(folder / "results.json", {"seeds": list(seeds), "groups": as_values(groups)})
    table = markdown(groups)
    write_atomically(folder / "table.md", lambda file: file.write(table.encode()))
    figure = draw(groups, settings.amount, settings.policy_width)
    write_atomically(folder / "figure.png", lambda file: figure.savefig(file, format="png", dpi=110))
    console.print(f"{folder}: figure.png, table.md, results.json", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlchat study", description="Studies of RLHF in a world whose truth is known."
    )
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    study = studies.add_parser(
        "overoptimization",
        help="optimize proxy reward models until the true reward falls (Gao et al. 2022)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    study.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"folder of the study (default {_OUT}, or {_QUICK_OUT}); the same folder continues a study",
    )
    study.add_argument(
        "--seeds",
        type=_integer(0),
        nargs="+",
        metavar="N",
        help="seeds of world, policy, proxies and PPO (default 0 1 2; with --quick 0); more can be added later",
    )
    study.add_argument("--quick", action="store_true", help="a trial of about two minutes, with rough curves")
    study.add_argument(
        "--jobs",
        type=_integer(1),
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="pieces at a time, each on one core (default: 2, or 1 on a single core)",
    )
    return parser


def _integer(least: int) -> Callable[[str], int]:
    """A reader of integers of at least ``least`` for argparse."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"invalid value {text!r}: expected an integer of at least {least}")
        return int(text)

    return read
