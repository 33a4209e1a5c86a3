"""Imports without the garbage collector, which works again afterwards."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest

from rlchat.utils.imports import no_garbage_collection


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if was_on else gc.disable)()


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_off_during_imports_and_restored_afterwards(was_on: bool) -> None:
    (gc.enable if was_on else gc.disable)()
    with contextlib.suppress(ImportError), no_garbage_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() == was_on


def test_imported_objects_are_frozen() -> None:
    gc.unfreeze()
    with no_garbage_collection():
        made = [[number] for number in range(1000)]
    assert gc.get_freeze_count() >= len(made)
