"""AdamW, also with 8-bit state, and the learning rate schedules of all stages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from rlchat.errors import UserError
from rlchat.utils.imports import install_command

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}


def make_optimizer(
    parameters: Iterable[Tensor],
    learning_rate: float,
    weight_decay: float,
    eps: float = 1e-8,
    beta2: float = 0.95,
    may_fuse: bool = True,
    name: OptimizerName = "adamw",
) -> torch.optim.Optimizer:
    """AdamW over the parameters that require a gradient. Weight decay applies to matrices, not to norms and biases.

    ``adamw`` is PyTorch's, with ``may_fuse`` as a fused kernel where there is one. ``adamw_8bit`` and
    ``paged_adamw_8bit`` are those of bitsandbytes, which keeps the state of parameters with fewer than 4096 values in
    32 bits.

    Raises:
        UserError: for one of bitsandbytes, if it is not installed, or a parameter is sharded or not on a CUDA GPU.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if name != "adamw":
        make = _from_bitsandbytes(name, trained)
        optimizer: torch.optim.Optimizer = make(groups, lr=learning_rate, betas=(0.9, beta2), eps=eps)
        return optimizer
    # The fused kernel is two to three times as fast on a CPU, and more on a GPU.
    has_kernel = bool(trained) and {p.device.type for p in trained} in ({"cpu"}, {"cuda"})
    fused = True if may_fuse and has_kernel else None
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), eps=eps, fused=fused)


def _from_bitsandbytes(name: OptimizerName, trained: Sequence[Tensor]) -> Any:
    """The class of the optimizer ``name`` (Dettmers et al. 2022, arXiv 2110.02861)."""
    if any(p.device.type != "cuda" for p in trained):
        raise UserError(
            f"--model.optimizer {name} requires a CUDA GPU: use a machine with one and --trainer.accelerator gpu, or "
            f"--model.optimizer adamw"
        )
    if any(hasattr(p, "full_tensor") for p in trained):
        raise UserError(
            f"--model.optimizer {name} does not support sharded weights: use --trainer.strategy ddp, or "
            f"--model.optimizer adamw"
        )
    try:
        import bitsandbytes
    except ImportError as error:
        command = install_command("bitsandbytes")
        raise UserError(f"--model.optimizer {name} requires bitsandbytes: install it with {command}") from error
    return getattr(bitsandbytes.optim, _BITSANDBYTES[name])


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: str, warmup: float, steps: float) -> LambdaLR:
    """The learning rate over a run of ``steps`` scheduler steps.

    Args:
        optimizer: its learning rate is the peak.
        schedule: ``constant``, or ``linear`` or ``cosine`` decay to zero at the end.
        warmup: fraction of the steps in which the learning rate rises linearly from 0.
        steps: the length of the run; math.inf is only possible with the schedule ``constant``.

    Raises:
        UserError: for a schedule other than ``constant`` in a run of unlimited length.
    """
    if not math.isfinite(steps):
        if schedule != "constant":
            raise UserError(
                f"invalid value '{schedule}' for --model.schedule: the length of the run is unlimited; "
                f"set --trainer.max_epochs, or use --model.schedule constant"
            )
        return get_scheduler("constant", optimizer)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    return get_scheduler(name, optimizer, num_warmup_steps=round(warmup * steps), num_training_steps=round(steps))


def follow_schedule(scheduler: LambdaLR) -> tuple[float, float] | None:
    """Sets the learning rates to those of the schedule at its current step.

    In a resumed run, they come from the checkpoint, in which the schedule may have been different or may have had
    another number of steps.

    Returns:
        The old and new learning rate of the first group that changed; None if none changed.
    """
    groups = scheduler.optimizer.param_groups
    changed: tuple[float, float] | None = None
    for group, peak, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=False):
        before, after = float(group["lr"]), float(peak * factor(scheduler.last_epoch))
        if not math.isclose(before, after, rel_tol=1e-9):
            group["lr"] = after
            changed = changed or (before, after)
    return changed
