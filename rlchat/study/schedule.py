"""The order of a study's pieces: one after the other, or several processes at a time."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from rlchat.study.pieces import Piece, run_piece
from rlchat.study.settings import Settings


def run_pieces(folder: Path, settings: Settings, pieces: Sequence[Piece], jobs: int) -> Iterator[tuple[Piece, float]]:
    """Does all ``pieces``, at most ``jobs`` at a time, and yields each when it is finished, with its seconds.

    A piece starts when those that it needs are finished; what is not among ``pieces`` counts as finished. An exception
    of a piece ends the work: pieces that have not started are not done, and the others are finished first.
    """
    if jobs == 1:
        for piece in pieces:
            yield piece, run_piece(folder, settings, piece)["seconds"]
        return
    # fork would copy the state of PyTorch's threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_end_at_ctrl_c) as pool:
        waiting, running = list(pieces), dict[Future[float], Piece]()
        try:
            while waiting or running:
                for piece in ready(settings, waiting, list(running.values()))[: jobs - len(running)]:
                    waiting.remove(piece)
                    with _ctrl_c_later():  # it may start a process, which must not report Ctrl-C while it starts
                        running[pool.submit(_seconds, folder, settings, piece)] = piece
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def ready(settings: Settings, waiting: Sequence[Piece], running: Sequence[Piece]) -> list[Piece]:
    """Those of ``waiting`` that need neither another one of ``waiting`` nor one of ``running``, in their order."""
    unfinished = {piece.name for piece in (*waiting, *running)}
    return [piece for piece in waiting if unfinished.isdisjoint(piece.needs(settings))]


def _seconds(folder: Path, settings: Settings, piece: Piece) -> float:
    return float(run_piece(folder, settings, piece)["seconds"])


def _end_at_ctrl_c() -> None:
    """Ctrl-C reaches all processes of a terminal; only the first one reports it, the others just end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Ctrl-C takes effect at the end; a process that starts meanwhile has it blocked too. Windows cannot block it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
