"""The weights of a chat model: as a causal language model of transformers, and as one safetensors file."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rlchat.errors import UserError, one_line
from rlchat.export.output import complete
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle

_TEMPERATURE = 0.7  # the default of rlchat's chat
# Tolerances of logits, relative to the largest one: of float32 on a CPU, and of what computes less exactly.
_TOLERANCE, _ROUGH_TOLERANCE = 1e-4, 5e-2


def causal_lm(bundle: PolicyBundle) -> PreTrainedModel:
    """The policy of ``bundle`` as a model of transformers with its own copy of the weights, in float32.

    The value head and a separate critic are left out. Raises :class:`UserError` for a model that has no class in
    transformers, and for a family whose class computes other logits than rlchat.
    """
    backbone, tokenizer = bundle.model.backbone, bundle.tokenizer
    config = copy.deepcopy(backbone.transformer.config)
    if backbone.is_encoder:
        raise UserError(
            f"cannot export this model to transformers or GGUF: {config.model_type} is an encoder that rlchat runs "
            f"with causal attention, and other programs would run it with attention in both directions; use --to "
            f"safetensors for its weights, or train a decoder such as llama"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"cannot export this model to transformers or GGUF: transformers has no causal language model of the "
            f"family {config.model_type}; use --to safetensors for its weights"
        )
    config.__dict__.pop("rlchat_logits", None)
    config.__dict__.pop("rlchat_base", None)
    config.tie_word_embeddings = backbone.head is None
    config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.end_id, tokenizer.pad_id, None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    model.base_model.load_state_dict(backbone.transformer.state_dict())
    if backbone.head is not None:
        output = model.get_output_embeddings()
        try:
            output.load_state_dict(backbone.head.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"cannot export this model: the output layer of {config.model_type} in transformers has other weights "
                f"than the model file ({one_line(error)})"
            ) from error
    model.tie_weights()
    model.generation_config = _generation_config(bundle)
    _check_logits(bundle, model.eval())
    return model


def save_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Writes the configuration and the weights of ``model`` (of :func:`causal_lm`) to ``folder``, as ``dtype``."""
    with _without_progress_bar():
        torch.nn.Module.to(model, dtype).save_pretrained(folder)  # PreTrainedModel.to has lost its type


def saved_names(backbone: Backbone, model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """The names of the weights in the files of ``folder``, by their names in ``backbone`` without adapters.

    ``model`` is the one of :func:`causal_lm` that :func:`save_model` wrote to ``folder``. Raises :class:`UserError` for
    a family whose weights are stored in another form than transformers computes with, such as separate experts.
    """
    outer = {id(module): name for name, module in model.named_modules()}
    parts: dict[str, torch.nn.Module] = {"transformer": model.base_model, "head": model.get_output_embeddings()}
    names = {
        f"{ours}.{name}": f"{outer[id(part)]}.{name}".removeprefix(".")
        for ours, part in parts.items()
        for name in (part.state_dict() if ours == "transformer" or backbone.head is not None else ())
    }
    stored: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    state = model.state_dict()
    if other := [name for name in stored if name not in names.values() or stored[name] != tuple(state[name].shape)]:
        raise UserError(
            f"files of {model.config.model_type} models contain {other[0]}, which the model in memory does not have in "
            f"this form"
        )
    return {ours: name for ours, name in names.items() if name in stored}


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """transformers shows the number of files it writes, which is nearly always one."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def write_safetensors(bundle: PolicyBundle, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the tensors of the model file, value head included, to ``path`` atomically, under the same names.

    The metadata holds the configuration of the backbone and the description of the model as JSON.
    """
    from safetensors.torch import save_file

    model = bundle.model
    metadata = {
        "format": "pt",
        "config": model.backbone.config_json(),
        "max_length": str(bundle.max_length),
        "about": json.dumps(bundle.about, ensure_ascii=False, default=str),
    }
    with complete(path) as new:
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}, new, metadata)


def _generation_config(bundle: PolicyBundle) -> GenerationConfig:
    """Sampling as in rlchat's chat. A response cannot contain the ids of ``suppress_tokens``."""
    tokenizer = bundle.tokenizer
    return GenerationConfig(
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=None,
        do_sample=True,
        temperature=_TEMPERATURE,
        top_k=0,
        suppress_tokens=tokenizer.unsayable_ids,
    )


@torch.no_grad()
def _check_logits(bundle: PolicyBundle, exported: PreTrainedModel) -> None:
    """Raises :class:`UserError` if ``exported`` computes other logits than the policy."""
    model = bundle.model
    count = min(16, bundle.max_length)
    ids = (torch.arange(count) * 7919 % model.backbone.vocab_size)[None].to(model.backbone.device)
    training = model.training
    model.eval()
    ours = model.logits(model(ids, torch.ones_like(ids, dtype=torch.bool)))[..., model.unsayable == 0].cpu()
    model.train(training)
    theirs = exported(ids.cpu(), use_cache=False).logits.float()[..., model.unsayable.cpu() == 0]
    difference = float((ours - theirs).abs().max())
    exact = model.backbone.device.type == "cpu" and model.backbone.head_weight.dtype == torch.float32
    if difference > (_TOLERANCE if exact else _ROUGH_TOLERANCE) * max(1.0, float(ours.abs().max())):
        raise UserError(
            f"cannot export this model: the class of {exported.config.model_type} in transformers computes logits that "
            f"differ by {difference:.2g} from rlchat's; use --to safetensors for its weights"
        )
