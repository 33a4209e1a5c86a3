"""The delayed progress bar."""

from __future__ import annotations

import pytest

from rlchat.utils import progress
from rlchat.utils.progress import DelayedProgress, with_progress


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")


def test_quick_work_shows_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_progress([1, 2, 3], "counting", show=True)) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_slow_work_shows_a_bar_with_its_label(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PROGRESS_AFTER_SECONDS", 0.0)
    assert list(with_progress([1, 2, 3], "counting", show=False)) == [1, 2, 3]
    assert capsys.readouterr().err == ""
    assert list(with_progress([1, 2, 3], "counting", show=True)) == [1, 2, 3]
    out, err = capsys.readouterr()
    assert "counting" in err
    assert out == ""


def test_no_bar_where_standard_error_is_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    monkeypatch.setattr(progress, "PROGRESS_AFTER_SECONDS", 0.0)
    with DelayedProgress("counting", 2, show=True) as bar:
        bar.update(1)
        assert not bar.due
    assert capsys.readouterr().err == ""
