"""A progress bar for what takes longer than one likes to wait without one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

PROGRESS_AFTER_SECONDS = 2.0

T = TypeVar("T")


def with_progress(items: Sequence[T], what: str, show: bool) -> Iterator[T]:
    """``items``, with a progress bar once they have taken a while."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    show = show and console.is_terminal
    bar: Progress | None = None
    began = time.monotonic()
    try:
        for done, item in enumerate(items):
            if bar is None and show and time.monotonic() - began > PROGRESS_AFTER_SECONDS:
                bar = Progress(console=console, transient=True)
                task = bar.add_task(what, total=len(items))
                bar.start()
            if bar is not None:
                bar.update(task, completed=done)
            yield item
    finally:
        if bar is not None:
            bar.stop()
