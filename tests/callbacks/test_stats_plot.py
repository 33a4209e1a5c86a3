"""StatsPlot: what it records, when it draws, and what a resumed run keeps."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.image
import pytest
from helpers.callback_runs import Automatic, Chatty, Data, Manual, logged, trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlchat.callbacks import SampleResponses, StatsPlot
from rlchat.callbacks.best_model import BestModel
from rlchat.callbacks.stats_plot import _Series
from rlchat.errors import UserError


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_tensorboard_gets_the_plot_less_often_in_longer_runs(tmp_path: Path) -> None:
    """Drawn after each of eight batches, shown where the run has grown by half since the last image, and at the end."""
    board = TensorBoardLogger(str(tmp_path), name="", version="run")
    trainer(StatsPlot(every_n_batches=1, min_seconds=0), logger=board, epochs=2).fit(Automatic(), Data())
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0})
    events.Reload()
    images = events.Images("stats")
    assert images[-1].step == 8
    assert all(after.step >= 1.5 * before.step for before, after in pairwise(images[:-1]))
    assert (images[0].width, images[0].height > 100) == (11 * 80, True)


@pytest.mark.parametrize("module", [Automatic, Manual])
def test_history_holds_each_logged_value_once_against_batches_seen(module: type[Automatic]) -> None:
    plot = StatsPlot(every_n_batches=3)
    trainer(plot).fit(module(), Data())
    history = logged(plot)
    assert history["train/loss"]["steps"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert history["train/loss"]["values"] == [1, 2, 3, 4, 5, 6, 7, 8]
    # In batch 2 Lightning still shows 1, which was not logged there.
    assert history["train/odd"]["steps"] == history["train/odd"]["values"] == [1, 3, 5, 7]
    assert history["train/once_an_epoch"]["steps"] == [4, 8]
    assert history["train/once_an_epoch"]["values"] == [2.5, 6.5]
    assert history["val/accuracy"]["steps"] == [2, 4, 6, 8]
    assert history["val/accuracy"]["values"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert not {"train/loss_step", "train/loss_epoch"} & history.keys()


def test_image_is_named_after_the_model_file_and_has_the_requested_width() -> None:
    trainer(StatsPlot(dpi=40)).fit(Automatic(), Data())
    picture = matplotlib.image.imread("checkpoints/tiny_model_stats.png")
    assert picture.shape[1] == 11 * 40
    assert [path.name for path in Path("checkpoints").iterdir()] == ["tiny_model_stats.png"]


def test_image_is_next_to_the_model_file() -> None:
    class Saved(Automatic):
        monitor = ("val/accuracy", "max")

        def save_bundle(self, path: Path) -> None:
            path.parent.mkdir(exist_ok=True)
            path.touch()

    trainer(StatsPlot(dpi=20), BestModel(folder="elsewhere")).fit(Saved(), Data())
    assert {path.name for path in Path("elsewhere").glob("tiny_*")} == {"tiny_model.pt", "tiny_model_stats.png"}


def test_image_is_redrawn_during_the_run_but_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spy(StatsPlot):
        _SHARE_OF_TIME = 0
        batches: list[int]

        def _write(self, picture: Path, batches: int) -> None:
            self.batches.append(batches)
            super()._write(picture, batches)

    def drawn(plot: Spy) -> list[int]:
        plot.batches = []
        trainer(plot, epochs=3, limit_val_batches=0).fit(Automatic(), Data())
        return plot.batches

    assert drawn(Spy(path="p.png", every_n_batches=5, min_seconds=0, dpi=10)) == [5, 10, 12]
    assert drawn(Spy(path="p.png", every_n_batches=5, min_seconds=3600, dpi=10)) == [5, 12]
    # Even if it may draw often, drawing takes a bounded share of the time.
    monkeypatch.setattr(Spy, "_SHARE_OF_TIME", 10**6)
    assert drawn(Spy(path="p.png", every_n_batches=5, min_seconds=0, dpi=10)) == [5, 12]


def test_history_continues_after_a_resume() -> None:
    whole, half, rest = StatsPlot(dpi=10), StatsPlot(dpi=10), StatsPlot(dpi=10)
    trainer(whole).fit(Automatic(), Data())
    first = trainer(half, epochs=1)
    first.fit(Automatic(), Data())
    first.save_checkpoint("half.ckpt")
    trainer(rest).fit(Automatic(), Data(), ckpt_path="half.ckpt", weights_only=True)
    assert logged(rest) == logged(whole)
    # A second run with the same callback starts a new history.
    trainer(rest, epochs=1).fit(Automatic(), Data())
    assert logged(rest) == logged(half)


def test_an_interrupted_run_draws_its_whole_history() -> None:
    plot = StatsPlot(every_n_batches=1000, dpi=10)
    with pytest.raises(ZeroDivisionError):
        trainer(plot, limit_val_batches=0).fit(Manual(fail_at=4), Data())
    assert Path("checkpoints/tiny_model_stats.png").exists()
    assert logged(plot)["train/loss"]["values"] == [1, 2, 3]


def test_validation_alone_and_fast_dev_run_do_not_change_the_image() -> None:
    module = Automatic()
    trainer(StatsPlot()).validate(module, Data(), verbose=False)
    trainer(StatsPlot(), fast_dev_run=True).fit(module, Data())
    assert not Path("checkpoints").exists()


def test_only_rank_zero_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    plot, samples = StatsPlot(), SampleResponses(prompts=["hello"])
    module = Chatty()
    monkeypatch.setattr(L.Trainer, "is_global_zero", False)
    trainer(plot, samples, logger=CSVLogger("logs")).fit(module, Data())
    assert len(module.asked) == 4
    assert not Path("checkpoints").exists()
    assert not list(Path().rglob("samples.jsonl"))


def test_a_folder_that_cannot_be_written_does_not_end_the_run() -> None:
    Path("file").touch()
    run = trainer(StatsPlot(path="file/p.png"))
    with pytest.warns(UserWarning, match=re.escape("StatsPlot: file/p.png: cannot be written")):
        run.fit(Automatic(), Data())
    assert run.global_step == 8


@pytest.mark.parametrize("options", [{"path": "p.txt"}, {"every_n_batches": 0}, {"dpi": 0}])
def test_plot_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        StatsPlot(**options)


def test_series_stays_short_and_keeps_the_mean() -> None:
    series = _Series()
    for step in range(1, 10_001):
        series.add(step, float(step))
    assert 512 <= len(series.steps) <= 1024
    assert series.stride == 16
    assert series.steps[:2] == [16, 32]
    assert series.values[:2] == [8.5, 24.5]
    assert series.steps[-1] == 10_000
    assert sum(v * n for v, n in zip(series.values, series.counts, strict=True)) == 10_000 * 10_001 / 2
    assert sum(series.counts) == 10_000


def test_series_of_a_rare_metric_stays_short_too() -> None:
    series = _Series()
    for step in range(100, 300_000, 100):
        series.add(step, 1.0)
    assert len(series.steps) <= 1024
    assert set(series.values) == {1.0}
