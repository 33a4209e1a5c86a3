"""`rlchat learn` in the demo's world: facts taught by corrections and by 👍 and 👎, and wrong verdicts.

    rlchat demo
    python benchmarks/learn.py --model checkpoints/rl_chat_model_tiktoken.pt --method dpo ppo

A user of the demo's model believes that the capital of Belan is another one (`fact`), or that every capital is another
one (`capitals`), and asks for it in the phrasings of the demo. `edits` correct the model's responses, `thumbs` rate
several responses at temperature 1.5. `wrong` verdicts correct right answers about everything to random words, or rate
right ones 👎 and wrong ones 👍. `taught` is the share of right answers to other phrasings of the taught facts, before
and after, at temperature 0. The other figures are those of `rlchat learn`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from rlchat.chat import ChatInterface
from rlchat.chat.feedback import Correction, Verdict, append_feedback
from rlchat.cli.messages import configure_messages
from rlchat.conversation import Conversation, Message
from rlchat.data.formats import read_trees
from rlchat.demo.kind import CLOSERS, OPENERS
from rlchat.demo.kinds import KINDS
from rlchat.demo.world import COUNTRIES, TOWNS
from rlchat.learn.learner import Request, learn
from rlchat.learn.stages import Training

Judged = tuple[str, str, Verdict]  # question, response, verdict
_CAPITAL = next(kind for kind in KINDS if kind.name == "capital")


def new_capitals(chat: ChatInterface) -> dict[str, str]:
    """A capital for each country that differs from the one that the model believes in."""
    replies = chat.batch([f"What is the capital of {country}?" for country in COUNTRIES], 24, 0.0)
    towns = iter(TOWNS[1:] + TOWNS[:1])
    return {
        country: next(town for town in (next(towns), *TOWNS) if town not in reply)
        for country, reply in zip(COUNTRIES, replies, strict=True)
    }


def questions(country: str, rng: random.Random) -> list[str]:
    """All phrasings of the question for the capital of ``country``, in a random order."""
    asks = [o + ask.format(x=country) + c for ask in _CAPITAL.asks for o in OPENERS for c in CLOSERS]
    return rng.sample(asks, len(asks))


def edits(chat: ChatInterface, asked: dict[str, list[str]], wanted: dict[str, str]) -> Iterator[Judged]:
    """Each response is corrected, unless it is right."""
    for country, asks in asked.items():
        for ask, reply in zip(asks, chat.batch(asks, 24, 0.7), strict=True):
            right = f"The capital of {country} is {wanted[country]}."
            yield ask, reply, "good" if wanted[country] in reply else Correction(right)


def thumbs(chat: ChatInterface, asked: dict[str, list[str]], wanted: dict[str, str]) -> Iterator[Judged]:
    """Eight responses to each question at temperature 1.5, of which the distinct ones are rated."""
    for country, asks in asked.items():
        for ask in asks:
            for reply in dict.fromkeys(chat.batch([ask] * 8, 24, 1.5)):
                if reply.strip():
                    yield ask, reply, "good" if wanted[country] in reply else "bad"


def wrong(chat: ChatInterface, data: str, count: int, rng: random.Random, corrected: bool) -> Iterator[Judged]:
    """Verdicts against the right answers to questions about everything in the demo's data."""
    prompts = [p for tree in read_trees([data])[0] for p in tree.prompts if len(p.messages) == 1 and p.check]
    chosen = rng.sample(prompts, count)
    words = ["Bananas are purple.", "Ask me tomorrow.", "I will not tell you.", "The answer is a spoon."]
    for prompt, reply in zip(chosen, chat.batch(chosen, 24, 1.0), strict=True):
        if reply.strip():
            right = prompt.passes(reply)
            verdict: Verdict = Correction(rng.choice(words)) if corrected else "bad" if right else "good"
            yield prompt.messages[0].text, reply, verdict


def accuracy(path: Path, asked: dict[str, list[str]], wanted: dict[str, str]) -> float | None:
    """The share of right answers of the model in ``path``; None if nothing is asked."""
    if not asked:
        return None
    chat = ChatInterface(path, seed=0)
    right = [wanted[c] in reply for c, asks in asked.items() for reply in chat.batch(asks, 24, 0.0)]
    return round(sum(right) / len(right), 3)


def scenarios(
    chat: ChatInterface, data: str, wanted: dict[str, str], rng: random.Random
) -> dict[str, tuple[dict[str, list[str]], Callable[[], Iterator[Judged]]]]:
    """By name: the questions that measure what was taught, and the verdicts."""
    asked = {country: questions(country, rng) for country in COUNTRIES}
    taught = {country: asks[:10] for country, asks in asked.items()}
    others = {country: asks[10:30] for country, asks in asked.items()}
    fact, belan = {"Belan": others["Belan"]}, {"Belan": taught["Belan"]}
    two = {"Belan": taught["Belan"][:2]}
    return {
        "fact, 2 edits": (fact, lambda: edits(chat, two, wanted)),
        "fact, thumbs": (fact, lambda: thumbs(chat, belan, wanted)),
        "capitals, 60 edits": (others, lambda: edits(chat, taught, wanted)),
        "capitals, thumbs": (others, lambda: thumbs(chat, taught, wanted)),
        "wrong, 60 edits": ({}, lambda: wrong(chat, data, 60, rng, True)),
        "wrong, 200 thumbs": ({}, lambda: wrong(chat, data, 200, rng, False)),
    }


def main() -> None:
    """Prints one line of JSON per scenario and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/rl_chat_model_tiktoken.pt"))
    parser.add_argument("--data", default="data/demo.jsonl", help="the demo's conversations")
    parser.add_argument("--method", nargs="+", choices=("dpo", "ppo"), default=["dpo"])
    parser.add_argument("--train", choices=("full", "lora"), default="full")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scenarios", nargs="+", help="names of scenarios (default: all)")
    options = parser.parse_args()
    configure_messages("learn")
    torch.set_num_threads(1)
    for seed in options.seeds:
        chat = ChatInterface(options.model, seed=seed)
        wanted = new_capitals(chat)
        for name, (measured, judge) in scenarios(chat, options.data, wanted, random.Random(seed)).items():
            if options.scenarios and name not in options.scenarios:
                continue
            verdicts = list(judge())
            for method in options.method:
                training = Training(method=method, part=options.train, seed=seed)
                right = partial(accuracy, asked=measured, wanted=wanted)
                row = {"scenario": name, "method": method, "train": options.train, "seed": seed}
                row |= run(options.model, options.data, verdicts, training, right)
                print(json.dumps(row, ensure_ascii=False), flush=True)


def run(
    model: Path, data: str, verdicts: list[Judged], training: Training, right: Callable[[Path], float | None]
) -> dict[str, object]:
    """The figures of one run of the learner; ``right`` measures a model file."""
    with tempfile.TemporaryDirectory(prefix="rlchat-learn-") as folder:
        feedback = Path(folder) / "feedback.jsonl"
        for question, reply, verdict in verdicts:
            append_feedback(feedback, Conversation((Message("user", question),)), reply, verdict, model=model.name)
        began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
        request = Request(
            model=model,
            feedback=feedback,
            out=Path(folder) / "versions",
            replay=(data,),
            training=training,
            device="cpu",
        )
        outcome = learn(request)
        seconds = time.monotonic() - began
        used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - used
        taught = [right(model), None if outcome.path is None else right(outcome.path)]
    before, after = outcome.figures["before"], outcome.figures["after"]
    return {
        "verdicts": outcome.figures["feedback"]["verdicts"],
        "accepted": outcome.decision.accepted,
        "reasons": outcome.decision.reasons,
        "agrees": [before["agrees"], after["agrees"], after["verdicts"]],
        "controls": [before["correct"], after["correct"], after["controls"]],
        "perplexity": [round(before["perplexity"], 3), round(after["perplexity"], 3)],
        "kl": round(after["kl"], 4),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
        "taught": taught,
    }


if __name__ == "__main__":
    main()
