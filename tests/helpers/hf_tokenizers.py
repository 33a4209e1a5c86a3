"""Small byte-level BPE tokenizers as the content of a `tokenizer.json`, trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog, and they're 1234 years old. user assistant system",
    "def add(a, b):\n    return a + b  # 100 + 23\n\n\nWe'll see what the others think of these thoughts.",
    "Straße, café, naïve, Здравствуйте, 你好世界, 🙂🙂 \t tabs\r\nand lines",
)


def tokenizer_json(
    pattern: str | None = LLAMA3,
    size: int = 400,
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    text: tuple[str, ...] = (),
    normalizer: str | None = None,
) -> dict[str, Any]:
    """A tokenizer that splits by ``pattern`` (None: GPT-2's) with ``special`` and ``text`` added tokens behind."""
    bpe = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    bpe.train_from_iterator([*CORPUS] * 3, trainer)
    raw: dict[str, Any] = json.loads(bpe.to_str())
    behind = len(raw["model"]["vocab"])
    raw["added_tokens"] = [
        {
            "id": behind + number,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": content in special,
        }
        for number, content in enumerate((*special, *text))
    ]
    raw["normalizer"] = {"type": normalizer} if normalizer else None
    return raw


def tokenizer_folder(folder: Path, raw: dict[str, Any], template: str | None = CHATML, **options: Any) -> Path:
    """``folder`` with the files of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    values = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **options}
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def reference(raw: dict[str, Any]) -> Tokenizer:
    """The tokenizer itself, to which typed names of special tokens are text."""
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.encode_special_tokens = True
    return tokenizer


def wordpiece_json(words: Sequence[str]) -> dict[str, Any]:
    """BERT's tokenizer, without case and accents: the special tokens, then ``words``."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {word: number for number, word in enumerate((*special, *words))}
    wordpiece = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.add_special_tokens(list(special))
    raw: dict[str, Any] = json.loads(wordpiece.to_str())
    return raw
