"""`rlchat tokenizer train`: a tiktoken rank file from your own data. `rlchat tokenizer convert`: from a base model.

rlchat tokenizer train conversations.jsonl --vocab-size 4096 -o mine.tiktoken
rlchat tokenizer convert SmolLM2-135M-Instruct -o smollm2.tiktoken
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlchat.data.forest import Tree
from rlchat.data.formats import read_trees
from rlchat.data.sources import data_file
from rlchat.errors import UserError
from rlchat.tokenizer.base_files import no_tokenizer_json, tokenizer_files
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.load import sidecar, write_encoding
from rlchat.tokenizer.own import own_encoding, own_format_of
from rlchat.tokenizer.ranks import format_ranks, train_ranks
from rlchat.utils.files import write_atomically

_SMALLEST, _LARGEST = 256, 1_000_000  # the single bytes; several times the size of the largest common encoding
_MEASURED_BYTES = 5_000_000


def main(args: list[str]) -> int:
    """Runs ``rlchat tokenizer`` with ``args``; returns the exit code.

    Raises :class:`UserError` for a vocabulary size out of range, data that cannot be read, and an output file that
    already exists (without ``--force``), cannot be written, or has another suffix than ``.tiktoken``, and for a
    tokenizer that cannot be converted exactly.
    """
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    options.run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlchat tokenizer", description="Train or convert a tokenizer.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a tiktoken rank file on conversations or plain text",
        description="Train a tiktoken rank file on conversations (.jsonl, .jsonl.gz) or plain text (.txt).",
    )
    train.add_argument("data", nargs="+", type=Path, metavar="DATA", help=".jsonl, .jsonl.gz or .txt files")
    train.add_argument(
        "--vocab-size",
        "--vocab_size",
        type=int,
        required=True,
        metavar="N",
        help=f"size of the vocabulary without control tokens, at least {_SMALLEST} (the single bytes)",
    )
    _add_output(train)
    train.add_argument("--lang", default="en", help="language of the OASST trees to use, or any (default: %(default)s)")
    train.add_argument(
        "--on_bad_line",
        "--on-bad-line",
        choices=("error", "skip"),
        default="error",
        help="what to do with an invalid line (default: %(default)s)",
    )
    train.set_defaults(run=_train)
    convert = commands.add_parser(
        "convert",
        help="convert the tokenizer of a base model, exactly or not at all",
        description="Convert the byte-level BPE tokenizer and the chat template of a Hugging Face model to a rank file "
        "and a JSON file beside it (FILE.tiktoken.json) with pattern, special tokens and chat format.",
    )
    convert.add_argument("model", metavar="FOLDER", help="a folder with a tokenizer.json, or the name of a model")
    convert.add_argument("--no-chat-format", action="store_true", help="leave out the chat template")
    _add_output(convert)
    convert.set_defaults(run=_convert)
    return parser


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE.tiktoken", help="the rank file to write"
    )
    command.add_argument("--force", action="store_true", help="overwrite FILE.tiktoken if it exists")


def _check_output(options: argparse.Namespace) -> Path:
    output: Path = options.output
    if output.suffix != ".tiktoken":
        raise UserError(f"{output}: the name of a rank file must end in .tiktoken; use another name")
    if output.exists() and not options.force:
        raise UserError(f"{output} already exists; use another name, or --force to overwrite it")
    return output


def _convert(options: argparse.Namespace) -> None:
    output = _check_output(options)
    files = tokenizer_files(options.model)
    if files is None:
        raise no_tokenizer_json(options.model)
    conversion = own_encoding(files, "Choose another model, or make a rank file with `rlchat tokenizer train`")
    encoding, form = conversion.encoding, None
    if not options.no_chat_format:
        encoding, form = own_format_of(files, conversion, "Leave the template out with --no-chat-format")
    write_encoding(output, encoding, form)
    written = "the model's own chat format" if form else "no chat format, so rlchat's own markers are used"
    print(f"{output}: {conversion.summary()}; {written}")
    print(f"pattern, special tokens and chat format: {sidecar(output)}")


def _train(options: argparse.Namespace) -> None:
    if not _SMALLEST <= options.vocab_size <= _LARGEST:
        raise UserError(f"invalid value {options.vocab_size} for --vocab-size: expected {_SMALLEST} to {_LARGEST:,}")
    output = _check_output(options)
    texts = _texts(options.data, None if options.lang == "any" else options.lang, options.on_bad_line)

    ranks = train_ranks(iter(texts), options.vocab_size, progress=sys.stderr.isatty())
    write_atomically(output, lambda file: file.write(format_ranks(ranks)))
    sidecar(output).unlink(missing_ok=True)  # of an earlier file of this name, with another pattern

    size = sum(len(text.encode()) for text in texts)
    few = " (the data has no more pairs)" if len(ranks) < options.vocab_size else ""
    before, after = ChatTokenizer(), ChatTokenizer(str(output))
    print(f"{output}: {len(ranks):,} tokens{few}, trained on {len(texts):,} texts of {size:,} bytes")
    print(
        f"bytes per token on this data: {_bytes_per_token(before, texts, size):.2f} with {before.name}, "
        f"{_bytes_per_token(after, texts, size):.2f} with {output.name}"
    )
    print(f"to train a model with it: rlchat fit --config demo/sft --model.tiktoken_encoding {output}")


def _texts(paths: list[Path], lang: str | None, on_bad_line: Any) -> list[str]:
    """The texts in the files: every message once, and every paragraph of plain text."""
    plain = [path for path in paths if data_file(path).is_plain_text]
    texts = [paragraph for path in plain for paragraph in _paragraphs(path)]
    if rows := [path for path in paths if not data_file(path).is_plain_text]:
        trees, report = read_trees(
            rows, lang=lang, on_bad_line=on_bad_line, cure="fix the line, or skip it with --on_bad_line skip"
        )
        print(report.summary(), file=sys.stderr)
        texts += (text for tree in trees for text in _message_texts(tree))
    if not texts:
        raise UserError(f"no text in {', '.join(map(str, paths))}; check the path")
    return texts


def _paragraphs(path: Path) -> list[str]:
    """The text of the file, split before each line that does not begin with white space."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (at byte {error.start + 1}); convert it to UTF-8") from None
    return [paragraph for paragraph in re.split(r"(?<=\n)(?=\S)", text) if paragraph.strip()]


def _message_texts(tree: Tree) -> Iterator[str]:
    """Each message of ``tree`` once, even if several threads and prompts contain it."""
    root: dict[tuple[str, str], Any] = {}
    for conversation in (*tree.threads, *tree.prompts):
        place = root
        for message in conversation.messages:
            place = place.setdefault((message.role, message.text), {})
        for reply in conversation.references:
            place.setdefault((reply.role, reply.text), {})
    places = [root]
    while places:
        for (_, text), below in places.pop().items():
            yield text
            places.append(below)


def _bytes_per_token(tokenizer: ChatTokenizer, texts: list[str], size: int) -> float:
    sample = texts[:: max(1, size // _MEASURED_BYTES)]  # evenly spaced; more would not change two digits
    return sum(len(text.encode()) for text in sample) / sum(len(tokenizer.encode(text)) for text in sample)
