"""Runs the blocks of a lesson in order: Python in one namespace, bash in the same folder."""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.lessons.lesson import Block, Lesson

_SEEDS = re.compile(r"(--(?:seed_everything|data\.seed|model\.seed|seed)[ =])\d+")


def run_lesson(lesson: Lesson, folder: Path, seed: int = 0, short: bool = False) -> dict[str, float]:
    """Runs all blocks of ``lesson`` in ``folder``; returns the value of each figure by its name.

    Args:
        lesson: the lesson.
        folder: an empty folder, the working directory of the blocks.
        seed: the value of SEED, and of the seed options of the commands.
        short: whether to use the constants and options of the short form.

    Raises:
        RuntimeError: if a command fails. Exceptions of Python blocks are not caught; their traceback names the line of
            the lesson.
    """
    values = lesson.parameters | (lesson.short if short else {}) | {"SEED": seed}
    with _working_in(folder), _main_module() as namespace:
        for number, block in enumerate(lesson.blocks):
            if number == 0:
                namespace.update(values)
            elif block.language == "python":
                _run_python(lesson, block, namespace)
            else:
                for command in commands(block.code, seed, lesson.short_options if short else ""):
                    _run_command(command, f"{lesson.path.name}:{block.line}")
        return {figure.name: float(eval(figure.expression, namespace)) for figure in lesson.figures}


def commands(code: str, seed: int, fit_options: str = "") -> list[str]:
    """The commands of a bash block: continued lines joined, seeds set, options added to `rlchat fit`."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        line = _SEEDS.sub(rf"\g<1>{seed}", line).strip()
        words = shlex.split(line, comments=True)
        if words[:1] == ["rlchat"]:  # other commands stay as they are, for the shell
            line = shlex.join([*words, *(shlex.split(fit_options) if words[1] == "fit" else [])])
        if words:
            found.append(line)
    return found


def _run_python(lesson: Lesson, block: Block, namespace: dict[str, Any]) -> None:
    """Executes a block; tracebacks show its lines with their numbers in the lesson."""
    source = "\n" * (block.line - 1) + block.code
    linecache.cache[str(lesson.path)] = (len(source), None, source.splitlines(keepends=True), str(lesson.path))
    exec(compile(source, str(lesson.path), "exec"), namespace)


def _run_command(command: str, place: str) -> None:
    """Runs one command: rlchat in this process, because a new one imports PyTorch for seconds."""
    words = shlex.split(command)
    if words[0] == "rlchat":
        from rlchat.__main__ import main

        code = main(words[1:])
    else:
        code = subprocess.run(["bash", "-c", command], check=False).returncode
    if code:
        raise RuntimeError(f"{place}: exit code {code} of {command}")


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _main_module() -> Iterator[dict[str, Any]]:
    """A namespace that is that of the module ``__main__``, as in a notebook: classes defined in it can be imported."""
    module, before = ModuleType("__main__"), sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        yield module.__dict__
    finally:
        sys.modules["__main__"] = before
