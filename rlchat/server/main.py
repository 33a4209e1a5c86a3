"""`rlchat serve`: a web page and an API in OpenAI's format to chat with a model.

rlchat serve
rlchat serve checkpoints/sft_model.pt --port 8001 --feedback mine.jsonl
rlchat serve --learn --every 8
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlchat.chat.feedback import check_writable
from rlchat.chat.learning.options import add_learning_options, supervisor_arguments
from rlchat.errors import UserError
from rlchat.utils.imports import install_command, no_garbage_collection
from rlchat.utils.ranges import int_between, positive_int

if TYPE_CHECKING:
    import uvicorn

    from rlchat.server.responses import Limits

# Idle connections are closed after this time. It is longer than the timeout of common clients, so that the server does
# not close a connection just when a client uses it again.
_IDLE_SECONDS = 75
_ROWS = 64  # responses generated at a time
_WIDTH = 512  # of the layers whose speed is measured at most: for wider ones, it would take seconds
_SHUTDOWN_SECONDS = 30  # then uvicorn cancels requests that still run; the engine aborts its responses earlier


def main(args: list[str]) -> int:
    """Run ``rlchat serve`` with ``args`` until Ctrl-C or SIGTERM; return the exit code. Raises :class:`UserError`."""
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"rlchat serve needs {error.name}: install it with {install_command('serve')}") from error
    # Before the model is loaded, which takes seconds.
    check_writable(options.feedback)
    learning = _learning_of(options)
    with _listen(options.host, options.port) as listener:
        host = listener.getsockname()[0]
        if options.learn and not options.api_key and not ipaddress.ip_address(host).is_loopback:
            raise UserError(f"--learn on {host}, which others can reach, needs --api-key: they could teach the model")
        _serve(options, learning, listener)
    return 0


def uvicorn_config(
    api: Any, *, log_level: str = "warning", shutdown_seconds: int = _SHUTDOWN_SECONDS
) -> uvicorn.Config:
    """uvicorn's configuration for ``api``."""
    import uvicorn

    from rlchat.server.protocol import HeaderTimeoutProtocol

    return uvicorn.Config(
        api,
        http=HeaderTimeoutProtocol,
        log_level=log_level,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=shutdown_seconds,
    )


def _serve(options: argparse.Namespace, learning: dict[str, Any], listener: socket.socket) -> None:
    with no_garbage_collection():
        import torch

        from rlchat.chat.learning.round_options import check_for_model
        from rlchat.chat.learning.supervisor import Supervisor
        from rlchat.models.model_file import PolicyBundle, load_policy
        from rlchat.server.app import create_api
        from rlchat.server.engine import Engine
        from rlchat.server.feedback.caps import Caps
        from rlchat.server.feedback.rewards import Rewards
        from rlchat.server.protocol import Server
        from rlchat.utils.devices import choose_device, choose_dtype

    device = choose_device(options.device)
    file = Path(options.model)

    def load(path: Path) -> PolicyBundle:
        loaded = load_policy(path, device, options.base_model if path == file else None)
        loaded.model.to(choose_dtype(options.dtype, device))
        return loaded

    supervisor = None
    if options.learn:
        check_for_model(learning["options"], file)
        supervisor = Supervisor(
            file,
            options.feedback,
            on_version=lambda _, path: engine.swap(load(path), path.name),
            **learning,
        )
    path = supervisor.active()[1] if supervisor is not None else file
    bundle = load(path)
    torch.set_num_threads(options.threads or _threads(bundle.model.backbone.hidden_size))
    engine = Engine(bundle, max_rows=options.max_rows, max_waiting=options.max_waiting, version=path.name)
    api = create_api(
        engine,
        file.name,
        bundle.max_length,
        feedback=Path(options.feedback),
        limits=_limits(options),
        hosts=[*options.allow_host, options.host],
        origins=options.allow_origin,
        api_key=options.api_key or None,
        rewards=Rewards(engine, file, load, supervisor),
        supervisor=supervisor,
        caps=Caps(options.max_client_verdicts, options.max_verdicts),
    )
    del bundle  # after a swap, nothing refers to it
    if supervisor is not None:
        supervisor.start(engine.loaded.model_id)
    host, port = listener.getsockname()[:2]
    place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{file.stem} is at {place} (page) and {place}/v1 (OpenAI-compatible API); press Ctrl-C to stop", flush=True)
    if not options.api_key and not ipaddress.ip_address(host).is_loopback:
        print("rlchat: anyone who can reach this address can use the model: set --api-key", file=sys.stderr)
    # uvicorn shuts down on these signals and raises them again. Here they are the normal way to stop.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    Server(uvicorn_config(api), engine.abort).run(sockets=[listener])


def _learning_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the supervisor. Raises :class:`UserError` for options that have no effect without --learn."""
    usual = _parser().parse_args([])
    for name in ("max_client_verdicts", "max_verdicts"):
        if not options.learn and getattr(options, name) != getattr(usual, name):
            raise UserError(f"--{name.replace('_', '-')} has an effect only with --learn")
    return supervisor_arguments(options)


def _threads(width: int) -> int:
    """CPU threads for a model of this width: 1, unless more are clearly faster.

    The event loop and the clients need a core too, and all threads wait for the one that has to share its core. On two
    busy cores, one thread is several times as fast as two with the demo's model.
    """
    from rlchat.utils.threads import fastest_threads

    return fastest_threads(rounds=2, rows=_ROWS, width=min(width, _WIDTH), gain=1.5)


def _limits(options: argparse.Namespace) -> Limits:
    from rlchat.server.responses import Limits

    return Limits(options.max_body, options.max_messages, options.max_tokens, options.max_seconds)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family, backlog=1024)
        # Connections inherit it. asyncio sets it only on sockets with an explicit protocol; without it, Nagle's
        # algorithm delays each small response on a kept-alive connection by 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlchat serve", description="A web page and an OpenAI-compatible API to chat with a model."
    )

    def option(name: str, what: str, usual: str = "%(default)s", to: Any = parser, **more: object) -> None:
        more.setdefault("metavar", "N")
        to.add_argument(name, help=f"{what} (default: {usual})", **more)

    option("model", "model file", nargs="?", default="checkpoints/rl_chat_model_tiktoken.pt", metavar="MODEL")
    option("--base-model", "path of the base of an adapter file", "where it was in training", metavar="PATH")
    option("--host", "address to listen on; 0.0.0.0 for all", default="127.0.0.1", metavar="ADDRESS")
    option("--port", "port to listen on; 0 for any free port", type=_port, default=8000)
    option("--device", "device of the model, such as cpu or cuda", "the fastest available", metavar="DEVICE")
    option(
        "--dtype", "dtype of the model, such as float32", "bfloat16 on CUDA if supported, else float32", metavar="DTYPE"
    )
    option(
        "--feedback",
        "file to which ratings and corrected responses are appended, as training data",
        default="feedback.jsonl",
        metavar="FILE",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("RLCHAT_API_KEY", ""),
        metavar="KEY",
        help="key that clients must send; safer as environment variable RLCHAT_API_KEY (default: none)",
    )
    option(
        "--allow-host",
        "host name that clients may use for this server; may be repeated",
        "localhost and any address",
        action="append",
        default=[],
        metavar="NAME",
    )
    option(
        "--allow-origin",
        "web origin whose pages may use the API, such as http://localhost:3000, or * for all; may be repeated",
        "only this server's own page",
        action="append",
        type=_origin,
        default=[],
        metavar="ORIGIN",
    )
    option("--threads", "CPU threads", "1, or more if a quick test finds that clearly faster", type=positive_int)
    option("--max-rows", "maximum number of responses generated at a time", type=positive_int, default=_ROWS)
    option("--max-waiting", "maximum number of queued responses; more get status 429", type=positive_int, default=256)
    option("--max-tokens", "maximum number of tokens per response", type=positive_int, default=1_024)
    option("--max-seconds", "maximum number of seconds per response", type=positive_int, default=120)
    option("--max-messages", "maximum number of messages per conversation", type=positive_int, default=1_000)
    option("--max-body", "maximum number of bytes per request", type=positive_int, default=1_000_000)
    group = parser.add_argument_group("learning from feedback")
    add_learning_options(group)
    option("--max-client-verdicts", "verdicts per hour from one client", type=positive_int, default=200, to=group)
    option("--max-verdicts", "verdicts per hour from all clients", type=positive_int, default=1_000, to=group)
    return parser


def _origin(text: str) -> str:
    parts = urlsplit(text)
    if text != "*" and (not parts.scheme or not parts.netloc or parts.path.strip("/")):
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: expected an origin such as http://localhost:3000")
    return text


def _port(text: str) -> int:
    return int_between(text, 0, 65_535, "an integer from 0 to 65535")
