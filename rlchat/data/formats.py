"""Reads JSONL files into trees of conversations.

The keys of a row identify its format, so a file may mix formats. The readers are in :mod:`rlchat.data.readers`.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from rlchat.conversation import Conversation, Message
from rlchat.data.forest import Forest, ForestBuilder, Tree, tree_id_of
from rlchat.data.jsonl import CURE, MAX_LINE_BYTES, BadLineError, LineReport, decode_line, parse_object, take_lines
from rlchat.data.readers import Readers, ReadOptions, Row
from rlchat.data.sources import DataFile, data_file
from rlchat.errors import UserError

_log = logging.getLogger("rlchat")

_SHOWN_KEYS = 8


@dataclass(slots=True)
class ReadReport(LineReport):
    """Counts of what was read and what was left out.

    Attributes:
        dropped: the reason for leaving something out, as a plural noun → how often.
        warnings: a warning about some rows → the number of rows.
        used: a weight or a label, of a row or of its messages → the number of rows.
        unread: a key that has no effect → the number of rows.
    """

    trees: int = 0
    threads: int = 0
    prompts: int = 0
    responses: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    used: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line: the totals, then :meth:`losses`."""
        totals = (
            f"{self.trees:,} trees, {self.threads:,} threads, {self.prompts:,} prompts"
            + (f", {self.responses:,} lone responses" if self.responses else "")
            + f" from {self.lines:,} lines"
        )
        return "; ".join(filter(None, (totals, self.losses())))

    def losses(self) -> str:
        """What was dropped and why (most frequent reason first), bad lines and unused keys; may be empty."""
        parts = []
        if self.dropped:
            parts.append("dropped " + ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.most_common()))
        if self.bad_lines:
            parts.append(f"skipped {self.bad_lines:,} bad lines ({' | '.join(self.bad_line_examples)})")
        if used := [f"{key} ({n:,} rows)" for key, n in self.used.items() if n]:
            parts.append("weights and labels: " + ", ".join(used))
        if self.unread:
            keys = [f"{key} ({n:,} rows)" for key, n in self.unread.most_common(_SHOWN_KEYS)]
            more = len(self.unread) - len(keys)
            parts.append("unused keys: " + ", ".join(keys) + (f" and {more:,} more" if more else ""))
        return "; ".join(parts)

    def warning_lines(self) -> list[str]:
        """The warnings, one sentence each."""
        return [f"{n:,} rows have {what}" for what, n in self.warnings.most_common()]


def read_trees(paths: Sequence[str | Path | DataFile], **options: Any) -> tuple[list[Tree], ReadReport]:
    """Every usable conversation in ``paths``, as trees; the keyword arguments are those of :func:`read_forest`."""
    with tempfile.TemporaryDirectory(prefix="rlchat-") as folder:
        forest, report = read_forest(paths, Path(folder) / "trees", **options)
        return forest[:], report


def read_forest(
    paths: Sequence[str | Path | DataFile],
    destination: Path,
    *,
    lang: str | None = "en",
    on_bad_line: Literal["error", "skip"] = "error",
    cure: str = CURE,
    max_line_bytes: int = MAX_LINE_BYTES,
    keep_synthetic: bool = False,
    split_text: bool = False,
    progress: bool = True,
) -> tuple[Forest, ReadReport]:
    """Every usable conversation in ``paths``, as trees in the new file ``destination``.

    OASST trees are selected as :class:`rlchat.data.readers.oasst.OasstReader` describes. A preference pair becomes a
    thread (the chosen conversation) and a prompt with both responses, ranked 0 and 1. The ``quality`` of a row applies
    to every assistant message that has no ``quality``.

    Only OASST's rows have a tree id. For other rows it is a hash of the first user message (ignoring case and white
    space), so rows with the same first message belong to one tree and are never in different splits. Trees with the
    same id are merged: equal conversations are kept once, and the responses to one prompt are collected unless they are
    ranked, because ranks of different rows cannot be compared.

    Args:
        paths: plain or compressed files of JSON lines or of one JSON array.
        destination: the file that the trees are kept in.
        lang: the language of the OASST trees to keep; None keeps all.
        on_bad_line: stop at an invalid line (not JSON, no known format, a wrong type, longer than ``max_line_bytes``),
            with the advice ``cure``, or count it and continue.
        keep_synthetic: whether to keep OASST messages that were written by a model.
        split_text: whether to split ``text`` rows with chat markup into turns.
        progress: show a progress bar on standard error when reading takes longer than two seconds.

    Raises:
        UserError: a file is missing, a directory, damaged or of an unsupported kind; a bad line; no usable
            conversation at all.
        OSError: ``destination`` cannot be written.
    """
    files = [data_file(path) for path in ([paths] if isinstance(paths, str | Path | DataFile) else paths)]
    if not files:
        raise UserError("no data file is specified; pass at least one .jsonl or .jsonl.gz file")
    report = ReadReport()
    with ForestBuilder(destination) as trees:
        collector = _Collector(report, ReadOptions(lang, keep_synthetic, split_text=split_text), trees)
        take_lines(
            files,
            lambda line: collector.add(parse_object(line)),
            report,
            on_bad_line=on_bad_line,
            cure=cure,
            max_line_bytes=max_line_bytes,
            progress=progress,
        )
        forest = collector.finish()
    if not forest:
        raise UserError(
            f"no usable conversation in {', '.join(map(str, files))}: {report.summary()}; check that it is the right "
            f"file, and that data.lang ({lang}) and the other options do not exclude everything"
        )
    return forest, report


def read_prompts(
    path: str | Path, *, on_bad_line: Literal["error", "skip"] = "error", cure: str = CURE
) -> list[Conversation]:
    """One prompt per row of a file, in the order of the file. Duplicates are kept, so that responses match rows.

    The prompt of a conversation is its beginning up to the last user message. The prompt of a preference pair is the
    common prompt of both responses. The prompt of an OASST user message is the thread up to it, whatever the state and
    language of its tree. OASST messages that are deleted, empty, below such a message, or whose id occurred before have
    no prompt. In a ``.txt`` file, each line that is not blank is a prompt. References and checks are read as in
    :func:`read_trees`.

    Any other row without a prompt, for example a response alone, is a bad line: if it were skipped silently, the
    responses would no longer match the file. With ``on_bad_line="skip"``, a warning reports the skipped rows. ``cure``
    is the advice of :func:`rlchat.data.jsonl.take_lines`.

    Raises:
        UserError: the file is missing, a directory, damaged or of an unsupported kind; a bad line; no prompt at all.
    """
    file = data_file(path)
    report = ReadReport()
    readers = Readers(ReadOptions(keep_synthetic=True, any_state=True), report.dropped)
    # A message of an OASST row is represented by its id until all rows are read.
    found: list[Conversation | str] = []

    def take(line: bytes) -> None:
        if file.is_plain_text:
            if text := decode_line(line).strip():
                found.append(Conversation((Message("user", text),)))
            return
        row = readers.read(parse_object(line))
        if row.prompt is not None:
            found.append(row.prompt)
        elif row.message_ids or not (row.opening or row.flaw):
            found.extend(row.message_ids)
        else:
            raise BadLineError("the row has no prompt")

    take_lines([file], take, report, on_bad_line=on_bad_line, cure=cure)
    of_message = {message_id: prompt for tree in readers.linked() for message_id, prompt in tree.prompts.items()}
    prompts = [of_message.get(entry) if isinstance(entry, str) else entry for entry in found]
    usable = [prompt for prompt in prompts if prompt is not None]
    losses = report.losses()
    if not usable:
        raise UserError(
            f"{file}: contains no prompts{losses and f' ({losses})'}; "
            "use JSONL rows, or a .txt file with one prompt per line"
        )
    if losses:
        _log.warning("%s: %s", file, losses)
    return usable


def ranked_pairs(prompt: Conversation) -> list[tuple[Message, Message]]:
    """(better, worse) for every two references with different ranks, best first. Unranked references are ignored."""
    ranked = sorted(
        ((reply.rank, reply) for reply in prompt.references if reply.rank is not None), key=lambda entry: entry[0]
    )
    return [(better, worse) for (rank, better), (worse_rank, worse) in combinations(ranked, 2) if rank != worse_rank]


class _Collector:
    """Takes rows one by one, and returns the trees after the last row."""

    def __init__(self, report: ReadReport, options: ReadOptions, trees: ForestBuilder) -> None:
        self.report = report
        self.dropped = report.dropped
        self.readers = Readers(options, report.dropped)
        self.trees = trees
        self.feedback: dict[str, dict[str, Any]] = {}  # the last row of each feedback_id; see rlchat.chat.feedback
        self._options = options

    def add(self, row: dict[str, Any]) -> None:
        """Adds the usable parts of ``row``. Raises :class:`BadLineError`, in which case nothing is added."""
        if isinstance(feedback_id := row.get("feedback_id"), str):
            Readers(self._options, Counter()).read(row)  # raises for a bad line
            self.dropped["replaced or withdrawn verdicts"] += feedback_id in self.feedback
            self.feedback[feedback_id] = row
        else:
            self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        read: Row = self.readers.read(row)
        if read.flaw is not None:
            self.dropped[read.flaw] += 1
        elif read.opening:
            self.trees.add(tree_id_of(read.opening), read.threads, read.prompts)

    def finish(self) -> Forest:
        """The trees of all rows, after linking, selection and merging."""
        for row in self.feedback.values():
            if row.get("verdict") == "none":
                self.dropped["replaced or withdrawn verdicts"] += 1
            else:
                self._take(row)
        self.feedback.clear()
        for name in [name for name, count in self.dropped.items() if not count]:
            del self.dropped[name]
        report, trees = self.report, self.trees
        report.warnings, report.unread, report.used = self.readers.warnings, self.readers.unread, self.readers.used
        for planted in self.readers.linked():
            trees.add(planted.id, planted.threads, list(planted.prompts.values()))
        forest = trees.finish()
        if trees.duplicate_threads:
            self.dropped["duplicate threads"] += trees.duplicate_threads
        report.trees = len(forest)
        report.threads, report.prompts, report.responses = trees.threads, trees.prompts, trees.responses
        return forest
