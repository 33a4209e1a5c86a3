"""Measures how many threads are fastest for a model."""

from __future__ import annotations

import math
import time

import torch
from torch import nn

_TURNS = 5


def fastest_threads(rounds: int = 8, *, rows: int = 1280, width: int = 128, gain: float = 1.2) -> int:
    """1, or PyTorch's default number of threads if that is at least ``gain`` times as fast. It does not set the number.

    Threads that share a small matrix synchronize thousands of times per second. This is efficient on idle cores. But if
    another program occupies a core, all threads wait for it each time, and training becomes ten times slower than with
    one thread. Therefore this function measures it, on a batch of ``rows`` and layers of ``width``, by default the
    demo's. Both numbers take turns and the shortest time of each counts, so that a short interruption changes nothing.
    """
    usual = torch.get_num_threads()
    if usual == 1:
        return 1
    seconds = {1: math.inf, usual: math.inf}
    for threads in (1, usual) * _TURNS:
        torch.set_num_threads(threads)
        seconds[threads] = min(seconds[threads], _seconds(rounds, rows, width))
    torch.set_num_threads(usual)
    return usual if seconds[usual] * gain < seconds[1] else 1


def _seconds(rounds: int, rows: int, width: int) -> float:
    inner = width * 43 // 16  # 344 in the demo
    layer = nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width))
    x = torch.zeros(rows, width)
    for _ in range(2):  # the first passes start threads and allocate memory
        layer(x).sum().backward()
    began = time.perf_counter()
    for _ in range(rounds):
        layer(x).sum().backward()
    return time.perf_counter() - began
