"""Similarity to the human replies of the prompt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.rewards.base import Reply, ReplyFactor


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
