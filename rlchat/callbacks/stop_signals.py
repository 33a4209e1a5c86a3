"""Ctrl-C and SIGTERM that let what is being done come to its end, on one process and on many."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlchat.distributed.collectives import greatest, is_first

_STOPPED = "stopped, and nothing is lost; go on with `rlchat fit --ckpt_path last`"


class StopSignals:
    """Takes charge of Ctrl-C and SIGTERM: they ask for a stop, which the run makes where it can be resumed.

    A second Ctrl-C stops at once. Processes get a signal in different batches, or one of them alone does, so they tell
    each other: Lightning's own handler would do so from inside the signal, where another may be in the middle of
    something that they do together.
    """

    # torchrun passes on to its workers the Ctrl-C that the terminal has given them already.
    _SECOND_AFTER_SECONDS = 1.0

    def __init__(self) -> None:
        self.requested = 0
        """The signal that came to this process, 0 before one has."""
        self.stopped = False
        """Whether :meth:`stop` has ended the run, on all processes alike."""
        self._came_at = 0.0
        self._before: dict[int, Any] = {}

    def take_charge(self) -> None:
        """From here on; only the main thread can."""
        self.requested, self.stopped = 0, False
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def release(self) -> None:
        """Gives the signals back to whom they were taken from."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self, module: L.LightningModule) -> int:
        """The signal that came to any process, 0 where none did; a collective."""
        return greatest(module, self.requested)

    def stop(self, number: int) -> None:
        """Ends the run as the signal ``number`` is meant to: raises KeyboardInterrupt or SIGTERMException."""
        self.stopped = True
        raise KeyboardInterrupt(_STOPPED) if number == signal.SIGINT else SIGTERMException(_STOPPED)

    def _note(self, number: int, frame: Any) -> None:
        if not self.requested:
            self.requested, self._came_at = number, time.monotonic()
            if number == signal.SIGINT and is_first():
                print("\nstopping after this batch; Ctrl-C again stops at once", file=sys.stderr)
        elif number == signal.SIGINT and time.monotonic() - self._came_at > self._SECOND_AFTER_SECONDS:
            self.release()
            raise KeyboardInterrupt
