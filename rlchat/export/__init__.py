"""Export chat models to the formats of other programs: transformers, llama.cpp, safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.export.folder import write_folder as write_folder
    from rlchat.export.gguf_file import write_gguf as write_gguf
    from rlchat.export.weights import write_safetensors as write_safetensors

__all__ = [
    "write_folder",
    "write_gguf",
    "write_safetensors",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "write_folder": "rlchat.export.folder",
        "write_gguf": "rlchat.export.gguf_file",
        "write_safetensors": "rlchat.export.weights",
    },
)
