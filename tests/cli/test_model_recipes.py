"""The recipes for certain base models, each run on a small stand-in with the same kind of weights and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import BRIEF, SHAPE, rlchat, write_talk
from helpers.hf_tokenizers import LLAMA3, QWEN, tokenizer_folder, tokenizer_json
from tokenizers import Tokenizer
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlchat.models.model_file import load_policy

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ROWS, POSITIONS = 420, 128
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "comes", "after", "it", "is", *"abcdefghij0123456789?."]


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=ROWS, max_position_embeddings=POSITIONS))


def qwen() -> PreTrainedModel:
    config = Qwen2Config(**SMALL, num_key_value_heads=1, vocab_size=ROWS, max_position_embeddings=POSITIONS)
    return Qwen2ForCausalLM(config)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=ROWS, n_positions=POSITIONS))


def distilbert() -> PreTrainedModel:
    shape = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
    config = DistilBertConfig(**shape, vocab_size=len(WORDS), max_position_embeddings=POSITIONS)
    return DistilBertForMaskedLM(config)


def wordpiece() -> dict[str, Any]:
    raw = tokenizer_json()
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 100, "vocab": {word: number for number, word in enumerate(WORDS)}}
    special = [{**raw["added_tokens"][0], "id": n, "content": word} for n, word in enumerate(WORDS[:5])]
    return {**raw, "model": model, "added_tokens": special}


def stand_in(name: str, folder: Path) -> str:
    """The folder of a small model for the recipe ``name``."""
    torch.manual_seed(0)
    if name == "distilbert":
        distilbert().save_pretrained(folder)
        tokenizer_folder(folder, wordpiece(), None, eos_token="[SEP]", pad_token="[PAD]")
    elif name == "gpt2":
        gpt2().save_pretrained(folder)
        end = "<|endoftext|>"
        tokenizer_folder(folder, tokenizer_json(None, special=(end,)), None, eos_token=end, pad_token=end)
    elif name == "qwen-lora":
        qwen().save_pretrained(folder)
        tokenizer_folder(folder, tokenizer_json(QWEN))
    else:
        llama().save_pretrained(folder)
        tokenizer_folder(folder, tokenizer_json(LLAMA3))
    return str(folder)


def write_questions(path: Path) -> Path:
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_base_model_in_the_recipe_of_sft_keeps_its_own_tokens(workplace: Path) -> None:
    """The first command of docs/models.md."""
    base, data = stand_in("smollm2-lora", workplace / "SmolLM2-135M-Instruct"), write_talk(workplace / "talk.jsonl")
    words = ["fit", "--config", "sft", "--data.path", str(data), "--model.base_model", base]
    rlchat(*words, *BRIEF, "--trainer.accelerator=cpu", "--model.max_length=96", "--model.learning_rate=0")
    bundle = load_policy("checkpoints/sft_model.pt")
    assert bundle.tokenizer.has_own_format
    assert bundle.tokenizer.base_size <= ROWS
    rows = LlamaForCausalLM.from_pretrained(base).get_input_embeddings().weight
    ours = bundle.model.backbone.transformer.get_input_embeddings().weight
    own = bundle.tokenizer.encode("The quick brown fox")
    theirs = Tokenizer.from_file(f"{base}/tokenizer.json").encode("The quick brown fox").ids
    assert own == theirs
    torch.testing.assert_close(ours[own], rows[own], atol=0, rtol=0)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("distilbert", "from-scratch", "llama-lora")]


@pytest.mark.parametrize("name", ["gpt2", "qwen-lora", "smollm2-lora", *SLOW])
def test_a_recipe_trains_a_model_that_chats(name: str, workplace: Path) -> None:
    words = ["fit", "--config", name, *BRIEF, "--trainer.accelerator=cpu", "--model.max_length=96"]
    if name == "from-scratch":
        words += ["--model.base_model", json.dumps(SHAPE)]
    else:
        words += ["--model.base_model", stand_in(name, workplace / "base")]
    if name == "distilbert":  # cl100k_base is not available without a network
        words += ["--model.tiktoken_encoding=rlchat_1k"]
    ppo = name in ("qwen-lora", "smollm2-lora")
    if ppo:
        words += ["--model.max_new_tokens=8"]
    data = write_questions(workplace / "data.jsonl") if name == "qwen-lora" else write_talk(workplace / "data.jsonl")
    rlchat(*words, "--data.path", str(data), "--data.val_fraction=0.3")
    bundle = load_policy(f"checkpoints/{'rl_chat_model_tiktoken' if ppo else 'sft_model'}.pt")
    assert bundle.tokenizer.has_own_format == (name in ("llama-lora", "qwen-lora", "smollm2-lora"))
    assert all(torch.isfinite(weight).all() for weight in bundle.model.parameters())
