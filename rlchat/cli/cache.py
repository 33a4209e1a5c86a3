"""`rlchat cache`: what the cache folder contains. `rlchat cache clear`: removes it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlchat.utils.cache_folder import LIMIT, Entry, clear, entries
from rlchat.utils.files import user_cache


def main(args: list[str]) -> int:
    """Runs ``rlchat cache`` with ``args``; returns the exit code: 1 if an entry could not be removed.

    Raises :class:`UserError` for a folder that cannot be read.
    """
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    folder = (options.folder or user_cache()).expanduser()
    console = Console()
    known = entries(folder)
    if not known:
        console.print(
            f"{escape(str(folder))} contains no tokenized data and no base models", highlight=False, soft_wrap=True
        )
        return 0
    if options.action == "show":
        console.print(f"[bold]{escape(str(folder))}[/]", highlight=False, soft_wrap=True)
        console.print(_table(known))
        return 0
    removed = clear(folder)
    console.print(
        f"removed {len(removed)} of {len(known)} entries of {escape(str(folder))}: {_megabytes(removed)} MB",
        highlight=False,
        soft_wrap=True,
    )
    return 0 if len(removed) == len(known) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlchat cache",
        description="Show or clear the cache: tokenized data and unpacked base models. Both are made again when they "
        f"are needed. Above {LIMIT // 2**30} GiB, the least recently used tokenized data is removed.",
    )
    parser.add_argument("action", nargs="?", choices=("show", "clear"), default="show", help="default: show")
    parser.add_argument("--folder", type=Path, help="the cache folder (default: rlchat in the user's cache folder)")
    return parser


def _table(known: list[Entry]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("")
    table.add_column("entries", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("oldest use", justify="right")
    table.add_column("last used", justify="right")
    for what in sorted({entry.what for entry in known}):
        some = [entry for entry in known if entry.what == what]
        table.add_row(what, str(len(some)), _megabytes(some), _day(some[0].used), _day(some[-1].used))
    table.add_section()
    table.add_row("total", str(len(known)), _megabytes(known), "", "")
    return table


def _megabytes(some: list[Entry]) -> str:
    return f"{sum(entry.size for entry in some) / 1e6:,.1f}"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
