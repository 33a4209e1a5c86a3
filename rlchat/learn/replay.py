"""Replay: prompts of the original training, which keep the new version close to the original, and held-out ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlchat.conversation import Conversation, Message
from rlchat.data.forest import Tree, tree_id_of
from rlchat.data.formats import read_forest
from rlchat.data.loading import Reading
from rlchat.data.splits import split_trees, unit_hash
from rlchat.errors import UserError

# Without data of the original training. Every second one is replayed, and the others are the controls.
EVERYDAY = (
    "Hello",
    "Hi, how are you?",
    "What is your name?",
    "Who are you?",
    "What can you do?",
    "Good morning!",
    "Thank you very much.",
    "Goodbye",
    "What is two plus three?",
    "What comes after Monday?",
    "Tell me a joke.",
    "Write a short poem about the sea.",
    "What is the capital of France?",
    "Which colour is the sky?",
    "How many days does a week have?",
    "What is the opposite of hot?",
    "Explain what a computer is.",
    "How do I cook rice?",
    "Can you help me with my homework?",
    "What should I read next?",
    "I am sad today.",
    "I do not understand.",
    "Give me three names for a cat.",
    "Translate good night into French.",
    "Where do birds live?",
    "Why is the sea salty?",
    "What is a healthy breakfast?",
    "How do plants grow?",
    "Summarize the story of Cinderella.",
    "What time is it?",
    "Is it going to rain tomorrow?",
    "What do you think about music?",
)
# The defaults of the data module: older model files do not name these options.
_SPLIT = {"seed": 0, "val_fraction": 0.05, "test_fraction": 0.05}
_READING = Reading(lang="en", on_bad_line="error", keep_synthetic=False, split_text=False)


@dataclass(frozen=True)
class Replay:
    """What is replayed, and what the gate measures on.

    Attributes:
        source: where the prompts are from, as a phrase.
        prompts: training prompts.
        judged: training prompts whose references have ranks or labels, for the reward model.
        threads: held-out conversations with human replies.
        controls: held-out prompts; if some have a check, only those.
    """

    source: str
    prompts: list[Conversation]
    judged: list[Conversation]
    threads: list[Conversation]
    controls: list[Conversation]

    @property
    def checked(self) -> bool:
        """Whether the controls have answers that can be checked."""
        return any(prompt.check is not None for prompt in self.controls)


def everyday_replay(limit: int, without: Collection[str]) -> Replay:
    """At most ``limit`` packaged everyday prompts, without human replies and answers, and as many controls.

    Prompts with the opening ids ``without`` are left out of both.
    """
    prompts = [Conversation((Message("user", text),)) for text in EVERYDAY]
    replayed, controls = (
        [prompt for prompt in half if tree_id_of(prompt.messages) not in without]
        for half in (prompts[::2], prompts[1::2])
    )
    return Replay("packaged everyday prompts", replayed[:limit], [], [], controls)


@dataclass(frozen=True)
class TrainingData:
    """The data that a model was trained on.

    Attributes:
        paths: its files; empty if they are not known.
        split: the seed and the fractions of the split.
        reading: how the files were read.
    """

    paths: list[str]
    split: Mapping[str, Any]
    reading: Reading


def data_of(about: Mapping[str, Any]) -> TrainingData:
    """The data that a model file says it was trained on; what it does not say is as by default.

    ``about`` is from a file, so everything in it may have any type.
    """
    data = about.get("data")
    if not isinstance(data, dict):
        data = {}
    paths = data.get("path")
    found = [path for path in paths if isinstance(path, str)] if isinstance(paths, list) else []
    split = {name: data[name] for name in _SPLIT if isinstance(data.get(name), int | float)}
    reading = {name: data[name] for name, fits in _FITS.items() if name in data and fits(data[name])}
    return TrainingData(found, {**_SPLIT, **split}, replace(_READING, **reading))


_FITS: dict[str, Callable[[Any], bool]] = {
    "lang": lambda value: value is None or isinstance(value, str),
    "on_bad_line": lambda value: value in ("error", "skip"),
    "keep_synthetic": lambda value: isinstance(value, bool),
    "split_text": lambda value: isinstance(value, bool),
}


def read_replay(
    data: TrainingData,
    without: Collection[str],
    *,
    limit: int,
    held_out_limit: int,
) -> Replay:
    """Replay data, read and split as in the training of the original model.

    Args:
        data: files in any format that `rlchat fit` reads.
        without: the opening ids of the verdicts' prompts, whose trees are left out.
        limit: the largest number of training prompts.
        held_out_limit: the largest number of held-out conversations, and of controls.

    Raises:
        UserError: a file cannot be read, or contains no prompts.
    """
    with tempfile.TemporaryDirectory(prefix="rlchat-learn-") as folder:
        forest, _ = read_forest(data.paths, Path(folder) / "trees", **asdict(data.reading))
        trees = forest[:]
    split = data.split
    places = torch.tensor([unit_hash(split["seed"], tree.opening_id) for tree in trees], dtype=torch.float64)
    sides = split_trees(places, torch.arange(len(trees)), split["val_fraction"], split["test_fraction"])
    trained = _side(trees, sides["train"], without)
    held_out = _side(trees, (sides["val"] | sides["test"]) & ~sides["train"], without)
    prompts = [prompt for tree in trained for prompt in tree.prompts if prompt.is_prompt]
    if not prompts:
        raise UserError(
            f"{', '.join(data.paths)}: no prompts to replay beside those of the verdicts; pass other data with "
            f"--replay FILE"
        )
    asked = [prompt for tree in held_out for prompt in tree.prompts if prompt.is_prompt]
    checked = [prompt for prompt in asked if prompt.check is not None]
    judged = [
        prompt for prompt in prompts if any(r.rank is not None or r.quality is not None for r in prompt.references)
    ]
    return Replay(
        ", ".join(data.paths),
        _sample(prompts, limit),
        _sample(judged, limit),
        _sample([_imitable(thread) for tree in held_out for thread in tree.threads], held_out_limit),
        _sample(checked or asked, held_out_limit),
    )


def _side(trees: Sequence[Tree], chosen: torch.Tensor, without: Collection[str]) -> list[Tree]:
    sides = zip(trees, chosen.tolist(), strict=True)
    return [tree for tree, is_chosen in sides if is_chosen and tree.opening_id not in without]


def _imitable(thread: Conversation) -> Conversation:
    """``thread`` with the loss on all human replies that were not judged as bad."""
    return replace(
        thread,
        messages=tuple(
            replace(m, learn=m.learn and not m.rank and (m.quality is None or m.quality >= 0.5))
            if m.role == "assistant"
            else m
            for m in thread.messages
        ),
    )


def _sample(conversations: Iterable[Conversation], limit: int) -> list[Conversation]:
    """At most ``limit`` of ``conversations``, always the same ones, also if others are added."""

    def place(conversation: Conversation) -> float:
        return unit_hash(0, "\n".join(f"{m.role}: {m.text}" for m in conversation.messages))

    return sorted(conversations, key=place)[:limit]
