"""A progress bar on standard error that appears only when work takes longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

PROGRESS_AFTER_SECONDS = 2.0
_SECONDS_BETWEEN_UPDATES = 0.1

T = TypeVar("T")


class DelayedProgress:
    """A progress bar that appears after ``PROGRESS_AFTER_SECONDS`` of work and disappears at the end.

    Args:
        what: the label of the bar.
        total: the amount of work, in any unit.
        show: whether to show the bar. It is never shown if standard error is not a terminal.
    """

    def __init__(self, what: str, total: int, show: bool) -> None:
        self._what, self._total, self._show = what, total, show
        self._next_update = time.monotonic() + PROGRESS_AFTER_SECONDS
        self._bar: Progress | None = None

    def __enter__(self) -> DelayedProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def due(self) -> bool:
        """Whether :meth:`update` would draw now, so that a caller can skip computing the progress."""
        return self._show and time.monotonic() >= self._next_update

    def update(self, done: int) -> None:
        """Shows that ``done`` of the total is finished, at most ten times per second."""
        if not self.due:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress

            console = Console(stderr=True)
            self._show = console.is_terminal
            if not self._show:
                return
            self._bar = Progress(console=console, transient=True)
            self._bar.add_task(self._what, total=self._total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)
        self._next_update = time.monotonic() + _SECONDS_BETWEEN_UPDATES


def with_progress(items: Sequence[T], what: str, show: bool) -> Iterator[T]:
    """Iterates over ``items`` with a :class:`DelayedProgress`."""
    with DelayedProgress(what, len(items), show) as progress:
        for done, item in enumerate(items):
            progress.update(done)
            yield item
