"""Errors that are shown to the user as one sentence."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator

# What Python, C++, PyTorch and the system say if there is no memory. PyTorch raises a plain RuntimeError on a CPU.
_MEMORY_SIGNS = ("MemoryError", "std::bad_alloc", "can't allocate memory", os.strerror(errno.ENOMEM), "out of memory")
_DISK_IS_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


class UserError(Exception):
    """An error that the user can fix. The message states the cause, the place and the fix.

    The command line prints ``details`` and then the message, without a traceback, and exits with code 2.
    """

    details: str = ""  # the traceback of the user's own code, where that is what failed


class NonFiniteError(UserError):
    """The model computes NaN or infinity, because its weights have diverged in training."""


def at_least_one(owner: str, option: str, value: int) -> int:
    """``value`` of the ``option`` of a class named ``owner``. Raises :class:`UserError` if it is below 1."""
    if value < 1:
        raise UserError(f"invalid value {value} for {owner}.{option}: expected a positive integer")
    return value


def one_line(error: Exception) -> str:
    """The message of ``error`` on one line, or the name of its class if there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def counted(number: int, thing: str) -> str:
    """``number`` and the word ``thing``, which gets an s for the plural: 1 verdict, 1,000 verdicts."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def limit_reached(
    error: BaseException, more_memory: str = "use smaller batches or a smaller model"
) -> UserError | None:
    """The limit of the machine that has caused ``error``, memory or disk, as an error for the user; None if none has.

    ``more_memory`` is the fix if memory is missing.
    """
    for one in _causes(error):
        if isinstance(one, OSError) and one.errno in _DISK_IS_FULL:
            where = f" ({one.filename})" if one.filename else ""
            return UserError(
                f"the disk is full{where}: free some space; temporary files are in {tempfile.gettempdir()}, and TMPDIR "
                f"moves them to another disk"
            )
        is_memory = isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError"  # the latter of torch
        if is_memory or (isinstance(one, Exception) and says_no_memory(str(one))):
            return UserError(f"not enough memory: {more_memory}")
    return None


def says_no_memory(text: str) -> bool:
    """Whether ``text``, of an error or a log, says that there was no memory."""
    return any(sign in text for sign in _MEMORY_SIGNS)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error``, and the errors that led to it."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        yield found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
