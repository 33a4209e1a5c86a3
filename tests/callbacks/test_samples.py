"""SampleResponses: in the file, in TensorBoard and in the terminal."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from helpers.callback_runs import NASTY, Automatic, Chatty, Data, trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from rlchat.callbacks import SampleResponses
from rlchat.errors import UserError


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_responses_are_appended_as_lines() -> None:
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

    trainer(SampleResponses(prompts=["hällo"]), epochs=1, logger=logger).fit(Chatty(rewarded=False), Data())
    later = [json.loads(line) for line in Path(logger.log_dir, "samples.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert later[:4] == rows
    assert later[4].keys() == {"iteration", "prompt", "reply", "ended", "tokens"}


def test_tensorboard_shows_the_exact_text() -> None:
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
    assert shown.count("(truncated)") == 2
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


def test_a_module_that_generates_no_text_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(SampleResponses(), epochs=1).fit(Automatic(), Data())
    assert capsys.readouterr().out == ""


def test_without_prompts_the_warning_names_the_fix() -> None:
    class Bare(Data):
        sample_prompts = None  # type: ignore[assignment]

    with pytest.warns(UserWarning, match="set sample_responses.prompts"):
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
