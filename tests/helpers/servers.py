"""For tests: servers to talk to, in this process or in one of their own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from torch import Tensor

from rlchat.conversation import Conversation, Message
from rlchat.models.model_file import PolicyBundle
from rlchat.models.sampling import Sampling, addressed_uniforms, generate
from rlchat.server.app import create_api
from rlchat.server.engine import Engine

ROOT = Path(__file__).parents[2]
SILENT = [sys.executable, "-W", "ignore", "-m", "rlchat"]


# One for all: each client of its own would read the machine's certificates anew, which takes longer than most tests.
HTTP = httpx.Client(timeout=60)


class Server:
    """A server in this process: its address, and the engine behind it."""

    def __init__(self, url: str, engine: Engine, feedback: Path) -> None:
        self.url = url
        self.engine = engine
        self.feedback = feedback


@contextlib.contextmanager
def serving(
    bundle: PolicyBundle, feedback: Path, *, rows: int = 64, waiting: int = 256, **options: Any
) -> Iterator[Server]:
    """Serves ``bundle``, of a file ``tiny.pt``, on a port of its own; ``options`` are those of ``create_api``."""
    engine = Engine(bundle, max_rows=rows, max_waiting=waiting)
    api = create_api(engine, "tiny.pt", bundle.max_length, feedback=feedback, **options)
    server = uvicorn.Server(uvicorn.Config(api, log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, feedback)
        finally:
            server.should_exit = True
            thread.join()


def slow_down(bundle: PolicyBundle, seconds: float) -> PolicyBundle:
    """Makes each step of the model take ``seconds`` more."""
    forward = bundle.model.forward

    def slow(*args: Any) -> Tensor:
        time.sleep(seconds)
        return forward(*args)

    bundle.model.forward = slow  # type: ignore[method-assign]
    return bundle


@contextlib.contextmanager
def server_process(*words: str, cwd: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``rlchat serve`` on a free port, and its address; it is ended if it still runs."""
    process = subprocess.Popen(
        [*SILENT, "serve", *words, "--port", "0"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert " is at http" in line, process.stderr.read() if process.stderr else line
        yield process, line.split()[3]
    finally:
        process.kill()
        process.communicate()


def wait_until(true: Any, seconds: float = 20.0) -> None:
    """Returns when ``true()``; fails when that takes too long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def alone(bundle: PolicyBundle, question: str, sampling: Sampling, seed: int = 0, choice: int = 0) -> str:
    """What ``question`` gets when nobody else asks."""
    prompt = bundle.tokenizer.render_prompt(Conversation((Message("user", question),))).ids
    ids = torch.tensor([prompt])
    said = generate(
        bundle.model,
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        sampling,
        addressed_uniforms(seed, 0, torch.tensor([choice])),
        end_id=bundle.tokenizer.end_id,
        pad_id=bundle.tokenizer.pad_id,
    )
    decoder = bundle.tokenizer.stream()
    text = "".join(decoder.push(token) for token in said.ids[0].tolist())
    return text + decoder.finish() if said.ended[0] else text
