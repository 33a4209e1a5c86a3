"""Imports that take less time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For the time of large imports, which make a million objects that are there to stay.

    The collector would look through them again and again as they grow in number, a fifth of all the time that it takes
    to import torch and transformers; and once more at the end of the program, if they were not set aside.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
