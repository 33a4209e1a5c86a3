"""Mutation testing of the formulas, losses, rollouts and sampling: small changes that no test notices are printed.

python -m prove.mutants                            all modules of TESTS: an hour of one core and more
python -m prove.mutants rlchat/ppo/rollouts.py     one of them: a minute to twenty

`make mutants` runs it. The changes are those of mutmut. Its own run leaves decorated functions out, among them the
sampling loop and the backward pass of the policy head. Here the tests of a module are collected once. For each change,
a forked process replaces the code of the function and runs the tests that reach it, the fastest first, until one fails.
This needs Python 3.11.

Not tried: changes outside of functions, of default arguments, of raised errors, and of the arguments ``device`` and
``strict``, which a run of correct code on a CPU cannot notice.
"""

from __future__ import annotations

import difflib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import libcst
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

TESTS = {
    "rlchat/ppo/advantages.py": ["tests/ppo/test_advantages_and_losses.py"],
    "rlchat/ppo/losses.py": ["tests/ppo/test_advantages_and_losses.py"],
    "rlchat/ppo/minibatches.py": ["tests/ppo/test_minibatches.py"],
    "rlchat/ppo/rollouts.py": ["tests/ppo/test_rollouts.py"],
    "rlchat/models/decoding.py": ["tests/models/test_decoding.py"],
    "rlchat/models/packing.py": ["tests/models/test_packing.py"],
    "rlchat/models/sampling.py": ["tests/models/test_sampling.py", "tests/models/test_decoding.py"],
    "rlchat/models/token_stats.py": ["tests/models/test_networks.py"],
}
UNNOTICED = {"device", "strict"}  # arguments
SLOWEST = 3.0  # seconds; slower tests, which train a model, are left out
LIMIT = 60.0  # seconds of CPU time for one change, after which it counts as noticed


class Mutant(NamedTuple):
    """A module with one change."""

    function: str  # its qualified name, without functions inside it
    line: int
    source: str


class Changes(libcst.CSTVisitor):
    """All changes of the functions of a module: where each is, and what stands there instead."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.functions = 0  # nested functions around the node
        self.found: list[tuple[str, Any, libcst.CSTNode]] = []

    def on_visit(self, node: libcst.CSTNode) -> bool:
        if isinstance(node, libcst.Annotation | libcst.Decorator | libcst.Param | libcst.Raise):
            return False
        if isinstance(node, libcst.Arg) and node.keyword and node.keyword.value in UNNOTICED:
            return False
        if isinstance(node, libcst.FunctionDef | libcst.ClassDef):
            if not self.functions:
                self.names.append(node.name.value)
            self.functions += isinstance(node, libcst.FunctionDef) or self.functions > 0
        elif self.functions and (place := self.get_metadata(PositionProvider, node, None)):
            self.found += [(".".join(self.names), place, change) for change in changes(node)]
        return True

    def on_leave(self, original_node: libcst.CSTNode) -> None:
        if isinstance(original_node, libcst.FunctionDef | libcst.ClassDef):
            self.functions -= self.functions > 0
            if not self.functions:
                self.names.pop()


def changes(node: libcst.CSTNode) -> Iterator[libcst.CSTNode]:
    for kind, operator in mutation_operators:
        if isinstance(node, kind):
            found = list(operator(node))
            for change in found[:1] if operator is operator_string else found:
                if isinstance(node, libcst.Call) and isinstance(change, libcst.Call):
                    gone = {id(argument) for argument in node.args} - {id(argument) for argument in change.args}
                    words = {a.keyword.value for a in node.args if a.keyword and id(a) in gone}
                    if words & UNNOTICED:
                        continue
                yield change


def mutants(text: str) -> Iterator[Mutant]:
    """Each change of the module with the source ``text``."""
    wrapper, visitor, empty = MetadataWrapper(libcst.parse_module(text)), Changes(), libcst.Module([])
    wrapper.visit(visitor)
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for function, place, change in visitor.found:
        start, end = (starts[p.line - 1] + p.column for p in (place.start, place.end))
        changed = text[:start] + empty.code_for_node(change) + text[end:]
        if changed != text:
            yield Mutant(function, place.start.line, changed)


def codes(code: CodeType) -> dict[str, CodeType]:
    """The code of each function of a module or class by its qualified name."""
    found: dict[str, CodeType] = {}
    for inner in code.co_consts:
        if isinstance(inner, CodeType) and "<locals>" not in inner.co_qualname:
            found |= {inner.co_qualname: inner, **codes(inner)}
    return found


def body(code: CodeType) -> Iterator[int]:
    """The lines of a function, those of functions inside it too, except the one with its name."""
    yield from (line for *_, line in code.co_lines() if line and line > code.co_firstlineno)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from body(inner)


class Run:
    """A pytest plugin that runs the collected tests once for each mutant of ``module``."""

    def __init__(self, module: str) -> None:
        self.path = Path(module).resolve()
        self.survivors = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        text = self.path.read_text(encoding="utf-8")
        functions: dict[str, list[FunctionType]] = {}
        gc.unfreeze()  # frozen objects would not be listed
        for one in gc.get_objects():
            if isinstance(one, FunctionType) and one.__code__.co_filename == str(self.path):
                functions.setdefault(one.__code__.co_qualname, []).append(one)
        reached = in_a_fork(lambda: self.lines(session))
        if reached is None:
            pytest.exit("a test fails without a change: run the tests first", 1)
        count = 0
        for mutant in mutants(text):
            count += 1
            own = set(body(functions[mutant.function][0].__code__))
            tests = [(mutant.line not in lines, seconds, i) for i, seconds, lines in reached if own & set(lines)]
            if in_a_fork(lambda: self.survives(session, functions, mutant, [i for *_, i in sorted(tests)])):  # noqa: B023
                self.survivors += 1
                changed = difflib.unified_diff(text.splitlines(), mutant.source.splitlines(), n=0, lineterm="")
                print(f"\n{mutant.function}, {len(tests)} tests", *list(changed)[2:], sep="\n", flush=True)
        print(f"\n{self.path.name}: {count} changes, {self.survivors} not noticed", flush=True)
        return True

    def lines(self, session: pytest.Session) -> list[tuple[int, float, list[int]]]:
        """The number of each test that is not slow, its seconds, and the lines of the module that it reaches."""
        found = []
        for number in range(len(session.items)):
            lines: set[int] = set()

            def trace(frame: FrameType, event: str, argument: Any, lines: set[int] = lines) -> Any:
                if frame.f_code.co_filename != str(self.path):
                    return None
                lines.add(frame.f_lineno)
                return trace

            start = time.process_time()
            sys.settrace(trace)
            run(session, [number])
            sys.settrace(None)
            assert not session.testsfailed
            if time.process_time() - start <= SLOWEST:
                found.append((number, time.process_time() - start, sorted(lines)))
        return found

    def survives(
        self, session: pytest.Session, functions: dict[str, list[FunctionType]], mutant: Mutant, tests: list[int]
    ) -> bool:
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        code = codes(compile(mutant.source, str(self.path), "exec"))[mutant.function]
        for function in functions[mutant.function]:
            function.__code__ = code
        run(session, tests)
        return not session.testsfailed


def run(session: pytest.Session, numbers: list[int]) -> None:
    """Runs tests until one fails."""
    tests = [session.items[number] for number in numbers]
    for test, after in zip(tests, [*tests[1:], None], strict=True):
        test.config.hook.pytest_runtest_protocol(item=test, nextitem=after)
        if session.testsfailed:
            return


def in_a_fork(function: Callable[[], Any]) -> Any:
    """The result of ``function``, called in a forked process without output; None if it raises or the process dies."""
    read, write = os.pipe()
    if not os.fork():
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            with os.fdopen(write, "w") as file:
                file.write(json.dumps(function()))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.wait()
    return json.loads(text) if text else None


def main(modules: list[str]) -> None:
    if len(modules) != 1:  # one process for each module, so that each collects only its own tests
        for module in modules or TESTS:
            subprocess.run([sys.executable, "-m", "prove.mutants", module], check=True)
        return
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    pytest.main([*options, *TESTS[modules[0]]], plugins=[Run(modules[0])])


if __name__ == "__main__":
    main(sys.argv[1:])
