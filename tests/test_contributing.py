"""The recipes of CONTRIBUTING.md, executed exactly as printed in a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^### (Add .*?)\n(.*?)(?=^### |\Z)", TEXT, re.MULTILINE | re.DOTALL))
FILE = re.compile(r"^(Create|Append to) `(\S+)`:\n\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_there_are_four_recipes() -> None:
    assert [title.split()[-1] for title in RECIPES] == ["factor", "estimator", "format", "family"]


def test_the_recipes_pass_their_own_tests(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "rlchat", tmp_path / "rlchat", ignore=shutil.ignore_patterns("__pycache__"))
    tests = [follow(RECIPES[title], tmp_path) for title in RECIPES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *tests]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(RECIPES)} passed" in run.stdout


def follow(recipe: str, folder: Path) -> str:
    """Writes the files of ``recipe`` to ``folder``; returns the path of its test."""
    files = FILE.findall(recipe)
    code, tests = [path for _, path, _ in files]
    assert code.startswith("rlchat/")
    assert tests.startswith("tests/")
    for action, path, content in files:
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        assert place.exists() == (action == "Append to")
        with place.open("a", encoding="utf-8") as file:
            file.write(f"\n\n{content}" if action == "Append to" else content)
    return tests
