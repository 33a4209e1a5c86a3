"""A chat model as a GGUF file for llama.cpp and the programs that build on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from rlchat.errors import UserError
from rlchat.export.output import complete
from rlchat.export.vocabulary import Vocabulary
from rlchat.export.weights import causal_lm
from rlchat.models.model_file import PolicyBundle
from rlchat.tokenizer.pattern import GPT2, GPT2_SINGLE_DIGITS, LLAMA3, QWEN2

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Family:
    """How llama.cpp stores a family: its name there, the activation it has built in, and changes to tensors."""

    architecture: str
    activation: str
    change: Callable[[str, Array, PretrainedConfig], Array] = lambda name, array, config: array


def _interleaved(name: str, array: Array, config: PretrainedConfig) -> Array:
    """Rows of query and key projections in llama.cpp's order.

    It rotates neighbors (0, 1), (2, 3), …; transformers rotates the two halves of a head. For heads of width 4, the
    rows 0, 1, 2, 3 of a head become 0, 2, 1, 3.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return array
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def _transposed(name: str, array: Array, config: PretrainedConfig) -> Array:
    """GPT-2 of transformers stores the matrices of its layers as [inputs, outputs]."""
    matrices = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return array.T if name.endswith(matrices) else array


_FAMILIES = {
    "llama": _Family("llama", "silu", _interleaved),
    "qwen2": _Family("qwen2", "silu"),
    "qwen3": _Family("qwen3", "silu"),
    "gpt2": _Family("gpt2", "gelu_new", _transposed),
}

# llama.cpp knows pre-tokenizers by name. Its llama-bpe and the pattern of cl100k_base differ in one case: where a text
# ends in a line break and then spaces, cl100k_base keeps them as one piece.
_LETTERS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PRE_TOKENIZERS = {
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s": "llama-bpe",
    LLAMA3: "llama-bpe",
    QWEN2: "qwen2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt-2",
    GPT2: "gpt-2",
    GPT2_SINGLE_DIGITS: "smollm",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_LETTERS[0]}]*[{_LETTERS[1]}]+{_SUFFIXES}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_LETTERS[0]}]+[{_LETTERS[1]}]*{_SUFFIXES}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "gpt-4o",
}


def check_available() -> None:
    """Raises :class:`UserError` if the package gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("export to GGUF needs the package gguf; install it with: pip install 'rlchat[export]'")


def write_gguf(
    bundle: PolicyBundle, path: Path, name: str, license: str = "", dtype: torch.dtype = torch.float32
) -> None:
    """Writes the policy of ``bundle`` with its tokenizer and chat template to ``path``, atomically.

    Vectors stay in float32 whatever ``dtype`` is. Raises :class:`UserError` for a family, a configuration or an
    encoding that llama.cpp does not have.
    """
    import gguf

    vocabulary = Vocabulary.of(bundle.tokenizer)
    config = bundle.model.backbone.transformer.config
    family, pre_tokenizer = _family(config), _pre_tokenizer(vocabulary, bundle.tokenizer.name)
    model = causal_lm(bundle)
    with complete(path) as new:
        writer = gguf.GGUFWriter(new, family.architecture)
        writer.add_name(name)
        writer.add_description("A chat model trained with rlchat")
        if license:
            writer.add_license(license)
        _add_shape(writer, model.config, bundle.max_length)
        _add_tokenizer(writer, vocabulary, pre_tokenizer)
        for tensor, array, kind in _tensors(model, family, dtype):
            writer.add_tensor(tensor, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _family(config: PretrainedConfig) -> _Family:
    """The family of ``config`` in llama.cpp. Raises :class:`UserError` for what it does not have."""
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"cannot export the family {config.model_type} to GGUF: supported are {', '.join(_FAMILIES)}; use --to hf "
            f"and llama.cpp's own converter"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    unusual = {
        f"activation {activation}": activation != family.activation,
        f"rope type {rope.get('rope_type')}": rope.get("rope_type", "default") != "default",
        "a sliding window": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        "attention scaled by the layer": bool(getattr(config, "scale_attn_by_inverse_layer_idx", False)),
        "unscaled attention": not getattr(config, "scale_attn_weights", True),
    }
    for what, found in unusual.items():
        if found:
            raise UserError(
                f"cannot export this model to GGUF: its configuration has {what}, which is not supported; use --to hf "
                f"and llama.cpp's own converter"
            )
    return family


def _pre_tokenizer(vocabulary: Vocabulary, name: str) -> str:
    found = _PRE_TOKENIZERS.get(vocabulary.pattern)
    if found is None or vocabulary.normalizer not in (None, "NFC"):
        raise UserError(
            f"cannot export the encoding {name} to GGUF: llama.cpp has no pre-tokenizer for its pattern; use --to hf"
        )
    return found


def _add_shape(writer: Any, config: PretrainedConfig, max_length: int) -> None:
    import gguf

    heads = config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    writer.add_context_length(int(getattr(config, "max_position_embeddings", None) or max_length))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.GUESSED)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))


def _add_tokenizer(writer: Any, vocabulary: Vocabulary, pre_tokenizer: str) -> None:
    from gguf import TokenType

    names = {number: token for token, number in vocabulary.spelled.items()}
    kinds = dict.fromkeys(vocabulary.special.values(), TokenType.CONTROL)
    kinds |= dict.fromkeys([*vocabulary.texts.values(), *vocabulary.normalized_texts.values()], TokenType.USER_DEFINED)
    every = range(vocabulary.size)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([names.get(number, f"[UNUSED{number}]") for number in every])
    writer.add_token_types(
        [kinds.get(number, TokenType.NORMAL if number in names else TokenType.UNUSED) for number in every]
    )
    writer.add_token_merges([f"{left} {right}" for left, right in vocabulary.merges])
    end = vocabulary.special[vocabulary.end]
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_pad_token_id(vocabulary.special[vocabulary.pad])
    # Without a BOS token, llama.cpp would assume the id 11. It is not added to prompts.
    writer.add_bos_token_id(end if vocabulary.start is None else vocabulary.special[vocabulary.start])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(vocabulary.template)


def _tensors(model: PreTrainedModel, family: _Family, dtype: torch.dtype) -> Iterator[tuple[str, Array, Any]]:
    """The name in llama.cpp, the values and the type of each tensor."""
    import gguf

    config = model.config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UserError(
                f"cannot export this model to GGUF: llama.cpp has no tensor for {name} in {family.architecture}; use "
                f"--to hf and llama.cpp's own converter"
            )
        array = np.ascontiguousarray(family.change(name, tensor.float().numpy(), config))
        kind = kinds[dtype] if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        yield new, gguf.quants.quantize(array, kind), kind
