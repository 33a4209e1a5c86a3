"""What a study trains and how long: in full, or quickly as a trial."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

ENCODING, MAX_LENGTH = "rlchat_1k", 96

@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a result depends on."""

    seeds: tuple[int, ...] = (0, 1, 2)
    policy_width: int = 64
    widths: tuple[int, ...] = (16, 32, 64)
    amounts: tuple[int, ...] = (64, 256, 1024, 4096)
    kl_coefs: tuple[float, ...] = (0.0, 0.05, 0.2)
    questions: int = 2400
    held_out: int = 256
    sft_epochs: int = 4
    sft_batch: int = 32
    sft_learning_rate: float = 3e-3
    proxy_batch: int = 16
    proxy_learning_rate: float = 1e-3
    max_new_tokens: int = 24
    ppo_iterations: int = 60
    ppo_batch: int = 64
    ppo_learning_rate: float = 3e-4
    critic_warmup: int = 2
    record_every: int = 2

    def proxy_epochs(self, comparisons: int) -> int:
        """At least two passes, and more over few comparisons."""
        return max(2, min(20, 2048 // comparisons))
