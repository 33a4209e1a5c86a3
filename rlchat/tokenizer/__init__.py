"""Text to token ids: tiktoken encodings with chat markers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.tokenizer.chat_tokenizer import ChatTokenizer as ChatTokenizer

__all__ = [
    "ChatTokenizer",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "ChatTokenizer": "rlchat.tokenizer.chat_tokenizer",
    },
)
