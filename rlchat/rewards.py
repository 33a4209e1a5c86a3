"""Rewards: text in, numbers out.

A :class:`Reward` is a weighted sum of factors, and every factor judges what the model said, never the human replies.
Your own factor is a class anywhere on the import path; name it by ``class_path`` in the configuration::

    class Polite(ReplyFactor):
        def score(self, prompt: Conversation, reply: Reply) -> float:
            return float("please" in words(reply.text))

By convention a bonus scores 0..1, a penalty -1..0, a judgement -1..1, and the weight says how much that is worth. So a
weight is positive, and it is the most that its factor can add to a reply's reward or take from it.
"""

from __future__ import annotations

import abc
import inspect
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError, at_least_one

# Scripts written without spaces: kana and Han. A character counts as a word, as is usual for these languages.
_CJK = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_EMOJI = "\u2600-\u27bf\U0001f000-\U0001faff"
# Python's \w leaves out accents written as marks of their own and the vowel signs of Hebrew, Arabic and South Asian
# scripts (\u0964 and \u0965 are full stops), which would break words of these languages apart.
_LETTER = "\\w\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u109f\u1780-\u17d3"
_RUN = rf"(?:(?![{_CJK}_])[{_LETTER}])+"
_WORD = re.compile(
    rf"""
      [{_CJK}]
    | [{_EMOJI}] (?: \ufe0f | [\U0001f3fb-\U0001f3ff] | \u200d[{_EMOJI}] )*   # with its skin tone, or joined to others
    | {_RUN} (?: ['’-] {_RUN} )*
    """,
    re.VERBOSE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n+")
# A unit of at most 20 characters, four or more times in a row. It starts with ink, so indentation is no loop.
_LOOP = re.compile(r"(\S.{0,19}?)\1{3,}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to a prompt. ``tokens`` counts the sampled tokens, the end-of-turn marker among them.

    ``ended`` is False where the reply ran out of tokens before it came to an end of turn.
    """

    text: str
    tokens: int
    ended: bool


class Factor(abc.ABC):
    """One thing that a reward looks at. Subclass it to score a whole batch at once, as a learned reward does.

    ``weight`` is how much a score of 1 is worth; :class:`Reward` multiplies by it. ``name`` is what the log calls the
    factor (``reward/<name>``): the class's name in snake_case, unless a subclass says otherwise.
    """

    weight: float = 1.0

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    @property
    def name(self) -> str:
        """``TooShort`` → ``too_short``."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    def describe(self) -> dict[str, Any]:
        """Plain values that make this factor again: ``class_path``, and ``init_args`` by name.

        An argument is known by the attribute of its name; one that has none, or is no plain value, is left out.
        """
        names = inspect.signature(type(self)).parameters
        given = {name: getattr(self, name, None) for name in names}
        plain = {name: value for name, value in given.items() if isinstance(value, str | int | float)}
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": plain}

    @abc.abstractmethod
    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        """Unweighted scores, ``[batch]`` floats; row i judges ``replies[i]`` to ``prompts[i]`` and nothing else."""


class ReplyFactor(Factor):
    """A factor that scores one reply at a time: the easy way to write your own."""

    @abc.abstractmethod
    def score(self, prompt: Conversation, reply: Reply) -> float:
        """The unweighted score of ``reply``; the reply may be empty."""

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        scores = [self.score(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)


class Reward:
    """The weighted sum of ``factors``, or of :func:`default_factors` where none is given.

    Two factors of one name are told apart by a number: ``too_short``, ``too_short_2``.

    Raises:
        UserError: when called, where a factor gives anything but one finite number a reply.
    """

    # Not ``| None``: jsonargparse turns a factor's UserError into a list of the union's types.
    def __init__(self, factors: Sequence[Factor] = ()) -> None:
        self.factors: dict[str, Factor] = {}
        for factor in factors or default_factors():
            self.factors[_unused_name(factor.name, self.factors)] = factor

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        """The reward of each reply: ``[batch]`` float32, on the CPU."""
        return torch.stack(list(self.breakdown(prompts, replies).values())).sum(dim=0)

    def describe(self) -> list[dict[str, Any]]:
        """The factors as plain values, for a file that tells what a model was rewarded for."""
        return [factor.describe() for factor in self.factors.values()]

    def breakdown(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> dict[str, Tensor]:
        """What each factor contributes, its weight included: name → ``[batch]`` float32. They sum to the reward."""
        return {
            name: factor.weight * _checked(name, factor(prompts, replies), replies)
            for name, factor in self.factors.items()
        }


def default_factors() -> list[Factor]:
    """Resemblance to the replies that people preferred decides; manners of form count half or less."""
    return [
        QualitySimilarity(weight=1.0),
        TooShort(weight=0.5),
        TooLong(weight=0.5),
        AppropriateLength(weight=0.1),
        DistinctNgrams(weight=0.1),
        Repetition(weight=0.5),
        MissingEnd(weight=0.5),
    ]


class QualitySimilarity(ReplyFactor):
    """Quality without a reward model: like a good human reply is good, like a bad one is bad. -1..1.

    With the references r_i of the prompt, their similarities s_i = :func:`chrf` of the reply and r_i, and their
    qualities q_i in 0..1, the score is ``sum_i w_i s_i (2 q_i - 1)`` where ``w = softmax(s / temperature)``. So the
    nearest references vote on whether the reply is good, and their nearness says how much that is worth; the plain
    ``max_i s_i (2 q_i - 1)`` would forgive a copy of the worst reply for its faint likeness to the best. The lower
    ``temperature``, the more the nearest reference decides alone.

    A reference without a label takes its quality from its rank: 1 for the best, 0 for the lowest rank in sight. One
    that has neither counts as 0.75: nobody judged it, but a person wrote it. No references: 0.
    """

    UNJUDGED_QUALITY = 0.75

    def __init__(self, weight: float = 1.0, temperature: float = 0.1) -> None:
        super().__init__(weight)
        if temperature <= 0:
            raise UserError(f"QualitySimilarity: temperature is {temperature}, it must be above 0")
        self.temperature = temperature

    def score(self, prompt: Conversation, reply: Reply) -> float:
        if not prompt.references:
            return 0.0
        said = _character_ngrams(reply.text)
        similarities = [_chrf(said, _character_ngrams(reference.text)) for reference in prompt.references]
        nearest = max(similarities)
        votes = [math.exp((similarity - nearest) / self.temperature) for similarity in similarities]
        qualities = self._qualities(prompt.references)
        weighed = (v * s * (2 * q - 1) for v, s, q in zip(votes, similarities, qualities, strict=True))
        return sum(weighed) / sum(votes)

    def _qualities(self, references: Sequence[Message]) -> list[float]:
        lowest = max((reference.rank for reference in references if reference.rank is not None), default=0)

        def quality(reference: Message) -> float:
            if reference.quality is not None:
                return reference.quality
            if reference.rank is not None:
                return 1 - reference.rank / max(lowest, 1)
            return self.UNJUDGED_QUALITY

        return [quality(reference) for reference in references]


class TooShort(ReplyFactor):
    """Penalty for an overly short reply: -1 for no word at all, rising linearly to 0 at ``min_words``."""

    def __init__(self, weight: float = 1.0, min_words: int = 3) -> None:
        super().__init__(weight)
        self.min_words = at_least_one("TooShort", "min_words", min_words)

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return min(0.0, len(words(reply.text)) / self.min_words - 1)


class TooLong(ReplyFactor):
    """Penalty for an overly long reply: 0 up to ``max_words``, falling to -1 at twice as many, and no lower."""

    def __init__(self, weight: float = 1.0, max_words: int = 200) -> None:
        super().__init__(weight)
        self.max_words = at_least_one("TooLong", "max_words", max_words)

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return max(-1.0, min(0.0, 1 - len(words(reply.text)) / self.max_words))


class AppropriateLength(ReplyFactor):
    """Bonus for a reply of ``low`` to ``high`` words: 1 there, 0 for an empty reply and from ``2 * high`` words on.

    Half a cosine joins them, so that the bonus has neither a cliff nor a kink: half of it at ``low / 2`` and at
    ``1.5 * high`` words.
    """

    def __init__(self, weight: float = 1.0, low: int = 8, high: int = 100) -> None:
        super().__init__(weight)
        self.low = at_least_one("AppropriateLength", "low", low)
        if high < low:
            raise UserError(f"AppropriateLength: high is {high}, less than low, {low}: give a range from low to high")
        self.high = high

    def score(self, prompt: Conversation, reply: Reply) -> float:
        length = len(words(reply.text))
        inside = min(length / self.low, 2 - length / self.high)
        return (1 - math.cos(math.pi * min(1.0, max(0.0, inside)))) / 2


class DistinctNgrams(ReplyFactor):
    """Bonus for varied words: the share of the reply's n-grams that are distinct, averaged over n = 1..``max_n``. 0..1.

    One word is always distinct from itself. So that this is worth nothing, a reply with fewer than ``min_words`` words
    is measured against the n-grams that ``min_words`` words would have.
    """

    def __init__(self, weight: float = 1.0, max_n: int = 2, min_words: int = 8) -> None:
        super().__init__(weight)
        self.max_n = at_least_one("DistinctNgrams", "max_n", max_n)
        self.min_words = min_words
        if min_words < max_n:
            raise UserError(f"DistinctNgrams: min_words is {min_words}, it must be at least max_n, {max_n}")

    def score(self, prompt: Conversation, reply: Reply) -> float:
        said = words(reply.text)
        length = max(len(said), self.min_words)
        return sum(len(set(_ngrams(said, n))) / (length - n + 1) for n in range(1, self.max_n + 1)) / self.max_n


class Repetition(ReplyFactor):
    """Penalty for saying it again: minus the largest of three shares, -1..0.

    - n-grams of ``n`` words that stood earlier in the reply (seq-rep-n of Welleck et al. 2020);
    - sentences or lines that stood earlier in the reply;
    - characters in a loop, past its first round: a unit of up to 20 characters, four times or more in a row, as in
      ``!!!!!!`` or ``hahahahaha``, which the other two, being about words, do not see.
    """

    def __init__(self, weight: float = 1.0, n: int = 3) -> None:
        super().__init__(weight)
        self.n = at_least_one("Repetition", "n", n)

    def score(self, prompt: Conversation, reply: Reply) -> float:
        sentences = [tuple(words(sentence)) for sentence in _SENTENCE_END.split(reply.text)]
        looped = sum(len(match[0]) - len(match[1]) for match in _LOOP.finditer(reply.text))
        shares = (
            _repeated_share(_ngrams(words(reply.text), self.n)),
            _repeated_share([sentence for sentence in sentences if sentence]),
            looped / max(1, len(reply.text)),
        )
        return 0.0 - max(shares)


class MissingEnd(ReplyFactor):
    """Penalty for a reply that ran out of tokens before it ended its turn: -1, else 0."""

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return 0.0 if reply.ended else -1.0


def words(text: str) -> list[str]:
    """The words of ``text`` in any language, without case; punctuation separates and is dropped.

    Apostrophes and hyphens inside a word belong to it. A Chinese character, a kana and an emoji count as a word each.
    """
    return _WORD.findall(text.casefold())


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words among all n-grams of ``texts`` together: 1 where none occurs twice, 0 without any.

    Li et al. 2016, with the usual change of the denominator: they divide by the number of words, which
    keeps a corpus of short replies from ever reaching 1. No n-gram crosses from one text to the next.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(words(text), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def chrf(reply: str, reference: str) -> float:
    """How alike two texts look, 0..1: the character n-gram F1 score (chrF, Popović 2015; n = 1..6, no whitespace).

    It needs no tokenizer, works for any script, and gives credit for an inflected word. Precision and recall are means
    over those n for which both texts have n-grams, so that equal short texts score 1. F1 rather than the F2 that is
    usual in translation: recall that weighs more would pay for length.
    """
    return _chrf(_character_ngrams(reply), _character_ngrams(reference))


def _character_ngrams(text: str) -> list[Counter[str]]:
    """For n = 1..6, the n-grams of ``text`` without its whitespace, counted."""
    ink = "".join(text.split())
    return [Counter(ink[i : i + n] for i in range(len(ink) - n + 1)) for n in range(1, 7)]


def _chrf(reply: list[Counter[str]], reference: list[Counter[str]]) -> float:
    precisions, recalls = [], []
    for said, wanted in zip(reply, reference, strict=True):
        if said and wanted:
            shared = sum(min(count, wanted[ngram]) for ngram, count in said.items() if ngram in wanted)
            precisions.append(shared / said.total())
            recalls.append(shared / wanted.total())
    if not any(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 2 * precision * recall / (precision + recall)


def _ngrams(items: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def _repeated_share(items: Sequence[tuple[str, ...]]) -> float:
    return 1 - len(set(items)) / len(items) if items else 0.0


def _unused_name(name: str, taken: dict[str, Factor]) -> str:
    number, unused = 1, name
    while unused in taken:
        number += 1
        unused = f"{name}_{number}"
    return unused


def _checked(name: str, scores: Tensor, replies: Sequence[Reply]) -> Tensor:
    """``scores`` as float32 on the CPU, if they are one finite number a reply; a ``UserError`` otherwise."""
    if not isinstance(scores, Tensor) or scores.shape != (len(replies),):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise UserError(f"reward factor '{name}' returned {got}: it must return a tensor of shape ({len(replies)},)")
    scores = scores.detach().to("cpu", torch.float32)
    for row, (score, reply) in enumerate(zip(scores.tolist(), replies, strict=True)):
        if not math.isfinite(score):
            said = reply.text if len(reply.text) <= 60 else reply.text[:60] + "…"
            raise UserError(f"reward factor '{name}' gave {score} for reply {row}, {said!r}: mend it to give a number")
    return scores
