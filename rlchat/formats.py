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

import gzip
import hashlib
import json
import re
import reprlib
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, count
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal

from rlchat.conversation import Check, Conversation, Message, Role
from rlchat.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

_ROLES: dict[str, Role] = {"prompter": "user", "user": "user", "assistant": "assistant", "system": "system"}
_HH_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_HH_MARKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")

# Every prefix of a thread is a prompt, so the size of a tree grows with the square of its depth.
_MAX_MESSAGES = 1000
_SHOWN_BAD_LINES = 5
_SECONDS_BEFORE_PROGRESS = 2.0


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
class ReadReport:
    """What was read and what was left out: ``dropped`` counts by reason, in units that the reason names."""

    lines: int = 0
    trees: int = 0
    threads: int = 0
    prompts: int = 0
    responses: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad_lines: int = 0
    bad_line_examples: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line: the totals, then what was dropped and why, the most frequent reason first."""
        parts = [
            f"{self.trees:,} trees, {self.threads:,} threads, {self.prompts:,} prompts"
            + (f", {self.responses:,} lone responses" if self.responses else "")
            + f" from {self.lines:,} lines"
        ]
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
    max_line_bytes: int = 8_000_000,
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
    longer than ``max_line_bytes``, which is never read into memory as a whole): stop, or count it and go on. A
    progress bar shows on standard error when reading takes longer than two seconds.

    Raises:
        UserError: a file is missing, a directory or a broken gzip; a bad line; no usable conversation at all.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not files:
        raise UserError("no data file is given; name at least one .jsonl or .jsonl.gz file")
    report = ReadReport()
    forest = _Forest(report, lang, keep_synthetic)
    with _ReadingBar(sum(map(_file_size, files)), progress) as bar:
        for path in files:
            for number, line in _numbered_lines(path, max_line_bytes, bar):
                if line is not None and not line.strip():
                    continue
                report.lines += 1
                try:
                    if line is None:
                        raise _BadLineError(f"longer than {max_line_bytes:,} bytes")
                    forest.add(_parse_object(line))
                except _BadLineError as error:
                    place = f"{path}:{number}: {error}"
                    if on_bad_line == "error":
                        raise UserError(f"{place}; mend the line or set data.on_bad_line=skip") from None
                    report.bad_lines += 1
                    if len(report.bad_line_examples) < _SHOWN_BAD_LINES:
                        report.bad_line_examples.append(place)
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


def ranked_pairs(prompt: Conversation) -> list[tuple[Message, Message]]:
    """(better, worse) for every two references of different rank, best first; unranked ones and ties are no pair."""
    ranked = sorted(
        ((reply.rank, reply) for reply in prompt.references if reply.rank is not None), key=lambda entry: entry[0]
    )
    return [(better, worse) for (rank, better), (worse_rank, worse) in combinations(ranked, 2) if rank != worse_rank]


# ----------------------------------------------------------------------------------------------------------------------
# From bytes to rows


class _BadLineError(Exception):
    """Why a line cannot be used; the caller knows where it stands."""


def _file_size(path: Path) -> int:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory; name the .jsonl or .jsonl.gz files in it")
        return path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"no such data file: {path}; check the path") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; check the path and its permissions") from None


def _numbered_lines(path: Path, max_bytes: int, bar: _ReadingBar) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, the line), None in place of a line longer than ``max_bytes``."""
    try:
        with path.open("rb") as raw:
            is_gzip = raw.peek(2)[:2] == b"\x1f\x8b"
            handle: IO[bytes] = gzip.GzipFile(fileobj=raw) if is_gzip else raw  # type: ignore[assignment]
            for number in count(1):
                line = handle.readline(max_bytes + 1)
                if not line:
                    break
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                too_long = len(line) > max_bytes and not line.endswith(b"\n")
                yield number, None if too_long else line
                if too_long:
                    while (rest := handle.readline(1 << 20)) and not rest.endswith(b"\n"):
                        pass
                bar.show(raw)
            bar.finish_file(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is a broken or truncated gzip file ({error}); download or make it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; check the path and its permissions") from None


class _ReadingBar:
    """A progress bar over bytes, compressed ones where the file is, that appears only once reading has taken long."""

    def __init__(self, total_bytes: int, enabled: bool) -> None:
        self.total_bytes = total_bytes
        self.enabled = enabled
        self.next_update = time.monotonic() + _SECONDS_BEFORE_PROGRESS
        self.finished_bytes = 0
        self.progress: Progress | None = None

    def __enter__(self) -> _ReadingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()

    def show(self, raw: IO[bytes]) -> None:
        if not self.enabled or (now := time.monotonic()) < self.next_update:
            return
        self.next_update = now + 0.1
        if self.progress is None:
            from rich.console import Console
            from rich.progress import Progress

            self.progress = Progress(console=Console(stderr=True), transient=True)
            self.progress.add_task("reading", total=self.total_bytes)
            self.progress.start()
        self.progress.update(self.progress.task_ids[0], completed=self.finished_bytes + _position(raw))

    def finish_file(self, raw: IO[bytes]) -> None:
        self.finished_bytes += _position(raw)


def _position(raw: IO[bytes]) -> int:
    return raw.tell() if raw.seekable() else 0


def _parse_object(line: bytes) -> dict[str, Any]:
    if b"\0" in line:
        raise _BadLineError("a NUL character")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadLineError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise _BadLineError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"not usable as JSON ({error})") from None
    if not isinstance(row, dict):
        raise _BadLineError(f"not a JSON object but {_shown(row)}")
    return row


# ----------------------------------------------------------------------------------------------------------------------
# From rows to trees


@dataclass(slots=True)
class _Node:
    """An OASST message on its way into a tree; ``unusable`` is the reason to drop it, as the report names it."""

    id: str
    parent_id: str | None
    tree_id: str
    message: Message
    check: Check | None
    unusable: str | None
    rejected_as_root: str | None
    children: list[_Node] = field(default_factory=list)


@dataclass(slots=True)
class _Growing:
    """A tree that more rows may still join."""

    rows: int = 0
    threads: list[Conversation] = field(default_factory=list)
    prompts: list[Conversation] = field(default_factory=list)


class _Forest:
    """Takes rows one by one and gives the trees in the end: only then is every OASST message's parent known."""

    def __init__(self, report: ReadReport, lang: str | None, keep_synthetic: bool) -> None:
        self.dropped = report.dropped
        self.lang = lang
        self.keep_synthetic = keep_synthetic
        self.nodes: dict[str, _Node] = {}
        self.growing: dict[str, _Growing] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Recognise one row and take what is usable of it; raises :class:`_BadLineError`, having taken nothing."""
        if isinstance(row.get("prompt"), dict):
            self._add_oasst(row["prompt"], tree_row=row)
        elif "message_id" in row or "parent_id" in row:
            self._add_oasst(row, tree_row=row)
        elif "messages" in row:
            self._add_messages(row)
        elif ("chosen" in row) != ("rejected" in row):
            raise _BadLineError("chosen and rejected belong together, and one of them is missing")
        elif "chosen" in row and "prompt" in row:
            self._add_pair(row)
        elif "chosen" in row:
            self._add_hh_pair(row)
        elif "prompt" in row:
            messages, check = _prompt(row)
            self._grow(messages, [], [Conversation(messages, check=check)])
        elif "text" in row:
            response = Message("assistant", _text(row["text"], "text"), _quality(row.get("quality")))
            self._grow((response,), [Conversation((response,))], [Conversation((), (response,))])
        else:
            raise _BadLineError(
                f"no known format: it has the keys {_shown(list(row))}, but none of messages, prompt, "
                "chosen and rejected, text, or an OASST message_id"
            )

    def trees(self) -> list[Tree]:
        """All that was added, linked, selected and merged."""
        self._link_oasst()
        trees = []
        for tree_id, growing in self.growing.items():
            threads, prompts = growing.threads, growing.prompts
            if growing.rows > 1:
                threads, prompts = list(dict.fromkeys(threads)), _gathered(prompts)
                self._drop("duplicate threads", len(growing.threads) - len(threads))
            trees.append(
                Tree(
                    tree_id,
                    tuple(replace(thread, tree_id=tree_id) for thread in threads),
                    tuple(replace(prompt, tree_id=tree_id) for prompt in prompts),
                )
            )
        return trees

    def _drop(self, reason: str, number: int = 1) -> None:
        if number:
            self.dropped[reason] += number

    def _grow(
        self,
        opening: tuple[Message, ...],
        threads: list[Conversation],
        prompts: list[Conversation],
        tree_id: str | None = None,
    ) -> None:
        growing = self.growing.setdefault(tree_id or _tree_id(opening), _Growing())
        growing.rows += 1
        growing.threads += threads
        growing.prompts += prompts

    # -- rows that are one conversation, or two --

    def _add_messages(self, row: dict[str, Any]) -> None:
        messages, checks = _messages(row["messages"], _quality(row.get("quality")))
        if all(message.role == "system" for message in messages):
            raise _BadLineError("no user or assistant message")
        prompts = []
        for i, message in enumerate(messages):
            if message.role == "user":
                reply = messages[i + 1 : i + 2]
                references = reply if reply and reply[0].role == "assistant" else ()
                prompts.append(Conversation(messages[: i + 1], references, checks[i]))
        end = len(messages)
        while end and messages[end - 1].role != "assistant":
            end -= 1
        self._grow(messages, [Conversation(messages[:end])] if end else [], prompts)

    def _add_pair(self, row: dict[str, Any]) -> None:
        messages, check = _prompt(row)
        chosen = _text(row["chosen"], "chosen", may_be_empty=True)
        rejected = _text(row["rejected"], "rejected", may_be_empty=True)
        self._grow_pair(messages, chosen, rejected, check)

    def _add_hh_pair(self, row: dict[str, Any]) -> None:
        chosen = _hh_turns(_text(row["chosen"], "chosen"), "chosen")
        rejected = _hh_turns(_text(row["rejected"], "rejected"), "rejected")
        if chosen == rejected:
            self._drop("identical pairs")
        elif "user" in (chosen[-1].role, rejected[-1].role):
            self._drop("pairs that end on Human")
        elif chosen[:-1] != rejected[:-1]:
            self._drop("pairs that differ before the last reply")
        elif any(not turn.text for turn in chosen[:-1]):
            self._drop("pairs with an empty turn in the prompt")
        elif len(chosen) == 1:
            raise _BadLineError("chosen and rejected share no Human turn")
        else:
            self._grow_pair(chosen[:-1], chosen[-1].text, rejected[-1].text, None)

    def _grow_pair(self, messages: tuple[Message, ...], chosen: str, rejected: str, check: Check | None) -> None:
        if chosen.strip() == rejected.strip():
            self._drop("identical pairs")
        elif not chosen.strip() or not rejected.strip():
            self._drop("pairs with an empty reply")
        else:
            better, worse = Message("assistant", chosen, rank=0), Message("assistant", rejected, rank=1)
            thread = Conversation((*messages, better))
            self._grow(messages, [thread], [Conversation(messages, (better, worse), check)])

    # -- OASST --

    def _add_oasst(self, root: dict[str, Any], tree_row: dict[str, Any]) -> None:
        """Take a message and all that is nested in it; a flat row nests nothing and is linked in the end."""
        tree_id = _optional(tree_row, "message_tree_id", str)
        tree_state = _optional(tree_row, "tree_state", str) if "tree_state" in tree_row else "ready_for_export"
        root_id = _optional(root, "message_id", str) or tree_id
        if not root_id:
            raise _BadLineError("an OASST message without message_id")
        _text(tree_id or root_id, "message_tree_id")
        found: list[_Node] = []
        parent_id = None if root is not tree_row else _optional(root, "parent_id", str)
        stack: list[tuple[Any, str, str | None]] = [(root, root_id, parent_id)]
        while stack:
            row, message_id, parent_id = stack.pop()
            if not isinstance(row, dict):
                raise _BadLineError(f"a reply is not an object but {_shown(row)}")
            found.append(self._node(row, message_id, parent_id, tree_id or root_id, tree_state == "ready_for_export"))
            replies = _optional(row, "replies", list) or []
            for i, reply in reversed(list(enumerate(replies))):
                reply_id = _optional(reply, "message_id", str) if isinstance(reply, dict) else None
                stack.append((reply, reply_id or f"{message_id}/{i}", message_id))
        for node in found:
            if self.nodes.setdefault(node.id, node) is not node:
                self._drop("duplicate messages")

    def _node(self, row: dict[str, Any], message_id: str, parent_id: str | None, tree_id: str, exported: bool) -> _Node:
        text = _text(row.get("text"), "text", may_be_empty=True)
        deleted, synthetic = _optional(row, "deleted", bool), _optional(row, "synthetic", bool)
        reviewed = _optional(row, "review_result", bool) if "review_result" in row else True
        lang = _optional(row, "lang", str)
        if "role" not in row:
            raise _BadLineError("an OASST message without role")
        unusable = None
        if deleted:
            unusable = "deleted messages"
        elif synthetic and not self.keep_synthetic:
            unusable = "synthetic messages"
        elif not text.strip():
            unusable = "empty messages"
        rejected_as_root = None
        if not exported:
            rejected_as_root = "trees not ready for export"
        elif not reviewed:
            rejected_as_root = "trees whose prompt was not reviewed positively"
        elif self.lang is not None and lang is not None and lang != self.lang:
            rejected_as_root = "trees in another language"
        message = Message(_role(row["role"]), text, _label_quality(row.get("labels")), _rank(row.get("rank")))
        check = _check(row.get("check"))
        return _Node(message_id, parent_id, tree_id, message, check, unusable, rejected_as_root)

    def _link_oasst(self) -> None:
        roots = []
        for node in self.nodes.values():
            if node.parent_id is None:
                roots.append(node)
            elif node.parent_id in self.nodes:
                self.nodes[node.parent_id].children.append(node)
        reached = sum(map(self._plant_oasst, roots))
        # What is left hangs below a message that no file holds, or in a ring of messages.
        self._drop("messages that lead to no root", len(self.nodes) - reached)

    def _plant_oasst(self, root: _Node) -> int:
        """Grow the tree below ``root`` and return how many messages it has, dropped ones included."""
        usable: list[tuple[_Node, tuple[Message, ...], int]] = []
        reached = 0
        stack: list[tuple[_Node, tuple[Message, ...], int]] = [(root, (), -1)]
        if root.rejected_as_root is not None:
            self._drop(root.rejected_as_root)
            return _size(root)
        while stack:
            node, before, parent_index = stack.pop()
            reason = "messages nested too deep" if len(before) >= _MAX_MESSAGES else node.unusable
            if reason is not None:
                size = _size(node)
                self._drop(reason)
                self._drop("messages below a dropped one", size - 1)
                reached += size
                continue
            reached += 1
            messages = (*before, node.message)
            stack.extend((child, messages, len(usable)) for child in reversed(node.children))
            usable.append((node, messages, parent_index))

        # Children stand after their parents, so walking back meets every reply before what it replies to.
        answered_below = [False] * len(usable)
        for i in range(len(usable) - 1, 0, -1):
            node, _, parent_index = usable[i]
            if answered_below[i] or node.message.role == "assistant":
                answered_below[parent_index] = True
        references: list[list[Message]] = [[] for _ in usable]
        for node, _, parent_index in usable[1:]:
            if node.message.role == "assistant":
                references[parent_index].append(node.message)
        threads = [
            Conversation(messages)
            for (node, messages, _), below in zip(usable, answered_below, strict=True)
            if node.message.role == "assistant" and not below
        ]
        prompts = [
            Conversation(messages, tuple(replies), node.check)
            for (node, messages, _), replies in zip(usable, references, strict=True)
            if node.message.role == "user"
        ]
        if threads or prompts:
            self._grow((), threads, prompts, root.tree_id)
        return reached


def _size(node: _Node) -> int:
    stack, size = [node], 0
    while stack:
        size += 1
        stack.extend(stack.pop().children)
    return size


def _tree_id(opening: Iterable[Message]) -> str:
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


# ----------------------------------------------------------------------------------------------------------------------
# The fields of a row, each checked; a _BadLineError says what is wrong


def _shown(value: object) -> str:
    return reprlib.repr(value)


def _text(value: object, name: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _BadLineError(f"{name} is not a string but {_shown(value)}")
    if "\0" in value:
        raise _BadLineError(f"{name} holds a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadLineError(f"{name} holds a lone surrogate, which no UTF-8 text can") from None
    if not may_be_empty and not value.strip():
        raise _BadLineError(f"{name} is empty")
    return value


def _optional(row: dict[str, Any], key: str, kind: type) -> Any:
    """The value of ``key``, None where it is null or absent."""
    value = row.get(key)
    if value is not None and not isinstance(value, kind):
        raise _BadLineError(f"{key} is not of type {kind.__name__} but {_shown(value)}")
    return value


def _role(value: object) -> Role:
    if not isinstance(value, str) or value not in _ROLES:
        raise _BadLineError(f"unknown role {_shown(value)}; known are {', '.join(_ROLES)}")
    return _ROLES[value]


def _quality(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _BadLineError(f"quality is not a number but {_shown(value)}")
    if not 0 <= value <= 1:
        raise _BadLineError(f"quality {_shown(value)} is not in 0..1")
    return float(value)


def _label_quality(labels: object) -> float | None:
    """OASST's label ``quality``, from either layout: ``{name: [...], value: [...]}`` or ``{name: {value: …}}``."""
    if labels is None:
        return None
    if not isinstance(labels, dict):
        raise _BadLineError(f"labels is not an object but {_shown(labels)}")
    names = labels.get("name")
    if isinstance(names, list):
        values = labels.get("value")
        if not isinstance(values, list) or len(values) != len(names):
            raise _BadLineError("labels has not one value for each name")
        return _quality(values[names.index("quality")] if "quality" in names else None)
    label = _optional(labels, "quality", dict)
    return None if label is None else _quality(label.get("value"))


def _rank(value: object) -> int | None:
    if value is None:
        return None
    # Tables that know no null in a column of integers write 0.0 for 0.
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(whole, bool) or not isinstance(whole, int) or whole < 0:
        raise _BadLineError(f"rank is not a whole number from 0 but {_shown(value)}")
    return whole


def _check(value: object) -> Check | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _BadLineError(f"check is not an object but {_shown(value)}")
    any_of, none_of = _optional(value, "any_of", list), _optional(value, "none_of", list) or []
    if not any_of:
        raise _BadLineError("check.any_of is missing or empty")
    return Check(
        tuple(_text(phrase, "check.any_of") for phrase in any_of),
        tuple(_text(phrase, "check.none_of") for phrase in none_of),
    )


def _messages(rows: object, quality: float | None) -> tuple[tuple[Message, ...], list[Check | None]]:
    """The messages of a list of ``{content, role, quality, check}``, all but content optional, and their checks."""
    if not isinstance(rows, list) or not rows:
        raise _BadLineError("messages is not a list with a message in it")
    if len(rows) > _MAX_MESSAGES:
        raise _BadLineError(f"{len(rows):,} messages in one conversation, more than {_MAX_MESSAGES:,}")
    messages: list[Message] = []
    checks: list[Check | None] = []
    speaker: Role = "assistant"
    for row in rows:
        if not isinstance(row, dict):
            raise _BadLineError(f"a message is not an object but {_shown(row)}")
        role: Role = "assistant" if speaker == "user" else "user"
        if row.get("role") is not None:
            role = _role(row["role"])
        if role != "system":
            speaker = role
        own = _quality(row.get("quality"))
        if own is None and role == "assistant":
            own = quality
        messages.append(Message(role, _text(row.get("content"), "content"), own))
        checks.append(_check(row.get("check")) if role == "user" else None)
    return tuple(messages), checks


def _prompt(row: dict[str, Any]) -> tuple[tuple[Message, ...], Check | None]:
    """The ``prompt`` of a row, one text or a list of messages, and the check of the row or of its last message."""
    if not isinstance(row["prompt"], list):
        return (Message("user", _text(row["prompt"], "prompt")),), _check(row.get("check"))
    messages, checks = _messages(row["prompt"], None)
    if messages[-1].role != "user":
        raise _BadLineError("prompt does not end on a user message")
    return messages, _check(row.get("check")) or checks[-1]


def _hh_turns(text: str, name: str) -> tuple[Message, ...]:
    """The turns of an hh-rlhf conversation; one speaker's turns in a row (a marker said twice) are one."""
    before, *pieces = _HH_MARKER.split(text)
    if before.strip() or not pieces:
        raise _BadLineError(f"{name} does not begin with Human: or Assistant:, and there is no prompt beside it")
    turns: list[Message] = []
    for marker, said in zip(pieces[::2], pieces[1::2], strict=True):
        role = _HH_ROLES[marker]
        said = said.strip()
        if turns and turns[-1].role == role:
            said = "\n\n".join(part for part in (turns.pop().text, said) if part)
        turns.append(Message(role, said))
    if len(turns) > _MAX_MESSAGES:
        raise _BadLineError(f"{len(turns):,} turns in {name}, more than {_MAX_MESSAGES:,}")
    return tuple(turns)
