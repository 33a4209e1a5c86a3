"""What the gate compares: agreement with verdicts, their rewards, perplexity, controls, and the KL to the original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rlchat.chat.context import fit_prompt
from rlchat.chat.generation import ResponseGenerator
from rlchat.chat.verdicts import JudgedResponse
from rlchat.conversation import Conversation, Message
from rlchat.data.tokenizing import start_of_response
from rlchat.models.model_file import PolicyBundle
from rlchat.models.sampling import Sampling
from rlchat.rewards import Reply
from rlchat.tokenizer.rendering import Rendered
from rlchat.utils.padding import pad
from rlchat.utils.progress import with_progress

_BATCH_SIZE = 32
ALTERNATIVES = 3
"""Responses of the original model that a rated response is compared with, if no other response to it was judged."""


@dataclass(frozen=True, slots=True)
class Question:
    """A verdict as a comparison: is ``text`` more likely than most of ``others`` to the model?

    The answer should be yes if ``good``, and no otherwise. Without ``others``, the model would say nothing else, and
    the answer is yes.
    """

    prompt: Conversation
    text: str
    good: bool
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """A held-back response to ``prompt``, whether it is liked, and its log-prob under the original model, in nats."""

    prompt: Conversation
    text: str
    liked: bool
    original_logprob: float


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What every model is measured on; it is made once, with the original model.

    Attributes:
        questions: the held-back verdicts.
        judged: the responses of the held-back verdicts.
        threads: held-out conversations with human replies.
        controls: held-out prompts with a check.
        originals: held-out prompts, each with a response of the original model, sampled at temperature 1.
        max_new_tokens: of responses to controls.
    """

    questions: list[Question]
    judged: list[Judged]
    threads: list[Conversation]
    controls: list[Conversation]
    originals: list[tuple[Conversation, Reply]]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Figures:
    """The measures of one model. A measure without data is None.

    Attributes:
        agrees: held-back verdicts that the model agrees with.
        verdicts: held-back verdicts.
        reward_accuracy: see :func:`reward_accuracy`.
        perplexity: on human replies.
        correct: controls that are answered correctly, at temperature 0.
        controls: controls.
        original_nll: mean negative log-prob per token, in nats, of the original model's responses. Its difference to
            that of the original model estimates the KL from the original model to this one.
    """

    agrees: int | None
    verdicts: int
    reward_accuracy: float | None
    perplexity: float | None
    correct: int | None
    controls: int
    original_nll: float | None

    @classmethod
    def none(cls) -> Figures:
        """Of a model that cannot be measured."""
        return cls(None, 0, None, None, None, 0, None)

    def values(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure(model: PolicyBundle, yardstick: Yardstick) -> Figures:
    """The figures of ``model``, which must be in eval mode."""
    tokenizer, length = model.tokenizer, model.max_length
    threads = [tokenizer.render(thread, length) for thread in yardstick.threads]
    perplexity = nats_per_token(model, [row for row in threads if any(row.loss_mask)])
    responses = [render(model, prompt, reply.text.strip(), reply.ended) for prompt, reply in yardstick.originals]
    correct = None
    if yardstick.controls:
        replies = respond(model, yardstick.controls, Sampling(yardstick.max_new_tokens, 0.0), seed=0)
        correct = sum(p.passes(r.text) is True for p, r in zip(yardstick.controls, replies, strict=True))
    return Figures(
        agrees=agreement(model, yardstick.questions) if yardstick.questions else None,
        verdicts=len(yardstick.questions),
        reward_accuracy=reward_accuracy(model, yardstick.judged),
        perplexity=None if perplexity is None else _exp(perplexity),
        correct=correct,
        controls=len(yardstick.controls),
        original_nll=nats_per_token(model, responses),
    )


def _exp(nats: float) -> float:
    """e to the power of ``nats``. Of a version that has diverged, it can be more than the largest float: infinity."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def questions_of(
    held_back: Sequence[JudgedResponse],
    judged: Sequence[Conversation],
    original: PolicyBundle,
    sampling: Sampling,
    seed: int,
) -> list[Question]:
    """``held_back`` as comparisons.

    A correction is compared with what it corrects. A rated response is compared with the responses to the same prompt
    that were judged otherwise, or else with :data:`ALTERNATIVES` responses of ``original``.

    Args:
        held_back: the verdicts.
        judged: :func:`rlchat.learn.examples.judged_prompts` of them.
        original: the original model.
        sampling: how it responds.
        seed: of its responses.
    """
    by_prompt = {prompt.messages: prompt.references for prompt in judged}
    alternatives = _alternatives([verdict.prompt for verdict in held_back], original, sampling, seed)
    questions = []
    for verdict, sampled in zip(held_back, alternatives, strict=True):
        if verdict.kind == "corrected":
            text, good, others = verdict.correction, True, [verdict.response] if verdict.response else []
        else:
            text, good = verdict.response, verdict.kind == "good"
            ranked = [r for r in by_prompt.get(verdict.prompt.messages, ()) if r.rank is not None]
            others = [r.text for r in ranked if (r.rank == 1) == good and r.text != text]
        others = others or [other for other in dict.fromkeys(sampled) if other.strip() and other != text]
        questions.append(Question(verdict.prompt, text, good, tuple(others)))
    return questions


def _alternatives(
    prompts: Sequence[Conversation], original: PolicyBundle, sampling: Sampling, seed: int
) -> list[list[str]]:
    repeated = [prompt for prompt in prompts for _ in range(ALTERNATIVES)]
    texts = [reply.text.strip() for reply in respond(original, repeated, sampling, seed)] if repeated else []
    return [texts[i * ALTERNATIVES : (i + 1) * ALTERNATIVES] for i in range(len(prompts))]


def agreement(model: PolicyBundle, questions: Sequence[Question]) -> int:
    """The number of ``questions`` that ``model`` answers as the verdicts do, by mean log-probs per token.

    This is the ranking accuracy of a policy (Chen et al. 2024, arXiv 2405.19534, sec. 2), normalized by length.
    """
    rows = [render(model, q.prompt, text) for q in questions for text in (q.text, *q.others)]
    sums = logprob_sums(model, rows)
    means = iter([total / max(tokens, 1) for total, tokens in sums])
    agreeing = 0
    for question in questions:
        own = next(means)
        others = [next(means) for _ in question.others]
        likely = 2 * sum(own > other for other in others) > len(others) if others else True
        agreeing += likely == question.good
    return agreeing


def judged_responses(prompts: Sequence[Conversation], original: PolicyBundle) -> list[Judged]:
    """The references of ``prompts``, which are :func:`rlchat.learn.examples.judged_prompts` of held-back verdicts."""
    found = [(prompt, reference) for prompt in prompts for reference in prompt.references]
    sums = logprob_sums(original, [render(original, prompt, reference.text) for prompt, reference in found])
    return [
        Judged(prompt, reference.text, reference.rank == 0 or reference.quality == 1, logprob)
        for (prompt, reference), (logprob, _) in zip(found, sums, strict=True)
    ]


def reward_accuracy(model: PolicyBundle, judged: Sequence[Judged]) -> float | None:
    """The share of pairs of a liked and a disliked response of which the liked one has the higher reward.

    The pairs are all that there are, also of different prompts. The reward is the implicit one of DPO (Rafailov et al.
    2023, eq. 5) at β = 1: the log-prob of the response minus that under the original model. So it is about what the
    model has learned, and is 0.5 for the original model and for one that has learned nothing that carries over. Equal
    rewards count half. None without a liked or without a disliked response.
    """
    sums = logprob_sums(model, [render(model, one.prompt, one.text) for one in judged])
    rewards = [logprob - one.original_logprob for one, (logprob, _) in zip(judged, sums, strict=True)]
    liked, disliked = (
        [reward for one, reward in zip(judged, rewards, strict=True) if one.liked is side] for side in (True, False)
    )
    pairs = [(high > low) + 0.5 * (high == low) for high in liked for low in disliked]
    return sum(pairs) / len(pairs) if pairs else None


def render(model: PolicyBundle, prompt: Conversation, text: str, ended: bool = True) -> Rendered:
    """``text`` as the response to ``prompt``, with a loss mask on the response only.

    Unless it ``ended``, the end marker is not in the mask, because the model did not generate it.
    """
    row = model.tokenizer.render_response(prompt, Message("assistant", text), model.max_length)
    start, end = start_of_response(row), len(row.ids) - (not ended)
    mask = [start <= i < end for i in range(len(row.ids))]
    return Rendered(row.ids, mask, row.dropped, row.cut, row.response_cut)


def nats_per_token(model: PolicyBundle, rows: Sequence[Rendered]) -> float | None:
    """The mean negative log-prob of the tokens in the loss masks of ``rows``; None if there are none."""
    sums = logprob_sums(model, rows)
    tokens = sum(count for _, count in sums)
    return -sum(total for total, _ in sums) / tokens if tokens else None


@torch.no_grad()
def logprob_sums(model: PolicyBundle, rows: Sequence[Rendered]) -> list[tuple[float, int]]:
    """For each of ``rows``, the summed log-prob of the tokens in its loss mask, in nats, and their number."""
    device = model.model.backbone.device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    chunks = [order[start : start + _BATCH_SIZE] for start in range(0, len(order), _BATCH_SIZE)]
    sums: dict[int, tuple[float, int]] = {}
    for chunk in with_progress(chunks, "measuring", show=True):
        ids, attention = (x.to(device) for x in pad([rows[i].ids for i in chunk], model.tokenizer.pad_id, "right"))
        masks = pad([rows[i].loss_mask for i in chunk], False, "right")[0].bool().to(device)
        totals = model.model.sequence_logprobs(ids, attention, masks)
        for i, total, count in zip(chunk, totals.tolist(), masks[:, 1:].sum(1).tolist(), strict=True):
            sums[i] = total, count
    return [sums[i] for i in range(len(rows))]


def respond(model: PolicyBundle, prompts: Sequence[Conversation], sampling: Sampling, seed: int) -> list[Reply]:
    """One response of ``model`` to each of ``prompts``."""
    generator = ResponseGenerator(model, model.model.backbone.device, torch.Generator().manual_seed(seed))
    fitted = [fit_prompt(model.tokenizer, p, model.max_length, sampling.max_new_tokens) for p in prompts]
    return generator.batch(fitted, sampling, _BATCH_SIZE)
