"""Readers: JSONL files in, trees of conversations out.

Every row says by its keys what it is, so one file, or several, may mix them (see :func:`read_trees`):

===========================================  ====================================================================
keys                                         what it is
===========================================  ====================================================================
``prompt`` (an object)                       an OASST tree
``message_id``                               an OASST message, linked by ``parent_id``, or nested in ``replies``
``messages``                                 one conversation, with an optional ``quality``
``prompt``, ``chosen``, ``rejected``         a preference pair
``chosen``, ``rejected``                     an hh-rlhf pair: ``\\n\\nHuman: …\\n\\nAssistant: …``
``prompt`` (text, or a list of messages)     a prompt without replies
``text``                                     a lone response, with an optional ``quality``
===========================================  ====================================================================
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from rlchat.conversation import Conversation, Message
from rlchat.data.fields import shown
from rlchat.data.jsonl import CURE, MAX_LINE_BYTES, BadLineError, LineReport, decode_line, parse_object, take_lines
from rlchat.data.oasst import OasstForest
from rlchat.data.rows import hh_pair_row, messages_row, pair_row, prompt_row, text_row
from rlchat.errors import UserError

_log = logging.getLogger("rlchat")

_Format = Literal["oasst", "messages", "pair", "hh pair", "prompt", "text"]


@dataclass(frozen=True, slots=True)
class Tree:
    """What must stay on one side of a split: an OASST tree, or every row that opens with the same words.

    ``threads`` are the conversations to imitate, each ending on an assistant message; none of an OASST tree is the
    beginning of another. ``prompts`` are the conversations to reply to, each ending on a user message, with the usable
    replies that people gave to it as ``references``. A lone response has no prompt: its entry in ``prompts`` has no
    messages, is not :attr:`Conversation.is_prompt`, and carries the response as its one reference.
    """

    id: str
    threads: tuple[Conversation, ...]
    prompts: tuple[Conversation, ...]


@dataclass(slots=True)
class ReadReport(LineReport):
    """What was read and what was left out: ``dropped`` counts by reason, in units that the reason names."""

    trees: int = 0
    threads: int = 0
    prompts: int = 0
    responses: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line: the totals, then :meth:`losses`."""
        totals = (
            f"{self.trees:,} trees, {self.threads:,} threads, {self.prompts:,} prompts"
            + (f", {self.responses:,} lone responses" if self.responses else "")
            + f" from {self.lines:,} lines"
        )
        return "; ".join(filter(None, (totals, self.losses())))

    def losses(self) -> str:
        """What was dropped and why, the most frequent reason first, and the bad lines; empty where nothing was lost."""
        parts = []
        if self.dropped:
            parts.append("dropped " + ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.most_common()))
        if self.bad_lines:
            parts.append(f"skipped {self.bad_lines:,} bad lines ({' | '.join(self.bad_line_examples)})")
        return "; ".join(parts)


def read_trees(
    paths: Sequence[str | Path],
    *,
    lang: str | None = "en",
    on_bad_line: Literal["error", "skip"] = "error",
    cure: str = CURE,
    max_line_bytes: int = MAX_LINE_BYTES,
    keep_synthetic: bool = False,
    progress: bool = True,
) -> tuple[list[Tree], ReadReport]:
    """Every usable conversation of some JSONL files, plain or gzipped, as trees.

    OASST trees pass the selection of the official loader (``oasst_data`` in LAION-AI/Open-Assistant): exported
    (``tree_state`` is ``ready_for_export``), their prompt reviewed positively and written in ``lang`` (None: any). A
    key that the file does not carry is not held against a tree, nor is a language that is null. A deleted, synthetic
    or empty message goes with all that hangs below it; synthetic ones stay under ``keep_synthetic``.

    A preference pair gives its chosen conversation as the thread, and its prompt with both replies, ranked 0 and 1.
    The ``quality`` of a ``messages`` row holds for every assistant message that has none of its own.

    Rows other than OASST's have no tree id: theirs is a hash of the first user message (without regard to case and
    white space), so rows that open alike are one tree and never end up on both sides of a split. Trees of equal id
    merge: equal conversations are kept once, and replies to one prompt are gathered unless they are ranked, since
    ranks of different rows cannot be compared.

    ``on_bad_line`` says what to do about a line that cannot be used (not JSON, no known format, a wrong type, …, or
    longer than ``max_line_bytes``, which is never read into memory as a whole): stop, and tell the user to do what
    ``cure`` says, or count it and go on. A progress bar shows on standard error when reading takes longer than two
    seconds.

    Raises:
        UserError: a file is missing, a directory or a broken gzip; a bad line; no usable conversation at all.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not files:
        raise UserError("no data file is given; name at least one .jsonl or .jsonl.gz file")
    report = ReadReport()
    forest = _Forest(report, lang, keep_synthetic)
    take_lines(
        files,
        lambda line: forest.add(parse_object(line)),
        report,
        on_bad_line=on_bad_line,
        cure=cure,
        max_line_bytes=max_line_bytes,
        progress=progress,
    )
    trees = forest.trees()
    report.trees = len(trees)
    report.threads = sum(len(tree.threads) for tree in trees)
    report.prompts = sum(prompt.is_prompt for tree in trees for prompt in tree.prompts)
    report.responses = sum(len(tree.prompts) for tree in trees) - report.prompts
    if not trees:
        names = ", ".join(map(str, files))
        raise UserError(
            f"no usable conversation in {names}: {report.summary()}; "
            f"check that it is the right file, and what data.lang ({lang}) and the other rules leave out"
        )
    return trees, report


def read_prompts(
    path: str | Path, *, on_bad_line: Literal["error", "skip"] = "error", cure: str = CURE
) -> list[Conversation]:
    """One prompt for every row of a file, in the order of the file, equal ones kept, so that replies stay with rows.

    A ``messages`` row gives its beginning up to the last user message, and a preference pair what both replies answer.
    An OASST message gives the thread down to it where a user wrote it, whatever the state and language of its tree;
    those that are deleted, empty, below such a message or known by their id already give none. A ``.txt`` file has a
    prompt on each line that is not blank. References and checks come with a prompt as in :func:`read_trees`.

    Any other row that holds no prompt, such as a lone response, is a bad line: passing over it in silence would leave
    replies that no longer match the file. With ``on_bad_line="skip"``, a warning says what was left out. What a user
    can do about one is the ``cure`` of :func:`rlchat.data.jsonl.take_lines`.

    Raises:
        UserError: the file is missing, a directory or a broken gzip; a bad line; no prompt at all.
    """
    path = Path(path).expanduser()
    report = ReadReport()
    oasst = OasstForest(report.dropped, lang=None, keep_synthetic=True, any_state=True)
    # An OASST message stands here as its id until all others are known.
    found: list[Conversation | str] = []

    def take(line: bytes) -> None:
        if path.suffix == ".txt":
            if text := decode_line(line).strip():
                found.append(Conversation((Message("user", text),)))
            return
        row = parse_object(line)
        if _recognise(row) == "oasst":
            found.extend(oasst.add(row))
        else:
            found.append(_prompt_of(row))

    take_lines([path], take, report, on_bad_line=on_bad_line, cure=cure)
    of_message = {message_id: prompt for tree in oasst.trees() for message_id, prompt in tree.prompts.items()}
    prompts = [of_message.get(entry) if isinstance(entry, str) else entry for entry in found]
    usable = [prompt for prompt in prompts if prompt is not None]
    losses = report.losses()
    if not usable:
        raise UserError(
            f"{path}: no prompts in it{losses and f' ({losses})'}; "
            "give JSONL rows, or a .txt file with a prompt on each line"
        )
    if losses:
        _log.warning("%s: %s", path, losses)
    return usable


def ranked_pairs(prompt: Conversation) -> list[tuple[Message, Message]]:
    """(better, worse) for every two references of different rank, best first; unranked ones and ties are no pair."""
    ranked = sorted(
        ((reply.rank, reply) for reply in prompt.references if reply.rank is not None), key=lambda entry: entry[0]
    )
    return [(better, worse) for (rank, better), (worse_rank, worse) in combinations(ranked, 2) if rank != worse_rank]


def _recognise(row: dict[str, Any]) -> _Format:
    """What the keys of ``row`` say it is. Raises :class:`BadLineError` where they say nothing."""
    if isinstance(row.get("prompt"), dict) or "message_id" in row or "parent_id" in row:
        return "oasst"
    if "messages" in row:
        return "messages"
    if ("chosen" in row) != ("rejected" in row):
        raise BadLineError("chosen and rejected belong together, and one of them is missing")
    if "chosen" in row:
        return "pair" if "prompt" in row else "hh pair"
    if "prompt" in row:
        return "prompt"
    if "text" in row:
        return "text"
    raise BadLineError(
        f"no known format: it has the keys {shown(list(row))}, but none of messages, prompt, "
        "chosen and rejected, text, or an OASST message_id"
    )


def _prompt_of(row: dict[str, Any]) -> Conversation:
    """The one prompt of a row that is not OASST's. Raises :class:`BadLineError` where it has none."""
    kind = _recognise(row)
    prompt: Conversation | None = None
    if kind == "messages":
        _, prompts = messages_row(row)
        prompt = prompts[-1] if prompts else None
    elif kind == "prompt":
        prompt = prompt_row(row)
    elif kind != "text":
        prompt = (pair_row(row) if kind == "pair" else hh_pair_row(row)).prompt
    if prompt is None:
        raise BadLineError("no prompt to reply to")
    return prompt


@dataclass(slots=True)
class _Growing:
    """A tree that more rows may still join."""

    rows: int = 0
    threads: list[Conversation] = field(default_factory=list)
    prompts: list[Conversation] = field(default_factory=list)


class _Forest:
    """Takes rows one by one and gives the trees in the end, when no more can join one."""

    def __init__(self, report: ReadReport, lang: str | None, keep_synthetic: bool) -> None:
        self.dropped = report.dropped
        self.oasst = OasstForest(report.dropped, lang, keep_synthetic)
        self.growing: dict[str, _Growing] = {}
        self.feedback: dict[str, dict[str, Any]] = {}  # the last row of each feedback_id; see rlchat.chat.feedback
        self._options = lang, keep_synthetic

    def add(self, row: dict[str, Any]) -> None:
        """Recognise one row and take what is usable of it; raises :class:`BadLineError`, having taken nothing."""
        kind = _recognise(row)
        if kind == "oasst":
            if isinstance(feedback_id := row.get("feedback_id"), str):
                OasstForest(Counter(), *self._options).add(row)  # raises for a bad line
                self.dropped["replaced or withdrawn verdicts"] += feedback_id in self.feedback
                self.feedback[feedback_id] = row
            else:
                self.oasst.add(row)
        elif kind == "messages":
            messages, prompts = messages_row(row)
            end = len(messages)
            while end and messages[end - 1].role != "assistant":
                end -= 1
            self._grow(tree_id_of(messages), [Conversation(messages[:end])] if end else [], prompts)
        elif kind == "prompt":
            prompt = prompt_row(row)
            self._grow(tree_id_of(prompt.messages), [], [prompt])
        elif kind == "text":
            response = text_row(row)
            self._grow(tree_id_of([response]), [Conversation((response,))], [Conversation((), (response,))])
        else:
            pair = pair_row(row) if kind == "pair" else hh_pair_row(row)
            if pair.flaw is not None:
                self.dropped[pair.flaw] += 1
            elif pair.prompt is not None:
                better = pair.prompt.references[0]
                self._grow(tree_id_of(pair.prompt.messages), [pair.prompt.with_reply(better)], [pair.prompt])

    def trees(self) -> list[Tree]:
        """All that was added, linked, selected and merged."""
        for row in self.feedback.values():
            if row.get("verdict") == "none":
                self.dropped["replaced or withdrawn verdicts"] += 1
            else:
                self.oasst.add(row)
        self.feedback.clear()
        self.dropped += Counter()  # removes counts of zero
        for planted in self.oasst.trees():
            self._grow(planted.id, planted.threads, planted.prompts.values())
        trees = []
        for tree_id, growing in self.growing.items():
            threads, prompts = growing.threads, growing.prompts
            if growing.rows > 1:
                threads, prompts = list(dict.fromkeys(threads)), _gathered(prompts)
                if len(threads) < len(growing.threads):
                    self.dropped["duplicate threads"] += len(growing.threads) - len(threads)
            trees.append(
                Tree(
                    tree_id,
                    tuple(replace(thread, tree_id=tree_id) for thread in threads),
                    tuple(replace(prompt, tree_id=tree_id) for prompt in prompts),
                )
            )
        return trees

    def _grow(self, tree_id: str, threads: Iterable[Conversation], prompts: Iterable[Conversation]) -> None:
        growing = self.growing.setdefault(tree_id, _Growing())
        growing.rows += 1
        growing.threads += threads
        growing.prompts += prompts


def tree_id_of(opening: Iterable[Message]) -> str:
    """A stable name of all rows that open with the same user message (or, without one, the same message)."""
    messages = tuple(opening)
    text = next((message.text for message in messages if message.role == "user"), messages[0].text)
    return "row-" + hashlib.sha256(" ".join(text.split()).casefold().encode()).hexdigest()[:20]


def _gathered(prompts: list[Conversation]) -> list[Conversation]:
    """The distinct prompts; unranked replies to the same words (under the same check) come together in one."""
    gathered: dict[Any, Conversation] = {}
    for prompt in prompts:
        ranked = any(reply.rank is not None for reply in prompt.references)
        words = tuple((message.role, message.text) for message in prompt.messages)
        key = (words, prompt.check, prompt.references if ranked or not words else None)
        first = gathered.setdefault(key, prompt)
        if first is not prompt and not ranked:
            gathered[key] = replace(first, references=tuple(dict.fromkeys(first.references + prompt.references)))
    return list(gathered.values())
