"""GGUF files, read back with the reader of the package gguf."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlchat.errors import UserError
from rlchat.export.gguf_file import check_available, write_gguf
from rlchat.export.vocabulary import Vocabulary
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle, new_policy
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

gguf = pytest.importorskip("gguf")

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SMALL, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 4},
}


def bundle_of(shape: dict[str, Any], tokenizer: ChatTokenizer) -> PolicyBundle:
    torch.manual_seed(0)
    backbone = Backbone(shape, tokenizer.vocab_size, 32)
    return PolicyBundle(new_policy(backbone, tokenizer), tokenizer, 32)


def value(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


@pytest.mark.parametrize("name", SHAPES)
def test_shape_tokenizer_and_tensors(tmp_path: Path, byte_tokenizer: ChatTokenizer, name: str) -> None:
    bundle, file = bundle_of(SHAPES[name], byte_tokenizer), tmp_path / "model.gguf"
    write_gguf(bundle, file, "A name", license="apache-2.0")
    reader = gguf.GGUFReader(file)
    assert value(reader, "general.architecture") == name
    assert (value(reader, "general.name"), value(reader, "general.license")) == ("A name", "apache-2.0")
    shape = {"embedding_length": 16, "block_count": 1, "attention.head_count": 4, "vocab_size": 261}
    shape["feed_forward_length"] = 64 if name == "gpt2" else 24
    if name != "gpt2":
        shape |= {"attention.head_count_kv": 2, "attention.key_length": 8 if name == "qwen3" else 4}
    assert {key: value(reader, f"{name}.{key}") for key in shape} == shape

    tokens = value(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == 261
    assert tokens[65] == "A"
    assert tokens[32] == "Ġ"
    assert tokens[256:] == ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert value(reader, "tokenizer.ggml.token_type") == [1] * 256 + [3] * 5  # normal, control
    assert value(reader, "tokenizer.ggml.pre") == "llama-bpe"
    assert value(reader, "tokenizer.ggml.eos_token_id") == 260
    assert value(reader, "tokenizer.ggml.padding_token_id") == 256
    assert value(reader, "tokenizer.chat_template") == Vocabulary.of(byte_tokenizer).template

    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    embedding = bundle.model.backbone.transformer.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(tensors["token_embd.weight"], embedding)
    assert ("output.weight" in tensors) == (name == "llama")
    state = bundle.model.backbone.transformer.state_dict()
    if name == "gpt2":
        assert np.array_equal(tensors["blk.0.attn_qkv.weight"], state["h.0.attn.c_attn.weight"].numpy().T)
        return
    query = state["layers.0.self_attn.q_proj.weight"].numpy()
    if name == "llama":  # heads of width 4: rows 0, 1, 2, 3 of a head become 0, 2, 1, 3
        query = query[[0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15]]
    assert np.array_equal(tensors["blk.0.attn_q.weight"], query)
    assert np.array_equal(tensors["blk.0.attn_v.weight"], state["layers.0.self_attn.v_proj.weight"].numpy())


def test_matrices_in_half_precision_and_vectors_in_float32(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    write_gguf(bundle_of(SHAPES["llama"], byte_tokenizer), tmp_path / "half.gguf", "half", dtype=torch.float16)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "half.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.ffn_up.weight"] == "F16"
    assert kinds["output_norm.weight"] == "F32"


def test_an_id_without_a_token_is_unused(tmp_path: Path) -> None:
    ranks = b"".join(b"%s %d\n" % (base64_of(bytes([byte])), byte) for byte in range(256))
    state = {
        "name": "gap",
        "pattern": ChatTokenizer().state()["pattern"],
        "ranks": ranks,
        "special_tokens": {"<|endoftext|>": 258},
    }
    tokenizer = ChatTokenizer.from_state(state)
    write_gguf(bundle_of(SHAPES["llama"], tokenizer), tmp_path / "gap.gguf", "gap")
    reader = gguf.GGUFReader(tmp_path / "gap.gguf")
    assert value(reader, "tokenizer.ggml.tokens")[256:260] == ["[UNUSED256]", "[UNUSED257]", "<|endoftext|>", "<|pad|>"]
    assert value(reader, "tokenizer.ggml.token_type")[256:260] == [5, 5, 3, 3]


def base64_of(token: bytes) -> bytes:
    from base64 import b64encode

    return b64encode(token)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {"model_type": "gpt_neox", **SMALL},
            r"cannot export the family gpt_neox to GGUF: supported are llama, qwen2, qwen3, gpt2",
        ),
        ({"model_type": "llama", **SMALL, "hidden_act": "gelu"}, r"its configuration has activation gelu"),
        (
            {
                "model_type": "llama",
                **SMALL,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            },
            r"its configuration has rope type linear",
        ),
        (
            {"model_type": "qwen2", **SMALL, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
            r"its configuration has a sliding window",
        ),
    ],
)
def test_what_llama_cpp_lacks_is_refused(
    tmp_path: Path, byte_tokenizer: ChatTokenizer, shape: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write_gguf(bundle_of(shape, byte_tokenizer), tmp_path / "model.gguf", "name")
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_that_llama_cpp_does_not_know_is_refused(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    tokenizer = ChatTokenizer.from_state({**byte_tokenizer.state(), "name": "odd", "pattern": r"\p{L}+|[\s\S]"})
    with pytest.raises(UserError, match=r"cannot export the encoding odd to GGUF: llama\.cpp has no pre-tokenizer"):
        write_gguf(bundle_of(SHAPES["llama"], tokenizer), tmp_path / "model.gguf", "name")


def test_without_the_package_gguf_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rlchat\[export\]'"):
        check_available()
