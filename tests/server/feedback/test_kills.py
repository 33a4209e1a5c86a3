"""`kill -9` of a server that learns, and of its learner, at random moments while clients chat and give verdicts."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.chat_models import random_policy
from helpers.servers import alone, server_process, wait_until

from rlchat.chat.learning.state import read_state
from rlchat.chat.verdicts import read_verdicts
from rlchat.models.model_file import load_policy, save_bundle
from rlchat.models.sampling import Sampling
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

QUESTION, TOKENS, EVERY = "What is the colour of the sky?", 24, 4
# Each version differs from the one before, and all are accepted.
LEARN = (
    "--passes 1 --max-new-tokens 4 --replay-prompts 4 --control-prompts 4 --learning-rate 3e-3 --max-kl 99 "
    "--max-perplexity-rise 1e9 --max-control-drop 1"
)
SERVE = [
    "tiny.pt",
    "--learn",
    "--max-client-verdicts",
    "100000",
    "--max-verdicts",
    "100000",
    "--every",
    str(EVERY),
    "--keep-versions",
    "999",
    "--device",
    "cpu",
    "--threads",
    "1",
]


class Clients:
    """A client that streams one response after another, and one that gives verdicts. Servers come and go."""

    def __init__(self) -> None:
        self.url: str | None = None
        self.given = 0  # verdicts
        self.kept: set[str] = set()  # questions whose verdict the server has saved
        self.replies: set[tuple[str, str]] = set()  # complete ones, with their version
        self.broken = 0  # streams that ended with an error
        self.silent = 0  # streams that ended as if they were complete, and were not
        self.closing = threading.Event()
        self._threads = [threading.Thread(target=self._repeat, args=(what,)) for what in (self._stream, self._rate)]

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self.closing.set()
            for thread in self._threads:
                thread.join()

    def _repeat(self, what: Any) -> None:
        with httpx.Client(timeout=30) as client:
            while not self.closing.is_set():
                if self.url is None:
                    time.sleep(0.02)
                else:
                    what(client, self.url)

    def _stream(self, client: httpx.Client, url: str) -> None:
        body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": TOKENS}
        text, finish, versions = "", None, set()
        try:
            with client.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as stream:
                versions.add(stream.headers["X-Rlchat-Version"])
                for line in stream.iter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line[6:])
                        versions.add(chunk["system_fingerprint"])
                        for choice in chunk["choices"]:
                            text += choice["delta"].get("content") or ""
                            finish = choice["finish_reason"] or finish
        except (httpx.HTTPError, KeyError):  # the connection broke, or the body is an error
            self.broken += 1
            return
        self.silent += finish is None
        (version,) = versions
        self.replies.add((version, text))
        time.sleep(0.05)

    def _rate(self, client: httpx.Client, url: str) -> None:
        self.given += 1
        question = f"Question {self.given}"
        body = {"messages": [{"role": "user", "content": question}], "reply": "No.", "verdict": "bad"}
        with contextlib.suppress(httpx.HTTPError):
            if client.post(f"{url}/feedback", json={**body, "client": "a", "model": "tiny.pt"}).status_code == 200:
                self.kept.add(question)
        time.sleep(0.25)


def status_of(url: str) -> dict[str, Any]:
    """What the server says about learning."""
    found: dict[str, Any] = httpx.get(f"{url}/learning", timeout=60).json()
    return found


def learner_of(server: int) -> int | None:
    """The process of the round that runs."""
    for children in Path(f"/proc/{server}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                return int(child)
    return None


def check_folder(folder: Path, clients: Clients) -> None:
    """What must hold whenever no server runs."""
    verdicts, report = read_verdicts(folder / "feedback.jsonl")
    questions = [verdict.prompt.messages[-1].text for verdict in verdicts]
    assert len(set(questions)) == len(questions)
    assert clients.kept <= set(questions), "a saved verdict was lost"
    assert report.bad_lines == 0
    versions = folder / "tiny.versions"
    rejected = versions / "rejected.jsonl"
    rounds = [json.loads(path.read_text()) for path in versions.glob("*.json") if path.stem.isdigit()]
    rounds += [json.loads(line) for line in rejected.read_text().splitlines()] if rejected.exists() else []
    whole = [row for row in rounds if not row["accepted"] or (versions / f"{row['version']}.pt").exists()]
    used = sorted(row["feedback"]["verdicts"] for row in whole)
    assert all(later - earlier >= EVERY for earlier, later in itertools.pairwise(used)), used
    active = read_state(versions / "state.json").active if (versions / "state.json").exists() else 0
    if active:
        load_policy(versions / f"{active}.pt", "cpu")


def kill_often(folder: Path, tokenizer: ChatTokenizer, kills: int, seed: int) -> Clients:
    """Kills a server or its learner ``kills`` times; returns what the clients have seen."""
    chosen, clients = random.Random(seed), Clients()
    save_bundle(folder / "tiny.pt", random_policy(tokenizer))
    left, usual = kills, 0.0  # how long a round takes here
    with clients.at_work():
        while left:
            with server_process(*SERVE, f"--learn-args={LEARN}", cwd=folder) as (process, url):
                clients.url = url
                if not usual:
                    began = time.monotonic()
                    wait_until(lambda url=url: status_of(url)["version"] == 1, 600)
                    usual = time.monotonic() - began
                while left:
                    time.sleep(chosen.uniform(0.1, 1.5 * usual))
                    left -= 1
                    if chosen.random() < 0.5 or (learner := learner_of(process.pid)) is None:
                        clients.url = None
                        process.kill()
                        process.wait()
                        break
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(learner, signal.SIGKILL)
                    assert httpx.get(f"{url}/health").status_code == 200
            clients.url = None
            check_folder(folder, clients)
    with server_process(*SERVE, f"--learn-args={LEARN}", cwd=folder) as (_, url):

        def is_done() -> bool:
            status = status_of(url)
            return status["new"] < EVERY and status["training_seconds"] is None and bool(status["verdicts"])

        wait_until(is_done, 60 + 10 * usual)
        status = status_of(url)
        assert status["verdicts"] == len(read_verdicts(folder / "feedback.jsonl")[0])
        assert status["error"] is None
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
        assert answer.json()["system_fingerprint"] == status["file"]
    check_folder(folder, clients)
    return clients


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the learner in /proc")
def test_kills_at_random_moments(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    kills, seed = int(os.environ.get("KILLS", "40")), int(os.environ.get("SEED", "0"))
    clients = kill_often(tmp_path, tokenizer, kills, seed)
    assert clients.silent == 0
    assert clients.broken > 0
    assert len(clients.kept) > kills
    versions = {version for version, _ in clients.replies}
    assert len(versions) > 1
    assert len(clients.replies) == len(versions), "one version, one response"
    for version, text in clients.replies:
        path = tmp_path / version if version == "tiny.pt" else tmp_path / "tiny.versions" / version
        assert text == alone(load_policy(path, "cpu"), QUESTION, Sampling(TOKENS, 0.0))
    print(f"{kills} kills, {len(clients.kept)} verdicts, {len(versions)} versions, {clients.broken} broken streams")
