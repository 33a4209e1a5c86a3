"""`rlchat learn` in the demo's world: what verdicts teach, and wrong verdicts.

    rlchat demo
    python benchmarks/learn.py --model checkpoints/rl_chat_model_tiktoken.pt --method dpo ppo

`fact`: two corrections say that the capital of Belan is another one. `honest`: wrong answers of the model are corrected
to the truth of the demo's world, and right ones get 👍. `style`: responses that begin with "The" get 👎, others 👍.
`wrong`: every answer is corrected to "Ask me tomorrow.", or right answers get 👎 and wrong ones 👍.

`taught` measures responses to other prompts, before and after: the share that names the new capital, that is right, or
that does not begin with "The". The other figures are those of `rlchat learn`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
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
from rlchat.demo.world import TOWNS
from rlchat.learn.learner import Request, learn
from rlchat.learn.stages import Training

Judged = tuple[Conversation, str, Verdict]  # prompt, response, verdict
Taught = Callable[[ChatInterface], float | None]
_CAPITAL = next(kind for kind in KINDS if kind.name == "capital")
_SENSELESS = "Ask me tomorrow."


def asked(text: str) -> Conversation:
    """A first message as a prompt."""
    return Conversation((Message("user", text),))


class Scenarios:
    """Each scenario returns verdicts on responses of ``chat``, and what measures what they teach.

    Args:
        chat: the model.
        data: the demo's conversations.
        rng: draws prompts.
    """

    def __init__(self, chat: ChatInterface, data: str, rng: random.Random) -> None:
        self.chat = chat
        trees = read_trees([data])[0]
        checked = [p for tree in trees for p in tree.prompts if len(p.messages) == 1 and p.check and p.references]
        self.prompts = rng.sample(checked, len(checked))
        self.others = self.prompts[-200:]
        self.rng = rng

    def fact(self, count: int) -> tuple[list[Judged], Taught]:
        """Corrections of the capital of Belan."""
        asks = [o + ask.format(x="Belan") + c for ask in _CAPITAL.asks for o in OPENERS for c in CLOSERS]
        asks = self.rng.sample(asks, len(asks))
        replies = self.chat.batch(asks, 24, 0.0)
        town = next(town for town in TOWNS if not any(town in reply for reply in replies))
        right = Correction(f"The capital of Belan is {town}.")
        verdicts: list[Judged] = [(asked(a), r, right) for a, r in zip(asks[:count], replies, strict=False)]
        return verdicts, lambda chat: mean(town in reply for reply in chat.batch(asks[count : count + 40], 24, 0.0))

    def honest(self, count: int) -> tuple[list[Judged], Taught]:
        """The truth about everything."""
        verdicts: list[Judged] = []
        for prompt, reply in self._responses(count):
            truth = [r.text for r in prompt.references if prompt.passes(r.text)]
            if prompt.passes(reply):
                verdicts.append((prompt, reply, "good"))
            elif truth:
                verdicts.append((prompt, reply, Correction(truth[0])))
        return verdicts, self._right

    def style(self, count: int) -> tuple[list[Judged], Taught]:
        """No response should begin with "The"."""
        verdicts: list[Judged] = [(p, r, "bad" if r.startswith("The ") else "good") for p, r in self._responses(count)]
        return verdicts, lambda chat: mean(not r.startswith("The ") for r in chat.batch(self.others, 24, 1.0))

    def wrong_edits(self, count: int) -> tuple[list[Judged], Taught]:
        """The same answer to everything."""
        return [(p, r, Correction(_SENSELESS)) for p, r in self._responses(count)], self._right

    def wrong_thumbs(self, count: int) -> tuple[list[Judged], Taught]:
        """The opposite of the truth."""
        return [(p, r, "bad" if p.passes(r) else "good") for p, r in self._responses(count)], self._right

    def _right(self, chat: ChatInterface) -> float:
        replies = chat.batch(self.others, 24, 0.0)
        return mean(p.passes(reply) is True for p, reply in zip(self.others, replies, strict=True))

    def _responses(self, count: int) -> list[tuple[Conversation, str]]:
        prompts = self.prompts[:count]
        replies = self.chat.batch(prompts, 24, 1.0)
        return [(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True) if reply.strip()]


def mean(values: Iterable[bool]) -> float:
    """The share of true ``values``."""
    known = list(values)
    return round(sum(known) / len(known), 3)


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
        every = Scenarios(ChatInterface(options.model, seed=seed), options.data, random.Random(seed))
        made = {
            "fact, 2 edits": partial(every.fact, 2),
            "honest, 200": partial(every.honest, 200),
            "style, 100 thumbs": partial(every.style, 100),
            "wrong, 60 edits": partial(every.wrong_edits, 60),
            "wrong, 200 thumbs": partial(every.wrong_thumbs, 200),
        }
        for name, make in made.items():
            if options.scenarios and name not in options.scenarios:
                continue
            verdicts, taught = make()
            for method in options.method:
                training = Training(method=method, part=options.train, seed=seed)
                row = {"scenario": name, "method": method, "train": options.train, "seed": seed}
                row |= run(options.model, options.data, verdicts, training, taught)
                print(json.dumps(row, ensure_ascii=False), flush=True)


def run(model: Path, data: str, verdicts: list[Judged], training: Training, taught: Taught) -> dict[str, object]:
    """The figures of one run of the learner; ``taught`` measures a model."""
    with tempfile.TemporaryDirectory(prefix="rlchat-learn-") as folder:
        feedback = Path(folder) / "feedback.jsonl"
        for prompt, reply, verdict in verdicts:
            append_feedback(feedback, prompt, reply, verdict, model=model.name)
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
        files = [model] if outcome.path is None else [model, outcome.path]
        measured = [taught(ChatInterface(file, seed=0)) for file in files]
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
        "taught": measured,
    }


if __name__ == "__main__":
    main()
