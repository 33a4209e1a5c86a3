"""Selects the prompts, human replies and rankings of `rlchat demo --real` from the messages of OASST1.

python benchmarks/real_prompts.py en-validation.messages.jsonl.gz --out rlchat/demo/real/data

It writes train.jsonl and held_out.jsonl. No conversation tree is in both. Prompts are first messages, and later
messages that can be understood alone. A held-out first message comes with its best human reply, for the perplexity.
Where a later message refers to earlier ones that are short, the training prompt is the conversation up to it.

It also writes rankings.jsonl and held_out_rankings.jsonl, for the reward model: short conversations whose last user
message has two or more ranked replies, as messages of OASST1. They are from the same trees as train.jsonl and
held_out.jsonl, and no training conversation has a user message of a held-out tree.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MOST_WORDS, FEWEST_WORDS = 40, 2
HELD_OUT = 0.28
"""The share of the trees whose messages are held out."""
CONTEXT_WORDS = 95
"""The most words of a training prompt that is a conversation."""
REPLY_WORDS = 5, 200
"""The fewest and the most words of a human reply."""

RANKED_CHARACTERS = 1500
"""The most characters of a conversation with a ranked reply: up to about 350 tokens of SmolLM2."""

UNWANTED = ("spam", "lang_mismatch", "pii", "not_appropriate", "hate_speech", "sexual_content", "violence")
MOST_UNWANTED = 0.4

# A later message with one of these words refers to something said before. A program cannot know this exactly.
_BACKWARD = re.compile(
    r"\b(that|this|these|those|it|its|it's|they|them|their|above|previous|again|instead|thanks|thank|sorry|said|"
    r"mentioned|wrote|rewrite|continue|you forgot|your (answer|response|last|first|list|explanation|code)|ok|okay)\b",
    re.IGNORECASE,
)
# Code, links, and other scripts than the Latin one.
_NOT_PLAIN = re.compile(r"```|https?://|[\u0400-\uffff<>{}|\\]")


def main() -> None:
    parser = argparse.ArgumentParser(description="Select the prompts of the demo with a real model.")
    parser.add_argument("messages", type=Path, help="the messages of OASST1, as JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    options = parser.parse_args()
    opener: Any = gzip.open if options.messages.suffix == ".gz" else open
    with opener(options.messages, "rt", encoding="utf-8") as file:
        messages = [json.loads(line) for line in file]
    train, held_out = select(messages)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("held_out", held_out)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        replies = sum("messages" in row for row in rows)
        print(f"{name}: {len(rows)} prompts, {replies} of them with a human reply, {len(text.encode()):,} bytes")
    for name, rows in zip(("rankings", "held_out_rankings"), rankings(messages), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        ranked = Counter(row["parent_id"] for row in rows if "labels" in row)
        print(f"{name}: {len(ranked)} prompts with {ranked.total()} ranked replies, {len(text.encode()):,} bytes")


def select(messages: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows and held-out rows."""
    replies = defaultdict(list)
    for message in messages:
        replies[message["parent_id"]].append(message)
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    seen: set[str] = set()
    for root in sorted(replies[None], key=lambda message: message["message_id"]):
        held = is_held_out(root)
        for thread in threads((root,), replies):
            text = " ".join(thread[-1]["text"].split())
            plain = plain_text(text)
            if plain in seen or not is_prompt(thread[-1]):
                continue
            if thread[1:] and _BACKWARD.search(text):
                if not held and all(map(is_clean, thread)) and words_of(thread) <= CONTEXT_WORDS:
                    seen.add(plain)
                    train.append({"prompt": [as_message(message) for message in thread]})
                continue
            seen.add(plain)
            reply = human_reply(replies[root["message_id"]]) if held and not thread[1:] else None
            (held_out if held else train).append({"prompt": text} if reply is None else with_reply(text, reply))
    return train, held_out


def rankings(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages of the training rankings and of the held-out ones, each in the order of ``messages``.

    A message has the fields that the reader of OASST needs. Only a ranked reply to compare has a quality label.
    """
    by_id = {message["message_id"]: message for message in messages}
    replies = defaultdict(list)
    for message in messages:
        replies[message["parent_id"]].append(message)
    held_out = {plain_text(m["text"]) for m in messages if m["role"] == "prompter" and is_held_out(m)}
    context: set[str] = set()
    compared: set[str] = set()
    for prompt in messages:
        if prompt["role"] != "prompter":
            continue
        thread = [prompt]
        while thread[0]["parent_id"] in by_id:
            thread.insert(0, by_id[thread[0]["parent_id"]])
        asked = {plain_text(message["text"]) for message in thread if message["role"] == "prompter"}
        complete = thread[0]["parent_id"] is None
        if not complete or not all(map(is_clean, thread)) or (asked & held_out and not is_held_out(prompt)):
            continue
        room = RANKED_CHARACTERS - sum(len(message["text"]) for message in thread)
        found = [r for r in replies[prompt["message_id"]] if r["rank"] is not None and is_clean(r)]
        found = [reply for reply in found if len(reply["text"]) <= room]
        if len(found) >= 2:
            context |= {message["message_id"] for message in thread}
            compared |= {reply["message_id"] for reply in found}
    train: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    for message in messages:
        if message["message_id"] in context | compared:
            row = {name: message[name] for name in ("message_id", "parent_id", "role", "text")}
            row |= {} if message["rank"] is None else {"rank": message["rank"]}
            row |= {"labels": quality_label(message)} if message["message_id"] in compared else {}
            (held if is_held_out(message) else train).append(row)
    return train, held


def is_held_out(message: dict[str, Any]) -> bool:
    """Whether the tree of ``message`` is held out."""
    number = int(hashlib.sha256(message["message_tree_id"].encode()).hexdigest(), 16)
    return number % 1000 < 1000 * HELD_OUT


def plain_text(text: str) -> str:
    """``text`` in lower case without punctuation, to find equal messages."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def quality_label(message: dict[str, Any]) -> dict[str, Any]:
    """The label ``quality`` of ``message`` in the layout of OASST; no labels if it has none."""
    labels = message.get("labels") or {"name": [], "value": []}
    values = {name: round(value, 4) for name, value in zip(labels["name"], labels["value"], strict=True)}
    found = [name for name in ("quality",) if name in values]
    return {"name": found, "value": [values[name] for name in found]}


def threads(thread: tuple[dict[str, Any], ...], replies: dict[Any, list[dict[str, Any]]]) -> Iterable[Any]:
    """The beginnings of the conversations below ``thread`` that end with a user message."""
    if thread[-1]["role"] == "prompter":
        yield thread
    for reply in replies[thread[-1]["message_id"]]:
        yield from threads((*thread, reply), replies)


def words_of(thread: Iterable[dict[str, Any]]) -> int:
    return sum(len(message["text"].split()) for message in thread)


def as_message(message: dict[str, Any]) -> dict[str, str]:
    return {"role": {"prompter": "user"}.get(message["role"], "assistant"), "content": message["text"].strip()}


def is_prompt(message: dict[str, Any]) -> bool:
    """Whether a message is short and clean."""
    text = message["text"].strip()
    return FEWEST_WORDS <= len(text.split()) <= MOST_WORDS and not _NOT_PLAIN.search(text) and is_clean(message)


def is_clean(message: dict[str, Any]) -> bool:
    """Whether hardly any labeller objected to a message."""
    labels = message.get("labels") or {"name": [], "value": []}
    values = dict(zip(labels["name"], labels["value"], strict=True))
    return not message["deleted"] and all(values.get(name, 0) <= MOST_UNWANTED for name in UNWANTED)


def human_reply(replies: Iterable[dict[str, Any]]) -> str | None:
    """The best ranked reply of a suitable length; None if there is none."""
    fewest, most = REPLY_WORDS
    suitable = [
        r for r in replies if r["rank"] is not None and is_clean(r) and fewest <= len(r["text"].split()) <= most
    ]
    return min(suitable, key=lambda reply: reply["rank"])["text"].strip() if suitable else None


def with_reply(prompt: str, reply: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


if __name__ == "__main__":
    main()
