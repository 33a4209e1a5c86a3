"""Rows that are one text: a response without a prompt, or a whole chat with the markup of another program."""

from __future__ import annotations

import re
from typing import Any

from rlchat.conversation import Conversation, Message
from rlchat.data.jsonl import BadLineError
from rlchat.data.readers.base import Reader, Row, conversation_row
from rlchat.data.readers.fields import learn_field, role_field, row_quality, text_field
from rlchat.data.readers.turns import Turns, for_whole_row, joined_turns, notes_of_row

# The name of a chat markup → a regular expression for the beginning of a turn; its group is the speaker.
_MARKUP = {
    "### Human:": re.compile(r"\s*###\s*(Human|User|Assistant|System):"),
    "### Instruction:": re.compile(r"\s*###\s*(Instruction|Response):"),
    "<|im_start|>": re.compile(r"\s*(?:<\|im_end\|>)?\s*<\|im_start\|>(system|user|assistant)\n"),
    "<|user|>": re.compile(r"\s*(?:</s>|<\|end\|>)?\s*<\|(system|user|assistant)\|>\n?"),
    "Human:": re.compile(r"(?:^|\n\n)(Human|Assistant):"),
}
_SPEAKERS = {"instruction": "user", "response": "assistant"}
_END = re.compile(r"\s*(?:<\|im_end\|>|</s>|<\|end\|>|<\|endoftext\|>)?\s*$")


class TextReader(Reader):
    """``{"text": …}``: a response without a prompt, for language modelling and the reward model.

    With ``data.split_text``, a text with chat markup (``### Human:``, ChatML, …) is split into turns.
    """

    name = "text"
    required = frozenset({"text"})
    optional = frozenset({"quality", "label", "weight", "loss_weight", "train", "loss_mask"})
    priority = -2

    def read(self, row: dict[str, Any]) -> Row:
        text = text_field(row["text"], "text")
        markup = next((name for name, opening in _MARKUP.items() if len(opening.findall(text)) > 1), None)
        if markup is not None and self.options.split_text:
            return _split(text, markup, row)
        notes = set(notes_of_row(row))
        if markup is not None:
            notes.add(
                f"`text` in the markup of a chat ({markup}), all of which is learned, the user's messages too; "
                "set data.split_text=true to split it into turns"
            )
        response = Message("assistant", text, row_quality(row))
        if not learn_field(row):
            return Row(flaw="texts of weight 0")
        alone = Conversation((response,)), Conversation((), (response,))
        return Row((response,), alone[:1], alone[1:], notes=frozenset(notes))


def _split(text: str, markup: str, row: dict[str, Any]) -> Row:
    before, *pieces = _MARKUP[markup].split(_END.sub("", text))
    speakers = [role_field(_SPEAKERS.get(speaker.lower(), speaker)) for speaker in pieces[::2]]
    if before.strip():  # text before the first speaker is a system message
        speakers, pieces = ["system", *speakers], ["", before, *pieces]
    turns = joined_turns(zip(speakers, pieces[1::2], strict=True), "text")
    if any(not turn.text for turn in turns[:-1]):
        raise BadLineError("text has an empty turn")
    turns = turns if turns[-1].text else turns[:-1]
    whole = for_whole_row(Turns(turns, tuple(None for _ in turns)), row)
    return conversation_row(whole.messages, whole.checks, whole.notes)
