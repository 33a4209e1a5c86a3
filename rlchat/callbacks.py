"""What a run shows while it trains: a picture of its numbers, and replies to read.

Both callbacks work with every module of the program, need no arguments, and can be named in a configuration by class
path (``rlchat.callbacks.StatsPlot``).
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from rich import get_console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rlchat.best_model import BestModel
from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError, at_least_one
from rlchat.files import append_lines, write_atomically
from rlchat.rewards import Reply
from rlchat.stats_figure import draw_stats
from rlchat.trainer_facts import batches_seen, is_rehearsal


class StatsPlot(Callback):
    """Draws every run's numbers into one picture, ``checkpoints/<name of the bundle>_stats.png``.

    It keeps what the module logs, after each training batch and each validation, and redraws the picture as the run
    goes, at its end, and when it breaks off. The history travels in the checkpoint, so a resumed run's picture
    continues. Long runs are kept at a lower resolution: at most 1,024 points a metric, each the mean of a few batches.

    Args:
        path: the picture to write, as ``.png``, ``.svg`` or ``.pdf``. By default it stands beside the best bundle, in
            the folder of :class:`~rlchat.best_model.BestModel`, and is named after it (the module's ``bundle_name``).
        every_n_batches: how often, in training batches, the numbers are fetched from the device and the picture may be
            redrawn.
        min_seconds: how much time passes at least between two drawings.
        dpi: dots an inch; the picture is 11 inches wide.

    Raises:
        UserError: where an option cannot be meant.
    """

    # Drawing takes up to a second: however short min_seconds, no more than one part in so many of the run goes into it.
    _SHARE_OF_TIME = 30

    def __init__(
        self, path: str | None = None, every_n_batches: int = 10, min_seconds: float = 10.0, dpi: int = 150
    ) -> None:
        if path is not None and Path(path).suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"StatsPlot: path is {path!r}, it must end in .png, .svg or .pdf")
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

    def state_dict(self) -> dict[str, Any]:
        self._fetch()
        return {"history": {name: series.to_dict() for name, series in self._history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history = {name: _Series(**plain) for name, plain in state_dict["history"].items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A callback that is used for a second run would go on with the first one's numbers: keep this run's past only.
        self._history = {name: series.until(batches_seen(trainer)) for name, series in self._history.items()}
        self._history = {name: series for name, series in self._history.items() if series.steps}
        self._fresh, self._seen, self._batch_metrics, self._next_drawing = [], {}, set(), 0.0
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
        # Metrics of single batches have an epoch's mean now, which is no further point of theirs.
        fresh = {n: value for n, value in self._take_fresh(trainer).items() if n not in self._batch_metrics}
        self._fresh.append((batches_seen(trainer), fresh))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._fresh.append((batches_seen(trainer), self._take_fresh(trainer)))
            self._draw_if_due(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._picture is not None:
            self._draw(trainer, device_may_be_broken=True)

    def _take_fresh(self, trainer: Trainer) -> dict[str, Tensor]:
        """What was logged since the last call.

        ``callback_metrics`` also holds the last value of all that was logged before. A value that was logged anew is a
        tensor of its own, and the old one, being kept in ``_seen``, cannot have left its memory to it. Every rank
        has to ask, for Lightning may reduce a metric over the ranks when it is asked.
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
        """Moves what was logged since the last call into the history: one transfer from the device for all of it."""
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

    def _draw(self, trainer: Trainer, device_may_be_broken: bool = False) -> None:
        try:
            self._fetch()
        except RuntimeError:
            # After a device-side error no value comes back; that must not hide the error, nor what is known already.
            if not device_may_be_broken:
                raise
        if not (trainer.is_global_zero and self._history and self._picture) or is_rehearsal(trainer):
            return
        began = time.monotonic()
        try:
            self._write(self._picture, batches_seen(trainer))
        except UserError as error:
            rank_zero_warn(f"StatsPlot: {error}. Training goes on.")
        ended = time.monotonic()
        self._next_drawing = ended + max(self.min_seconds, self._SHARE_OF_TIME * (ended - began))

    def _write(self, picture: Path, batches: int) -> None:
        history = {name: (series.steps, series.values) for name, series in self._history.items()}
        figure = draw_stats(history, picture.stem.removesuffix("_stats"), batches)
        # Whoever looks at the picture while it is replaced sees the old one or the new one, and never half of one.
        write_atomically(picture, lambda file: figure.savefig(file, format=picture.suffix[1:], dpi=self.dpi))


class SampleResponses(Callback):
    """Lets the module answer the same prompts after each validation, and shows what it says.

    The replies go to TensorBoard (the tab *Text*, under ``samples``), to ``samples.jsonl`` in the run's log folder, one
    line a reply, and as a table to the terminal. A module with a reward shows what each factor gave. One that cannot
    answer, as a reward model, is left alone.

    Args:
        prompts: user messages to answer. By default the first held-out prompts of the data module are taken.
        every_n_validations: how often, in validations.
        count: how many held-out prompts to take where ``prompts`` is not given.
        max_rows: rows of the table in the terminal at most; 0 prints none.
        max_characters: where the table cuts a prompt or a reply. The other two places have all of it.

    Raises:
        UserError: where an option cannot be meant.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        every_n_validations: int = 1,
        count: int = 4,
        max_rows: int = 4,
        max_characters: int = 240,
    ) -> None:
        if prompts is not None and not (prompts and all(prompt.strip() for prompt in prompts)):
            raise UserError("SampleResponses: prompts has an empty message or none at all: give some text, or leave it")
        self.prompts = prompts
        self.every_n_validations = at_least_one("SampleResponses", "every_n_validations", every_n_validations)
        self.count = at_least_one("SampleResponses", "count", count)
        if max_rows < 0:
            raise UserError(f"SampleResponses: max_rows is {max_rows}, it must be 0 (no table) or more")
        self.max_rows = max_rows
        self.max_characters = at_least_one("SampleResponses", "max_characters", max_characters)
        self._validations = 0
        self._iteration = 0

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations, "iteration": self._iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations, self._iteration = state_dict["validations"], state_dict["iteration"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        respond: Any = getattr(pl_module, "respond", None)
        if trainer.sanity_checking or respond is None:
            return
        # A validation on its own trains nothing: the checkpoint that it loads says after which iteration it was saved.
        if trainer.state.fn == TrainerFn.FITTING:
            self._validations += 1
            self._iteration = batches_seen(trainer)
            if self._validations % self.every_n_validations:
                return
        prompts = self._chosen_prompts(trainer)
        if not prompts:
            rank_zero_warn("SampleResponses has nothing to ask: set prompts, or use a data module with sample_prompts.")
            return
        # All ranks answer, and ask for the folder, though one writes: each of these may be a collective.
        with trainer.precision_plugin.val_step_context():
            replies = respond(prompts)
            reward: Any = getattr(pl_module, "reward", None)
            factors = {} if reward is None else reward.breakdown(prompts, replies)
        log_dir = trainer.log_dir
        if not trainer.is_global_zero:
            return
        samples = _samples(prompts, replies, factors)
        self._write_text(trainer, samples)
        if log_dir is not None and not is_rehearsal(trainer):
            append_lines(Path(log_dir, "samples.jsonl"), self._rows(samples))
        if self.max_rows:
            _print_beside_progress_bar(trainer, self._table(samples))

    def _chosen_prompts(self, trainer: Trainer) -> list[Conversation]:
        if self.prompts is not None:
            return [Conversation((Message("user", text),)) for text in self.prompts]
        sample_prompts = getattr(getattr(trainer, "datamodule", None), "sample_prompts", None)
        return [] if sample_prompts is None else sample_prompts(self.count)

    def _write_text(self, trainer: Trainer, samples: Sequence[_Sample]) -> None:
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if add_text is not None:
                add_text("samples", _markdown(samples), self._iteration)

    def _rows(self, samples: Sequence[_Sample]) -> list[dict[str, Any]]:
        rows = []
        for sample in samples:
            row: dict[str, Any] = {
                "iteration": self._iteration,
                "prompt": [{"role": message.role, "text": message.text} for message in sample.prompt.messages],
                "reply": sample.reply.text,
                "ended": sample.reply.ended,
                "tokens": sample.reply.tokens,
            }
            if sample.factors:
                row["reward"] = round(sample.reward, 6)
                row["factors"] = {name: round(value, 6) for name, value in sample.factors.items()}
            rows.append(row)
        return rows

    def _table(self, samples: Sequence[_Sample]) -> Table:
        """Model and data speak in it, so all of their text goes in as ``Text``, which rich does not read as markup."""
        judged = bool(samples[0].factors)
        title = f"Samples after {self._iteration:,} training batches"
        table = Table(title=title, title_justify="left", title_style="bold", expand=True)
        table.add_column("prompt", ratio=3)
        table.add_column("reply", ratio=4)
        table.add_column("tokens", justify="right")
        if judged:
            table.add_column("reward", justify="right")
            table.add_column("of which", ratio=3, style="dim")
        for sample in samples[: self.max_rows]:
            asked = _one_line(sample.prompt.messages[-1].text, self.max_characters)
            said = _one_line(sample.reply.text, self.max_characters)
            if not sample.reply.ended:
                said.append(" (cut off)", style="dim")
            row = [asked, said, Text(str(sample.reply.tokens))]
            if judged:
                parts = (f"{name} {value:+.2f}" for name, value in sample.factors.items() if abs(value) >= 0.005)
                row += [Text(f"{sample.reward:+.2f}"), _one_line(", ".join(parts), self.max_characters)]
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class _Sample:
    prompt: Conversation
    reply: Reply
    factors: Mapping[str, float]  # empty where the module has no reward

    @property
    def reward(self) -> float:
        return sum(self.factors.values())


def _samples(prompts: Sequence[Conversation], replies: Sequence[Reply], factors: Mapping[str, Tensor]) -> list[_Sample]:
    columns = {name: column.tolist() for name, column in factors.items()}
    return [
        _Sample(prompt, reply, {name: column[row] for name, column in columns.items()})
        for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
    ]


def _markdown(samples: Sequence[_Sample]) -> str:
    """A table whose cells show their text as it is, whatever it would mean in Markdown or HTML."""
    names = list(samples[0].factors)
    header = ["prompt", "reply", "tokens", "ended", *(["reward", *names] if names else [])]
    rows = [[_markdown_cell(cell) for cell in header], ["---"] * len(header)]
    for sample in samples:
        messages = sample.prompt.messages
        prompt = messages[0].text if len(messages) == 1 else "\n".join(f"{m.role}: {m.text}" for m in messages)
        cells = [prompt, sample.reply.text, str(sample.reply.tokens), "yes" if sample.reply.ended else "no"]
        if names:
            cells += [f"{value:+.3f}" for value in (sample.reward, *sample.factors.values())]
        rows.append([_markdown_cell(cell) for cell in cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _markdown_cell(text: str) -> str:
    # Numeric entities: neither Markdown nor HTML gives the character behind one its special meaning.
    special = {ord(character): f"&#{ord(character)};" for character in "\\`*_{}[]<>()#+-.!|&~:\"'"}
    return "<br>".join(_visible(line).translate(special) for line in text.splitlines())


def _one_line(text: str, longest: int) -> Text:
    """``text`` as one line in the terminal's encoding, with … for what is beyond ``longest`` characters."""
    shortened = text if len(text) <= longest else text[: longest - 1] + "…"
    joined = " ⏎ ".join(map(_visible, shortened.splitlines()))
    encoding = get_console().encoding
    return Text(joined.encode(encoding, "replace").decode(encoding))


def _visible(line: str) -> str:
    """``line`` without what a terminal would take for a command or an encoder could not write."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(character) in ("Cc", "Cs") else character
        for character in line.expandtabs(4)
    )


def _print_beside_progress_bar(trainer: Trainer, table: Table) -> None:
    console = get_console()
    if isinstance(trainer.progress_bar_callback, TQDMProgressBar):
        with console.capture() as captured:
            console.print(table)
        Tqdm.write(captured.get(), end="")
    else:
        # Lightning's rich bar draws on this very console, which keeps the two apart.
        console.print(table)


@dataclass
class _Series:
    """One metric over a run at bounded length: when it is full, neighbours merge and each point covers twice as much.

    A point holds the last step that went into it, the mean of the values, and their number.
    """

    _FULL = 1024

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    stride: int = 1  # training batches that a point covers

    def add(self, step: int, value: float, count: int = 1) -> None:
        """``value``, the mean of ``count`` values, was logged at ``step``: from 1 on, and ascending."""
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
        """Plain values that make the same series again; the lists are copies."""
        return {"steps": [*self.steps], "values": [*self.values], "counts": [*self.counts], "stride": self.stride}
