"""Tokenizes trees of conversations.

:func:`tokenize_trees` renders the data of one task (threads, prompts or ranked responses) into arrays in a folder. It
works in parts of a few hundred trees, so that several processes can share the work and memory does not grow with it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from rlchat.conversation import Conversation, Message, conversation_to_dict, message_to_list
from rlchat.data.corpus import BOUNDS, COUNTS, RANKED, DataNeeds, Prompts, Ragged
from rlchat.data.forest import Tree
from rlchat.data.formats import ranked_pairs
from rlchat.data.imitation import Imitation, ImitationCounts, MessageTree
from rlchat.data.splits import unit_hash
from rlchat.errors import UserError
from rlchat.tokenizer.rendering import Rendered
from rlchat.utils.arrays import Arrays, ArrayWriter
from rlchat.utils.progress import DelayedProgress

TREES_IN_A_PART = 256

_JSON = json.JSONEncoder(ensure_ascii=False)


@dataclass
class _RaggedBuilder:
    """Collects rows in C arrays: lists of Python ints would take ten times the memory."""

    typecode: str
    flat: array[int] = field(init=False)
    ends: array[int] = field(default_factory=lambda: array("q"))

    def __post_init__(self) -> None:
        self.flat = array(self.typecode)

    def add(self, row: list[int] | bytes) -> None:
        if isinstance(row, bytes):
            self.flat.frombytes(row)
        else:
            self.flat.extend(row)
        self.ends.append(len(self.flat))

    def build(self, name: str) -> Arrays:
        return {f"{name}.flat": np.asarray(self.flat), f"{name}.offsets": np.asarray(self.ends)}


@dataclass
class _Tally:
    """Counts rows that were truncated, those among them with a truncated response, and rows that were left out."""

    dropped: int = 0
    cut: int = 0
    response_cut: int = 0
    left_out: int = 0

    def count(self, rendered: Rendered) -> Rendered:
        self.dropped += rendered.dropped > 0
        self.cut += rendered.cut > 0
        self.response_cut += rendered.response_cut
        return rendered

    def add(self, other: _Tally) -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass(frozen=True)
class Tokenization:
    """How trees become the data of a corpus.

    Attributes:
        needs: what the data is for.
        imitation: selects the messages that SFT trains on (default: every assistant message once).
        contrast: whether :func:`contrasted` adds responses.
        split_seed: the seed whose :func:`unit_hash` of each tree is stored.
    """

    needs: DataNeeds
    imitation: Imitation = field(default_factory=Imitation)
    contrast: bool = False
    split_seed: int = 0


@dataclass(frozen=True)
class _Part:
    """The data of some trees, by the names in :class:`rlchat.data.corpus.Corpus`, and what was counted."""

    arrays: Arrays
    tally: _Tally
    imitated: ImitationCounts


def tokenize_trees(
    trees: Sequence[Tree],
    how: Tokenization,
    folder: Path,
    report: str = "",
    warnings: Sequence[str] = (),
    *,
    processes: int = 0,
    progress: bool = False,
) -> None:
    """Writes the data for ``how.needs.task`` in ``trees``, rendered and truncated, as arrays into the empty ``folder``.

    ``rlchat.data.corpus.corpus_of(*read_arrays(folder))`` is then the corpus. The result does not depend on the number
    of ``processes`` (0: this process does the work).

    Raises:
        UserError: the tokenizer cannot encode a text, or the chat format cannot express a conversation.
        OSError: the folder cannot be written.
    """
    tally, imitated = _Tally(), ImitationCounts()
    # A loader is a pool of processes that ends with this one. With a generator, it draws no number of the global one.
    generator = torch.Generator().manual_seed(0)
    parts = DataLoader(_Parts(trees, how), batch_size=None, num_workers=processes, generator=generator)
    with DelayedProgress("tokenizing", len(parts), progress) as bar, ArrayWriter(folder) as writer:
        for done, part in enumerate(parts):
            if isinstance(part, UserError):
                raise part
            _append(part.arrays, writer)
            tally.add(part.tally)
            imitated.add(part.imitated)
            bar.update(done)
        if how.needs.task == "sft":
            report = "; ".join(filter(None, (report, imitated.summary())))
        writer.finish(
            {
                "facts": {"trees": len(trees), **vars(tally)},
                "report": report,
                "warnings": list(warnings),
                "split_seed": how.split_seed,
            }
        )


class _Parts(Dataset["_Part | UserError"]):
    """The data of ``trees``, :data:`TREES_IN_A_PART` at a time, tokenized on access.

    An error of the user is an item, because a loader would add the traceback of its process to the message.
    """

    def __init__(self, trees: Sequence[Tree], how: Tokenization) -> None:
        self.trees, self.how = trees, how

    def __len__(self) -> int:
        return -(-len(self.trees) // TREES_IN_A_PART)

    def __getitem__(self, index: int) -> _Part | UserError:
        try:
            return _tokenized(self.trees[index * TREES_IN_A_PART : (index + 1) * TREES_IN_A_PART], self.how)
        except UserError as error:
            return error


def _tokenized(trees: Sequence[Tree], how: Tokenization) -> _Part:
    needs, tally, counts = how.needs, _Tally(), ImitationCounts()
    sequences = _SequenceBuilder(needs, how.imitation, counts)
    ranked, prompts = _RankedBuilder(needs), _PromptBuilder(needs)
    tree_ids, split_ids, split_hash = _RaggedBuilder("B"), _RaggedBuilder("B"), array("d")
    for index, tree in enumerate(trees):
        tree_ids.add(tree.id.encode())
        opening_id = tree.opening_id
        split_ids.add(opening_id.encode())
        split_hash.append(unit_hash(how.split_seed, opening_id))
        judged = _judged(tree, how) if needs.task in ("reward", "dpo") else []
        if needs.task != "reward":
            sequences.add(tree.threads, index, tally)
            prompts_of_tree = [p for p in (judged if needs.task == "dpo" else tree.prompts) if p.is_prompt]
            if needs.whole_conversations:
                prompts_of_tree = whole_conversations(prompts_of_tree)
            # SFT uses prompts for samples only: one per tree is enough, and its truncation does not matter.
            count = 1 if needs.task == "sft" else None
            prompts.add(prompts_of_tree[:count], index, tally if needs.task == "ppo" else _Tally())
        for prompt in judged:
            ranked.add(prompt, index, tally)
    trees_alone = {**tree_ids.build("tree_ids"), **split_ids.build("split_ids"), "split_hash": np.asarray(split_hash)}
    return _Part({**trees_alone, **sequences.build(), **ranked.build(), **prompts.build()}, tally, counts)


def _append(arrays: Arrays, writer: ArrayWriter) -> None:
    """Appends a part; its numbers, which count from the part's own beginning, then count from that of the whole."""
    before = {name: writer.length(counted) for name, counted in COUNTS.items()}
    for name, values in arrays.items():
        if name in BOUNDS and not writer.length(name):
            writer.append(name, np.zeros(1, dtype=np.int64))
        writer.append(name, values + before[name] if name in COUNTS else values)


def contrasted(prompts: Sequence[Conversation]) -> list[Conversation]:
    """The prompts of one tree. Prompts without ranks and labels get the response to another turn as a worse response.

    The worse response is from the same tree, so that it is in the same split and on the same subject.
    """
    result = []
    for index, prompt in enumerate(prompts):
        if prompt.references and all(r.rank is None and r.quality is None for r in prompt.references):
            given = prompt.references[0]
            others = [p.references[0] for p in prompts if p.references and p.references[0].text != given.text]
            if others:
                pair = (replace(given, rank=0), replace(others[index % len(others)], rank=1))
                prompt = replace(prompt, references=pair)
        result.append(prompt)
    return result


def whole_conversations(prompts: Sequence[Conversation]) -> list[Conversation]:
    """The first prompt of each conversation in one tree, with the later prompts of the conversation as ``later``.

    A conversation is a path through the tree to a user message without later user messages. Conversations that begin
    alike and diverge later are separate.
    """
    by_messages = {prompt.messages: prompt for prompt in prompts}
    before: dict[tuple[Message, ...], tuple[Message, ...]] = {}
    for messages in by_messages:
        # Usually the prompt two messages earlier, so a long conversation is not compared with all its prefixes.
        earlier = next((messages[:end] for end in range(len(messages) - 1, 0, -1) if messages[:end] in by_messages), ())
        before[messages] = earlier
    continued = set(before.values())
    result = []
    for messages in by_messages:
        if messages not in continued:
            chain = [messages]
            while before[chain[-1]]:
                chain.append(before[chain[-1]])
            first, *later = (by_messages[beginning] for beginning in reversed(chain))
            result.append(replace(first, later=tuple(later)))
    return result


def render_prompts(conversations: Sequence[Conversation], needs: DataNeeds) -> Prompts:
    """``conversations``, each of which ends with a user message, in their order."""
    rows = [needs.tokenizer.render_prompt(conversation, needs.prompt_length).ids for conversation in conversations]
    offsets = torch.tensor([0, *accumulate(map(len, rows))])
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return Prompts(Ragged(flat, offsets), conversations, torch.arange(len(conversations)))


def recent_messages(conversation: Conversation, room: int, tokens_of: Callable[[str], int]) -> Conversation:
    """``conversation`` without old messages that cannot fit in ``room`` tokens, so that they need not be encoded.

    Messages are kept from the end until their texts alone exceed ``room``. A leading system message is kept.
    Truncation to ``room`` tokens then gives the same result as for the whole conversation.
    """
    messages = conversation.messages
    if sum(len(message.text.encode()) for message in messages) <= room:  # a token is at least one byte
        return conversation
    start, used = len(messages), 0
    while start > 0 and used <= room:
        start -= 1
        used += tokens_of(messages[start].text)
    while start > 0 and messages[start].role == "system":  # it would be mistaken for the leading one
        start -= 1
    pinned = messages[:1] if start > 0 and messages[0].role == "system" else ()
    return replace(conversation, messages=pinned + messages[start:])


class _SequenceBuilder:
    def __init__(self, needs: DataNeeds, imitation: Imitation, counts: ImitationCounts) -> None:
        self.needs, self.imitation, self.counts = needs, imitation, counts
        self.ids, self.mask, self.tree = _RaggedBuilder("i"), _RaggedBuilder("b"), array("q")

    def add(self, threads: Sequence[Conversation], tree: int, tally: _Tally) -> None:
        known = MessageTree()
        for thread in threads:
            nodes = known.path(thread.messages)
            chosen = self.imitation.chosen(thread.messages, nodes, self.counts)
            rendered = self.needs.tokenizer.render(replace(thread, messages=chosen), self.needs.max_length)
            if not any(rendered.loss_mask):
                tally.left_out += 1
                continue
            tally.count(rendered)
            # What is kept starts with a user message, so the first assistant message in it has a larger index.
            self.counts.learned.update(
                node
                for i, node in enumerate(nodes)
                if chosen[i].learn and chosen[i].role == "assistant" and (i > rendered.dropped or not rendered.dropped)
            )
            self.ids.add(rendered.ids)
            self.mask.add(bytes(rendered.loss_mask))
            self.tree.append(tree)
        self.counts.finish_tree()

    def build(self) -> Arrays:
        mask = self.mask.build("sequences.loss_mask")
        mask["sequences.loss_mask.flat"] = mask["sequences.loss_mask.flat"].view(np.bool_)
        return {**self.ids.build("sequences.ids"), **mask, "sequences.tree": np.asarray(self.tree)}


class _PromptBuilder:
    def __init__(self, needs: DataNeeds) -> None:
        self.needs = needs
        self.ids, self.rows, self.tree = _RaggedBuilder("i"), _RaggedBuilder("B"), array("q")
        self.messages, self.parents, self.first_message = _RaggedBuilder("B"), array("q"), array("q")

    def add(self, prompts: Sequence[Conversation], tree: int, tally: _Tally) -> None:
        tokenizer = self.needs.tokenizer
        tokens_of = cache(lambda text: len(tokenizer.encode(text)))
        known, first_message = MessageTree(), len(self.parents)
        for prompt in prompts:
            recent = recent_messages(prompt, self.needs.prompt_length, tokens_of)
            rendered = tokenizer.render_prompt(recent, self.needs.prompt_length)
            dropped = rendered.dropped + len(prompt.messages) - len(recent.messages)
            self.ids.add(tally.count(replace(rendered, dropped=dropped) if dropped else rendered).ids)
            self.rows.add(_json(self._stored(prompt, known)))
            self.first_message.append(first_message)
            self.tree.append(tree)
        for parent, message in known.nodes:
            self.parents.append(parent)
            self.messages.add(_json(message_to_list(message)))

    def _stored(self, prompt: Conversation, known: MessageTree) -> dict[str, Any]:
        return {
            "last": known.path(prompt.messages)[-1],
            "rest": conversation_to_dict(replace(prompt, messages=(), later=())),
            "later": [self._stored(later, known) for later in prompt.later],
        }

    def build(self) -> Arrays:
        return {
            **self.ids.build("prompts.ids"),
            **self.rows.build("prompts.rows"),
            **self.messages.build("prompts.messages"),
            "prompts.parents": np.asarray(self.parents),
            "prompts.first_message": np.asarray(self.first_message),
            "prompts.tree": np.asarray(self.tree),
        }


class _RankedBuilder:
    def __init__(self, needs: DataNeeds) -> None:
        self.needs = needs
        self.ids, self.replies, self.tree = _RaggedBuilder("i"), array("q"), array("q")
        self.rank, self.quality, self.right = array("q"), array("f"), array("q")
        self.start, self.end = array("q"), array("q")

    def add(self, prompt: Conversation, tree: int, tally: _Tally) -> None:
        needs, labels = self.needs, self.needs.task == "reward" or self.needs.unpaired
        used = [r for r in prompt.references if r.rank is not None or (labels and r.quality is not None)]
        for reply in used:
            response = replace(reply, learn=True)  # marks its tokens
            rendered = tally.count(needs.tokenizer.render_response(prompt, response, needs.max_length))
            self.ids.add(rendered.ids)
            self.start.append(start_of_response(rendered))
            self.end.append(len(rendered.ids) - rendered.response_cut)
            self.rank.append(-1 if reply.rank is None else reply.rank)
            self.quality.append(float("nan") if reply.quality is None else reply.quality)
            passed = prompt.passes(reply.text)
            self.right.append(-1 if passed is None else passed)
        self.replies.append(len(self.rank))
        self.tree.append(tree)

    def build(self) -> Arrays:
        return {
            **self.ids.build("ranked.ids"),
            **{f"ranked.{name}": np.asarray(getattr(self, name)) for name in RANKED},
        }


def _judged(tree: Tree, how: Tokenization) -> list[Conversation]:
    """The prompts of ``tree`` with the responses that a reward model or DPO learns from."""
    prompts = contrasted(tree.prompts) if how.contrast else tree.prompts
    return [prompt for prompt in prompts if _is_judged(prompt, how.needs)]


def _is_judged(prompt: Conversation, needs: DataNeeds) -> bool:
    """Whether the task can learn from ``prompt``: it has two references with different ranks.

    For a reward model, one labelled reference is enough. A labelled response without a prompt counts: it is a prompt
    without messages. For DPO with ``unpaired``, one reference with a label or a rank is enough.
    """
    if needs.unpaired:
        return any(reply.quality is not None or reply.rank is not None for reply in prompt.references)
    labelled = needs.task == "reward" and any(reply.quality is not None for reply in prompt.references)
    return labelled or bool(ranked_pairs(prompt))


def start_of_response(rendered: Rendered) -> int:
    """The number of tokens before the last response in ``rendered``, which ends with it.

    Earlier responses are in the loss mask too, but not what opens the last one.
    """
    before = (i for i in reversed(range(len(rendered.loss_mask))) if not rendered.loss_mask[i])
    return next(before, -1) + 1


def _json(values: Any) -> bytes:
    return _JSON.encode(values).encode()
