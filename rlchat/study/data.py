"""The data of one seed: prompts of the demo's world, the replies that the policy imitates, and batches of both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlchat.conversation import Check, Conversation, Message
from rlchat.data.datamodule import PromptBatch, RankedBatch, SequenceBatch
from rlchat.demo.corpus import demo_trees
from rlchat.study.gold import known_words
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.padding import pad


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt of the demo's world, and what people replied to it."""

    prompt: Conversation
    replies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two different responses to a prompt. ``better`` is the one that the noisy label prefers."""

    prompt: Conversation
    better: str
    worse: str


def asked_questions(count: int, seed: int) -> list[Asked]:
    """``count`` different first questions of the demo's conversations with seed ``seed``, each with its replies."""
    asked = []
    for tree in demo_trees(count, seed):
        message = tree["prompt"]
        check = Check(tuple(message["check"]["any_of"]), tuple(message["check"]["none_of"]))
        prompt = Conversation((Message("user", message["text"]),), check=check)
        asked.append(Asked(prompt, tuple(reply["text"] for reply in message["replies"])))
    return asked


@dataclass(frozen=True, slots=True)
class StudyWorld:
    """The world of one seed: questions with people's replies, and the words that people use."""

    held_out: tuple[Asked, ...]
    training: tuple[Asked, ...]
    known: frozenset[str]


def make_study_world(questions: int, held_out: int, seed: int) -> StudyWorld:
    """``questions`` of the demo's world with seed ``seed``, of which the first ``held_out`` are not trained on."""
    asked = asked_questions(questions, seed)
    known = known_words(reply for one in asked for reply in one.replies)
    return StudyWorld(tuple(asked[:held_out]), tuple(asked[held_out:]), known)


def sequence_batches(
    tokenizer: ChatTokenizer, asked: Sequence[Asked], size: int, epochs: int, seed: int
) -> list[SequenceBatch]:
    """Batches of ``size`` conversations for SFT, each reply once per epoch, in random order."""
    chats = [one.prompt.with_reply(Message("assistant", reply)) for one in asked for reply in one.replies]
    rendered = [tokenizer.render(chat) for chat in chats]
    batches = []
    for rows in _shuffled(len(rendered), size, epochs, seed):
        ids, mask = pad([rendered[row].ids for row in rows], tokenizer.pad_id, "right")
        loss_mask, _ = pad([rendered[row].loss_mask for row in rows], False, "right")
        batches.append(SequenceBatch(ids, mask, loss_mask.bool()))
    return batches


def ranked_batches(
    tokenizer: ChatTokenizer, comparisons: Sequence[Comparison], size: int, epochs: int, seed: int
) -> list[RankedBatch]:
    """Batches of ``size`` comparisons for a reward model, each once per epoch, in random order."""
    rendered = [
        [tokenizer.render_response(one.prompt, Message("assistant", text)).ids for text in (one.better, one.worse)]
        for one in comparisons
    ]
    batches = []
    for rows in _shuffled(len(rendered), size, epochs, seed):
        ids, mask = pad([ids for row in rows for ids in rendered[row]], tokenizer.pad_id, "right")
        count = len(rows)
        batches.append(
            RankedBatch(
                ids,
                mask,
                group=torch.arange(count).repeat_interleave(2),
                rank=torch.tensor([0, 1]).repeat(count),
                quality=torch.full((2 * count,), torch.nan),
                right=torch.full((2 * count,), -1),
            )
        )
    return batches


def prompt_batch(tokenizer: ChatTokenizer, prompts: Sequence[Conversation]) -> PromptBatch:
    """``prompts`` as one batch."""
    ids, mask = pad([tokenizer.render_prompt(prompt).ids for prompt in prompts], tokenizer.pad_id, "left")
    return PromptBatch(ids, mask, tuple(prompts))


def prompt_batches(
    tokenizer: ChatTokenizer, prompts: Sequence[Conversation], size: int, count: int, seed: int
) -> list[PromptBatch]:
    """``count`` batches of ``size`` prompts for PPO, in random order, all prompts before one occurs again."""
    epochs = -(-count * size // len(prompts))
    rows = _shuffled(len(prompts), size, epochs, seed)[:count]
    return [prompt_batch(tokenizer, [prompts[i] for i in batch]) for batch in rows]


def _shuffled(count: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    """Batches of ``size`` of the numbers below ``count``; only the last may be smaller."""
    rng = random.Random(seed)
    order = [row for _ in range(epochs) for row in rng.sample(range(count), count)]
    return [order[start : start + size] for start in range(0, len(order), size)]
