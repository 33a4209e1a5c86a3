"""Which runs use the fused kernel of AdamW, and the optimizers of bitsandbytes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.small_ppo import ONE_STEP, fit, ppo, prompts, serve, trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch._subclasses import FakeTensorMode

from rlchat.errors import UserError
from rlchat.training.optimizers import OptimizerName, make_optimizer


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


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------


def on_gpu() -> list[torch.nn.Parameter]:
    """A matrix, a bias and a frozen matrix on a GPU that does not exist."""
    with FakeTensorMode():
        weights = [torch.empty(shape, device="cuda") for shape in ((2, 2), (2,), (2, 2))]
        return [torch.nn.Parameter(weight, requires_grad=number < 2) for number, weight in enumerate(weights)]


@pytest.mark.parametrize(("name", "made"), [("adamw_8bit", "AdamW8bit"), ("paged_adamw_8bit", "PagedAdamW8bit")])
def test_bitsandbytes_gets_the_options_of_adamw(
    name: OptimizerName, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = SimpleNamespace(optim=SimpleNamespace(**{made: lambda groups, **options: (groups, options)}))
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    matrix, bias, frozen = on_gpu()
    groups, options = make_optimizer([matrix, bias, frozen], 0.1, 0.5, eps=1e-5, beta2=0.99, name=name)  # type: ignore[misc]
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.5), (1, 0.0)]
    assert groups[0]["params"][0] is matrix
    assert groups[1]["params"][0] is bias
    assert options == {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-5}


def test_what_an_8_bit_optimizer_requires(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    shards: Any = on_gpu()
    shards[0].full_tensor = None  # a method of the shards of FSDP2
    with pytest.raises(
        UserError, match=r"adamw_8bit requires bitsandbytes: install it with .*-m pip install .*bitsand"
    ):
        make_optimizer(on_gpu(), 0.1, 0.0, name="adamw_8bit")
    with pytest.raises(
        UserError, match=r"paged_adamw_8bit does not support sharded weights: use --trainer\.strategy ddp"
    ):
        make_optimizer(shards, 0.1, 0.0, name="paged_adamw_8bit")
    with pytest.raises(UserError, match=r"--model\.optimizer adamw_8bit requires a CUDA GPU: use a machine with one"):
        fit(ppo(encoding, optimizer="adamw_8bit"), 1)
    with pytest.raises(UserError, match="'sgd' for optimizer: expected one of adamw, adamw_8bit, paged_adamw_8bit"):
        ppo(encoding, optimizer="sgd")


def test_a_run_is_resumed_with_the_optimizer_of_its_checkpoint(encoding: str, tmp_path: Path) -> None:
    module = ppo(encoding, **ONE_STEP)
    run = trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(module, serve([prompts(module.tokenizer)]))
    run.save_checkpoint(tmp_path / "run.ckpt")
    other = ppo(encoding, optimizer="adamw_8bit", **ONE_STEP)
    with pytest.raises(
        UserError, match=r"trained with optimizer adamw, not adamw_8bit; set --model\.optimizer adamw, or"
    ):
        other.on_load_checkpoint(torch.load(tmp_path / "run.ckpt", weights_only=True))
