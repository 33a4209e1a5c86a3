"""From a conversation to token ids: the chat format of the tokenizer, the loss mask, and what stays of a long one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rlchat.conversation import Message
from rlchat.tokenizer.chat_format import ChatFormat


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as token ids.

    ``loss_mask[t]`` is True where ``ids[t]`` belongs to an assistant message to be learned, its end marker included.
    ``dropped`` counts the messages left out on the left, ``cut`` the tokens removed from a message that alone was too
    long. ``response_cut`` is True for a response that was cut and closed, see :meth:`ChatTokenizer.render_response`.
    """

    ids: list[int]
    loss_mask: list[bool]
    dropped: int = 0
    cut: int = 0
    response_cut: bool = False


@dataclass(frozen=True, slots=True)
class _Segment:
    """One message as ids: what the format writes before it (``head`` ids), its text, and what is written after it."""

    message: Message
    ids: list[int]
    head: int

    def cut_left(self, room: int) -> _Segment:
        if len(self.ids) <= room:
            return self
        kept = max(0, room - self.head)
        return replace(self, ids=[*self.ids[: self.head], *self.ids[len(self.ids) - kept :]][:room])

    def cut_right(self, room: int) -> _Segment:
        return replace(self, ids=self.ids[:room])

    def mask(self) -> list[bool]:
        """What opens a turn is part of the prompt."""
        learn = self.message.role == "assistant" and self.message.learn
        return ([False] * self.head + [learn] * len(self.ids))[: len(self.ids)]


class Renderer:
    """Writes conversations in the chat format ``form``.

    ``encode`` gives the ids of ordinary text and ``controls`` the ids of the special tokens that the format names.
    Texts of messages go through ``encode`` only, so nothing in them can become a control token.
    """

    def __init__(self, form: ChatFormat, encode: Callable[[str], list[int]], controls: Mapping[str, int]) -> None:
        self.form, self._encode, self._controls = form, encode, controls
        names = sorted(controls, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._known: dict[str, tuple[int, ...]] = {}  # the format writes few different texts
        longest = [len(self.written(form.head(role, None))) for role in form.before]
        shortest = [len(self.written(form.head(role, "user"))) for role in form.before]
        # Ids that a message gains at most when it becomes the first one.
        self._lead = max(a - min(b, a) for a, b in zip(longest, shortest, strict=True))

    def render(self, messages: Sequence[Message], max_length: int | None, opening: bool) -> Rendered:
        """The ids of ``messages``, then what asks for a response if ``opening``, in at most ``max_length`` ids.

        Raises ValueError where what asks for the response alone is longer.
        """
        self.form.check(messages)
        messages = self.form.written(messages)
        ask = self.written(self.form.opening_after(messages[-1].role if messages else None)) if opening else ()
        segments = self._segments(messages, None)
        dropped = cut = 0
        if max_length is not None and max_length < len(ask):
            raise ValueError(f"max_length is {max_length}, which leaves no room for the marker of the reply")
        if max_length is not None and _count(segments) > (room := max_length - len(ask)):
            pinned, start = _keep_from_the_right(segments, room, self._lead)
            kept = segments[:pinned] + segments[start:]
            if not pinned and start:
                kept[0] = self._segment(kept[0].message, None)
            fitted = _cut_to(kept, room) if _count(kept) > room else kept
            dropped, cut = len(segments) - len(kept), _count(kept) - _count(fitted)
            segments = fitted
        ids, mask = [], []
        for segment in segments:
            ids += segment.ids
            mask += segment.mask()
        return Rendered([*ids, *ask], mask + [False] * len(ask), dropped, cut)

    def following(self, messages: Sequence[Message], ended: bool) -> list[int]:
        """The ids between a response and the next one: ``messages``, and what asks for the next response.

        Unless the response ``ended`` by itself, its end token comes first. Raises :class:`UserError` for messages that
        the format cannot write after a response.
        """
        self.form.check([Message("assistant", ""), *messages])
        ids = [] if ended else [self._controls[self.form.end]]
        for segment in self._segments(messages, "assistant"):
            ids += segment.ids
        return [*ids, *self.written(self.form.opening_after(messages[-1].role if messages else "assistant"))]

    def written(self, text: str) -> tuple[int, ...]:
        """The ids of ``text``, which is the format's own: here the name of a special token is that token."""
        if text not in self._known:
            ids: list[int] = []
            for part in self._cut.split(text):
                ids += [self._controls[part]] if part in self._controls else self._encode(part)
            self._known[text] = tuple(ids)
        return self._known[text]

    def _segments(self, messages: Sequence[Message], previous: str | None) -> list[_Segment]:
        segments = []
        for message in messages:
            segments.append(self._segment(message, previous))
            previous = message.role
        return segments

    def _segment(self, message: Message, previous: str | None) -> _Segment:
        head, text = self.form.head(message.role, previous), self.form.text_of(message)
        tail, opened = self.form.tail(message.role), self.written(head)
        if message.role == "assistant":  # encoded apart from its head, as it was sampled
            said = self._encode(text)
            return _Segment(message, [*opened, *said, *self.written(tail)], len(opened))
        # Ordinary text of the format beside the message is encoded together with it: pieces may cross the border.
        *before, last = self._cut.split(head)
        first, *after = self._cut.split(tail)
        ids = [
            *self.written("".join(before)),
            *(self._encode(last + text + first) if last or text or first else ()),
            *self.written("".join(after)),
        ]
        return _Segment(message, ids, min(len(opened), len(ids)))


def _keep_from_the_right(segments: list[_Segment], room: int, lead: int) -> tuple[int, int]:
    """How many leading messages stay (0 or 1), and the first of the last messages that fit: (pinned, start).

    The last messages begin with a user's turn and are at least the last turn (a reply keeps what it replies to).
    ``lead`` is what the first message gains by being the first.
    """
    last_turn = len(segments) - 1
    if segments[last_turn].message.role == "assistant" and last_turn > 0:
        last_turn -= 1
    pinned = int(segments[0].message.role == "system" and last_turn > 0)
    if _count(segments[:pinned]) + _count(segments[last_turn:]) > room:
        pinned = 0
    used = (0 if pinned else lead) + _count(segments[:pinned]) + _count(segments[last_turn:])
    start = last_turn
    for index in range(last_turn - 1, pinned - 1, -1):
        used += len(segments[index].ids)
        if used > room:
            break
        if segments[index].message.role == "user":
            start = index
    return pinned, start


def _cut_to(segments: list[_Segment], room: int) -> list[_Segment]:
    """A last turn that alone is too long, cut: the question from the left, down to half of the room, then the reply."""
    if len(segments) == 1:
        (only,) = segments
        return [only.cut_right(room) if only.message.role == "assistant" else only.cut_left(room)]
    question, reply = segments
    question = question.cut_left(max(room // 2, room - len(reply.ids)))
    return [question, reply.cut_right(room - len(question.ids))]


def _count(segments: list[_Segment]) -> int:
    return sum(len(segment.ids) for segment in segments)
