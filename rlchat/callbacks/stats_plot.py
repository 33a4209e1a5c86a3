"""Plots the metrics of a run while it trains."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from rlchat.callbacks.best_model import BestModel
from rlchat.callbacks.run_state import batches_seen, is_fast_dev_run
from rlchat.callbacks.stats_figure import draw_stats
from rlchat.errors import UserError, at_least_one
from rlchat.utils.files import write_atomically

_SCREEN_DPI = 80  # of the image in TensorBoard


class StatsPlot(Callback):
    """Plots the metrics of a run into one image, ``checkpoints/<name of the model file>_stats.png``.

    It records the metrics of each training batch and each validation. It draws the plot during the run, at
    its end, and when an exception ends it. TensorBoard shows the same plot in its tab *Images*. The history is saved in
    the checkpoint, so that the plot of a resumed run is complete. Long runs are stored at a lower resolution: at most
    1,024 points per metric, each a mean of batches.

    Args:
        path: the image file, ``.png``, ``.svg`` or ``.pdf``. By default it is next to the model file, in the folder of
            :class:`~rlchat.callbacks.best_model.BestModel`, and named after the module's ``bundle_name``.
        every_n_batches: fetch the numbers from the device after this many training batches; then the plot may be
            drawn again.
        min_seconds: minimum time between two drawings.
        dpi: dots per inch; the image is 11 inches wide.

    Raises:
        UserError: for an invalid option.
    """

    # Drawing takes up to a second. Whatever min_seconds is, drawing takes at most 1/30 of the run's time.
    _SHARE_OF_TIME = 30
    # TensorBoard keeps all images in its file, so the longer the run, the less often an image is added.
    _GROWTH_BETWEEN_IMAGES = 1.5

    def __init__(
        self, path: str | None = None, every_n_batches: int = 10, min_seconds: float = 10.0, dpi: int = 150
    ) -> None:
        if path is not None and Path(path).suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"invalid value {path!r} for StatsPlot.path: expected a .png, .svg or .pdf file")
        self.path = path
        self.every_n_batches = at_least_one("StatsPlot", "every_n_batches", every_n_batches)
        self.min_seconds = min_seconds
        self.dpi = at_least_one("StatsPlot", "dpi", dpi)
        self._history: dict[str, _Series] = {}
        self._fresh: list[tuple[int, dict[str, Tensor]]] = []
        self._seen: dict[str, Tensor] = {}
        self._batch_metrics: set[str] = set()
        self._picture: Path | None = None
        self._next_drawing = 0.0
        self._shown_at = 0  # the number of training batches when TensorBoard got its last image

    def state_dict(self) -> dict[str, Any]:
        self._fetch()
        return {"history": {name: series.to_dict() for name, series in self._history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history = {name: _Series(**plain) for name, plain in state_dict["history"].items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The same callback may be used for a second run: drop points from other runs.
        self._history = {name: series.until(batches_seen(trainer)) for name, series in self._history.items()}
        self._history = {name: series for name, series in self._history.items() if series.steps}
        self._fresh, self._seen, self._batch_metrics, self._next_drawing = [], {}, set(), 0.0
        self._shown_at = 0
        bundle = Path(getattr(pl_module, "bundle_name", f"{type(pl_module).__name__}.pt"))
        folders = (callback.folder for callback in trainer.checkpoint_callbacks if isinstance(callback, BestModel))
        folder = next(folders, "checkpoints")
        self._picture = Path(self.path) if self.path else Path(folder, f"{bundle.stem}_stats.png")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fresh = self._take_fresh(trainer)
        self._batch_metrics |= fresh.keys()
        self._fresh.append((batches_seen(trainer), fresh))
        if batches_seen(trainer) % self.every_n_batches == 0:
            self._draw_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Metrics that are logged per batch now contain the mean of the epoch, which is not a new point.
        fresh = {n: value for n, value in self._take_fresh(trainer).items() if n not in self._batch_metrics}
        self._fresh.append((batches_seen(trainer), fresh))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._fresh.append((batches_seen(trainer), self._take_fresh(trainer)))
            self._draw_if_due(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, last=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._picture is not None:
            self._draw(trainer, last=True, device_may_be_broken=True)

    def _take_fresh(self, trainer: Trainer) -> dict[str, Tensor]:
        """The metrics logged since the last call.

        ``callback_metrics`` also contains the last value of all metrics logged before. A newly logged value is a new
        tensor at a new address: ``_seen`` keeps the old tensor alive, so that its memory is not reused. Every process
        has to call this, because Lightning may reduce a metric over the processes when it is read.
        """
        metrics = trainer.callback_metrics
        fresh = {
            name: value
            for name, value in metrics.items()
            if value.numel() == 1
            and not (name.endswith(("_step", "_epoch")) and name.rpartition("_")[0] in metrics)
            and (name not in self._seen or self._seen[name].data_ptr() != value.data_ptr())
        }
        self._seen.update(fresh)
        return fresh

    def _fetch(self) -> None:
        """Moves the metrics logged since the last call to the history, in one transfer from the device."""
        points = [(step, name, value) for step, metrics in self._fresh for name, value in metrics.items()]
        self._fresh = []
        if points:
            accelerator = max((value.device for _, _, value in points), key=lambda device: device.type != "cpu")
            numbers = torch.stack([value.reshape(()).to(accelerator, torch.float32) for _, _, value in points]).tolist()
            for (step, name, _), number in zip(points, numbers, strict=True):
                self._history.setdefault(name, _Series()).add(step, number)

    def _draw_if_due(self, trainer: Trainer) -> None:
        self._fetch()
        if time.monotonic() >= self._next_drawing:
            self._draw(trainer)

    def _draw(self, trainer: Trainer, last: bool = False, device_may_be_broken: bool = False) -> None:
        try:
            self._fetch()
        except RuntimeError:
            # After a device-side error, no value can be read. Do not hide that error; draw the values fetched before
            # it.
            if not device_may_be_broken:
                raise
        if not (trainer.is_global_zero and self._history and self._picture) or is_fast_dev_run(trainer):
            return
        began = time.monotonic()
        batches = batches_seen(trainer)
        try:
            figure = self._write(self._picture, batches)
        except UserError as error:
            rank_zero_warn(f"StatsPlot: {error}. Training continues.")
        else:
            if last or batches >= self._GROWTH_BETWEEN_IMAGES * self._shown_at:
                self._show(trainer, figure, batches)
        ended = time.monotonic()
        self._next_drawing = ended + max(self.min_seconds, self._SHARE_OF_TIME * (ended - began))

    def _write(self, picture: Path, batches: int) -> Figure:
        history = {name: (series.steps, series.values) for name, series in self._history.items()}
        figure = draw_stats(history, picture.stem.removesuffix("_stats"), batches)
        # Atomic, so that a viewer never sees half an image.
        write_atomically(picture, lambda file: figure.savefig(file, format=picture.suffix[1:], dpi=self.dpi))
        return figure

    def _show(self, trainer: Trainer, figure: Figure, batches: int) -> None:
        """Adds the plot as an image [height, width, 3] to each logger that has images."""
        adders = [getattr(getattr(logger, "experiment", None), "add_image", None) for logger in trainer.loggers]
        if not any(adders) or batches == self._shown_at:
            return
        figure.set_dpi(_SCREEN_DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        for add_image in filter(None, adders):
            add_image("stats", pixels, batches, dataformats="HWC")
        self._shown_at = batches


@dataclass
class _Series:
    """One metric over a run, of bounded length: when it is full, neighboring points are merged in pairs.

    A point holds its last step, the mean of its values, and their number.
    """

    _FULL = 1024

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    stride: int = 1  # training batches that a point covers

    def add(self, step: int, value: float, count: int = 1) -> None:
        """Adds ``value``, the mean of ``count`` values logged at ``step``. Steps start at 1 and ascend."""
        if self.steps and (step - 1) // self.stride == (self.steps[-1] - 1) // self.stride:
            known = self.counts[-1]
            self.steps[-1], self.counts[-1] = step, known + count
            self.values[-1] = (known * self.values[-1] + count * value) / (known + count)
            return
        self.steps.append(step)
        self.values.append(value)
        self.counts.append(count)
        if len(self.steps) > self._FULL:
            coarser = _Series(stride=2 * self.stride)
            for point in zip(self.steps, self.values, self.counts, strict=True):
                coarser.add(*point)
            self.__dict__.update(coarser.__dict__)

    def until(self, step: int) -> _Series:
        """The points up to and including ``step``."""
        kept = sum(s <= step for s in self.steps)
        return _Series(self.steps[:kept], self.values[:kept], self.counts[:kept], self.stride)

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which the series can be rebuilt; the lists are copies."""
        return {"steps": [*self.steps], "values": [*self.values], "counts": [*self.counts], "stride": self.stride}
