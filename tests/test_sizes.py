"""Limits on the size of packages, modules and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rlchat"
MAX_MODULES, MAX_MODULE_LINES, MAX_FUNCTION_LINES = 15, 400, 60


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function of a module, nested ones too: where it is, and its number of lines without decorators."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_packages_are_small() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    modules = {str(folder.relative_to(PACKAGE)): len(list(folder.glob("*.py"))) for folder in folders}
    assert len(modules) > 10
    assert {name: count for name, count in modules.items() if count > MAX_MODULES} == {}


def test_modules_are_short() -> None:
    lines = {
        str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: count for name, count in lines.items() if count > MAX_MODULE_LINES} == {}


def test_functions_are_short() -> None:
    lines = dict(found for path in PACKAGE.rglob("*.py") for found in functions(path))
    assert len(lines) > 500
    assert {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES} == {}


def test_the_ppo_loop_fits_on_two_screens() -> None:
    lines = dict(functions(PACKAGE / "ppo" / "module.py"))
    loop = {name.split()[-1]: count for name, count in lines.items()}
    assert loop["training_step"] + loop["update"] + loop["minibatch_loss"] <= 100
