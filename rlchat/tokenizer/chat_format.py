"""ChatFormat: how a conversation is written as text and control tokens. A table; there is no Jinja at run time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rlchat.conversation import Message
from rlchat.errors import UserError

MARKERS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_OPTIONAL = ("strip_start", "strip_end", "thoughts", "skips_empty_system")  # left out of the state where unused


@dataclass(frozen=True)
class ChatFormat:
    """What is written before and after the text of each role.

    The texts may contain the names of special tokens. Only there, and never in the text of a message, such a name is
    the control token.
    """

    name: str
    start: str  # before a first message that is not the system's: a BOS token, or a default system message
    start_system: str  # before a system message at the beginning
    before: dict[str, str]  # by role; a role that is missing cannot be written
    after: dict[str, str]  # by role; the assistant's begins with ``end``
    opening: str  # what asks for a response; a beginning of ``before["assistant"]``
    end: str  # the special token that ends a response
    pad: str  # a special token that no response contains
    strips: tuple[str, ...] = ()  # roles whose text loses white space at both ends
    late_system: bool = True  # whether a system message may come later than at the beginning
    single_turn: bool = False  # whether earlier responses are written in another way than the last one
    template: str = ""  # the Jinja template that this table replaces, for export
    strip_start: dict[str, str] = field(
        default_factory=dict
    )  # by role: the characters that its text loses at the start
    strip_end: dict[str, str] = field(default_factory=dict)  # by role: the characters that its text loses at the end
    thoughts: bool = False  # whether the thought of a response is written anew, see :meth:`response`
    skips_empty_system: bool = False  # whether a system message without text counts as none

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ChatFormat:
        """The format that :meth:`state` described. Raises KeyError, TypeError or ValueError for damaged values."""
        if unknown := state.keys() - {field.name for field in fields(cls)}:
            raise ValueError(f"unknown part {sorted(unknown)[0]} of the chat format")
        for part in ("before", "after", "strip_start", "strip_end"):
            texts = state.get(part, {}) if part in _OPTIONAL else state[part]
            if not all(isinstance(text, str) for text in texts.values()):
                raise TypeError(f"{part} of the chat format is not text")
        return cls(**{**state, "strips": tuple(state.get("strips", ()))})

    def state(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_state` builds the same format."""
        state = {**asdict(self), "strips": list(self.strips)}
        # Formats of older model files lack these parts: without them, a format keeps its fingerprint.
        return {part: value for part, value in state.items() if value or part not in _OPTIONAL}

    def written(self, messages: Sequence[Message]) -> Sequence[Message]:
        """``messages`` without a leading system message that the format does not write."""
        if self.skips_empty_system and messages and messages[0].role == "system" and not messages[0].text:
            return messages[1:]
        return messages

    def text_of(self, message: Message) -> str:
        """The text of ``message`` as it is encoded; of a response it is :meth:`response`."""
        text = message.text.strip() if message.role in self.strips else message.text
        if start := self.strip_start.get(message.role):
            text = text.lstrip(start)
        if end := self.strip_end.get(message.role):
            text = text.rstrip(end)
        return self.response(text) if message.role == "assistant" else text

    def head(self, role: str, previous: str | None) -> str:
        """What is written before a message of ``role`` after one of the role ``previous``; None at the beginning.

        Before a response it is what asks for it: what follows up to the end token is :meth:`response`.
        """
        if previous is None:
            between = self.start_system if role == "system" else self.start
        else:
            # What a template writes after the end token belongs to the next message: a response ends with the token.
            between = self.after["assistant"].removeprefix(self.end) if previous == "assistant" else ""
        return between + (self.opening if role == "assistant" else self.before[role])

    def opening_after(self, previous: str | None) -> str:
        """What asks for a response after a message of the role ``previous``; None without any message."""
        return self.head("assistant", previous) if previous else self.opening

    def tail(self, role: str) -> str:
        """What is written after a message of ``role``."""
        return self.end if role == "assistant" else self.after[role]

    def response(self, text: str) -> str:
        """The response ``text`` with the thought that the format writes before it: ``<think>\\n\\n</think>\\n\\n``.

        With ``thoughts``, a thought in ``text`` is written in this form too. Otherwise such a text stays as it is.
        """
        prefix = self.before["assistant"].removeprefix(self.opening)
        if not self.thoughts:
            return text if text.startswith(tuple(prefix.split()[:1])) else prefix + text
        begin, end = prefix.split()
        thought = text.split(end)[0].split(begin)[-1].strip("\n") if end in text else ""
        answer = text.split(end)[-1].lstrip("\n")
        return f"{begin}\n{thought}\n{end}\n\n{answer}"

    def text(self, messages: Sequence[Message], opening: bool) -> str:
        """The conversation as one text, as a Jinja template writes it up to the end token of a last response."""
        written, previous = "", None
        for message in self.written(messages):
            written += self.head(message.role, previous) + self.text_of(message) + self.tail(message.role)
            previous = message.role
        return written + self.opening_after(previous) if opening else written

    def check(self, messages: Sequence[Message]) -> None:
        """Raises :class:`UserError` for a conversation that this format cannot write."""
        roles = [message.role for message in messages]
        for place, role in enumerate(roles):
            if role not in self.before:
                raise UserError(
                    f"the chat format of {self.name} has no {role} message; remove it, or use "
                    f"--model.chat_format rlchat"
                )
            if role == "system" and place and not self.late_system:
                raise UserError(
                    f"the chat format of {self.name} has a system message only at the beginning, and message "
                    f"{place + 1} of a conversation is one; move it, or use --model.chat_format rlchat"
                )
        if self.single_turn and "assistant" in roles[:-1]:
            raise UserError(
                f"the chat template of {self.name} writes a response differently once another message follows it; only "
                f"conversations with one response can be used ({' '.join(roles)} was given), or use "
                f"--model.chat_format rlchat"
            )


def rlchat_format() -> ChatFormat:
    """rlchat's own markers: ``<|user|>Hello<|end|><|assistant|>Hi there.<|end|>``."""
    roles = ("system", "user", "assistant")
    return ChatFormat(
        name="rlchat",
        start="",
        start_system="",
        before={role: f"<|{role}|>" for role in roles},
        after=dict.fromkeys(roles, "<|end|>"),
        opening="<|assistant|>",
        end="<|end|>",
        pad="<|pad|>",
    )
