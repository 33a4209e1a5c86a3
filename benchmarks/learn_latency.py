"""Learning while chatting: how much it slows the chat, and how long a new version takes.

    rlchat demo
    python -m benchmarks.learn_latency --model checkpoints/rl_chat_model_tiktoken.pt

A client asks one question after another of a `rlchat serve --learn` process and streams the responses. First nobody
gives verdicts: that is `idle`. Then the client corrects eight responses about the capital of a country, so that a
round of learning begins, and goes on asking: that is `learning`, from the eighth verdict to the first response of the
new version. `--rounds` repeats both. Times per token are between two pieces of a stream.

The client waits `--pause` seconds before each question, less than a person who reads and types; with `--pause 0`, it
keeps one core busy, and a round gets what is left of the other. Run it where nothing else uses the cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving import server
from rlchat.demo.kind import CLOSERS, OPENERS
from rlchat.demo.kinds import KINDS
from rlchat.demo.world import COUNTRIES, TOWNS

EVERY = 8
_SECONDS = 300.0  # a round that takes longer has failed
_CAPITAL = next(kind for kind in KINDS if kind.name == "capital")


class Chat:
    """A client. ``gaps`` are the times between two pieces of a response, ``firsts`` those to the first piece."""

    def __init__(self, url: str, pause: float) -> None:
        self.pause = pause
        self.http = httpx.Client(base_url=url, timeout=60)
        self.gaps: list[float] = []
        self.firsts: list[float] = []
        self.seed = 0

    def ask(self, question: str) -> tuple[str, str]:
        """The response, and the model file that generated it."""
        time.sleep(self.pause)
        self.seed += 1
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 24, "seed": self.seed}
        text, last = "", time.perf_counter()
        with self.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    sys.exit(f"a stream ended with the error: {chunk['error']['message']}")
                piece = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                if piece:
                    now = time.perf_counter()
                    (self.gaps if text else self.firsts).append(now - last)
                    text, last = text + piece, now
            return text, response.headers["X-Rlchat-Version"]

    def correct(self, question: str, reply: str, correction: str, model: str) -> None:
        """Gives a verdict."""
        messages = [{"role": "user", "content": question}]
        body = {"messages": messages, "reply": reply, "correction": correction, "client": "benchmark", "model": model}
        self.http.post("/feedback", json=body).raise_for_status()

    def status(self) -> dict[str, Any]:
        """Where learning stands."""
        found: dict[str, Any] = self.http.get("/learning").raise_for_status().json()
        return found

    def take(self) -> tuple[list[float], list[float]]:
        """The times since the last call."""
        taken = self.gaps, self.firsts
        self.gaps, self.firsts = [], []
        return taken


def questions(rng: random.Random, countries: Sequence[str] = COUNTRIES) -> list[str]:
    """Questions about the capitals of ``countries``, in random order."""
    asks = [o + ask.format(x=x) + c for ask in _CAPITAL.asks for x in countries for o in OPENERS for c in CLOSERS]
    return rng.sample(asks, len(asks))


def one_round(chat: Chat, country: str, idle_seconds: float) -> dict[str, Any]:
    """The figures of an idle time, and of a round of learning."""
    asks = itertools.cycle(questions(random.Random(0)))
    until = time.monotonic() + idle_seconds
    while time.monotonic() < until:
        chat.ask(next(asks))
    idle, idle_firsts = chat.take()
    before = chat.status()
    asked = questions(random.Random(1), [country])[:EVERY]
    answers = [chat.ask(question) for question in asked]
    town = next(town for town in TOWNS if not any(town in reply for reply, _ in answers))
    for question, (reply, model) in zip(asked, answers, strict=True):
        chat.correct(question, reply, f"The capital of {country} is {town}.", model)
    began = time.monotonic()
    chat.take()
    answered, looked = None, began
    while time.monotonic() < began + _SECONDS:
        _, model = chat.ask(next(asks))
        if model != before["file"]:
            answered = time.monotonic() - began
            break
        if time.monotonic() > looked + 1:
            looked, status = time.monotonic(), chat.status()
            if len(status["rounds"]) > len(before["rounds"]) and status["version"] == before["version"]:
                break  # rejected
    learning, learning_firsts = chat.take()
    status = chat.status()
    if len(status["rounds"]) == len(before["rounds"]):
        sys.exit(f"there was no version after {_SECONDS:g} seconds: {status['error']}")
    return {
        "outcome": status["rounds"][-1]["sentence"],
        "round_seconds": status["rounds"][-1]["seconds"],
        "seconds_to_version": None if answered is None else round(answered, 1),
        "idle": figures(idle, idle_firsts),
        "learning": figures(learning, learning_firsts),
        "p95_ratio": round(percentile(learning, 95) / percentile(idle, 95), 2),
    }


def figures(gaps: list[float], firsts: list[float]) -> dict[str, float]:
    """In milliseconds."""
    named = {f"p{share}": percentile(gaps, share) for share in (50, 95, 99)}
    named |= {"max": max(gaps), "first_token_p95": percentile(firsts, 95)}
    return {"tokens": len(gaps), **{name: round(1000 * value, 2) for name, value in named.items()}}


def percentile(values: list[float], share: int) -> float:
    """The value that ``share`` percent of ``values`` do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/rl_chat_model_tiktoken.pt"))
    parser.add_argument("--rounds", type=int, default=2, help="rounds of learning")
    parser.add_argument("--idle-seconds", type=float, default=15.0, help="how long nobody gives verdicts, before each")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds before each question")
    parser.add_argument("--learn-args", default="", help="further options of `rlchat learn`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(shutil.copy(options.model, folder))
        feedback = str(model.with_name("feedback.jsonl"))
        words = ["--learn", "--feedback", feedback, "--every", str(EVERY), "--device", "cpu"]
        with server(model, *words, f"--learn-args={options.learn_args}") as url:
            chat = Chat(url, options.pause)
            for question in questions(random.Random(2))[:20]:  # the first requests are slower
                chat.ask(question)
            chat.take()
            for country in COUNTRIES[: options.rounds]:
                print(json.dumps(one_round(chat, country, options.idle_seconds)), flush=True)


if __name__ == "__main__":
    main()
