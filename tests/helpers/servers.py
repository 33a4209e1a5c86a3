"""Servers for tests, in this process or in another one."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from torch import Tensor

from helpers import quick_round
from rlchat.chat.learning.supervisor import Supervisor
from rlchat.conversation import Conversation, Message
from rlchat.models.model_file import PolicyBundle, load_policy
from rlchat.models.sampling import Sampling, addressed_uniforms, generate
from rlchat.server.app import create_api
from rlchat.server.engine import Engine
from rlchat.server.feedback.rewards import Rewards
from rlchat.server.main import uvicorn_config

ROOT = Path(__file__).parents[2]
SILENT = [sys.executable, "-W", "ignore", "-m", "rlchat"]


# Shared: each client reads the machine's certificates, which takes longer than most tests.
HTTP = httpx.Client(timeout=60)


class Server:
    """A server in this process: its address, its engine and its feedback file."""

    def __init__(self, url: str, engine: Engine, feedback: Path) -> None:
        self.url = url
        self.engine = engine
        self.feedback = feedback


@contextlib.contextmanager
def serving(
    bundle: PolicyBundle, feedback: Path, *, rows: int = 64, waiting: int = 256, **options: Any
) -> Iterator[Server]:
    """Serve ``bundle`` as ``tiny.pt`` on a free port. ``options`` are those of ``create_api``."""
    engine = Engine(bundle, max_rows=rows, max_waiting=waiting, version="tiny.pt")
    rewards = Rewards(engine, feedback.with_name("tiny.pt"), load_policy, options.get("supervisor"))
    api = create_api(engine, "tiny.pt", bundle.max_length, feedback=feedback, rewards=rewards, **options)
    server = uvicorn.Server(uvicorn_config(api, log_level="critical", shutdown_seconds=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, feedback)
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def learning_server(
    model: Path, *options: str, every: int = 2, load: Callable[[Path], PolicyBundle] = load_policy, **more: Any
) -> Iterator[tuple[Server, Supervisor]]:
    """Serve the file ``model``, called tiny.pt, while quick rounds with ``options`` make versions of it."""
    servers: list[Server] = []
    feedback = model.with_name("feedback.jsonl")
    supervisor = Supervisor(
        model,
        feedback,
        every=every,
        options=options,
        command=quick_round.COMMAND,
        on_version=lambda _, path: servers[0].engine.swap(load(path), path.name),
    )
    with serving(load(model), feedback, supervisor=supervisor, **more) as server:
        servers.append(server)
        supervisor.start()
        yield server, supervisor


@contextlib.contextmanager
def held(bundle: PolicyBundle) -> Iterator[Callable[[], None]]:
    """Make the model wait before each step, until the function that this yields is called or the block ends."""
    forward, go = bundle.model.forward, threading.Event()

    def wait(*args: Any) -> Tensor:
        assert go.wait(60)
        return forward(*args)

    bundle.model.forward = wait  # type: ignore[method-assign]
    try:
        yield go.set
    finally:
        go.set()


def slow_down(bundle: PolicyBundle, seconds: float) -> PolicyBundle:
    """Make each step of the model take ``seconds`` longer."""
    forward = bundle.model.forward

    def slow(*args: Any) -> Tensor:
        time.sleep(seconds)
        return forward(*args)

    bundle.model.forward = slow  # type: ignore[method-assign]
    return bundle


@contextlib.contextmanager
def server_process(*words: str, cwd: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``rlchat serve`` on a free port, and its address. The process is killed at the end of the block."""
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


def wait_until(true: Any, seconds: float = 60.0) -> None:
    """Return when ``true()`` returns True; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def alone(bundle: PolicyBundle, question: str, sampling: Sampling, seed: int = 0, choice: int = 0) -> str:
    """The response to ``question`` without other requests."""
    prompt = bundle.tokenizer.render_prompt(Conversation((Message("user", question),))).ids
    ids = torch.tensor([prompt])
    generated = generate(
        bundle.model,
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        sampling,
        addressed_uniforms(seed, 0, torch.tensor([choice])),
        end_id=bundle.tokenizer.end_id,
        pad_id=bundle.tokenizer.pad_id,
    )
    decoder = bundle.tokenizer.stream()
    text = "".join(decoder.push(token) for token in generated.ids[0].tolist())
    return text + decoder.finish() if generated.ended[0] else text
