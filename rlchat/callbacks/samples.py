"""Shows sampled responses after each validation: in TensorBoard, in a file, and in the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from rich import get_console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rlchat.callbacks.run_state import batches_seen, is_fast_dev_run
from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError, at_least_one
from rlchat.rewards import Reply
from rlchat.utils.files import append_lines


class SampleResponses(Callback):
    """Samples responses to the same prompts after each validation and shows them.

    The responses go to TensorBoard (tab *Text*, under ``samples``), to ``samples.jsonl`` in the run's log folder (one
    line per response), and as a table to the terminal. If the module has a reward, each factor is shown. Modules
    without ``respond``, such as a reward model, are skipped.

    Args:
        prompts: user messages to respond to. By default the first validation prompts of the data module are used.
        every_n_validations: sample after every this many validations.
        count: number of validation prompts if ``prompts`` is not set.
        max_rows: maximum number of rows of the table in the terminal; 0 prints no table.
        max_characters: the table truncates prompts and responses to this length. The file contains the whole text.

    Raises:
        UserError: for an invalid option.
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
            raise UserError("SampleResponses: prompts is empty or has an empty message; set one or more messages")
        self.prompts = prompts
        self.every_n_validations = at_least_one("SampleResponses", "every_n_validations", every_n_validations)
        self.count = at_least_one("SampleResponses", "count", count)
        if max_rows < 0:
            raise UserError(f"invalid value {max_rows} for SampleResponses.max_rows: expected 0 (no table) or more")
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
        # `rlchat validate` does not train; its iteration is the one stored in the checkpoint.
        if trainer.state.fn == TrainerFn.FITTING:
            self._validations += 1
            self._iteration = batches_seen(trainer)
            if self._validations % self.every_n_validations:
                return
        prompts = self._chosen_prompts(trainer)
        if not prompts:
            rank_zero_warn("SampleResponses has no prompts; set sample_responses.prompts, or use rlchat's data module")
            return
        # Only one process writes, but every process calls these, because each may be a collective.
        with trainer.precision_plugin.val_step_context():
            replies = respond(prompts)
            reward: Any = getattr(pl_module, "reward", None)
            score = getattr(pl_module, "score_responses", None if reward is None else reward.breakdown)
            factors = {} if score is None else score(prompts, replies)
        log_dir = trainer.log_dir
        if not trainer.is_global_zero:
            return
        samples = _samples(prompts, replies, factors)
        self._write_text(trainer, samples)
        if log_dir is not None and not is_fast_dev_run(trainer):
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
        """A table for the terminal. Text is passed as ``Text``, which rich does not interpret as markup."""
        has_reward = bool(samples[0].factors)
        title = f"Samples after {self._iteration:,} training batches"
        table = Table(title=title, title_justify="left", title_style="bold", expand=True)
        table.add_column("prompt", ratio=3)
        table.add_column("response", ratio=4)
        table.add_column("tokens", justify="right")
        if has_reward:
            table.add_column("reward", justify="right")
            table.add_column("by factor", ratio=3, style="dim")
        for sample in samples[: self.max_rows]:
            prompt = _one_line(sample.prompt.messages[-1].text, self.max_characters)
            response = _one_line(sample.reply.text, self.max_characters)
            if not sample.reply.ended:
                response.append(" (truncated)", style="dim")
            row = [prompt, response, Text(str(sample.reply.tokens))]
            if has_reward:
                parts = (f"{name} {value:+.2f}" for name, value in sample.factors.items() if abs(value) >= 0.005)
                row += [Text(f"{sample.reward:+.2f}"), _one_line(", ".join(parts), self.max_characters)]
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class _Sample:
    prompt: Conversation
    reply: Reply
    factors: Mapping[str, float]  # empty if the module has no reward

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
    """A Markdown table whose cells show their text literally, even if it contains Markdown or HTML."""
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
    # Neither Markdown nor HTML interprets a character that is written as a numeric entity.
    special = {ord(character): f"&#{ord(character)};" for character in "\\`*_{}[]<>()#+-.!|&~:\"'"}
    return "<br>".join(_visible(line).translate(special) for line in text.splitlines())


def _one_line(text: str, longest: int) -> Text:
    """``text`` as one line in the terminal's encoding, truncated with … at ``longest`` characters."""
    shortened = text if len(text) <= longest else text[: longest - 1] + "…"
    joined = " ⏎ ".join(map(_visible, shortened.splitlines()))
    encoding = get_console().encoding
    return Text(joined.encode(encoding, "replace").decode(encoding))


def _visible(line: str) -> str:
    """``line`` without control characters and surrogates, which a terminal would execute or could not encode."""
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
        # Lightning's rich bar draws on the same console, which prints the table above the bar.
        console.print(table)
