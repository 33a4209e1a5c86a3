"""Rows with a prompt, alone or beside its response."""

from __future__ import annotations

from typing import Any, ClassVar

from rlchat.conversation import Conversation, Message
from rlchat.data.jsonl import BadLineError
from rlchat.data.readers.base import Reader, Row, conversation_row
from rlchat.data.readers.fields import row_check, text_field
from rlchat.data.readers.messages import CHECKED, WHOLE_ROW
from rlchat.data.readers.turns import Turns, for_whole_row, hh_turns, is_hh_text, message_list


def prompt_turns(row: dict[str, Any]) -> Turns:
    """The ``prompt`` of a row: a text, a conversation as hh-rlhf writes it, or a list of messages.

    The check comes from the row or from the last message. Raises :class:`BadLineError` if the last message is an
    assistant's.
    """
    value = row["prompt"]
    if isinstance(value, list):
        turns = message_list(value)
        messages, check, notes = turns.messages, turns.checks[-1], turns.notes
    elif is_hh_text(value):
        messages = hh_turns(text_field(value, "prompt"), "prompt")
        if messages[-1].role == "assistant" and not messages[-1].text:
            messages = messages[:-1]
        if not all(message.text for message in messages):
            raise BadLineError("prompt has an empty turn")
        check, notes = None, frozenset()
    else:
        messages, check, notes = (Message("user", text_field(value, "prompt")),), None, frozenset()
    if messages[-1].role != "user":
        raise BadLineError("prompt does not end with a user message")
    check = row_check(row) or check
    return Turns(messages, (*(None for _ in messages[1:]), check), notes)


class PromptReader(Reader):
    """``{"prompt": …}``: a prompt to answer, without a response."""

    name = "prompt"
    required = frozenset({"prompt"})
    optional = CHECKED
    priority = -1

    def read(self, row: dict[str, Any]) -> Row:
        turns = prompt_turns(row)
        prompt = Conversation(turns.messages, (), turns.checks[-1])
        return Row(turns.messages, (), (prompt,), prompt, notes=turns.notes)


class AnswerReader(PromptReader):
    """``{"prompt": …, "answer": …}``: a prompt with an answer that can be checked.

    The answer is a text, a number or a list of them, and ``check`` says how to compare it; see
    :func:`rlchat.data.readers.fields.row_check`. It is no response to imitate.
    """

    name = "prompt and answer"
    required = frozenset({"prompt", "answer"})


class CompletionReader(Reader):
    """``{"prompt": …, "completion": …}``, with a KTO ``label`` or a ``quality`` if there is one."""

    name = "prompt and completion"
    required = frozenset({"prompt", "completion"})
    optional = WHOLE_ROW
    answer: ClassVar[str] = "completion"

    def read(self, row: dict[str, Any]) -> Row:
        prompt, value = prompt_turns(row), row[self.answer]
        if isinstance(value, list):
            turns = message_list([{"role": "assistant", **m} if isinstance(m, dict) else m for m in value], self.answer)
            response, checks, notes = turns.messages, turns.checks, prompt.notes | turns.notes
        else:
            text = text_field(value, self.answer)
            response = (Message("assistant", text.strip() if is_hh_text(row["prompt"]) else text),)
            checks, notes = (None,), prompt.notes
        whole = for_whole_row(Turns(prompt.messages + response, prompt.checks + checks, notes), row)
        return conversation_row(whole.messages, whole.checks, whole.notes)


class ResponseReader(CompletionReader):
    """``{"prompt": …, "response": …}``."""

    name = "prompt and response"
    required = frozenset({"prompt", "response"})
    answer = "response"


class InstructionReader(Reader):
    """Alpaca's ``{"instruction": …, "input": …, "output": …}``; an ``input`` follows the instruction."""

    name = "instruction and output"
    required = frozenset({"instruction", "output"})
    optional = WHOLE_ROW | {"input"}
    ignored = frozenset({"text"})  # the original file has the whole row as one text

    def read(self, row: dict[str, Any]) -> Row:
        asked = text_field(row["instruction"], "instruction")
        if (more := row.get("input")) is not None and text_field(more, "input", may_be_empty=True).strip():
            asked = f"{asked}\n\n{more}"
        messages = (Message("user", asked), Message("assistant", text_field(row["output"], "output")))
        whole = for_whole_row(Turns(messages, (row_check(row), None)), row)
        return conversation_row(whole.messages, whole.checks, whole.notes)
