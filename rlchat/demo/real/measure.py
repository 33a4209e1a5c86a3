"""What the demo with a real model measures, in the same way before and after training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from statistics import mean
from typing import Any

import torch

from rlchat.chat.context import fit_prompt
from rlchat.conversation import Conversation
from rlchat.data.formats import read_prompts
from rlchat.demo.real.goal import meets_goal
from rlchat.models.model_file import PolicyBundle
from rlchat.models.sampling import Sampling, addressed_uniforms, generate
from rlchat.rewards import Reply, Reward, words
from rlchat.utils.padding import pad
from rlchat.utils.progress import with_progress

MAX_NEW_TOKENS = 48
_BATCH_SIZE = 32
_LONGEST_TEXT = 320
"""Tokens of a held-out conversation with a human reply; a longer reply is cut."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A reply with its tokens."""

    prompt: Conversation
    prompt_ids: list[int]
    reply_ids: list[int]
    reply: Reply


@dataclass(frozen=True, slots=True)
class Measured:
    """The replies of one model to the held-out prompts and to the control questions, and its perplexity."""

    greedy: list[Sampled]
    sampled: list[Sampled]
    control: list[Sampled]
    perplexity: float

    def figures(self, reward: Reward) -> dict[str, Any]:
        """The figures of the report, by the way in which the replies were drawn."""
        return {
            "greedy": reply_figures(self.greedy, reward),
            "sampled": reply_figures(self.sampled, reward),
            "control_correct": sum(is_correct(sample) for sample in self.control),
            "perplexity": round(self.perplexity, 3),
        }

    def control_beside(self, after: Measured) -> list[dict[str, Any]]:
        """Each control question with the replies of this model (``before``) and of ``after``."""
        return control_beside(self.control, after.control)

    def replies_beside(self, after: Measured) -> list[dict[str, Any]]:
        """Each held-out prompt with the greedy replies of this model (``before``) and of ``after``."""
        return [
            {"prompt": old.prompt.messages[-1].text, "before": _judged(old), "after": _judged(new)}
            for old, new in zip(self.greedy, after.greedy, strict=True)
        ]


def measure(
    bundle: PolicyBundle, held_out: Sequence[Conversation], control: Sequence[Conversation], *, seed: int
) -> Measured:
    """Measures one model. ``seed`` is that of the replies at temperature 1; the others are greedy."""
    return Measured(
        sample_replies(bundle, held_out, temperature=0.0),
        sample_replies(bundle, held_out, temperature=1.0, seed=seed),
        sample_replies(bundle, control, temperature=0.0),
        perplexity(bundle, held_out),
    )


def read_data(name: str) -> list[Conversation]:
    """The prompts in the packaged file ``name``: held_out.jsonl or control.jsonl, with references and checks."""
    with as_file(files("rlchat.demo.real") / "data" / name) as path:
        return read_prompts(path)


def sample_replies(
    bundle: PolicyBundle, prompts: Sequence[Conversation], *, temperature: float, seed: int = 0
) -> list[Sampled]:
    """One reply to each of ``prompts``, of at most ``MAX_NEW_TOKENS`` tokens; temperature 0 is greedy."""
    model, tokenizer = bundle.model, bundle.tokenizer
    device = model.backbone.head_weight.device
    fitted = [fit_prompt(tokenizer, prompt, bundle.max_length, MAX_NEW_TOKENS).ids for prompt in prompts]
    found: dict[int, Sampled] = {}
    for rows in with_progress(_batches([len(ids) for ids in fitted]), "replying", show=True):
        ids, mask = pad([fitted[i] for i in rows], tokenizer.pad_id, "left")
        generated = generate(
            model,
            ids.to(device),
            mask.to(device),
            Sampling(MAX_NEW_TOKENS, temperature),
            addressed_uniforms(seed, 0, torch.tensor(rows)),
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
        )
        lengths = generated.mask.sum(1).tolist()
        for i, tokens, length, ended in zip(
            rows, generated.ids.tolist(), lengths, generated.ended.tolist(), strict=True
        ):
            reply = Reply(tokenizer.decode(tokens[:length]).strip(), length, ended)
            found[i] = Sampled(prompts[i], fitted[i], tokens[:length], reply)
    return [found[i] for i in range(len(prompts))]


@torch.no_grad()
def log_likelihoods(bundle: PolicyBundle, texts: Sequence[tuple[list[int], list[bool]]]) -> list[tuple[float, int]]:
    """For each of ``texts`` (ids, and whether an id counts): the sum of log-probs of the ids that count, and how many.

    Natural logarithms, at temperature 1. The first id never counts.
    """
    model, device = bundle.model, bundle.model.backbone.head_weight.device
    results: dict[int, tuple[float, int]] = {}
    for rows in with_progress(_batches([len(ids) for ids, _ in texts]), "reading", show=True):
        ids, mask = (part.to(device) for part in pad([texts[i][0] for i in rows], bundle.tokenizer.pad_id, "right"))
        counts = pad([texts[i][1] for i in rows], False, "right")[0].bool().to(device)[:, 1:]
        hidden = model(ids, mask)[:, :-1]
        logprobs = torch.zeros(counts.shape, device=device)
        logprobs[counts] = model.token_stats(hidden[counts], ids[:, 1:][counts]).logprobs
        sums, numbers = logprobs.sum(1).tolist(), counts.sum(1).tolist()
        results |= {i: (total, number) for i, total, number in zip(rows, sums, numbers, strict=True)}
    return [results[i] for i in range(len(texts))]


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """The rows in batches of similar length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + _BATCH_SIZE] for start in range(0, len(order), _BATCH_SIZE)]


def reply_figures(samples: Sequence[Sampled], reward: Reward) -> dict[str, float]:
    """The share of replies that meet the goal, the mean reward, words per reply, and the share of truncated ones."""
    scores = reward([sample.prompt for sample in samples], [sample.reply for sample in samples])
    figures = {
        "goal": mean(meets_goal(sample.reply) for sample in samples),
        "reward": float(scores.mean()),
        "words": mean(len(words(sample.reply.text)) for sample in samples),
        "truncated": mean(not sample.reply.ended for sample in samples),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


def is_correct(sample: Sampled) -> bool:
    """Whether a reply to a control question contains the right answer."""
    return sample.prompt.passes(sample.reply.text) is True


def control_beside(before: Sequence[Sampled], after: Sequence[Sampled]) -> list[dict[str, Any]]:
    """Each control question with the replies of two models, each marked as correct or not."""
    return [
        {"question": old.prompt.messages[-1].text, "before": _checked(old), "after": _checked(new)}
        for old, new in zip(before, after, strict=True)
    ]


def perplexity(bundle: PolicyBundle, prompts: Sequence[Conversation]) -> float:
    """The perplexity of the human replies to those of ``prompts`` that have one, per token."""
    texts = []
    for prompt in prompts:
        for reference in prompt.references[:1]:
            rendered = bundle.tokenizer.render(prompt.with_reply(reference))
            texts.append((rendered.ids[:_LONGEST_TEXT], rendered.loss_mask[:_LONGEST_TEXT]))
    sums = log_likelihoods(bundle, texts)
    return math.exp(-sum(total for total, _ in sums) / sum(count for _, count in sums))


def mean_kl(tuned: PolicyBundle, base: PolicyBundle, samples: Sequence[Sampled]) -> float:
    """The KL of ``tuned`` to ``base`` in nats per reply, estimated on ``samples`` of ``tuned`` at temperature 1.

    The estimate is the mean of ``log tuned(reply) - log base(reply)``.
    """
    texts = [(s.prompt_ids + s.reply_ids, [False] * len(s.prompt_ids) + [True] * len(s.reply_ids)) for s in samples]
    pairs = zip(log_likelihoods(tuned, texts), log_likelihoods(base, texts), strict=True)
    return mean(ours - theirs for (ours, _), (theirs, _) in pairs)


def _checked(sample: Sampled) -> dict[str, Any]:
    return {"reply": sample.reply.text, "correct": is_correct(sample)}


def _judged(sample: Sampled) -> dict[str, Any]:
    return {"reply": sample.reply.text, "goal": meets_goal(sample.reply)}
