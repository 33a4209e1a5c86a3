"""What model files contain, and checks of it, because a file may be damaged or from someone else."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlchat.errors import UserError, one_line
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

FORMAT = "rlchat-bundle"
VERSION = 2  # 1 has rlchat's own markers only, and no bias, scale or soft cap of logits
ADAPTER_VERSION = 3  # of adapter files, which earlier versions of rlchat cannot load
_READABLE = (1, VERSION, ADAPTER_VERSION)
Kind = Literal["policy", "reward"]
_NAMES = {"policy": "a chat model", "reward": "a reward model"}
TYPES: dict[str, type] = {
    "kind": str,
    "backbone": str,
    "hidden_dim": int,
    "tokenizer": dict,
    "max_length": int,
    "about": dict,
    "state": dict,
}
ADAPTER_TYPES: dict[str, type] = {
    **{name: kind for name, kind in TYPES.items() if name != "backbone"},
    "base": dict,
    "alpha": float,
}


def holds_adapter(path: str | Path) -> bool:
    """Whether ``path`` is an adapter file. False for a file that cannot be loaded."""
    return _glance(path).get("version") == ADAPTER_VERSION


def kind_of(path: str | Path) -> str | None:
    """The kind of model in ``path``: ``policy`` or ``reward``. None for a file that cannot be loaded."""
    kind = _glance(path).get("kind")
    return kind if isinstance(kind, str) else None


def _glance(path: str | Path) -> dict[str, Any]:
    """The content of a model file, whose weights are not read. Empty for a file that cannot be loaded."""
    try:
        _check_archive(Path(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # from torch, about pickles of other programs
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # the function that loads the file reports it
        return {}
    return content if isinstance(content, dict) else {}


def read_content(path: str | Path, kind: Kind, weights: bool = True) -> dict[str, Any]:
    """The content of the model file ``path``, whose types and numbers are checked.

    Without ``weights``, the values of the weights are neither read nor checked.

    Raises:
        UserError: if the file is missing, damaged, or contains another kind of model.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path}: this is a folder, not a model file; pass a .pt file that `rlchat fit` has written, or train the "
            f"base model in the folder first, with --model.base_model {path}"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such model file; train one with `rlchat demo` or `rlchat fit`, or fix the path")
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # from torch, about pickles of other programs
            # A tensor of a mapped file takes no memory until its values are read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=not weights)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: contains something other than tensors and plain values, or is damaged; it was not loaded"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(f"{path}: damaged, or not an rlchat model file; create it again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not an rlchat model file; `rlchat fit` writes them to checkpoints/*.pt")
    if content.get("version") not in _READABLE:
        found = content.get("version")
        raise UserError(
            f"{path}: unsupported model file version {found}, expected 1 to {ADAPTER_VERSION}; update rlchat"
        )
    types = ADAPTER_TYPES if content["version"] == ADAPTER_VERSION else TYPES
    if missing := sorted(types.keys() - content.keys()):
        raise UserError(f"{path}: incomplete model file, {', '.join(missing)} missing; create it again")
    check_types(content, types, path, weights)
    if content["kind"] not in _NAMES:
        raise UserError(f"{path}: unknown kind of model {content['kind']!r}; update rlchat or create the file again")
    if content["kind"] != kind:
        raise UserError(f"{path}: contains {_NAMES[content['kind']]}, expected {_NAMES[kind]}")
    return content


def _check_archive(path: Path) -> None:
    """torch.save does not compress; a compressed archive could need any amount of memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # torch.load reports the problem
    if size > path.stat().st_size:
        raise UserError(f"{path}: expands to {size:,} bytes, more than the size of the file; not an rlchat model file")


def check_types(content: dict[str, Any], types: dict[str, type], path: str | Path, weights: bool = True) -> None:
    """Raises :class:`UserError` if a value of ``content`` has another type, or a tensor of its state is damaged.

    Without ``weights``, the values of the tensors are not read.
    """
    for name, expected in types.items():
        value = content.get(name)
        if not isinstance(value, expected) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise UserError(f"{path}: damaged model file, {name} is {shown(value)}, expected {expected.__name__}")
    for name, tensor in content["state"].items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: damaged model file, weight {name} is {shown(tensor)}, expected a tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: damaged model file, weight {name} is larger than its stored data")
        if weights and not _is_finite(tensor):
            raise UserError(f"{path}: weight {name} has NaN or infinite values; training diverged, use another file")


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. The sum is fast to compute, and finite only if all values are."""
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def shown(value: object) -> str:
    """A number as it is, and of anything else its type, for an error."""
    return repr(value) if isinstance(value, int | float | bool | None) else f"a {type(value).__name__}"


def stored_tokenizer(content: dict[str, Any], path: str | Path) -> ChatTokenizer:
    """The tokenizer in ``content``. Raises :class:`UserError` if it cannot be built."""
    try:
        state = dict(content["tokenizer"])
        state["ranks"] = state["ranks"].numpy().tobytes()
        if not isinstance(state["name"], str):
            raise TypeError(f"its name is {shown(state['name'])}, expected str")
        return ChatTokenizer.from_state(state)
    except UserError:
        raise
    except Exception as error:  # tiktoken raises many types of errors
        raise UserError(f"{path}: damaged model file, its tokenizer cannot be built: {one_line(error)}") from error
