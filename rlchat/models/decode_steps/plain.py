"""Modules as plain functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Function = Callable[[Tensor], Tensor]


def plain(module: nn.Module) -> Function:
    """A function that computes what ``module`` does in eval mode, and faster than a call of it.

    It keeps the tensors that the module has now. Modules of other types, such as adapters, are returned themselves. A
    ``Conv1D`` of transformers must be called with [rows, width].
    """
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if type(module) is Conv1D:
        return partial(_affine, module.weight, module.bias)
    if type(module) is nn.LayerNorm:
        shape = list(module.normalized_shape)
        return partial(F.layer_norm, normalized_shape=shape, weight=module.weight, bias=module.bias, eps=module.eps)
    if type(module) is nn.Embedding and module.max_norm is None:
        return partial(F.embedding, weight=module.weight)
    if type(module) is nn.GELU:
        return partial(F.gelu, approximate=module.approximate)
    if type(module) is nn.SiLU:
        return F.silu
    return module


def _affine(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(bias, x, weight)
