"""A GGUF file as a base model: its weights and its tokenizer, unpacked once into a transformers folder in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from rlchat.errors import UserError, one_line
from rlchat.models.base.source import BaseSource
from rlchat.models.base_models import REPORT, check_report
from rlchat.tokenizer.pattern import LLAMA3, QWEN2
from rlchat.utils.cache_folder import BASE_MODELS, MARKER, mark_used
from rlchat.utils.files import give_usual_permissions, user_cache
from rlchat.utils.imports import install_command

log = logging.getLogger("rlchat")

_CONTROL, _USER_DEFINED = 3, 4  # types of tokens in GGUF files


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


_DIGITS = {"type": "Digits", "individual_digits": True}
# A GGUF file contains only the name of its pre-tokenizer; llama.cpp defines these names.
_PRE_TOKENIZERS = {
    "gpt-2": _byte_level(use_regex=True),
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _byte_level(use_regex=True)]},
    "llama-bpe": _split(LLAMA3),
    "qwen2": _split(QWEN2),
}


def unpacked_gguf(path: Path) -> Path:
    """The transformers folder with the content of the GGUF file ``path``, in the user's cache folder.

    It is written in float32 when a file is first used, and found by the content of the file afterwards.

    Raises:
        UserError: if the file is missing or damaged, if its family or its tokenizer is not supported, or if the
            package gguf is not installed.
    """
    if not path.is_file():
        raise UserError(f"base_model {path}: no such file")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"base_model {path} needs the package gguf; install it with: {install_command('export')}")
    root = user_cache() / BASE_MODELS
    folder = root / f"{path.stem}-{_digest(path)}"
    if folder.is_dir():
        mark_used(folder)
        return folder
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=root, prefix=".unpacking-"))
    try:
        _write_tokenizer(path, scratch)
        log.info("%s: unpacking it into %s", path, folder)
        _write_weights(path, scratch)
        try:
            (scratch / MARKER).touch()
            give_usual_permissions(scratch)
            scratch.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _digest(path: Path) -> str:
    sha = hashlib.sha256(transformers.__version__.encode())
    with path.open("rb") as file:
        while piece := file.read(2**24):
            sha.update(piece)
    return sha.hexdigest()[:16]


def _write_tokenizer(path: Path, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, the chat template and where the model comes from.

    transformers reads the tokenizer of a GGUF file too, but not its pre-tokenizer: numbers would get other ids.
    """
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(
            f"base_model {path}: not a readable GGUF file ({one_line(error)}); download it again"
        ) from error

    def value(name: str, default: Any = None) -> Any:
        return fields[name].contents() if name in fields else default

    BaseSource.of_gguf(value).write(folder)
    kind, pre = value("tokenizer.ggml.model"), value("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        found = f"tokenizer.ggml.model {kind}, tokenizer.ggml.pre {pre}"
        raise UserError(
            f"base_model {path}: its tokenizer ({found}) is not supported; supported are gpt2 with "
            f"{', '.join(_PRE_TOKENIZERS)}. Use the transformers folder of the model instead"
        )
    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, "special": of_type == _CONTROL, **plain}
        for number, (token, of_type) in enumerate(zip(tokens, types, strict=True))
        if of_type in (_CONTROL, _USER_DEFINED)
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [merge.split(" ", 1) for merge in value("tokenizer.ggml.merges", [])]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    special = {"bos": "bos", "eos": "eos", "padding": "pad"}
    ids = {name: value(f"tokenizer.ggml.{key}_token_id") for key, name in special.items()}
    options = {f"{name}_token": tokens[number] for name, number in ids.items() if number is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
    if template := value("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_weights(path: Path, folder: Path) -> None:
    """Writes config.json and the weights in float32."""
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32, **REPORT}
    if hasattr(transformers, "GgufConfig"):  # newer versions of transformers keep the quantized weights by default
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), **options)
    except Exception as error:  # each family fails in its own way
        raise UserError(
            f"base_model {path}: transformers cannot read its weights ({one_line(error)}); use the transformers folder "
            f"of the model instead"
        ) from error
    model, report = loaded
    check_report(str(path), report, model.config.model_type)
    # The folder holds plain weights, and transformers refuses to save a model that it takes for a quantized one.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
