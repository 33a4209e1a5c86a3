"""Base models: from ``base_model`` (a hub name, a folder or an inline configuration) to a configuration and weights."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rlchat.errors import UserError, one_line
from rlchat.models.causal_attention import ATTENTION_NAME
from rlchat.models.families import encoder_families, positions_of
from rlchat.utils.hub import hub_error, reachable_source

T = TypeVar("T")

_SAMPLED_VALUES = 4096  # of each weight, for a digest

# Without it, transformers asks in the terminal whether to run the code that comes with a model.
NO_CODE = {"trust_remote_code": False}

# ``from_pretrained`` also returns which tensors are missing or have another shape; see :func:`check_report`.
REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}


class LogitsForm(NamedTuple):
    """What a family does to the product of hidden states and output matrix: ``cap * tanh(scale * logits / cap)``."""

    scale: float = 1.0
    cap: float | None = None
    bias: bool = False  # whether the output layer adds a bias

    def __call__(self, logits: Tensor) -> Tensor:
        """``logits`` [..., vocabulary] as the family gives them."""
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def apply_(self, logits: Tensor) -> Tensor:
        """The same, in the memory of ``logits`` and without a gradient."""
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor, temperature: float) -> Tensor | float:
        """The derivative of the logits at ``temperature``, given the ``logits`` [..., vocabulary] at it."""
        slope = self.scale / temperature
        return slope if self.cap is None else slope * (1 - (logits * (temperature / self.cap)).square())


class Pretrained(NamedTuple):
    """A loaded base model: its trunk, the output layer where it is not tied to the embeddings, and its logits."""

    trunk: PreTrainedModel
    head: nn.Linear | None
    form: LogitsForm


def configuration(base_model: str | dict[str, Any], vocab_size: int, max_length: int) -> PretrainedConfig:
    """The configuration of ``base_model``; an inline one gets ``vocab_size`` and enough positions.

    Raises :class:`UserError` if it cannot be loaded, has too few positions, or has unknown options.
    """
    if isinstance(base_model, str):
        _require_model(base_model)
        config = _fetch(base_model, lambda: AutoConfig.from_pretrained(reachable_source(base_model), **NO_CODE))
        _require_positions(config, max_length, base_model)
        return config
    values = dict(base_model)
    family = values.pop("model_type", None)
    if family not in CONFIG_MAPPING:
        raise UserError(
            f"base_model: unknown model_type {family!r}; expected a model family of transformers such as llama or gpt2"
        )
    _require_known(values, CONFIG_MAPPING[family](), family)
    values.setdefault("max_position_embeddings", max_length + 2)  # RoBERTa's first position is 2
    values.setdefault("pad_token_id", 0 if family in encoder_families() else None)
    values.setdefault("bos_token_id", None)
    values.setdefault("eos_token_id", None)
    if "num_attention_heads" in values and getattr(CONFIG_MAPPING[family](), "num_key_value_heads", None):
        # The default of families with grouped-query attention only fits their default number of heads.
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
    try:
        config = AutoConfig.for_model(family, **{**values, "vocab_size": vocab_size})
    except (TypeError, ValueError, NotImplementedError, StrictDataclassError) as error:
        raise UserError(f"base_model: invalid configuration for {family}: {one_line(error)}") from error
    _require_positions(config, max_length, family)
    return config


def from_config(config: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """An untrained model of the shape of ``config``. Raises :class:`UserError` where it cannot be built."""
    try:
        model = AutoModel.from_config(config, attn_implementation=attention_name(config, attention))
    except Exception as error:  # each family fails in its own way
        raise UserError(f"base_model: cannot build a {config.model_type} model: {one_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def pretrained(name: str, config: PretrainedConfig, attention: str | None = None) -> Pretrained:
    """The weights of the base model ``name`` in float32.

    Raises :class:`UserError` where they cannot be loaded, are incomplete, or where its logits cannot be reproduced.
    """
    options: dict[str, Any] = {"attn_implementation": attention_name(config, attention), "dtype": torch.float32}
    options |= NO_CODE | REPORT
    if not _has_head(config):
        model, report = _fetch(name, lambda: AutoModel.from_pretrained(reachable_source(name), **options))
        check_report(name, report, config.model_type)
        return Pretrained(model, None, LogitsForm())
    loaded: Any = _fetch(name, lambda: AutoModelForCausalLM.from_pretrained(reachable_source(name), **options))
    whole, report = loaded
    check_report(name, report, config.model_type)
    parts = _parts(whole, config)
    _check_logits(name, whole, parts.trunk, parts.form, whole.get_output_embeddings())
    return parts


def check_report(name: str, report: dict[str, Any], family: str) -> None:
    """Raises :class:`UserError` if ``report`` (of ``from_pretrained`` with :data:`REPORT`) has tensors that do not fit.

    transformers gives these random values. A pooler is not used, so its weights may be missing.
    """
    for tensor, found, expected in sorted(report["mismatched_keys"]):
        raise UserError(
            f"base_model {name}: its weight {tensor} has shape {tuple(found)}, but its config.json describes "
            f"{tuple(expected)}; download it again"
        )
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UserError(
            f"base_model {name}: its weights lack {missing[0]}{more} of a {family} model; download it again"
        )


def untrained(config: PretrainedConfig, attention: str | None = None) -> Pretrained:
    """A model of the shape that :func:`pretrained` returns for ``config``, without the weights."""
    options: dict[str, Any] = {"attn_implementation": attention_name(config, attention), "dtype": torch.float32}
    if not _has_head(config):
        return Pretrained(AutoModel.from_config(config, **options), None, LogitsForm())
    return _parts(AutoModelForCausalLM.from_config(config, **options), config)


def _has_head(config: PretrainedConfig) -> bool:
    """Whether transformers has a causal language model of the family, whose output layer is used."""
    return config.model_type not in encoder_families() and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _parts(whole: Any, config: PretrainedConfig) -> Pretrained:
    trunk, head = whole.base_model, whole.get_output_embeddings()
    assert isinstance(trunk, PreTrainedModel)
    form = logits_form(config)._replace(bias=getattr(head, "bias", None) is not None)
    tied = is_tied(whole)
    assert tied or isinstance(head, nn.Linear)
    return Pretrained(trunk, None if tied else head, form)


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of ``weights`` with their names, from a fixed sample of the values of each.

    Training changes almost every value of a weight, so different weights have different digests.
    """
    found = hashlib.sha256()
    for name, weight in weights:
        values = weight.detach().flatten()
        values = values[:: max(1, len(values) // _SAMPLED_VALUES)].cpu().contiguous()
        found.update(f"{name} {tuple(weight.shape)}".encode())
        found.update(values.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def logits_form(config: PretrainedConfig) -> LogitsForm:
    """Scale and soft cap of the logits: ``logit_scale`` (Cohere), ``logits_scaling`` (Granite), Gemma's soft cap."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return LogitsForm(scale, None if not cap else float(cap))


@torch.no_grad()
def _check_logits(name: str, whole: Any, trunk: PreTrainedModel, form: LogitsForm, head: Any) -> None:
    """Raises :class:`UserError` where ``whole`` computes other logits from the states of ``trunk`` than ``form``."""
    ids = torch.arange(6)[None] % whole.config.vocab_size
    whole.eval()
    try:
        theirs, hidden = whole(ids, use_cache=False).logits, trunk(ids, use_cache=False).last_hidden_state
    except Exception:  # the probe of the backbone reports what fails
        return
    ours = form(nn.functional.linear(hidden, head.weight, getattr(head, "bias", None)))
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0):
        raise UserError(
            f"base_model {name}: the output layer of the family {whole.config.model_type} computes its logits in a way "
            f"that is not supported; choose another model"
        )


def config_from_json(text: str) -> PretrainedConfig:
    """The configuration that ``PretrainedConfig.to_json_string`` wrote.

    transformers writes an infinite value as ``{"__float__": "Infinity"}``. Raises KeyError for a ``model_type`` that
    the installed transformers does not have, ValueError and TypeError for other invalid content.
    """

    def restore(values: dict[str, Any]) -> Any:
        return float(values["__float__"]) if values.keys() == {"__float__"} else values

    values = json.loads(text, object_hook=restore)
    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def attention_name(config: PretrainedConfig, asked: str | None = None) -> str | None:
    """The attention implementation to ask transformers for; None lets it take sdpa, or eager where there is no sdpa.

    Raises :class:`UserError` where ``asked`` cannot be used.
    """
    if config.model_type in encoder_families():
        if asked is not None:
            raise UserError(
                f"invalid value {asked!r} for attn_implementation: {config.model_type} is an encoder, which runs with "
                f"rlchat's causal attention; leave the option out"
            )
        return ATTENTION_NAME
    return asked


def hidden_width(config: PretrainedConfig) -> int:
    """The width of the last hidden states. OPT may project them to the width of its embeddings."""
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the policy head is the embedding matrix: tied, and as wide as the hidden states (not in ELECTRA)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    width = weight.shape[1]
    return bool(getattr(model.config, "tie_word_embeddings", True)) and width == hidden_width(model.config)


def _require_known(values: dict[str, Any], default: PretrainedConfig, family: str) -> None:
    """transformers ignores unknown keys: a misspelled size would build a model of billions of parameters."""
    known = {*default.to_dict(), *default.attribute_map}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            fix = f"did you mean {close[0]}?" if close else f"see the configuration of {family} in transformers"
            raise UserError(f"base_model: {family} has no option {key!r}; {fix}")


def _require_positions(config: PretrainedConfig, max_length: int, name: str) -> None:
    positions = positions_of(config)
    if positions is not None and positions < max_length:
        raise UserError(
            f"max_length {max_length} exceeds the {positions} positions of base_model {name}; lower max_length, "
            f"or choose a base model with more positions"
        )


def _require_model(name: str) -> None:
    """Raises :class:`UserError` unless ``name`` is a folder with a configuration, or a hub has one, or it is cached."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return
    if folder.is_dir():
        raise UserError(f"base_model {name}: {_no_configuration(folder)}")
    if (error := hub_error(name)) is not None and not _is_cached(name):
        raise _not_downloaded(name, error) from error


def _is_cached(name: str) -> bool:
    """Whether the configuration of ``name`` has been downloaded."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no valid name of a hub
        return False


def _no_configuration(folder: Path) -> str:
    """Why ``folder``, which has no config.json, is no base model."""
    if not (folder / "adapter_config.json").is_file():
        return "the folder contains no config.json, expected a model of transformers"
    return (
        "the folder contains an adapter of peft, not a whole model; merge it into its base model with peft "
        "(merge_and_unload, then save_pretrained of model and tokenizer), and set --model.base_model to the new folder"
    )


def _not_downloaded(name: str, error: Exception) -> UserError:
    return UserError(
        f"base_model {name} is neither a folder nor a model that could be downloaded ({type(error).__name__}); "
        f"{_DOWNLOAD}"
    )


_DOWNLOAD = (
    "download its config.json, .safetensors files, tokenizer.json and tokenizer_config.json into one folder, and set "
    "--model.base_model to it"
)


def _fetch(name: str, load: Callable[[], T]) -> T:
    """What ``load`` returns. Raises :class:`UserError` that says what failed."""
    try:
        return load()
    except OSError as error:
        if Path(name).is_dir():
            raise UserError(f"base_model {name}: the folder has no complete model: {one_line(error)}") from error
        if (cause := hub_error(name)) is not None and _is_cached(name):
            raise UserError(
                f"base_model {name}: its config.json has been downloaded before, but not its weights, and the hub "
                f"cannot be reached now ({type(cause).__name__}); connect to a network and start again, or {_DOWNLOAD}"
            ) from error
        raise _not_downloaded(name, error) from error
    except (ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        if code := _own_code(name):
            raise UserError(
                f"base_model {name} needs its own code ({', '.join(code)}), which rlchat does not run, because a model "
                f"file must load without code from elsewhere; choose a model whose family is part of transformers"
            ) from error
        # An unknown family, or an attention that the family lacks.
        raise UserError(f"base_model {name}: transformers cannot load it: {one_line(error)}") from error


def _own_code(name: str) -> list[str]:
    """The Python files that come with ``name`` and define its family; empty if transformers has the family."""
    try:
        values, _ = PretrainedConfig.get_config_dict(reachable_source(name))
    except (OSError, ValueError):
        return []
    if not isinstance(values.get("auto_map"), dict) or values.get("model_type") in CONFIG_MAPPING:
        return []
    return sorted({f"{path.rpartition('.')[0]}.py" for path in values["auto_map"].values() if isinstance(path, str)})
