"""The callbacks, on modules of one weight that log known numbers and give known replies."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.image
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch import Tensor
from torch.utils.data import DataLoader

from rlchat.callbacks import SampleResponses, StatsPlot
from rlchat.callbacks.best_model import BestModel
from rlchat.callbacks.stats_figure import _Curve, _fence, _limits, _spread, draw_stats
from rlchat.callbacks.stats_plot import _Series
from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.rewards import Reply


class Automatic(L.LightningModule):
    """Logs, in its n-th training batch, ``train/loss`` n, and ``train/odd`` n where n is odd."""

    bundle_name = "tiny_model.pt"

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = 0
        self.validations = 0
        self.fail_at = fail_at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count_and_log()
        return self.weight.sum()

    def count_and_log(self) -> None:
        self.batches += 1
        if self.batches == self.fail_at:
            raise ZeroDivisionError
        self.log("train/loss", float(self.batches), on_step=True, on_epoch=True)
        self.log("train/once_an_epoch", float(self.batches), on_step=False, on_epoch=True)
        if self.batches % 2:
            self.log("train/odd", float(self.batches))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.validations += not self.trainer.sanity_checking
        self.log("val/accuracy", self.validations / 10)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["counts"] = (self.batches, self.validations)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches, self.validations = checkpoint["counts"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Automatic):
    """Takes three optimizer steps a batch, as PPO does."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__(fail_at)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.count_and_log()
        for _ in range(3):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.weight.sum())
            optimizer.step()


NASTY = "[bold]a|b[/bold] <b>x</b> *y*\n\x1b[31m$1_2_3 :smile: ![i](http://e.x/i.png)"


class FixedReward:
    def breakdown(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> dict[str, Tensor]:
        return {
            "polite": torch.full((len(replies),), 0.5),
            "too_long": torch.tensor([-0.125 * r.tokens for r in replies]),
        }


class Chatty(Automatic):
    """Answers every prompt with ``NASTY``, and reports whether anything was recorded for a gradient."""

    def __init__(self, judged: bool = True) -> None:
        super().__init__()
        self.asked: list[list[Conversation]] = []
        if judged:
            self.reward = FixedReward()

    def respond(self, prompts: list[Conversation]) -> list[Reply]:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.asked.append(prompts)
        return [Reply(NASTY, tokens=row + 1, ended=row > 0) for row in range(len(prompts))]


class Data(L.LightningDataModule):
    prompts = tuple(Conversation((Message("user", f"question {n}"),)) for n in range(9))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(4, 1))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(1, 1))  # type: ignore[arg-type]

    def sample_prompts(self, n: int) -> list[Conversation]:
        return list(self.prompts[:n])


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trainer(*callbacks: L.Callback, epochs: int = 2, **options: Any) -> L.Trainer:
    """Four batches an epoch, a validation after each second one."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": epochs,
        "val_check_interval": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, BestModel) for callback in callbacks),
    }
    return L.Trainer(callbacks=list(callbacks), **defaults | options)


def logged(plot: StatsPlot) -> dict[str, dict[str, Any]]:
    return plot.state_dict()["history"]


# StatsPlot ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [Automatic, Manual])
def test_history_holds_each_logged_value_once_against_batches_seen(module: type[Automatic]) -> None:
    plot = StatsPlot(every_n_batches=3)
    trainer(plot).fit(module(), Data())
    history = logged(plot)
    assert history["train/loss"]["steps"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert history["train/loss"]["values"] == [1, 2, 3, 4, 5, 6, 7, 8]
    # Lightning goes on showing 1 in batch 2: nobody logged it there.
    assert history["train/odd"]["steps"] == history["train/odd"]["values"] == [1, 3, 5, 7]
    assert history["train/once_an_epoch"]["steps"] == [4, 8]
    assert history["train/once_an_epoch"]["values"] == [2.5, 6.5]
    assert history["val/accuracy"]["steps"] == [2, 4, 6, 8]
    assert history["val/accuracy"]["values"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert not {"train/loss_step", "train/loss_epoch"} & history.keys()


def test_picture_is_named_after_the_bundle_and_as_wide_as_asked() -> None:
    trainer(StatsPlot(dpi=40)).fit(Automatic(), Data())
    picture = matplotlib.image.imread("checkpoints/tiny_model_stats.png")
    assert picture.shape[1] == 11 * 40
    assert [path.name for path in Path("checkpoints").iterdir()] == ["tiny_model_stats.png"]


def test_picture_stands_beside_the_best_bundle() -> None:
    class Saved(Automatic):
        monitor = ("val/accuracy", "max")

        def save_bundle(self, path: Path) -> None:
            path.parent.mkdir(exist_ok=True)
            path.touch()

    trainer(StatsPlot(dpi=20), BestModel(folder="elsewhere")).fit(Saved(), Data())
    assert {path.name for path in Path("elsewhere").glob("tiny_*")} == {"tiny_model.pt", "tiny_model_stats.png"}


def test_picture_is_redrawn_through_the_run_but_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
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
    # However often it may, drawing takes a bounded share of the time.
    monkeypatch.setattr(Spy, "_SHARE_OF_TIME", 10**6)
    assert drawn(Spy(path="p.png", every_n_batches=5, min_seconds=0, dpi=10)) == [5, 12]


def test_history_goes_on_after_a_resume() -> None:
    whole, half, rest = StatsPlot(dpi=10), StatsPlot(dpi=10), StatsPlot(dpi=10)
    trainer(whole).fit(Automatic(), Data())
    first = trainer(half, epochs=1)
    first.fit(Automatic(), Data())
    first.save_checkpoint("half.ckpt")
    trainer(rest).fit(Automatic(), Data(), ckpt_path="half.ckpt", weights_only=True)
    assert logged(rest) == logged(whole)
    # A second run with the same callback is a life of its own.
    trainer(rest, epochs=1).fit(Automatic(), Data())
    assert logged(rest) == logged(half)


def test_an_interrupted_run_leaves_a_picture_of_all_it_saw() -> None:
    plot = StatsPlot(every_n_batches=1000, dpi=10)
    with pytest.raises(ZeroDivisionError):
        trainer(plot, limit_val_batches=0).fit(Manual(fail_at=4), Data())
    assert Path("checkpoints/tiny_model_stats.png").exists()
    assert logged(plot)["train/loss"]["values"] == [1, 2, 3]


def test_validation_alone_and_rehearsals_leave_the_picture_of_the_run_alone() -> None:
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


# The figure -----------------------------------------------------------------------------------------------------------


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]]


def curve(n: int, start: float = 1.0) -> tuple[list[int], list[float]]:
    return list(range(1, n + 1)), [start / (1 + k) for k in range(n)]


@pytest.mark.parametrize(
    ("metrics", "titles"),
    [
        (["train/loss", "train/accuracy", "val/accuracy", "val/perplexity"], ["Loss", "Token accuracy", "Perplexity"]),
        (["train/loss", "val/pair_accuracy", "val/right_over_wrong"], ["Loss", "Pair accuracy", "Right over wrong"]),
        (
            ["train/reward", "reward/too_long", "train/policy_loss", "train/value_loss", "train/entropy", "val/kl"],
            ["Reward", "Reward by factor", "Policy loss", "Value loss", "Entropy", "KL to the reference"],
        ),
    ],
)
def test_a_panel_for_what_was_logged_and_none_besides(metrics: list[str], titles: list[str]) -> None:
    figure = draw_stats({name: curve(30) for name in metrics} | {"train/learning_rate": curve(30)}, "my_run")
    assert len(figure.axes) == len(titles)
    assert set(titles) < set(texts(figure))
    assert {"my_run", "30 training batches"} < set(texts(figure))


def test_train_and_held_out_share_a_panel_and_the_legend_names_both() -> None:
    figure = draw_stats({"train/kl": curve(30), "val/kl": ([10, 20], [0.5, 0.25])}, "run")
    (axes,) = figure.axes
    held_out = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in held_out] == [[0.5, 0.25]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training", "training, smoothed", "held-out"]


@pytest.mark.parametrize("values", [[1.0], [math.nan], [math.nan, math.inf, 2.0], [0.0] * 40, [1e300, -1e300] * 20])
def test_any_values_can_be_drawn(values: list[float]) -> None:
    steps = list(range(1, len(values) + 1))
    history = dict.fromkeys(("train/reward", "train/perplexity", "val/loss", "reward/a"), (steps, values))
    draw_stats(history, "run").savefig("run.png", dpi=20)


def test_names_are_shown_as_they_are_written() -> None:
    history = {f"reward/cost_$\\frac{{{n}_{'x' * 50}": curve(5) for n in range(20)}
    figure = draw_stats(history, "$\\frac{a$")
    figure.savefig("run.png", dpi=20)  # a formula that is none would raise here
    assert "points a reply, weight included; the 12 largest of 20" in texts(figure)


def test_values_that_are_not_finite_are_crossed_on_the_axis() -> None:
    figure = draw_stats({"train/loss": ([1, 2, 3, 4], [1.0, math.nan, 2.0, math.inf])}, "run")
    (crosses,) = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert list(crosses.get_xdata()) == [2, 4]


def test_smoothing_keeps_a_straight_line_and_does_not_spread_gaps() -> None:
    line = [3.0 - 0.5 * step for step in range(200)]
    line[50] = math.nan
    smoothed = _Curve.of(range(200), line).smoothed()
    assert np.isnan(smoothed).nonzero()[0].tolist() == [50]
    np.testing.assert_allclose(np.delete(smoothed, 50), np.delete(np.array(line), 50), atol=1e-8)


def test_smoothing_averages_noise() -> None:
    noise = np.random.default_rng(0).standard_normal(2000)
    assert _Curve.of(range(2000), noise.tolist()).smoothed().std() < 0.15


def test_one_wild_value_does_not_flatten_the_rest() -> None:
    values = np.append(np.linspace(0, 1, 100), 1e6)
    assert _fence(values) == (0, 1)
    low, high, is_log = _limits(values, may_be_log=False)
    assert (low, high, is_log) == (0, pytest.approx(1.06), False)


def test_axis_is_logarithmic_only_where_values_span_much() -> None:
    assert _limits(np.array([1000.0, 30.0, 3.0]), may_be_log=True)[2]
    assert not _limits(np.array([1000.0, 30.0, 3.0]), may_be_log=False)[2]
    assert not _limits(np.array([10.0, 3.0]), may_be_log=True)[2]
    assert not _limits(np.array([1000.0, 0.0]), may_be_log=True)[2]


def test_labels_keep_their_distance_and_otherwise_their_place() -> None:
    assert _spread([0.1, 0.5, 0.9], gap=0.1, low=0, high=1) == pytest.approx([0.1, 0.5, 0.9])
    assert _spread([0.5, 0.5, 0.9], gap=0.1, low=0, high=1) == pytest.approx([0.45, 0.55, 0.9])
    assert _spread([0.0, 0.0, 0.0], gap=0.1, low=0, high=1) == pytest.approx([0.0, 0.1, 0.2])
    assert _spread([1.0, 1.0], gap=0.1, low=0, high=1) == pytest.approx([0.9, 1.0])


# SampleResponses ------------------------------------------------------------------------------------------------------


def test_replies_are_appended_line_by_line() -> None:
    logger = CSVLogger("logs", version=0)
    trainer(SampleResponses(prompts=["hällo", "two"]), epochs=1, logger=logger).fit(Chatty(), Data())
    rows = [json.loads(line) for line in Path(logger.log_dir, "samples.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [row["iteration"] for row in rows] == [2, 2, 4, 4]
    assert rows[0] == {
        "iteration": 2,
        "prompt": [{"role": "user", "text": "hällo"}],
        "reply": NASTY,
        "ended": False,
        "tokens": 1,
        "reward": 0.375,
        "factors": {"polite": 0.5, "too_long": -0.125},
    }
    assert (rows[1]["tokens"], rows[1]["ended"], rows[1]["reward"]) == (2, True, 0.25)

    trainer(SampleResponses(prompts=["hällo"]), epochs=1, logger=logger).fit(Chatty(judged=False), Data())
    later = [json.loads(line) for line in Path(logger.log_dir, "samples.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert later[:4] == rows
    assert later[4].keys() == {"iteration", "prompt", "reply", "ended", "tokens"}


def test_tensorboard_shows_the_very_text() -> None:
    logger = TensorBoardLogger("logs", version=0)
    trainer(SampleResponses(prompts=["what | is\n<this>?"]), epochs=1, logger=logger).fit(Chatty(), Data())
    events = EventAccumulator(logger.log_dir).Reload()
    tensors = events.Tensors("samples/text_summary")
    assert [tensor.step for tensor in tensors] == [2, 4]
    markdown = tensors[0].tensor_proto.string_val[0].decode()
    page = markdown_to_safe_html(markdown)
    assert set(re.findall(r"<(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td", "br"}
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", page)]
    assert cells[:7] == ["prompt", "reply", "tokens", "ended", "reward", "polite", "too_long"]
    assert cells[7:] == [
        "what | is<br><this>?",
        "[bold]a|b[/bold] <b>x</b> *y*<br>\N{REPLACEMENT CHARACTER}[31m$1_2_3 :smile: ![i](http://e.x/i.png)",
        "1",
        "no",
        "+0.375",
        "+0.500",
        "-0.125",
    ]


@pytest.mark.parametrize("bar", [None, TQDMProgressBar, RichProgressBar])
def test_terminal_shows_a_table_in_plain_text(
    bar: type[L.Callback] | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("rich._console", None)  # the one of an earlier test has another width
    callbacks = [SampleResponses(max_rows=2, max_characters=30), *([bar()] if bar else [])]
    trainer(*callbacks, epochs=1, enable_progress_bar=bar is not None).fit(Chatty(), Data())
    shown = capsys.readouterr().out
    assert shown.count("Samples after 2 training batches") == shown.count("Samples after 4 training batches") == 1
    assert shown.count("question 0") == shown.count("question 1") == 2
    assert "question 2" not in shown
    assert "[bold]a|b[/bold] <b>x</b> *y*…" in shown.replace(" ⏎", "…")
    assert "+0.38" in shown
    assert "polite +0.50, too_long -0.12" in shown
    assert shown.count("(cut off)") == 2
    assert "\x1b[31m" not in shown


def test_held_out_prompts_are_the_same_each_time() -> None:
    module = Chatty()
    trainer(SampleResponses(count=3, max_rows=0)).fit(module, Data())
    assert module.asked == [list(Data.prompts[:3])] * 4  # two epochs of two validations; the sanity check asks nothing


def test_every_nth_validation_counted_over_resumes() -> None:
    module = Chatty()
    trainer(SampleResponses(every_n_validations=3, max_rows=0)).fit(module, Data())
    assert len(module.asked) == 1

    first, resumed = Chatty(), Chatty()
    run = trainer(SampleResponses(every_n_validations=3, max_rows=0), epochs=1)
    run.fit(first, Data())
    run.save_checkpoint("half.ckpt")
    trainer(SampleResponses(every_n_validations=3, max_rows=0)).fit(resumed, Data(), ckpt_path="half.ckpt")
    assert (len(first.asked), len(resumed.asked)) == (0, 1)


def test_validation_alone_names_the_iteration_of_its_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(SampleResponses(every_n_validations=100), epochs=1)
    run.fit(Chatty(), Data())
    run.save_checkpoint("model.ckpt")
    capsys.readouterr()
    trainer(SampleResponses(every_n_validations=100)).validate(Chatty(), Data(), ckpt_path="model.ckpt", verbose=False)
    assert "Samples after 4 training batches" in capsys.readouterr().out


def test_a_module_that_cannot_answer_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(SampleResponses(), epochs=1).fit(Automatic(), Data())
    assert capsys.readouterr().out == ""


def test_without_prompts_the_cure_is_named() -> None:
    class Bare(Data):
        sample_prompts = None  # type: ignore[assignment]

    with pytest.warns(UserWarning, match="set prompts"):
        trainer(SampleResponses(), epochs=1).fit(Chatty(), Bare())


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": []},
        {"prompts": [" "]},
        {"every_n_validations": 0},
        {"count": 0},
        {"max_rows": -1},
        {"max_characters": 0},
    ],
)
def test_sample_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        SampleResponses(**options)


@pytest.mark.parametrize(("name", "option", "value"), [("StatsPlot", "dpi", 80), ("SampleResponses", "count", 2)])
def test_callbacks_are_made_from_a_class_path(name: str, option: str, value: int) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=L.Callback)
    spec = {"class_path": f"rlchat.callbacks.{name}"}
    assert parser.instantiate_classes(parser.parse_object({"callback": spec})).callback is not None
    spec_with = spec | {"init_args": {option: value}}
    made = parser.instantiate_classes(parser.parse_object({"callback": spec_with})).callback
    assert getattr(made, option) == value
