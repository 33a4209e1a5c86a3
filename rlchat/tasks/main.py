"""`rlchat data reasoning-gym`: prompts with answers that can be checked, from a task of reasoning-gym.

rlchat data reasoning-gym spell_backward -n 8000 --set max_word_len=5 -o data/words.jsonl
rlchat data reasoning-gym --list
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path

from rlchat.conversation import CHECK_KINDS
from rlchat.errors import UserError
from rlchat.tasks.reasoning_gym import CHECKS, Settings, checks_of_tasks, generate_rows, parse_settings
from rlchat.utils.files import write_atomically

_MANY = "several right answers, or several ways to write one"


def main(args: list[str]) -> int:
    """Runs ``rlchat data`` with ``args``; returns the exit code.

    Raises :class:`UserError` for an unknown task or setting, a task with several right answers (without
    ``--one_answer``), an output file that exists (without ``--force``) or cannot be written, and without reasoning-gym.
    """
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    if options.list:
        print(_list())
        return 0
    _write(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlchat data", description="Generate data.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    gym = commands.add_parser(
        "reasoning-gym",
        help="prompts with answers that can be checked, from a task of reasoning-gym",
        description="Write prompts with answers that can be checked, from a task of reasoning-gym. Every question is "
        "written once; questions that differ in case or white space only are the same.",
    )
    gym.add_argument("task", nargs="?", metavar="TASK", help="such as spell_backward")
    gym.add_argument("--list", action="store_true", help="print the tasks by how a response is checked")
    gym.add_argument("-n", "--rows", type=int, default=1000, metavar="N", help="number of rows (default: %(default)s)")
    gym.add_argument("-o", "--output", type=Path, metavar="FILE.jsonl", help="the file to write")
    gym.add_argument("--seed", type=int, default=0, help="row i is drawn from SEED + i (default: %(default)s)")
    gym.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="options of the task, such as max_word_len=5",
    )
    gym.add_argument(
        "--check",
        choices=CHECK_KINDS[:3],
        help="how an answer matches a response, see docs/data.md (default: exact, or number for some tasks of "
        "arithmetic)",
    )
    gym.add_argument(
        "--responses", action="store_true", help="write the answer as the response too, for SFT on the training split"
    )
    gym.add_argument("--one_answer", "--one-answer", action="store_true", help=f"accept a task with {_MANY}")
    gym.add_argument("--force", action="store_true", help="overwrite FILE.jsonl if it exists")
    return parser


def _write(options: argparse.Namespace) -> None:
    task, output = options.task, options.output
    if task is None:
        raise UserError("no task is specified; `rlchat data reasoning-gym --list` prints the tasks")
    if output is None:
        raise UserError("no output file is specified; add -o FILE.jsonl")
    if output.suffix != ".jsonl":
        raise UserError(f"{output}: the name of a data file must end in .jsonl; use another name")
    if output.exists() and not options.force:
        raise UserError(f"{output} already exists; use another name, or --force to overwrite it")
    if options.rows < 1:
        raise UserError(f"invalid value {options.rows} for -n: expected a positive integer")
    settings = Settings(
        task, options.rows, options.seed, parse_settings(options.set), options.check, options.one_answer
    )
    rows, draws = generate_rows(settings, progress=sys.stderr.isatty())
    if options.responses:
        rows = [{**row, "response": row["answer"]} for row in rows]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(output, lambda file: file.write(text.encode()))
    few = "" if len(rows) == options.rows else f", no more than these in {draws:,} draws"
    print(f"{output}: {len(rows):,} different questions of {task}{few}; check: {rows[0]['check']}")


def _list() -> str:
    found = checks_of_tasks()
    parts = [(f"check {kind}", [name for name, known in found.items() if known == kind]) for kind in CHECKS]
    parts.append((f"{_MANY}; need --one_answer", [name for name, known in found.items() if known is None]))
    return "\n".join(
        f"{title} ({len(names)}):\n{textwrap.fill(', '.join(names), 118, initial_indent='  ', subsequent_indent='  ')}"
        for title, names in parts
    )
