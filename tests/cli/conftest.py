"""Fixtures of the tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.command_line import empty_plots


@pytest.fixture(autouse=True)
def _empty_plots() -> Iterator[None]:
    """Also for tests that call the command line without ``helpers.command_line.rlchat``."""
    with empty_plots():
        yield
