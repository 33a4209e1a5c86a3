"""The default device and data type."""

from __future__ import annotations

import pytest
import torch

from rlchat.errors import UserError
from rlchat.utils.devices import choose_dtype


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "expected"),
    [("cpu", True, torch.float32), ("cuda", True, torch.bfloat16), ("cuda", False, torch.float32)],
)
def test_bfloat16_where_cuda_supports_it(
    device: str, has_bfloat16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert choose_dtype(None, torch.device(device)) == expected
    assert choose_dtype("float16", torch.device(device)) == torch.float16


def test_an_unknown_dtype() -> None:
    with pytest.raises(UserError, match="invalid dtype 'int8': expected one of float32, bfloat16, float16"):
        choose_dtype("int8", torch.device("cpu"))
