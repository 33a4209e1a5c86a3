"""Preference pairs: a chosen and a rejected response to one prompt."""

from __future__ import annotations

from typing import Any

from rlchat.conversation import Check, Conversation, Message
from rlchat.data.jsonl import BadLineError
from rlchat.data.readers.base import Reader, Row
from rlchat.data.readers.fields import learn_field, row_check, text_field
from rlchat.data.readers.prompts import prompt_turns
from rlchat.data.readers.turns import hh_turns, is_hh_text, message_list, notes_of_row


class PairReader(Reader):
    """``chosen`` and ``rejected``, each a response to ``prompt`` or a whole conversation that differs in its last turn.

    A response is a text or a list with one message; a conversation is a list of messages (TRL, UltraFeedback) or a text
    as hh-rlhf writes it: ``\\n\\nHuman: …\\n\\nAssistant: …``.
    """

    name = "chosen and rejected"
    required = frozenset({"chosen", "rejected"})
    optional = frozenset({"prompt", "check", "answer", "weight", "loss_weight", "train", "loss_mask"})
    # UltraFeedback: the chosen conversation again, and an id.
    ignored = frozenset({"messages", "prompt_id"})
    priority = 1

    @classmethod
    def recognises(cls, row: dict[str, Any]) -> bool:
        return any(row.get(key) is not None for key in cls.required)

    def read(self, row: dict[str, Any]) -> Row:
        if not super().recognises(row):
            raise BadLineError("chosen and rejected are both required, and one of them is missing")
        if isinstance(row["chosen"], list) or isinstance(row["rejected"], list):
            return _of_message_lists(row)
        return _of_responses(row) if row.get("prompt") is not None else _of_hh_texts(row)


def _of_responses(row: dict[str, Any]) -> Row:
    prompt = prompt_turns(row)
    chosen, rejected = (text_field(row[key], key, may_be_empty=True) for key in ("chosen", "rejected"))
    if is_hh_text(row["prompt"]):
        chosen, rejected = chosen.strip(), rejected.strip()
    return _pair(row, prompt.messages, chosen, rejected, prompt.checks[-1], prompt.notes)


def _of_message_lists(row: dict[str, Any]) -> Row:
    sides = []
    for key, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if not isinstance(row[key], list):
            raise BadLineError(f"{key} is not a list of messages, but {other} is")
    for key in ("chosen", "rejected"):
        entries = [dict(m) if isinstance(m, dict) else m for m in row[key]]
        if len(entries) == 1 and isinstance(entries[0], dict) and "role" not in entries[0] and "from" not in entries[0]:
            entries[0]["role"] = "assistant"
        sides.append(message_list(entries, key))
    (*before, better), (*others, worse) = (side.messages for side in sides)
    notes = sides[0].notes | sides[1].notes
    check = None
    if row.get("prompt") is not None and not any(m.role != "system" for m in before):
        prompt = prompt_turns(row)
        before, others, check = [*before, *prompt.messages], [*others, *prompt.messages], prompt.checks[-1]
        notes |= prompt.notes
    else:
        check = row_check(row)
    if [(m.role, m.text) for m in before] != [(m.role, m.text) for m in others]:
        return Row(flaw="pairs that differ before the last reply")
    if not before or before[-1].role != "user":
        raise BadLineError("chosen and rejected have no common user message, and the row has no prompt")
    if better.role != "assistant" or worse.role != "assistant":
        return Row(prompt=Conversation(tuple(before), (), check), flaw="pairs that end with a user message")
    return _pair(row, tuple(before), better.text, worse.text, check, notes)


def _of_hh_texts(row: dict[str, Any]) -> Row:
    chosen, rejected = (hh_turns(text_field(row[key], key), key) for key in ("chosen", "rejected"))
    # Consecutive turns of one speaker are joined, so the text before the last reply ends with a Human turn or is empty.
    messages, others = (turns if turns[-1].role == "user" else turns[:-1] for turns in (chosen, rejected))
    prompt = None
    if messages and messages == others and all(turn.text for turn in messages):
        prompt = Conversation(messages)
    if chosen == rejected:
        return Row(prompt=prompt, flaw="identical pairs")
    if "user" in (chosen[-1].role, rejected[-1].role):
        return Row(prompt=prompt, flaw="pairs that end with Human")
    if messages != others:
        return Row(flaw="pairs that differ before the last reply")
    if any(not turn.text for turn in messages):
        return Row(flaw="pairs with an empty turn in the prompt")
    if not messages:
        raise BadLineError("chosen and rejected have no common Human turn")
    return _pair(row, messages, chosen[-1].text, rejected[-1].text, None, frozenset())


def _pair(
    row: dict[str, Any],
    messages: tuple[Message, ...],
    chosen: str,
    rejected: str,
    check: Check | None,
    notes: frozenset[str],
) -> Row:
    prompt = Conversation(messages, (), check)
    if chosen.strip() == rejected.strip():
        return Row(prompt=prompt, flaw="identical pairs")
    if not chosen.strip() or not rejected.strip():
        return Row(prompt=prompt, flaw="pairs with an empty reply")
    if not learn_field(row):
        return Row(prompt=prompt, flaw="pairs of weight 0")
    replies = Message("assistant", chosen, rank=0), Message("assistant", rejected, rank=1)
    prompt = Conversation(messages, replies, check)
    return Row(messages, (prompt.with_reply(replies[0]),), (prompt,), prompt, notes=notes | notes_of_row(row))
