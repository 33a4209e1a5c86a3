"""Options that all stages share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

from rlchat.errors import UserError
from rlchat.models.adapters import AdapterKind, TrainedPart
from rlchat.models.base.weights import BaseWeights
from rlchat.models.sampling import Sampling
from rlchat.training.optimizers import OptimizerName
from rlchat.utils.ranges import check_room, fractions, not_negative, positive, positive_integers

Schedule = Literal["constant", "linear", "cosine"]
ChatFormatName = Literal["own", "rlchat"]
T = TypeVar("T", bound="StageOptions")


@dataclass(kw_only=True)
class StageOptions:
    """The options of a stage, which are the arguments of its LightningModule by the same names.

    The module's docstring describes them. Lightning stores them as hyperparameters, in plain values: an instance of a
    class would need an unpickler.

    Raises:
        UserError: for an option that is out of range.
    """

    base_model: str | dict[str, Any] | None
    tiktoken_encoding: str | None
    max_length: int | None
    init_from: str | None
    learning_rate: float
    schedule: Schedule
    warmup: float
    weight_decay: float
    adam_eps: float = 1e-8
    adam_beta2: float = 0.95
    optimizer: OptimizerName = "adamw"
    adapter: AdapterKind | None = None
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: list[str] | None = None
    train_layers: int | None = None
    merge_adapter: bool = True
    gradient_checkpointing: bool = False
    chat_format: ChatFormatName | None = None
    new_embeddings: bool = False
    attn_implementation: str | None = None

    @classmethod
    def of(cls: type[T], arguments: Mapping[str, Any]) -> T:
        """The options among ``arguments``, the local variables of a module's ``__init__``."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def __post_init__(self) -> None:
        not_negative(learning_rate=self.learning_rate, weight_decay=self.weight_decay, adam_eps=self.adam_eps)
        fractions(warmup=self.warmup)
        if not 0 <= self.adam_beta2 < 1:
            raise UserError(f"invalid value {self.adam_beta2} for adam_beta2: expected a number in [0, 1)")
        if self.optimizer not in get_args(OptimizerName):
            names = ", ".join(get_args(OptimizerName))
            raise UserError(f"invalid value '{self.optimizer}' for optimizer: expected one of {names}")
        if self.adapter not in (None, "lora"):
            raise UserError(f"invalid value '{self.adapter}' for adapter: expected lora, or null")
        positive_integers(lora_rank=self.lora_rank, train_layers=self.train_layers)
        positive(lora_alpha=self.lora_alpha)
        if self.lora_targets is not None and not self.lora_targets:
            raise UserError("invalid value [] for lora_targets: expected names of linear layers, or null for all")
        if not self.merge_adapter and self.adapter is None:
            raise UserError("merge_adapter false needs an adapter; set --model.adapter lora, or leave it out")

    def check_base(self, base: BaseWeights | None) -> None:
        """Raises :class:`UserError` if model files would refer to a ``base`` that cannot be loaded again (None)."""
        if not self.merge_adapter and base is None:
            raise UserError(
                "merge_adapter false needs a base model that can be loaded again, and this one has random weights; set "
                "--model.merge_adapter true, or pass a pretrained base_model or init_from"
            )

    @property
    def trained_part(self) -> TrainedPart:
        """The weights of the backbone that are trained."""
        return TrainedPart(
            adapter=self.adapter,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            targets=self.lora_targets,
            layers=self.train_layers,
        )


@dataclass(kw_only=True)
class SupervisedOptions(StageOptions):
    """The options of a stage that learns from data. PPO has no dropout, which would change the policy.

    Raises:
        UserError: for an option that is out of range.
    """

    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        StageOptions.__post_init__(self)
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"invalid value {self.lora_dropout} for lora_dropout: expected a number in [0, 1)")

    @property
    def trained_part(self) -> TrainedPart:
        """The weights of the backbone that are trained."""
        return replace(super().trained_part, dropout=self.lora_dropout)


def check_sampling(max_new_tokens: int | None, temperature: float) -> None:
    """Raises :class:`UserError` for the options of sampled responses in a stage that does not sample to train."""
    positive_integers(max_new_tokens=max_new_tokens)
    if temperature != 0 and not 1e-6 <= temperature <= 1e6:
        raise UserError(f"invalid value {temperature} for temperature: expected 0 or a number from 1e-6 to 1e6")


def sampling_within(max_length: int, max_new_tokens: int | None, temperature: float) -> Sampling:
    """How such a stage samples: at most 100 tokens by default, or half of ``max_length`` if that is less.

    Raises:
        UserError: if a response can fill the whole ``max_length`` of the model.
    """
    sampling = Sampling(max_new_tokens or max(min(100, max_length // 2), 1), temperature)
    check_room(sampling.max_new_tokens, max_length)
    return sampling
