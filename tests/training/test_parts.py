"""Runs that train adapters or the last layers: their reference model, checkpoints, model files and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_ppo import ONE_STEP, fit, ppo, prompts, rolled_out, serve, trainer
from torch.optim import AdamW

from rlchat.errors import UserError
from rlchat.models.model_file import PolicyBundle, load_policy, save_bundle
from rlchat.ppo.module import PPOModule

PARTS: list[dict[str, Any]] = [
    {"adapter": "lora", "lora_rank": 4},
    {"adapter": "lora", "lora_targets": ["q_proj", "v_proj"], "critic": "separate"},
    {"adapter": "lora", "advantage": "rloo", "group_size": 2, "gradient_checkpointing": True},
    {"train_layers": 1},
    {"train_layers": 1, "critic": "separate", "gradient_checkpointing": True},
]
NAMES = ["lora", "critic", "rloo", "layers", "layers-critic"]
SLOW = ("critic", "layers")
EVERY_PART = pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for options, name in zip(PARTS, NAMES, strict=True)
    ],
)


def trained(module: PPOModule, path: Path, iterations: int = 1) -> dict[str, Any]:
    """The checkpoint of a short run of ``module``."""
    run = trainer()
    run.fit(module, serve([prompts(module.tokenizer)] * iterations))
    run.save_checkpoint(path)
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def save(module: PPOModule, path: Path) -> None:
    """The model file of an untrained ``module``."""
    save_bundle(path, PolicyBundle(module.model, module.tokenizer, module.max_length))


@EVERY_PART
def test_the_reference_is_the_initial_policy(encoding: str, options: dict[str, Any]) -> None:
    module = ppo(encoding, minibatches=1, **options)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    first, second = fit(module, 2)
    assert first["train/kl"] == 0
    assert second["train/kl"] != 0
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, start[name])}
    assert changed <= {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert any(".lora_B." in name if "adapter" in options else ".layers.1." in name for name in changed)
    assert not any(name.startswith("reference.") for name in changed)


@EVERY_PART
def test_the_first_ratio_is_1(encoding: str, options: dict[str, Any]) -> None:
    row = fit(ppo(encoding, ppo_epochs=1, minibatches=1, **options), 1)[0]
    assert row["train/ratio_residual"] == 0


def test_the_networks_share_the_frozen_weights(encoding: str) -> None:
    module = ppo(encoding, adapter="lora", critic="separate")
    storages = {p.untyped_storage().data_ptr() for p in module.parameters() if not p.requires_grad}
    alone = {p.untyped_storage().data_ptr() for p in ppo(encoding).model.backbone.parameters()}
    heads = 2 * 2  # weights and biases of the value heads of policy and reference model, which are not used here
    assert len(storages) == len(alone) + heads
    assert module.critic is not None
    names = [name for name, p in module.critic.named_parameters() if p.requires_grad]
    assert sum("lora_A" in name for name in names) == 14  # seven linear layers in each of two layers


@EVERY_PART
def test_a_checkpoint_contains_what_is_trained(encoding: str, tmp_path: Path, options: dict[str, Any]) -> None:
    module = ppo(encoding, **ONE_STEP, **options)
    checkpoint = trained(module, tmp_path / "run.ckpt")
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    heads = {"model.value_head.weight", "model.value_head.bias"}
    assert checkpoint["state_dict"].keys() == names | heads
    assert "model" not in checkpoint["rlchat"]
    (optimizer,) = module.trainer.optimizers
    assert isinstance(optimizer, AdamW)
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(names)


def test_a_checkpoint_of_all_weights_is_as_before(encoding: str, tmp_path: Path) -> None:
    module = ppo(encoding, **ONE_STEP)
    assert trained(module, tmp_path / "run.ckpt")["state_dict"].keys() == module.state_dict().keys()


@EVERY_PART
def test_a_model_file_starts_the_next_stage_with_the_trained_policy_as_reference(
    encoding: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    module = ppo(encoding, minibatches=1, **options)
    fit(module, 1)
    module.save_bundle(tmp_path / "model.pt")
    plain = load_policy(tmp_path / "model.pt").model
    assert not any("lora" in name for name in plain.state_dict())
    expected = rolled_out(module)
    again = PPOModule(init_from=str(tmp_path / "model.pt"), max_new_tokens=8, **options)
    found = rolled_out(again)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.ref_logprobs, expected.old_logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.old_logprobs, found.ref_logprobs, atol=0, rtol=0)
    torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("error:Found keys")  # the frozen weights are not in the file on purpose
@pytest.mark.parametrize("options", PARTS[:2], ids=NAMES[:2])
def test_a_checkpoint_is_loaded_with_the_file_that_its_run_started_from(
    encoding: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    save(ppo(encoding), tmp_path / "start.pt")
    module = PPOModule(
        init_from=str(tmp_path / "start.pt"), max_new_tokens=8, learning_rate=1e-2, **ONE_STEP, **options
    )
    trained(module, tmp_path / "run.ckpt")
    loaded = PPOModule.load_from_checkpoint(tmp_path / "run.ckpt")
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"adapter": "lora"}, {}, "trained with adapter lora, not null; set --model.adapter lora, or start"),
        ({}, {"adapter": "lora"}, "trained with adapter null, not lora"),
        ({"adapter": "lora"}, {"adapter": "lora", "lora_rank": 2}, "with lora_rank 16, not 2"),
        ({"adapter": "lora"}, {"adapter": "lora", "lora_targets": ["q_proj"]}, "lora_targets null, not "),
        ({"train_layers": 1}, {"train_layers": 2}, "with train_layers 1, not 2"),
    ],
)
def test_resuming_with_other_options_is_an_error(
    encoding: str, tmp_path: Path, before: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    trained(ppo(encoding, **ONE_STEP, **before), tmp_path / "run.ckpt")
    module = ppo(encoding, **now)
    with pytest.raises(UserError, match=message):
        trainer().fit(module, serve([prompts(module.tokenizer)]), ckpt_path=tmp_path / "run.ckpt")


def test_resuming_with_another_base_model_is_an_error(encoding: str, tmp_path: Path) -> None:
    trained(ppo(encoding, adapter="lora", **ONE_STEP), tmp_path / "run.ckpt")
    other = ppo(encoding)
    torch.nn.init.normal_(other.model.backbone.head_weight)
    save(other, tmp_path / "other.pt")
    module = PPOModule(init_from=str(tmp_path / "other.pt"), max_new_tokens=8, adapter="lora")
    with pytest.raises(UserError, match="the frozen weights differ from those that the checkpoint was trained with"):
        trainer().fit(module, serve([prompts(module.tokenizer)]), ckpt_path=tmp_path / "run.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "dora"}, "invalid value 'dora' for adapter: expected lora, or null"),
        ({"lora_rank": 0}, "invalid value 0 for lora_rank: expected a positive integer"),
        ({"lora_alpha": 0.0}, "invalid value 0.0 for lora_alpha: expected a positive number"),
        ({"lora_targets": []}, "for lora_targets: expected names of linear layers, or null for all"),
        ({"train_layers": 0}, "invalid value 0 for train_layers: expected a positive integer"),
        ({"train_layers": 5}, "invalid value 5 for train_layers: expected an integer from 1 to 2"),
    ],
)
def test_options_out_of_range(encoding: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ppo(encoding, **options)
