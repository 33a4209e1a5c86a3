"""What an exported tokenizer consists of, read from a :class:`ChatTokenizer`.

This is the only module of the package that knows the chat formats. To export another chat format, extend
:meth:`Vocabulary.of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlchat.tokenizer.chat_format import MARKERS
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.ranks import parse_ranks, to_byte_letters

# rlchat's own chat format, as ChatTokenizer.render writes it.
_OWN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens, the pattern that splits text, and the chat template.

    ``special`` are control tokens by name. ``texts`` are tokens that are matched as a whole wherever they occur in
    text, ``normalized_texts`` the same after normalization. ``end``, ``pad`` and ``start`` are names in ``special``;
    ``start`` is the BOS token of the chat template, or None.
    """

    pattern: str
    ranks: Mapping[bytes, int]
    special: Mapping[str, int]
    size: int
    template: str
    end: str
    pad: str
    start: str | None = None
    texts: Mapping[str, int] = field(default_factory=dict)
    normalized_texts: Mapping[str, int] = field(default_factory=dict)
    normalizer: str | None = None

    @classmethod
    def of(cls, tokenizer: ChatTokenizer) -> Vocabulary:
        """The vocabulary of ``tokenizer``."""
        state = tokenizer.state()
        special: dict[str, int] = dict(state["special_tokens"])
        template, start = _OWN_TEMPLATE, None
        if form := state.get("chat_format"):  # the format of a base model, whose control tokens are in special_tokens
            template, start = form["template"], _start_token(form, special)
        else:
            markers = {marker: tokenizer.base_size + number for number, marker in enumerate(MARKERS)}
            # o200k_harmony has an <|end|> too. rlchat never produces that one, so it gets another name.
            special = {name if name not in markers else f"{name}#{token}": token for name, token in special.items()}
            special |= markers
        names = {token: name for name, token in special.items()}
        return cls(
            pattern=state["pattern"],
            ranks=parse_ranks(state["ranks"], state["name"]),
            special=special,
            size=tokenizer.vocab_size,
            template=template,
            end=names[tokenizer.end_id],
            pad=names[tokenizer.pad_id],
            start=start,
            texts=state.get("text_tokens", {}),
            normalized_texts=state.get("normalized_tokens", {}),
            normalizer=state.get("normalizer"),
        )

    @property
    def spelled(self) -> dict[str, int]:
        """Every token as byte-level vocabularies spell it, with its id."""
        ordinary = {to_byte_letters(token): number for token, number in self.ranks.items()}
        return {**ordinary, **self.texts, **self.normalized_texts, **self.special}

    @property
    def merges(self) -> list[tuple[str, str]]:
        """All pairs of tokens that form a token, in the order of ranks: tiktoken merges whatever is in the vocabulary.

        Example: with the tokens a, b, c, ab, bc and abc, in this order, the pairs are (a, b), (b, c), (ab, c), (a, bc).
        """
        pairs = []
        for token in sorted(self.ranks, key=self.ranks.__getitem__):
            cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            known = [cut for cut in cuts if cut[0] in self.ranks and cut[1] in self.ranks]
            known.sort(key=lambda cut: max(self.ranks[cut[0]], self.ranks[cut[1]]))
            pairs += [(to_byte_letters(left), to_byte_letters(right)) for left, right in known]
        return pairs


def _start_token(form: Mapping[str, Any], special: Mapping[str, int]) -> str | None:
    """The control token that a conversation begins with, if it is not the beginning of a message."""
    first = str(form["start"])
    found = [name for name in special if first.startswith(name)]
    return max(found, key=len, default=None)
