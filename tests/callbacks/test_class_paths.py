"""Every callback can be configured by its class path."""

from __future__ import annotations

import lightning as L
import pytest
from jsonargparse import ArgumentParser


@pytest.mark.parametrize(("name", "option", "value"), [("StatsPlot", "dpi", 80), ("SampleResponses", "count", 2)])
def test_callbacks_are_made_from_a_class_path(name: str, option: str, value: int) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=L.Callback)
    spec = {"class_path": f"rlchat.callbacks.{name}"}
    assert parser.instantiate_classes(parser.parse_object({"callback": spec})).callback is not None
    spec_with = spec | {"init_args": {option: value}}
    made = parser.instantiate_classes(parser.parse_object({"callback": spec_with})).callback
    assert getattr(made, option) == value
