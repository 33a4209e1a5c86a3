"""From verdicts to training data: pairs, labels and corrections, as rows that `rlchat fit` reads too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlchat.chat.verdicts import JudgedResponse
from rlchat.conversation import Check, Conversation, Message, spaced_words
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

_OASST_ROLES = {"user": "prompter", "assistant": "assistant", "system": "system"}


def fits(verdict: JudgedResponse, tokenizer: ChatTokenizer, max_length: int) -> bool:
    """Whether the last message and each judged response fit into ``max_length`` tokens without being cut.

    Older messages may be dropped, as they are in a chat.
    """
    texts = [text for text in (verdict.response, verdict.correction) if text]
    rendered = [tokenizer.render_response(verdict.prompt, Message("assistant", text), max_length) for text in texts]
    return not any(row.response_cut or row.cut for row in rendered)


@dataclass
class _Votes:
    """The verdicts on the responses to one prompt."""

    marks: dict[str, list[float]] = field(default_factory=dict)  # by text: 1 for each client that likes it, else 0
    corrections: set[str] = field(default_factory=set)

    def add(self, verdict: JudgedResponse) -> None:
        if verdict.kind == "corrected":
            self.corrections.add(verdict.correction)
            self.marks.setdefault(verdict.correction, []).append(1.0)
        if verdict.response:
            self.marks.setdefault(verdict.response, []).append(float(verdict.kind == "good"))


def judged_prompts(verdicts: Iterable[JudgedResponse]) -> list[Conversation]:
    """The prompts of ``verdicts``, each with what was said about its responses as ``references``.

    A response counts as good if more clients like it than dislike it. A correction is liked, and what it corrects is
    disliked. If a prompt has good and bad responses, they get the ranks 0 and 1. Otherwise a correction gets rank 0,
    and any other response the label 1 or 0. A response with as many votes for it as against it is left out.
    """
    by_prompt: dict[Conversation, _Votes] = {}
    for verdict in verdicts:
        by_prompt.setdefault(verdict.prompt, _Votes()).add(verdict)
    prompts = []
    for prompt, votes in by_prompt.items():
        share = {text: sum(marks) / len(marks) for text, marks in votes.marks.items()}
        decided = {text: mean > 0.5 for text, mean in share.items() if mean != 0.5}
        paired = len(set(decided.values())) == 2
        references = tuple(
            Message("assistant", text, rank=int(not good))
            if paired or (good and text in votes.corrections)
            else Message("assistant", text, quality=float(good))
            for text, good in decided.items()
        )
        if references:
            prompts.append(replace(prompt, references=references))
    return prompts


def rejected_texts(prompts: Iterable[Conversation]) -> set[str]:
    """The :func:`words_of` the responses that were judged as bad."""
    return {words_of(r.text) for prompt in prompts for r in prompt.references if r.rank == 1 or r.quality == 0}


def words_of(text: str) -> str:
    """The words of ``text`` in alphabetical order: "Tova is the capital." and "The capital is Tova." have the same."""
    return " ".join(sorted(spaced_words(text).split()))


def held(prompt: Conversation, text: str) -> Conversation:
    """``prompt`` with ``text`` as its only response, with the label 0.5: neither better nor worse than now.

    The label loss of DPO is then smallest where the log-prob of ``text`` is that of the reference model. It holds the
    policy there, and its gradient is 0 at the start of training.
    """
    return replace(prompt, references=(Message("assistant", text, quality=0.5),))


def write_prompts(path: Path, prompts: Sequence[Conversation]) -> None:
    """Writes ``prompts`` with their references to ``path``, one OASST tree per line."""
    with path.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts):
            file.write(json.dumps(_tree(prompt, f"learn-{number}"), ensure_ascii=False) + "\n")


def _tree(prompt: Conversation, name: str) -> dict[str, Any]:
    replies: list[dict[str, Any]] = []
    for i, reply in enumerate(prompt.references):
        row: dict[str, Any] = {"message_id": f"{name}-reply-{i}", "role": "assistant", "text": reply.text}
        if reply.rank is not None:
            row["rank"] = reply.rank
        if reply.quality is not None:
            row["labels"] = {"quality": {"value": reply.quality}}
        replies.append(row)
    for depth, message in reversed(list(enumerate(prompt.messages))):
        row = {"message_id": f"{name}-{depth}", "role": _OASST_ROLES[message.role], "text": message.text}
        if message.role == "assistant":  # of the context, which SFT must not imitate
            row["train"] = False
        if prompt.check is not None and depth == len(prompt.messages) - 1:
            row["check"] = _check_row(prompt.check)
        replies = [{**row, "replies": replies}]
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": replies[0]}


def _check_row(check: Check) -> dict[str, Any]:
    key = "any_of" if check.kind == "contains" else check.kind
    return {key: [*check.any_of], "none_of": [*check.none_of], "tolerance": check.tolerance}
