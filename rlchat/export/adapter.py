"""The adapter of an adapter file as a folder that peft and transformers load on top of the base model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from rlchat.errors import UserError
from rlchat.export.folder import write_tokenizer
from rlchat.export.output import complete
from rlchat.export.weights import causal_lm
from rlchat.models.adapters import Adapter
from rlchat.models.base.weights import BaseWeights, base_model_folder, is_gguf
from rlchat.models.file_content import holds_adapter, read_content
from rlchat.models.model_file import PolicyBundle
from rlchat.models.vocabulary import plan_rows
from rlchat.utils.imports import install_command

FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""The files of an exported adapter."""


def base_of(path: Path, base_model: str | None) -> str:
    """The base model that the adapter file ``path`` belongs to; ``base_model`` is where it is now, or None.

    Raises:
        UserError: if peft is not installed, or the file has no adapter, or one that belongs to a model file.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f"--to peft requires peft: install it with {install_command('lora')}") from error
    if not holds_adapter(path):
        raise UserError(f"{path} contains no adapter; train it with --model.merge_adapter false, or use --to hf")
    base = BaseWeights.from_values(read_content(path, "policy", weights=False)["base"])
    if base is None or base.kind != "base_model":
        raise UserError(f"{path}: the adapter belongs to {base}, which peft cannot load; use --to hf")
    place = base_model or base.place(path) or base.name
    if is_gguf(place):
        raise UserError(f"{path}: the adapter belongs to {place}, a GGUF file, which peft cannot load; use --to hf")
    return place


def write_adapter(
    path: Path, bundle: PolicyBundle, base_model: str, folder: Path, card: str, dtype: torch.dtype = torch.float32
) -> None:
    """Writes the adapter in ``path`` to ``folder``, with the tokenizer; it appears complete or not at all.

    Args:
        path: the adapter file.
        bundle: the model that was loaded from it.
        base_model: of the adapter; its name becomes that of the base in ``adapter_config.json``.
        folder: the output.
        card: the text of ``README.md``.
        dtype: of the matrices.

    Raises:
        UserError: if the tokenizer is not the base model's own, so that the base has other embeddings in rlchat.
    """
    from peft import LoraConfig

    plan = plan_rows(base_model_folder(base_model), bundle.tokenizer)
    if plan is None or plan.sources != tuple((row,) for row in range(len(plan.sources))):
        raise UserError(
            f"{path}: the model has the tokenizer {bundle.tokenizer.name}, and the base {base_model} another one, so "
            f"the adapter does not fit the base's embedding; use --to hf"
        )
    whole = causal_lm(bundle)
    content = read_content(path, "policy")
    # `backbone.transformer.layers.0.…` is `model.layers.0.…` of a Llama in transformers.
    inside, outside = "backbone.transformer.", f"{whole.base_model_prefix}."
    state = content["state"].items()
    matrices = {name.replace(inside, outside, 1): matrix for name, matrix in state if ".lora_" in name}
    adapter = Adapter(content["alpha"], matrices)
    layers = [name for name, _, _ in adapter.layers()]
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft accepts a float
        target_modules=layers,
        fan_in_fan_out=isinstance(whole.get_submodule(layers[0]), Conv1D),
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with complete(folder) as new:
        config.save_pretrained(str(new))
        tensors = {f"base_model.model.{name}": matrix.to(dtype).contiguous() for name, matrix in matrices.items()}
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        write_tokenizer(bundle, new, card)
