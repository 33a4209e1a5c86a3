"""`rlchat serve`: a page, and an API in OpenAI's protocol, to talk with a model.

rlchat serve
rlchat serve checkpoints/sft_model.pt --port 8001 --feedback mine.jsonl
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlchat.chat.feedback import check_writable
from rlchat.errors import UserError
from rlchat.utils.imports import no_garbage_collection

if TYPE_CHECKING:
    from rlchat.server.responses import Limits

# A connection may idle for so long: longer than clients let theirs, so that none is closed just as it is used again.
_IDLE_SECONDS = 75
_GRACE_SECONDS = 3  # that replies under way have to end when the server is told to


def main(args: list[str]) -> int:
    """Runs ``rlchat serve`` with ``args`` until Ctrl-C or SIGTERM; returns the exit code. Raises :class:`UserError`."""
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"rlchat serve needs {error.name}, which comes with: pip install 'rlchat[serve]'") from error
    # Before the model is loaded, which takes seconds, so that a mistake is told at once.
    check_writable(options.feedback)
    with _listen(options.host, options.port) as listener:
        _serve(options, listener)
    return 0


def _serve(options: argparse.Namespace, listener: socket.socket) -> None:
    with no_garbage_collection():
        import uvicorn

        from rlchat.models.model_file import load_policy
        from rlchat.server.app import create_api
        from rlchat.server.engine import Engine
        from rlchat.utils.devices import choose_device, choose_dtype

    device = choose_device(options.device)
    bundle = load_policy(options.model, device)
    bundle.model.to(choose_dtype(options.dtype, device))
    file = Path(options.model)
    engine = Engine(bundle, max_rows=options.max_rows, max_waiting=options.max_waiting)
    api = create_api(
        engine,
        file.name,
        bundle.max_length,
        feedback=Path(options.feedback),
        limits=_limits(options),
        hosts=[*options.allow_host, options.host],
        api_key=options.api_key or None,
    )
    config = uvicorn.Config(
        api,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    host, port = listener.getsockname()[:2]
    place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{file.stem} is at {place} (a page) and {place}/v1 (OpenAI's protocol); Ctrl-C ends it", flush=True)
    if not options.api_key and not ipaddress.ip_address(host).is_loopback:
        print("rlchat: whoever reaches this address can use the model; --api-key asks for a key", file=sys.stderr)
    # uvicorn ends in good order on these two, and then raises them again; for a server they are the usual way to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listener])


def _limits(options: argparse.Namespace) -> Limits:
    from rlchat.server.responses import Limits

    return Limits(options.max_body, options.max_messages, options.max_tokens, options.max_seconds)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise UserError(f"cannot listen on {host}:{port}: {reason}; give another --port or --host") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlchat serve", description="A page, and an API in OpenAI's protocol, to talk with a model."
    )

    def option(name: str, what: str, usual: str = "%(default)s", **more: object) -> None:
        more.setdefault("metavar", "N")
        parser.add_argument(name, help=f"{what} (default: {usual})", **more)  # type: ignore[arg-type]

    option("model", "a model bundle", nargs="?", default="checkpoints/rl_chat_model_tiktoken.pt", metavar="MODEL")
    option("--host", "the address to listen on; 0.0.0.0 is all", default="127.0.0.1", metavar="ADDRESS")
    option("--port", "the port to listen on; 0 is any that is free", type=_port, default=8000)
    option("--device", "where the model runs, as cpu or cuda", "the fastest there is", metavar="DEVICE")
    option("--dtype", "the numbers it computes with, as float32", "bfloat16 on CUDA, else float32", metavar="DTYPE")
    option(
        "--feedback",
        "the file that 👍, 👎 and corrected replies are appended to, as training data",
        default="feedback.jsonl",
        metavar="FILE",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("RLCHAT_API_KEY", ""),
        metavar="KEY",
        help="what clients must show; better in the environment, as RLCHAT_API_KEY (default: nothing)",
    )
    option(
        "--allow-host",
        "a name by which clients may call this server; may be repeated",
        "localhost and any address",
        action="append",
        default=[],
        metavar="NAME",
    )
    option("--max-rows", "replies generated at a time", type=_positive, default=64)
    option("--max-waiting", "replies that may wait for their turn; more get status 429", type=_positive, default=256)
    option("--max-tokens", "tokens of a reply at most", type=_positive, default=1_024)
    option("--max-seconds", "seconds until a reply is broken off", type=_positive, default=120)
    option("--max-messages", "messages of a conversation at most", type=_positive, default=1_000)
    option("--max-body", "bytes of a request at most", type=_positive, default=1_000_000)
    return parser


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _positive(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _port(text: str) -> int:
    number = _whole(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"{number} is no port; they go from 0 to 65535")
    return number
