"""Similarity to the human responses to the prompt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.rewards.base import Reply, ReplyFactor


class QualitySimilarity(ReplyFactor):
    """Quality without a reward model: similarity to good human responses minus similarity to bad ones. -1..1.

    Let r_i be the references of the prompt, s_i the :func:`chrf` similarity of the response to r_i, and q_i in 0..1 the
    quality of r_i. The score is ``sum_i w_i s_i (2 q_i - 1)`` with ``w = softmax(s / temperature)``: the nearest
    references decide whether the response is good, and their similarity decides how much that counts. (The plain
    ``max_i s_i (2 q_i - 1)`` would reward a copy of the worst response for its faint similarity to the best.) With a
    lower ``temperature``, the nearest reference dominates more.

    The quality of a reference without a label follows from its rank: 1 for the best, 0 for the lowest rank present. A
    reference with neither counts as 0.75, because a person wrote it. Without references the score is 0.
    """

    UNLABELLED_QUALITY = 0.75

    def __init__(self, weight: float = 1.0, temperature: float = 0.1) -> None:
        super().__init__(weight)
        if temperature <= 0:
            raise UserError(
                f"invalid value {temperature} for QualitySimilarity.temperature: expected a positive number"
            )
        self.temperature = temperature

    def score(self, prompt: Conversation, reply: Reply) -> float:
        if not prompt.references:
            return 0.0
        response = character_ngrams(reply.text)
        similarities = [chrf(response, character_ngrams(reference.text)) for reference in prompt.references]
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
            return self.UNLABELLED_QUALITY

        return [quality(reference) for reference in references]


def character_ngrams(text: str) -> list[Counter[str]]:
    """For n = 1..6, the n-grams of ``text`` without its white space, counted."""
    ink = "".join(text.split())
    return [Counter(ink[i : i + n] for i in range(len(ink) - n + 1)) for n in range(1, 7)]


def chrf(reply: list[Counter[str]], reference: list[Counter[str]]) -> float:
    """The character n-gram F1 score of two texts, 0..1 (chrF, Popović 2015; n = 1..6, no white space).

    It needs no tokenizer, works for any script, and gives credit for an inflected word. Precision and recall are means
    over those n for which both texts have n-grams, so that equal short texts score 1. F1 and not the F2 that is usual
    in translation: a larger weight of recall would reward length.
    """
    precisions, recalls = [], []
    for found, expected in zip(reply, reference, strict=True):
        if found and expected:
            shared = sum(min(count, expected[ngram]) for ngram, count in found.items() if ngram in expected)
            precisions.append(shared / found.total())
            recalls.append(shared / expected.total())
    if not any(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 2 * precision * recall / (precision + recall)
