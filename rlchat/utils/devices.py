"""The device and data type of a model."""

from __future__ import annotations

import torch

from rlchat.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``; by default CUDA if available, else MPS, else the CPU.

    Raises :class:`UserError` for a device that this machine does not have.
    """
    if name is None:
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without CUDA
        raise UserError(f"device {name!r} is not available on this machine; use another, for example cpu") from error


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The data type called ``name``; by default bfloat16 on a GPU that supports it, else float32.

    Raises :class:`UserError` for a name that is not supported.
    """
    if name is None:
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UserError(f"invalid dtype {name!r}: expected one of {', '.join(known)}")
    return known[name]
