"""Embedding rows of a base model are kept only if its tokenizer files contain the tokens of the encoding."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from rlchat.models.vocabulary import kept_rows
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.ranks import format_ranks
from rlchat.training.initial_model import open_policy

RANKS = {**{bytes([i]): i for i in range(256)}, b" t": 256, b"he": 257, " é".encode(): 258}
# The same tokens in the spelling of byte-level vocabularies: bytes without a printable letter follow from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
LETTERS = [chr(byte) if byte in PRINTABLE else chr(256 + OTHERS.index(byte)) for byte in range(256)]
SPELLED = {**{letter: byte for byte, letter in enumerate(LETTERS)}, "Ġt": 256, "he": 257, "ĠÃ©": 258}


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    (tmp_path / "mine.tiktoken").write_bytes(format_ranks(RANKS))
    return ChatTokenizer(str(tmp_path / "mine.tiktoken"))


def model_folder(folder: Path, vocab_size: int = 259, **files: Any) -> str:
    """A llama's folder; a file whose content is None is left out, a dict is written as JSON."""
    folder.mkdir()
    LlamaConfig(vocab_size=vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        folder
    )
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return str(folder)


def bpe(vocabulary: dict[str, int], *added: dict[str, Any]) -> dict[str, Any]:
    return {"added_tokens": list(added), "model": {"type": "BPE", "vocab": vocabulary}}


@pytest.mark.parametrize("files", [{"tokenizer": bpe(SPELLED)}, {"vocab": SPELLED}], ids=["tokenizer", "vocab"])
def test_rows_of_the_same_tokens_are_kept(tokenizer: ChatTokenizer, tmp_path: Path, files: dict[str, Any]) -> None:
    assert kept_rows(model_folder(tmp_path / "model", **files), tokenizer) == 259


SWAPPED = {**SPELLED, "Ġt": 257, "he": 256}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": bpe(SWAPPED)}, "2 of them differ"),
        ({"vocab": {**SPELLED, "ĠÃ©": 300}}, "1 of them differ"),
        (
            {"tokenizer": bpe({k: v for k, v in SPELLED.items() if v < 258}, {"id": 258, "content": "</s>"})},
            "1 of them",
        ),
        ({"tokenizer": bpe({"▁the": 0})}, "no byte-level tokenizer.json or vocab.json"),
        ({"tokenizer": {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}}, "no byte-level tokenizer.json"),
        ({"tokenizer": "not JSON"}, "no byte-level tokenizer.json"),
        ({}, "no byte-level tokenizer.json or vocab.json that could show whether they are the same"),
    ],
    ids=["swapped", "another id", "special", "sentencepiece", "unigram", "damaged", "none"],
)
def test_an_equal_number_of_different_tokens_is_reinitialized_with_a_warning(
    tokenizer: ChatTokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    files: dict[str, Any],
    message: str,
) -> None:
    with caplog.at_level(logging.WARNING, "rlchat"):
        assert kept_rows(model_folder(tmp_path / "model", **files), tokenizer) == 0
    (record,) = caplog.records
    assert message in record.getMessage()
    assert record.getMessage().endswith("the embeddings are initialized randomly")


def test_a_different_number_of_tokens_is_reinitialized(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    assert kept_rows(model_folder(tmp_path / "model", vocab_size=260, vocab=SPELLED), tokenizer) == 0
    assert kept_rows({"model_type": "llama"}, tokenizer) == 0


def test_special_tokens_of_the_encoding_are_compared_by_their_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = tiktoken.Encoding("one", pat_str=".", mergeable_ranks=RANKS, special_tokens={"<|end|>": 259})
    monkeypatch.setattr("tiktoken.list_encoding_names", lambda: ["one"])
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: encoding)
    tokenizer = ChatTokenizer("one")
    same = model_folder(tmp_path / "same", 260, tokenizer=bpe(SPELLED, {"id": 259, "content": "<|end|>"}))
    other = model_folder(tmp_path / "other", 260, tokenizer=bpe(SPELLED, {"id": 259, "content": "<|pad|>"}))
    assert kept_rows(same, tokenizer) == 260
    assert kept_rows(other, tokenizer) == 0


@pytest.mark.parametrize(("name", "kept"), [("gpt2", 50257), ("cl100k_base", 0)])
def test_gpt2_without_tokenizer_files_is_kept_under_its_own_encoding_only(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    kept: int,
) -> None:
    ranks = {**RANKS, **{b"token%d" % i: i for i in range(259, 50257)}}
    encoding = tiktoken.Encoding(name, pat_str=".", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: encoding)
    GPT2Config(vocab_size=50257).save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "rlchat"):
        assert kept_rows(str(tmp_path / "model"), ChatTokenizer(name)) == kept
    assert ("kept as those of GPT-2" in caplog.text) == bool(kept)


@pytest.mark.parametrize(("vocabulary", "same"), [(SPELLED, True), (SWAPPED, False)])
def test_a_new_policy_keeps_rows_only_for_equal_tokens(
    tmp_path: Path, tokenizer: ChatTokenizer, vocabulary: dict[str, int], same: bool
) -> None:
    folder = model_folder(tmp_path / "model", vocab=vocabulary)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, intermediate_size=8))
    model.save_pretrained(folder)
    policy = open_policy(folder, str(tmp_path / "mine.tiktoken"), 16, None, None).model
    assert torch.equal(policy.backbone.head_weight[:259], model.lm_head.weight) == same
