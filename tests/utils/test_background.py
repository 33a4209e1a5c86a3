"""A considerate child process: priority, memory, and its end. Each test is a small process without PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlchat.utils.background import machine_memory

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither")


def child(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"import os, time; from rlchat.utils.background import *; {code}"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_ends_with_standard_input_although_it_works() -> None:
    process = child("lower_priority(); end_with_stdin(); print(os.nice(0), flush=True); time.sleep(600)")
    assert process.stdin
    assert process.stdout
    assert int(process.stdout.readline()) == 19
    if sys.platform == "linux":
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
    process.stdin.write("text does not end it")
    process.stdin.flush()
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(60) == 1


def test_memory_is_limited() -> None:
    process = child("limit_memory(2**28); bytearray(2**26); print('small', flush=True); bytearray(2**29)")
    out, error = process.communicate(timeout=60)
    assert out == "small\n"
    assert error.splitlines()[-1] == "MemoryError"


def test_the_memory_of_the_machine() -> None:
    memory = machine_memory()
    assert memory is not None
    assert memory > 2**28
