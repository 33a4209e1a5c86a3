"""GGUF files as base models: the weights and the tokenizer that rlchat exported come back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.export.gguf_file import write_gguf
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle, new_policy
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.training.initial_model import open_policy
from rlchat.utils.cache_folder import entries

gguf = pytest.importorskip("gguf")

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
TEXTS = ("Hello!", "12 345 cats, they're naïve", "<|end|> \n\n x  y", "🙂")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rlchat" / "base_models"


def exported(path: Path, shape: dict[str, Any], tokenizer: ChatTokenizer) -> PolicyBundle:
    torch.manual_seed(0)
    bundle = PolicyBundle(new_policy(Backbone(shape, tokenizer.vocab_size, 64), tokenizer), tokenizer, 64)
    for weight in bundle.model.backbone.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    write_gguf(bundle, path, "A name")
    return bundle


@torch.no_grad()
def logits(bundle: PolicyBundle, ids: list[int]) -> Tensor:
    batch = torch.tensor([ids])
    model = bundle.model.eval()
    return model.logits(model(batch, torch.ones_like(batch, dtype=torch.bool)))[0]


@pytest.mark.parametrize("family", SHAPES)
def test_weights_tokens_and_chat_format_come_back(
    family: str, tmp_path: Path, cache: Path, tokenizer: ChatTokenizer
) -> None:
    path = tmp_path / "model.gguf"
    before = exported(path, SHAPES[family], tokenizer)
    after = open_policy(str(path), None, 64, None, None)
    assert after.tokenizer.has_own_format
    for text in TEXTS:
        prompt = Conversation((Message("user", text),))
        ids = before.tokenizer.render_prompt(prompt).ids
        assert after.tokenizer.render_prompt(prompt).ids == ids
        sayable = list(range(before.tokenizer.base_size))
        torch.testing.assert_close(
            logits(after, ids)[:, sayable], logits(before, ids)[:, sayable], atol=1e-4, rtol=1e-4
        )
    (folder,) = cache.iterdir()
    assert after.model.backbone.transformer.config.rlchat_base == {"hub": "", "title": "A name", "license": ""}
    changed = (folder / "config.json").stat().st_mtime_ns
    os.utime(folder, (1e9, 1e9))
    open_policy(str(path), None, 64, None, None)  # from the cache
    (entry,) = entries(cache.parent)
    assert (entry.path, entry.what) == (folder, "base model")
    assert entry.used > 1e9  # marked as used
    assert (folder / "config.json").stat().st_mtime_ns == changed


def write(path: Path, architecture: str = "llama", model: str = "gpt2", pre: str = "gpt-2") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"model": "llama"}, "its tokenizer .tokenizer.ggml.model llama, .* is not supported; supported are gpt2 with"),
        (
            {"pre": "kimi-k2"},
            "its tokenizer .*tokenizer.ggml.pre kimi-k2. is not supported; .*Use the transformers folder",
        ),
        ({"architecture": "clip"}, "transformers cannot read its weights .*clip.*; use the transformers folder"),
    ],
)
def test_what_cannot_be_read_is_named(options: dict[str, str], answer: str, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=f"base_model .*model.gguf: {answer}"):
        open_policy(str(write(tmp_path / "model.gguf", **options)), None, 64, None, None)
    assert list(cache.iterdir()) == []


def test_a_file_that_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing.gguf: no such file"):
        open_policy("missing.gguf", None, 64, None, None)
    (tmp_path / "text.gguf").write_text("not a GGUF file " * 10)
    with pytest.raises(UserError, match=r"text.gguf: not a readable GGUF file .*; download it again"):
        open_policy(str(tmp_path / "text.gguf"), None, 64, None, None)


def test_a_file_that_lacks_tensors(
    tmp_path: Path, cache: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would give them random values."""
    path, add = tmp_path / "model.gguf", gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", lambda *a, **k: None if "blk.1." in a[1] else add(*a, **k))
    exported(path, SHAPES["llama"], tokenizer)
    lacks = r"model.gguf: its weights lack model.layers.1.\S+ and 8 more tensors of a llama model; download it again"
    with pytest.raises(UserError, match=lacks):
        open_policy(str(path), None, 64, None, None)
    assert not list(cache.iterdir())  # nothing was unpacked


def test_without_the_package_gguf_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match=r"needs the package gguf; install it with: .*pip install .*export"):
        open_policy(str(tmp_path / "model.gguf"), None, 64, None, None)
