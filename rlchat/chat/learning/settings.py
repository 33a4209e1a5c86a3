"""How a round trains and judges a version: plain values, without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from rlchat.utils.ranges import check_room, check_seed, fractions, not_negative, positive, positive_integers

if TYPE_CHECKING:
    from rlchat.models.model_file import PolicyBundle

Method = Literal["dpo", "ppo"]
Part = Literal["lora", "full"]

FULL_BELOW = 20_000_000
"""Models with fewer weights are trained in full by default, others with LoRA."""

# Of a new version; a LoRA needs a higher one, see docs/lora.md, and so do all weights of a small model.
_LEARNING_RATES: dict[Part, float] = {"full": 1e-4, "lora": 5e-4}
_SMALL_RATE = 3e-4
# A model that is trained with LoRA is large, and the time of a round is that of its rows. With DPO, smaller batches
# make as many steps from fewer rows, which taught as much in less than half of the time. See docs/learn.md.
_BATCH, _LORA_BATCH = 16, 4


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a version is trained.

    Attributes:
        method: dpo, or ppo after an update of the reward model.
        part: lora, or full for all weights; None: full for a model below :data:`FULL_BELOW` weights.
        learning_rate: the peak learning rate; None: 5e-4 for LoRA, 1e-4 for all weights, and 3e-4 for all weights of a
            model below :data:`FULL_BELOW` weights.
        passes: passes over the data; None: as many as 100 steps need, from 4 to 12, and for DPO with LoRA as many as 24
            steps need, from 2 to 12.
        beta: the KL penalty to the original model: β of DPO, or the coefficient of PPO.
        iterations: of PPO.
        lora_rank: the rank of the adapters.
        train_layers: the last N layers are trained only, or their adapters; None: all layers.
        batch_size: prompts in a batch of DPO and of the reward model; None: 16, and 4 for DPO with LoRA.
        max_new_tokens: the largest number of tokens in a response; None: a quarter of the model's, at most 100.
        seed: of the order, the adapter's initial values and sampling.

    Raises:
        UserError: an option is out of range.
    """

    method: Method = "dpo"
    part: Part | None = None
    learning_rate: float | None = None
    passes: int | None = None
    beta: float = 0.1
    iterations: int = 16
    lora_rank: int = 16
    train_layers: int | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        positive(learning_rate=self.learning_rate, beta=self.beta)
        check_seed("seed", self.seed)
        positive_integers(passes=self.passes, iterations=self.iterations, lora_rank=self.lora_rank)
        positive_integers(train_layers=self.train_layers, batch_size=self.batch_size)
        positive_integers(max_new_tokens=self.max_new_tokens)

    def for_model(self, original: PolicyBundle) -> Training:
        """These options with defaults that suit ``original``.

        Raises:
            UserError: a response can fill the whole ``max_length`` of the model.
        """
        size = sum(weight.numel() for weight in original.model.backbone.parameters())
        part: Part = self.part or ("full" if size < FULL_BELOW else "lora")
        tokens = self.max_new_tokens or max(1, min(100, original.max_length // 4))
        check_room(tokens, original.max_length)
        is_small = part == "full" and size < FULL_BELOW
        rate = self.learning_rate or (_SMALL_RATE if is_small else _LEARNING_RATES[part])
        batch = self.batch_size or (_LORA_BATCH if part == "lora" and self.method == "dpo" else _BATCH)
        return replace(self, part=part, learning_rate=rate, batch_size=batch, max_new_tokens=tokens)

    @property
    def tokens(self) -> int:
        """``max_new_tokens`` after :meth:`for_model`."""
        assert self.max_new_tokens is not None
        return self.max_new_tokens

    @property
    def rows_per_batch(self) -> int:
        """``batch_size`` after :meth:`for_model`."""
        assert self.batch_size is not None
        return self.batch_size


@dataclass(frozen=True)
class Bounds:
    """How much worse than the original model a version may be, and how well it must have learned.

    Attributes:
        perplexity_rise: of the perplexity on human replies, as a share of it.
        control_drop: of the share of controls that are answered correctly; see :meth:`controls_to_lose`.
        kl: in nats per token, from the original model to the version, on responses of the original to controls.
        reward_accuracy: the least :func:`rlchat.learn.measure.reward_accuracy`, if enough verdicts are held back.

    Raises:
        UserError: a bound is negative, or the reward accuracy is above 1.
    """

    perplexity_rise: float = 0.05
    control_drop: float = 0.02
    kl: float = 0.1
    reward_accuracy: float = 0.6

    def __post_init__(self) -> None:
        not_negative(perplexity_rise=self.perplexity_rise, control_drop=self.control_drop, kl=self.kl)
        fractions(reward_accuracy=self.reward_accuracy)

    def controls_to_lose(self, controls: int) -> int:
        """How many correct answers to ``controls`` a version may lose: at least one, unless ``control_drop`` is 0.

        One of a few controls says little, as an answer can change in one word.
        """
        lost = int(self.control_drop * controls + 1e-9)  # 0.29 * 100 is 28.999999999999996
        return max(lost, 1) if self.control_drop else 0
