"""Chat with a trained model: :class:`ChatInterface`, the terminal, feedback, saved conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.chat.interface import ChatInterface as ChatInterface

__all__ = [
    "ChatInterface",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "ChatInterface": "rlchat.chat.interface",
    },
)
