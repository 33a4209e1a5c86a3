"""What a study trains and how long: in full, or quickly as a trial."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ENCODING, MAX_LENGTH = "rlchat_1k", 96


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a result depends on, apart from the seed.

    The initial policy is trained briefly, so that its responses differ: there is much for the proxies to improve, and
    they see few of the responses that PPO finds later.

    Attributes:
        policy_width: hidden units of the policy.
        widths: hidden units of the proxy reward models; each is compared at ``amount`` comparisons.
        amounts: numbers of comparisons; each is compared at the policy's width.
        amount: the number of comparisons of the runs that compare widths and KL coefficients.
        kl_coefs: β of the KL penalty in PPO; 0 without one.
        questions: prompts of the demo's world, of which the first ``held_out`` are not trained on.
        best_of: responses per prompt for best-of-n, to the first ``best_of_prompts`` held-out prompts.
        ppo_iterations: iterations of PPO at most; a run also ends above a KL of ``most_kl`` nats per response.
        entropy_coef: of PPO; with more entropy, the policy goes on looking for responses that the proxy likes.
        record_every: iterations between two measurements on the held-out prompts.
        recorded: responses per prompt in a measurement.
    """

    policy_width: int = 32
    widths: tuple[int, ...] = (16, 32, 64)
    amounts: tuple[int, ...] = (64, 256, 1024, 4096)
    amount: int = 256
    kl_coefs: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.3)
    questions: int = 800
    held_out: int = 256
    max_new_tokens: int = 24
    sft_epochs: int = 4
    sft_batch: int = 32
    sft_learning_rate: float = 3e-3
    proxy_batch: int = 16
    proxy_learning_rate: float = 1e-3
    proxy_rows: int = 2048
    tested_pairs: int = 512
    best_of: int = 1024
    best_of_prompts: int = 64
    ppo_iterations: int = 80
    ppo_batch: int = 64
    ppo_learning_rate: float = 3e-4
    most_kl: float = 60.0
    entropy_coef: float = 0.0
    critic_warmup: int = 2
    record_every: int = 2
    recorded: int = 2

    def proxy_epochs(self, comparisons: int) -> int:
        """Passes over ``comparisons``: four, and up to sixteen if they are fewer than ``proxy_rows`` / 4."""
        return max(4, min(16, self.proxy_rows // comparisons))

    @property
    def proxies(self) -> tuple[tuple[int, int], ...]:
        """Width and number of comparisons of each proxy: all amounts at the policy's width, and all widths."""
        by_amount = [(self.policy_width, amount) for amount in self.amounts]
        by_width = [(width, self.amount) for width in self.widths]
        return tuple(dict.fromkeys([*by_amount, *by_width]))

    @property
    def ppo_runs(self) -> tuple[tuple[int, int, float], ...]:
        """Width and comparisons of the proxy, and KL coefficient, of each PPO run."""
        unpenalized = [(width, amount, 0.0) for width, amount in self.proxies]
        penalized = [(self.policy_width, self.amount, coef) for coef in self.kl_coefs]
        return tuple(dict.fromkeys([*unpenalized, *penalized]))

    def values(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


QUICK = Settings(
    widths=(32,),
    amounts=(64, 512),
    amount=64,
    kl_coefs=(0.0, 0.1),
    questions=600,
    held_out=64,
    tested_pairs=128,
    best_of=128,
    best_of_prompts=32,
    ppo_iterations=40,
    ppo_learning_rate=5e-4,
    record_every=4,
)
"""About two minutes of CPU time per seed: the whole program, with curves that are too rough to conclude anything."""
