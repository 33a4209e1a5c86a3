"""The weights that training starts from: how they are opened, and how an adapter file refers to them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlchat.models.backbones import Backbone
from rlchat.models.base.gguf import unpacked_gguf
from rlchat.models.vocabulary import plan_rows
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

BaseKind = Literal["base_model", "init_from"]
_KINDS = {"base_model": "base model", "init_from": "model file"}


@dataclass(frozen=True)
class BaseWeights:
    """The weights of a backbone before training, as an adapter file refers to them.

    Attributes:
        kind: the option that they came from: base_model, or init_from for a model file.
        name: its value, a name or a path.
        fingerprint: a digest of the weights in the files of a base model, before its embedding is fitted to a
            tokenizer, or of the backbone in a model file.
    """

    kind: BaseKind
    name: str
    fingerprint: str

    @classmethod
    def from_values(cls, values: Any) -> BaseWeights | None:
        """The inverse of :meth:`values`; None if ``values`` are anything else."""
        if not isinstance(values, dict) or values.keys() != {"kind", "name", "fingerprint"}:
            return None
        if not all(isinstance(value, str) and value.isprintable() for value in values.values()):
            return None
        if values["kind"] not in _KINDS:
            return None
        return cls(**values)

    def values(self) -> dict[str, str]:
        """Plain values, for a file."""
        return asdict(self)

    def __str__(self) -> str:
        return f"the {_KINDS[self.kind]} {self.name}"

    def place(self, file: Path) -> str | None:
        """Where the weights are: at their own path, or beside the adapter ``file``; None if they are not found.

        The name of a base model that is at neither place may be a name in a model hub, unless it is an absolute path or
        a GGUF file.
        """
        try:
            there = Path(self.name).expanduser()
            for path in (there, file.parent / there.name):
                if path.exists():
                    return str(path)
        except (OSError, RuntimeError):  # a name too long, or the home of a user that does not exist
            return None
        may_be_hub = self.kind == "base_model" and not there.is_absolute() and self.name.count("/") < 2
        return self.name if may_be_hub and not is_gguf(self.name) else None


def open_base_model(
    base_model: str | dict[str, Any],
    tokenizer: ChatTokenizer,
    max_length: int,
    new_embeddings: bool = False,
    attention: str | None = None,
    weights: bool = True,
) -> Backbone:
    """A backbone with the weights of ``base_model``, and an embedding with a row for each id of ``tokenizer``.

    Args:
        base_model: a name, a folder, a GGUF file, or an inline configuration (random weights).
        tokenizer: of the new model.
        max_length: the maximum number of tokens in a conversation.
        new_embeddings: start every row of the embedding from random values.
        attention: an attention implementation of transformers, or None.
        weights: as in :class:`Backbone`.

    Raises:
        UserError: if the base model cannot be used.
    """
    if isinstance(base_model, str):
        base_model = base_model_folder(base_model)
    plan = plan_rows(base_model, tokenizer, new_embeddings)
    rows = None if plan is None else plan.sources
    return Backbone(base_model, tokenizer.vocab_size, max_length, rows, attention, weights)


def base_model_folder(base_model: str) -> str:
    """``base_model``, or the folder that a GGUF file is unpacked into. Raises :class:`UserError` if that fails."""
    return str(unpacked_gguf(Path(base_model).expanduser())) if is_gguf(base_model) else base_model


def is_gguf(name: str) -> bool:
    """Whether ``name`` is that of a GGUF file."""
    return name.lower().endswith(".gguf")
