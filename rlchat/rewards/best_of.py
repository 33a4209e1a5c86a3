"""Several responses to a prompt: the one with the highest reward, and pass@k, the chance that one of k is correct."""

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


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that at least one of ``k`` responses is correct, estimated from ``n`` of which some are correct.

    ``1 - C(n - correct, k) / C(n, k)``: the fraction of the subsets of k of the n responses that contain a correct one.
    The estimate is unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1). With k = 1, it is ``correct / n``.

    Example: n = 4, correct = 1 and k = 2 give 1 - 3/6 = 0.5.

    Raises:
        ValueError: unless 1 <= k <= n and 0 <= correct <= n.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} responses of which {correct} are correct")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def pass_at(correct: Sequence[bool], n: int) -> dict[int, list[float]]:
    """:func:`pass_at_k` of each group of ``n`` consecutive responses, for k = 1, 2, 4, ... below ``n``, and for ``n``.

    Example: correct (1, 0, 0, 0) and n = 2 give {1: [0.5, 0], 2: [1, 0]}.

    Raises:
        ValueError: if ``n`` does not divide the number of responses.
    """
    if n < 1 or len(correct) % n:
        raise ValueError(f"{len(correct)} responses are not groups of {n}")
    counts = [sum(correct[start : start + n]) for start in range(0, len(correct), n)]
    sizes = [*(2**i for i in range((n - 1).bit_length())), n]
    return {k: [pass_at_k(n, count, k) for count in counts] for k in sizes}
