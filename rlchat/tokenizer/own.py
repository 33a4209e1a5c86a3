"""A base model's own tokenizer and chat format, from its files."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace

from rlchat.tokenizer.base_files import TokenizerFiles
from rlchat.tokenizer.chat_format import ChatFormat
from rlchat.tokenizer.chat_template import read_template
from rlchat.tokenizer.convert import Conversion, convert
from rlchat.tokenizer.pattern import NotExact
from rlchat.tokenizer.text_encoding import TextEncoding

log = logging.getLogger("rlchat")

_NEW_PAD = "<|rlchat_pad|>"
_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_OTHER_ENCODING = (
    "Set --model.tiktoken_encoding cl100k_base (or another encoding): rows of the embedding then start from the pieces "
    "that the base tokenizer makes of each token, and the model has to be trained for longer"
)
_OTHER_FORMAT = "Set --model.chat_format rlchat to use rlchat's own markers"


def own_encoding(files: TokenizerFiles, cure: str = _OTHER_ENCODING) -> Conversion:
    """The tokenizer of ``files`` under tiktoken.

    Raises :class:`NotExact` with the reason where that is not exact, and ``cure``, which says what to do instead.
    """
    try:
        return convert(files.tokenizer, _short_name(files.source))
    except NotExact as error:
        raise NotExact(
            f"{files.source}: its tokenizer cannot be converted to tiktoken exactly: {error}. {cure}"
        ) from error


def own_format_of(
    files: TokenizerFiles, conversion: Conversion, cure: str = _OTHER_FORMAT
) -> tuple[TextEncoding, ChatFormat | None]:
    """The encoding of ``conversion`` with a token for padding, and the chat format; None without a chat template.

    Raises :class:`NotExact` for a template that no table can replace, with ``cure``, which says what to do instead.
    """
    encoding = conversion.encoding
    if not files.template:
        return encoding, None
    tokens = {name: files.token(name) for name in _TOKEN_NAMES}
    try:
        form = read_template(files.template, encoding.special_tokens, tokens, encoding.name)
        encoding, form = _with_pad(encoding, form, tokens["pad_token"])
        _check_ids(files, conversion, encoding, form)
    except NotExact as error:
        raise NotExact(f"{files.source}: {error}. {cure}") from error
    plain = [role for role, text in form.before.items() if text and not any(t in text for t in encoding.special_tokens)]
    if plain:
        log.warning(
            "the chat template of %s marks %s messages by ordinary text, which a user can type too",
            encoding.name,
            " and ".join(plain),
        )
    return encoding, form


def _with_pad(encoding: TextEncoding, form: ChatFormat, own: str) -> tuple[TextEncoding, ChatFormat]:
    """Padding needs an id that no response contains: not the end token, which is the pad token of many models."""
    written = "".join((form.start, form.start_system, form.opening, *form.before.values(), *form.after.values()))
    special = encoding.special_tokens
    likely = [own, *(name for name in special if "pad" in name.lower()), *special]
    for name in likely:
        if name in special and name not in written:
            return encoding, replace(form, pad=name)
    special = {**special, _NEW_PAD: encoding.size}
    return replace(encoding, special_tokens=special), replace(form, pad=_NEW_PAD)


def _check_ids(files: TokenizerFiles, conversion: Conversion, encoding: TextEncoding, form: ChatFormat) -> None:
    """Raises :class:`NotExact` where a prompt gets other ids than from the base model's own tokenizer."""
    from tokenizers import Tokenizer

    from rlchat.conversation import Conversation, Message
    from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

    theirs, ours = Tokenizer.from_str(json.dumps(files.tokenizer)), ChatTokenizer.of(encoding, form)
    theirs.no_truncation()
    theirs.no_padding()
    texts = ("Hello", " a", "b ", "\n\nlines\n", "12 x", "'s", "\u00e9\U0001f642", "")
    chains = [[Message("user", text)] for text in texts]
    if "system" in form.before:
        chains += [[Message("system", text), Message("user", text)] for text in texts]
    for messages in chains:
        written = form.text(messages, opening=True)
        expected = [
            conversion.moved.get(token, token) for token in theirs.encode(written, add_special_tokens=False).ids
        ]
        if ours.render_prompt(Conversation(tuple(messages))).ids != expected:
            raise NotExact(f"its tokenizer merges what the chat template writes with the text {messages[-1].text!r}")


def _short_name(source: str) -> str:
    return re.sub(r"[^\w.\-]+", "_", source.rstrip("/").split("/")[-1]) or "own"
