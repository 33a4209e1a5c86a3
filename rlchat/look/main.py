"""`rlchat look`: a page over the rollouts and metrics of a PPO run.

rlchat look
rlchat look lightning_logs/ppo/version_3 --with lightning_logs/ppo/version_2
rlchat look --out page.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rlchat.errors import UserError
from rlchat.look.page import build_page
from rlchat.look.rollouts import NAME
from rlchat.look.server import LookServer, Run
from rlchat.utils.files import write_atomically

LOGS = Path("lightning_logs")
PORT = 8010


def main(args: list[str]) -> int:
    """Runs ``rlchat look`` with ``args``; returns the exit code. Raises :class:`UserError`."""
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    folders = [find_run(options.run), *([find_run(options.other)] if options.other else [])]
    runs, names = [Run(folder) for folder in folders], run_names(folders)
    if options.out is not None:
        if options.out.exists() and not options.force:
            raise UserError(f"{options.out} already exists; set another --out, or use --force")
        page = build_page(names, [run.chunk() for run in runs])
        write_atomically(options.out, lambda file: file.write(page.encode()))
        print(f"{options.out}: {' and '.join(names)}")
        return 0
    for run in runs:
        run.chunk()  # now, so that the page opens at once
    with LookServer(runs, names, options.port) as server:
        print(f"{' and '.join(names)}: {server.url}; press Ctrl-C to stop", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:  # the normal way to stop
            print()
    return 0


def find_run(given: Path | None) -> Path:
    """The folder ``given``, or that of the newest run; it has a ``rollouts.jsonl``. Raises :class:`UserError`."""
    if given is None:
        found = LOGS.glob(f"*/version_*/{NAME}")
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            raise UserError(
                f"no PPO run with a {NAME} under {LOGS}; train one with `rlchat fit --config ppo`, or "
                f"specify its folder"
            )
        return newest.parent
    if not given.is_dir():
        raise UserError(f"{given}: no such folder; specify that of a PPO run, such as {LOGS}/ppo/version_0")
    if not (given / NAME).is_file():
        raise UserError(
            f"{given}: it has no {NAME}, which the callback RolloutLog writes during PPO, in every "
            f"--rollout_log.every_n_iterations; specify the folder of a PPO run"
        )
    return given


def run_names(folders: list[Path]) -> list[str]:
    """What the page calls the runs: the stage and version, or the whole paths if these are the same."""
    short = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlchat look",
        description="A page over the rollouts and metrics of a PPO run. It follows a run that is still training.",
    )
    parser.add_argument(
        "run",
        nargs="?",
        type=Path,
        metavar="RUN",
        help=f"folder of a PPO run, such as {LOGS}/ppo/version_0 (default: the newest under {LOGS})",
    )
    parser.add_argument(
        "--with", dest="other", type=Path, metavar="RUN", help="folder of a second run, to compare them side by side"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the page with its data to this HTML file instead of serving it"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--port", type=_port, default=PORT, metavar="N", help="port of 127.0.0.1; 0 for any free port (default: 8010)"
    )
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65_535):
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: expected an integer from 0 to 65535")
    return int(text)
