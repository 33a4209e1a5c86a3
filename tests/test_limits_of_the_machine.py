"""A full disk and missing memory are one sentence, in whatever way Python, PyTorch or the system report them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.chat_models import random_policy

from rlchat.__main__ import main
from rlchat.errors import limit_reached
from rlchat.models.model_file import save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


class OutOfMemoryError(RuntimeError):
    """Named as that of torch."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
        RuntimeError("std::bad_alloc"),
        OutOfMemoryError("CUDA"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        ImportError(f"libtorch_cpu.so: failed to map segment from shared object: {os.strerror(errno.ENOMEM)}"),
    ],
)
def test_memory_that_is_missing(error: Exception) -> None:
    assert str(limit_reached(error, "buy some")) == "not enough memory: buy some"


def test_a_full_disk_is_named_also_if_another_error_followed() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "data/rows.jsonl")
    assert str(limit_reached(full)).startswith("the disk is full (data/rows.jsonl): free some space; temporary files")
    later = RuntimeError("PytorchStreamWriter failed")
    later.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(limit_reached(later)).startswith("the disk is full: ")


@pytest.mark.parametrize("error", [ValueError("wrong"), OSError(errno.EACCES, "denied"), KeyError("memory")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    assert limit_reached(error) is None


def test_a_cycle_of_causes_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    assert limit_reached(first) is None


def test_every_command_reports_a_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: list[str]) -> int:
        raise {"disk": OSError(errno.ENOSPC, "full", "a.pt"), "memory": MemoryError(), "bug": ValueError("a bug")}[
            args[0]
        ]

    monkeypatch.setattr("rlchat.__main__._run", lambda command: fail)
    assert main(["cache", "disk"]) == 2
    assert "rlchat: the disk is full (a.pt)" in capsys.readouterr().err
    assert main(["cache", "memory"]) == 2
    assert capsys.readouterr().err == "rlchat: not enough memory: use smaller batches or a smaller model\n"
    with pytest.raises(ValueError, match="a bug"):
        main(["cache", "bug"])


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of memory on Windows")
def test_learn_within_too_little_memory(workplace: Path, tokenizer: ChatTokenizer) -> None:
    save_bundle("chat.pt", random_policy(tokenizer))
    Path("feedback.jsonl").write_text("")
    command = ["learn", "chat.pt", "--feedback", "feedback.jsonl", "--max-memory", "0.2"]
    ended = subprocess.run([sys.executable, "-m", "rlchat", *command], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        "rlchat: not enough memory: raise --max-memory, or --learn-memory of a chat that learns"
    )
