"""Makes this process a considerate child: low priority, bounded memory, and an end with its parent."""

from __future__ import annotations

import os
import sys
import threading

_NICE = 19


def lower_priority() -> None:
    """Lets all other processes compute first. Threads that start later inherit it. Does nothing on Windows.

    On Linux, the process gets only time that no other one wants (``SCHED_IDLE``), and others need not wait for the end
    of its time slice, which would be milliseconds.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if sys.platform != "win32":
        os.nice(_NICE)


def limit_memory(limit: int) -> None:
    """Lets allocations fail when this process would have more than ``limit`` bytes of its own memory.

    It bounds the memory that a process could write to (``RLIMIT_DATA``), which shared libraries are hardly a part of.
    Does nothing on Windows.
    """
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


def machine_memory() -> int | None:
    """The machine's memory in bytes; None if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def end_with_stdin() -> None:
    """Ends this process at once when its standard input ends, as it does when the process at its other end does."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="rlchat-parent", daemon=True).start()
