"""How many threads a small model should train with, here and now."""

from __future__ import annotations

import time

import torch
from torch import nn


def fastest_threads(rounds: int = 8) -> int:
    """1, or as many threads as PyTorch would take by itself where those are clearly faster; sets nothing.

    Threads that share a small matrix meet thousands of times a second. On a core of their own that pays; where another
    program holds a core they wait for it each time, and training becomes ten times slower than with one thread. So it
    is measured, on layers as small as the demo's.
    """
    usual = torch.get_num_threads()
    if usual == 1:
        return 1
    seconds = {}
    for threads in (1, usual):
        torch.set_num_threads(threads)
        seconds[threads] = _seconds(rounds)
    torch.set_num_threads(usual)
    return usual if seconds[usual] * 1.2 < seconds[1] else 1


def _seconds(rounds: int) -> float:
    layer = nn.Sequential(nn.Linear(128, 344), nn.SiLU(), nn.Linear(344, 128))
    x = torch.zeros(1280, 128)
    for _ in range(2):  # threads are started and memory is taken once
        layer(x).sum().backward()
    began = time.perf_counter()
    for _ in range(rounds):
        layer(x).sum().backward()
    return time.perf_counter() - began
