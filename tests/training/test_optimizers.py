"""Which runs use the fused kernel of AdamW."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.small_ppo import ppo
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from rlchat.training.optimizers import make_optimizer


@pytest.mark.parametrize(
    ("precision", "automatic", "fused"),
    [
        (Precision(), True, True),
        (Precision(), False, True),
        # Lightning clips no gradients for a fused optimizer in mixed precision; PPO clips them itself.
        (MixedPrecision("bf16-mixed", "cpu"), True, None),
        (MixedPrecision("bf16-mixed", "cpu"), False, True),
        # Lightning does not unscale the gradients of a fused optimizer.
        (MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")), True, None),
        (MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")), False, None),
    ],
)
def test_the_fused_kernel(encoding: str, precision: Precision, automatic: bool, fused: bool | None) -> None:
    module = ppo(encoding)
    module.automatic_optimization = automatic
    trainer: Any = SimpleNamespace(precision_plugin=precision, estimated_stepping_batches=10)
    module.trainer = trainer
    configured: Any = module.configure_optimizers()
    assert configured["optimizer"].defaults["fused"] is fused


def test_parameters_on_several_devices_have_no_fused_kernel() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2, 2, device=device)) for device in ("cpu", "meta")]
    assert make_optimizer(parameters, 1e-3, 0.0).defaults["fused"] is None
    assert make_optimizer(parameters[:1], 1e-3, 0.0).defaults["fused"] is True
