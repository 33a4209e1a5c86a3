"""Tokenizes trees of conversations.

:func:`tokenize_trees` renders the data of one task (threads, prompts or ranked responses) into flat tensors.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlchat.conversation import Conversation, Message, conversation_to_dict, message_to_list
from rlchat.data.corpus import Corpus, DataNeeds, Prompts, Ragged, RankedReplies, Sequences, StoredConversations
from rlchat.data.forest import Tree
from rlchat.data.formats import ranked_pairs
from rlchat.data.imitation import Imitation, ImitationCounts, MessageTree
from rlchat.tokenizer.rendering import Rendered
from rlchat.utils.progress import with_progress


@dataclass
class _RaggedBuilder:
    """Collects rows in C arrays: lists of Python ints would take ten times the memory."""

    typecode: str
    flat: array[int] = field(init=False)
    offsets: array[int] = field(default_factory=lambda: array("q", [0]))

    def __post_init__(self) -> None:
        self.flat = array(self.typecode)

    def add(self, row: Iterable[int]) -> None:
        self.flat.extend(row)
        self.offsets.append(len(self.flat))

    def build(self, dtype: torch.dtype) -> Ragged:
        flat = torch.frombuffer(self.flat, dtype=dtype) if self.flat else torch.empty(0, dtype=dtype)
        return Ragged(flat, torch.frombuffer(self.offsets, dtype=torch.int64))


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


def tokenize_trees(
    trees: Sequence[Tree],
    needs: DataNeeds,
    report: str = "",
    warnings: Sequence[str] = (),
    *,
    imitation: Imitation | None = None,
    contrast: bool = False,
    progress: bool = False,
) -> Corpus:
    """The data for ``needs.task`` in ``trees``, rendered and truncated.

    ``imitation`` selects the messages that SFT trains on (default: every assistant message once). With ``contrast``,
    :func:`contrasted` adds responses.
    """
    tally, counts = _Tally(), ImitationCounts()
    sequences = _SequenceBuilder(needs, imitation or Imitation(), counts)
    ranked, prompts = _RankedBuilder(needs), _PromptBuilder(needs)
    for index, tree in enumerate(with_progress(trees, "tokenizing", progress)):
        if needs.task in ("sft", "ppo"):
            sequences.add(tree.threads, index, tally)
            prompts_of_tree = [p for p in tree.prompts if p.is_prompt]
            if needs.whole_conversations:
                prompts_of_tree = whole_conversations(prompts_of_tree)
            # SFT uses prompts for samples only: one per tree is enough, and its truncation does not matter.
            count = 1 if needs.task == "sft" else None
            prompts.add(prompts_of_tree[:count], index, tally if needs.task == "ppo" else _Tally())
        if needs.task == "reward":
            for prompt in filter(_is_judged, contrasted(tree.prompts) if contrast else tree.prompts):
                ranked.add(prompt, index, tally)
    facts = {"trees": len(trees), **vars(tally)}
    if needs.task == "sft":
        report = "; ".join(filter(None, (report, counts.summary())))
    return Corpus(
        [tree.id for tree in trees],
        [tree.opening_id for tree in trees],
        sequences.build(),
        ranked.build(),
        prompts.build(),
        facts,
        report,
        list(warnings),
    )


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
    ids = _RaggedBuilder("i")
    for conversation in conversations:
        ids.add(needs.tokenizer.render_prompt(conversation, needs.prompt_length).ids)
    return Prompts(ids.build(torch.int32), conversations, torch.arange(len(conversations)))


def recent_messages(conversation: Conversation, room: int, tokens_of: Callable[[str], int]) -> Conversation:
    """``conversation`` without old messages that cannot fit in ``room`` tokens, so that they need not be encoded.

    Messages are kept from the end until their texts alone exceed ``room``. A leading system message is kept.
    Truncation to ``room`` tokens then gives the same result as for the whole conversation.
    """
    messages = conversation.messages
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
            self.mask.add(rendered.loss_mask)
            self.tree.append(tree)
        self.counts.finish_tree()

    def build(self) -> Sequences:
        return Sequences(self.ids.build(torch.int32), self.mask.build(torch.bool), _long(self.tree))


class _PromptBuilder:
    def __init__(self, needs: DataNeeds) -> None:
        self.needs = needs
        self.ids, self.rows, self.tree = _RaggedBuilder("i"), _RaggedBuilder("B"), array("q")
        self.messages, self.parents = _RaggedBuilder("B"), array("q")

    def add(self, prompts: Sequence[Conversation], tree: int, tally: _Tally) -> None:
        tokenizer = self.needs.tokenizer
        tokens_of = cache(lambda text: len(tokenizer.encode(text)))
        known = MessageTree(first=len(self.parents))
        for prompt in prompts:
            recent = recent_messages(prompt, self.needs.prompt_length, tokens_of)
            rendered = tokenizer.render_prompt(recent, self.needs.prompt_length)
            dropped = rendered.dropped + len(prompt.messages) - len(recent.messages)
            self.ids.add(tally.count(replace(rendered, dropped=dropped)).ids)
            self.rows.add(json.dumps(self._stored(prompt, known), ensure_ascii=False).encode())
            self.tree.append(tree)
        for parent, message in known.nodes:
            self.parents.append(parent)
            self.messages.add(json.dumps(message_to_list(message), ensure_ascii=False).encode())

    def _stored(self, prompt: Conversation, known: MessageTree) -> dict[str, Any]:
        return {
            "last": known.path(prompt.messages)[-1],
            "rest": conversation_to_dict(replace(prompt, messages=(), later=())),
            "later": [self._stored(later, known) for later in prompt.later],
        }

    def build(self) -> Prompts:
        stored = StoredConversations(
            self.rows.build(torch.uint8), self.messages.build(torch.uint8), _long(self.parents)
        )
        return Prompts(self.ids.build(torch.int32), stored, _long(self.tree))


class _RankedBuilder:
    def __init__(self, needs: DataNeeds) -> None:
        self.needs = needs
        self.ids, self.replies, self.tree = _RaggedBuilder("i"), array("q", [0]), array("q")
        self.rank, self.quality, self.right = array("q"), array("f"), array("q")

    def add(self, prompt: Conversation, tree: int, tally: _Tally) -> None:
        needs = self.needs
        judged = [reply for reply in prompt.references if reply.rank is not None or reply.quality is not None]
        for reply in judged:
            self.ids.add(tally.count(needs.tokenizer.render_response(prompt, reply, needs.max_length)).ids)
            self.rank.append(-1 if reply.rank is None else reply.rank)
            self.quality.append(float("nan") if reply.quality is None else reply.quality)
            self.right.append(-1 if prompt.check is None else prompt.check.passes(reply.text))
        self.replies.append(len(self.rank))
        self.tree.append(tree)

    def build(self) -> RankedReplies:
        quality = torch.frombuffer(self.quality, dtype=torch.float32) if self.quality else torch.empty(0)
        return RankedReplies(
            self.ids.build(torch.int32),
            _long(self.replies),
            _long(self.rank),
            quality,
            _long(self.right),
            _long(self.tree),
        )


def _is_judged(prompt: Conversation) -> bool:
    """Whether a reward model can learn from ``prompt``: it has two references with different ranks, or a labelled one.

    A labelled response without a prompt counts: it is a prompt without messages.
    """
    return any(reply.quality is not None for reply in prompt.references) or bool(ranked_pairs(prompt))


def _long(values: array[int]) -> Tensor:
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)
