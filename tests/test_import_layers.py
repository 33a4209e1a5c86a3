"""The import layers of packages, and imports that the command line delays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlchat.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch",
    "lightning",
    "transformers",
    "tiktoken",
    "numpy",
    "matplotlib",
    "jsonargparse",
    "rich",
    "prompt_toolkit",
}


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_packages_only_import_from_lower_layers() -> None:
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_module_has_a_place_in_the_layers() -> None:
    named = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("layers = [")[1].split("]")[0]
    places = {name.strip() for line in named.split('"') for name in line.split("|")}
    assert {path.stem for path in (ROOT / "rlchat").glob("*.py")} - {"__init__"} - places == set()


@pytest.mark.parametrize("words", [["--help"], [], ["fit"], ["no-such-command"]])
def test_what_needs_no_model_imports_none(words: list[str]) -> None:
    out = python(
        "import sys\n"
        "from rlchat.__main__ import main\n"
        f"main({words!r})\n"
        "print('imported:', *{name.partition('.')[0] for name in sys.modules})\n"
    )
    imported = set(out.rpartition("imported:")[2].split())
    assert not imported & HEAVY


def test_help_imports_few_modules() -> None:
    """Measured by the number of modules that Python does not import itself, because times depend on the load."""
    count = "; print(len(sys.modules) - before)"
    out = python("import sys; before = len(sys.modules); from rlchat.__main__ import main; main(['--help'])" + count)
    assert int(out.splitlines()[-1]) < 110
    for name, what in COMMANDS.items():
        assert f"  {name:<9}  {what}" in out
