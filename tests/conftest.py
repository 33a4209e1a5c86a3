"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.load import packaged_encodings
from rlchat.tokenizer.ranks import format_ranks, train_ranks


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the caches of the tests out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # matplotlib's font cache also uses this variable, and takes seconds to create.
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR") or str(cache / "matplotlib"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """A small tokenizer with whole words among its tokens: the packaged one, or a similar one trained here."""
    if "rlchat_1k" in packaged_encodings():
        return ChatTokenizer("rlchat_1k")
    path = tmp_path_factory.mktemp("encoding") / "small.tiktoken"
    texts = ["Hello, how are you?", "What is the colour of the sky?", "The sky is blue.", "I do not know."] * 20
    path.write_bytes(format_ranks(train_ranks(iter(texts), 400)))
    return ChatTokenizer(str(path))


@pytest.fixture(scope="session")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of an encoding of single bytes."""
    path = tmp_path_factory.mktemp("encoding") / "bytes.tiktoken"
    path.write_bytes(format_ranks({bytes([byte]): byte for byte in range(256)}))
    return str(path)


@pytest.fixture(scope="session")
def byte_tokenizer(encoding: str) -> ChatTokenizer:
    """A tokenizer whose ids can be worked out by hand: the bytes of the text; then pad 256, system 257, user 258,
    assistant 259, end 260."""
    return ChatTokenizer(encoding)


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """An empty working directory for the command line, whose changes to this process are undone."""
    from helpers.command_line import working_in

    with working_in(tmp_path):
        yield tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with tiny models of stages 1 and 2 of the demo; copy what you need."""
    from helpers.command_line import train_bundles, working_in

    folder = tmp_path_factory.mktemp("trained")
    with working_in(folder):
        train_bundles(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_module_of_another_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Unloads modules that a test imported from its own folder: the next test may have one of the same name."""
    yield
    folder = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; tests with it are skipped without Playwright or a Chromium (variable CHROMIUM, or in PATH)."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
