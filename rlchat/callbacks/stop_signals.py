"""Handles Ctrl-C and SIGTERM: the run stops where it can be resumed, on all processes after the same batch."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlchat.distributed.collectives import greatest, is_first
from rlchat.errors import UserError

_STOPPED = "stopped; the run is saved. Resume it with `rlchat fit --ckpt_path last`"

_ERROR = 10_000  # above the numbers of all signals: an error that another callback has found


class StopSignals:
    """Turns Ctrl-C and SIGTERM into a request to stop, which the run follows when it can be resumed.

    A second Ctrl-C stops immediately. Signals reach processes during different batches, or only one of them, so the
    processes agree on a batch by a collective. Lightning's own handler would communicate inside the signal handler,
    while another process may be in the middle of another collective.
    """

    # torchrun forwards to its workers the Ctrl-C that the terminal has already sent them.
    _SECOND_AFTER_SECONDS = 1.0

    def __init__(self) -> None:
        self.requested = 0
        """The signal that this process received; 0: none."""
        self.stopped = False
        """Whether :meth:`stop` has ended the run; the same on all processes."""
        self._error: UserError | None = None
        self._came_at = 0.0
        self._before: dict[int, Any] = {}

    def take_charge(self) -> None:
        """Installs the handlers; has no effect outside the main thread, where Python does not allow it."""
        self.requested, self.stopped, self._error = 0, False, None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def release(self) -> None:
        """Restores the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def request(self, error: UserError) -> None:
        """Asks to stop with ``error`` instead of a signal. All processes have to, in the same batch."""
        self.requested, self._error = _ERROR, error

    @property
    def has_error(self) -> bool:
        """Whether the run stops with an error."""
        return self._error is not None

    def agreed(self, module: L.LightningModule) -> int:
        """The signal that any process received, 0 if none did; a collective."""
        return greatest(module, self.requested)

    def stop(self, number: int) -> None:
        """Ends the run for the signal ``number``: raises KeyboardInterrupt, SIGTERMException or the requested error."""
        self.stopped = True
        if self._error is not None:
            raise self._error
        raise KeyboardInterrupt(_STOPPED) if number == signal.SIGINT else SIGTERMException(_STOPPED)

    def _note(self, number: int, frame: Any) -> None:
        if not self.requested:
            self.requested, self._came_at = number, time.monotonic()
            if number == signal.SIGINT and is_first():
                print("\nstopping after this batch; press Ctrl-C again to stop immediately", file=sys.stderr)
        elif number == signal.SIGINT and time.monotonic() - self._came_at > self._SECOND_AFTER_SECONDS:
            self.release()
            raise KeyboardInterrupt
