"""Signals request a stop; a second Ctrl-C stops at once. Several processes: prove/stop_signals.py."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlchat.callbacks.stop_signals import StopSignals

ALONE: Any = SimpleNamespace(trainer=SimpleNamespace(world_size=1))
BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in BOTH}
    taken = StopSignals()
    taken.take_charge()
    yield taken
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SIGTERMException)])
def test_a_signal_requests_a_stop(signals: StopSignals, number: signal.Signals, raised: type[BaseException]) -> None:
    assert signals.agreed(ALONE) == 0
    signal.raise_signal(number)  # and nothing happens here
    assert signals.agreed(ALONE) == number
    assert not signals.stopped
    with pytest.raises(raised, match=r"the run is saved\. Resume it with `rlchat fit --ckpt_path last`"):
        signals.stop(signals.agreed(ALONE))
    assert signals.stopped


def test_a_second_ctrl_c_stops_at_once(signals: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("rlchat.callbacks.stop_signals.time.monotonic", lambda: now)
    signal.raise_signal(signal.SIGINT)
    now = 100.5
    signal.raise_signal(signal.SIGINT)  # the same key, passed on by torchrun
    now = 102.0
    signal.raise_signal(signal.SIGTERM)  # that has been asked for already
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_signal_handlers_are_restored(signals: StopSignals) -> None:
    signals.release()
    ours = [signal.getsignal(number) for number in BOTH]
    signals.take_charge()
    assert all(signal.getsignal(number) == signals._note for number in BOTH)
    signals.release()
    assert [signal.getsignal(number) for number in BOTH] == ours
    signals.release()  # twice does nothing
    assert [signal.getsignal(number) for number in BOTH] == ours


def test_a_new_run_forgets_the_stop_of_the_last_run(signals: StopSignals) -> None:
    signal.raise_signal(signal.SIGTERM)
    signals.release()
    signals.take_charge()
    assert signals.requested == 0
