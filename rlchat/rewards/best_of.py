"""Best-of-n sampling: of n responses to a prompt, keep the one with the highest reward."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_of(rewards: Sequence[float], n: int) -> list[int]:
    """For each group of ``n`` consecutive rewards, the index of the highest in ``rewards``; of equal ones, the first.

    Example: rewards (1, 3, 3, 0, -1, 2) and n = 3 give [1, 5].

    Raises:
        ValueError: if ``n`` does not divide the number of rewards.
    """
    if n < 1 or len(rewards) % n:
        raise ValueError(f"{len(rewards)} rewards are not groups of {n}")
    return [max(range(start, start + n), key=lambda i: (rewards[i], -i)) for start in range(0, len(rewards), n)]


def best_of_kl(n: int) -> float:
    """The KL in nats between the best of ``n`` responses and a single one: ``log n - (n - 1) / n``.

    It is exact if no two responses have the same reward, and an upper bound otherwise (Stiennon et al. 2020, appendix
    G.3; Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n
