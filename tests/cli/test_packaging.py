"""What is installed: the recipes, encodings and the page, from a wheel and from an editable install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlchat.cli import recipes

ROOT = Path(recipes.__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, so that it leaves nothing in the working tree."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("pyproject.toml requires a newer setuptools, and a test does not download one")
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("configs", "rlchat"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", *words, "--no-deps", "--no-build-isolation", "--no-index"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


def recipes_listed(folder: Path, before: str, place: Path) -> list[str]:
    """What `rlchat fit` without options lists in a new process that imports rlchat from below ``place``.

    The process does not see the rlchat of this environment: ``-S`` leaves its ``.pth`` files unread. ``before`` is run
    first, and makes the other one importable.
    """
    code = [
        "import site, sys, sysconfig",
        before,
        "sys.path.append(sysconfig.get_path('purelib'))",
        "import rlchat.__main__ as m",
        "print(m.__file__)",
        "sys.exit(m.main(['fit']))",
    ]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", "\n".join(code)]
    ran = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2, ran.stderr
    assert Path(ran.stdout.strip()).is_relative_to(place)
    return [line.split()[1] for line in ran.stderr.splitlines() if line.startswith("  --config")]


@pytest.mark.slow
def test_a_wheel_contains_everything_that_a_clone_has(source: Path, tmp_path: Path) -> None:
    pip("wheel", str(source), "-w", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(wheel, unpacked, format="zip")

    code = {path.relative_to(source) for path in (source / "rlchat").rglob("*") if path.suffix != ".pyc"}
    configs = {Path("rlchat") / path.relative_to(source) for path in (source / "configs").rglob("*")}
    expected = {path for path in code if (source / path).is_file()}
    expected |= {path for path in configs if (source / path.relative_to("rlchat")).is_file()}
    packaged = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert {path for path in packaged if path.parts[0] == "rlchat"} == expected
    assert {path.parts[0] for path in packaged} == {"rlchat", f"{wheel.name.split('-py3')[0]}.dist-info"}
    assert Path("rlchat/configs/demo/ppo.yaml") in packaged
    assert recipes_listed(tmp_path, f"sys.path.insert(0, {str(unpacked)!r})", unpacked) == list(recipes.recipes())


@pytest.mark.slow
def test_an_editable_install_reads_the_recipes_of_the_clone(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip("install", "--editable", str(source), "--target", str(target))
    (source / "configs" / "added.yaml").write_text("# Added after the installation\nseed_everything: 1\n")
    listed = recipes_listed(tmp_path, f"site.addsitedir({str(target)!r})", source)
    assert listed == sorted([*recipes.recipes(), "added"])
