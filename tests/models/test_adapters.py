"""LoRA adapters, training of the last layers, and gradient checkpointing of a backbone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers.small_ppo import BACKBONES
from torch import Tensor

from rlchat.errors import UserError
from rlchat.models.adapters import (
    Adapter,
    TrainedPart,
    add_adapter,
    alpha_of,
    checkpoint_gradients,
    copy_sharing_frozen,
    freeze,
    frozen_digest,
    merge_into,
    merged_state,
    merged_weights,
    put_on,
    state_without_base,
)
from rlchat.models.model_file import PolicyBundle, load_policy, new_policy, save_bundle
from rlchat.models.networks import RLChatModel
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.training.initial_model import open_policy

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.ones(2, 4, dtype=torch.bool)


def policy(family: str = "llama", **options: object) -> RLChatModel:
    torch.manual_seed(0)
    model = open_policy({"model_type": family, **BACKBONES[family], **options}, "rlchat_1k", 48, None, None).model
    return model.eval()


def with_adapter(model: RLChatModel, trained: bool = True, **options: object) -> RLChatModel:
    """``model`` with an adapter; ``trained``: with random values in place of its initial zeros."""
    part = TrainedPart(adapter="lora", rank=2, alpha=6.0, **options)  # type: ignore[arg-type]
    freeze(model.backbone, part)
    add_adapter(model.backbone, part)
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def output(model: RLChatModel) -> Tensor:
    return model.logits(model(IDS, MASK)).detach()


@pytest.mark.parametrize("family", ["llama", "gpt2", "distilbert", "gpt_neox"])
def test_a_new_adapter_changes_nothing_and_a_merged_one_equals_the_adapter(family: str, tmp_path: Path) -> None:
    before = output(policy(family))
    assert torch.equal(output(with_adapter(policy(family), trained=False)), before)
    model = with_adapter(policy(family))
    after = output(model)
    assert (after - before).abs().max() > 1e-3
    plain = policy(family)
    state = merged_state(model)
    assert state.keys() == plain.state_dict().keys()
    weights = dict(merged_weights(model))
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[key], value) for key, value in state.items())
    plain.load_state_dict(state)
    torch.testing.assert_close(output(plain), after, atol=1e-5, rtol=0)
    assert torch.equal(output(model), after)  # merging did not change the model
    save_bundle(tmp_path / "model.pt", PolicyBundle(model, ChatTokenizer("rlchat_1k"), 48))
    assert torch.equal(output(load_policy(tmp_path / "model.pt").model), output(plain))


@pytest.mark.parametrize("family", ["llama", "gpt2", "distilbert", "gpt_neox"])
def test_an_adapter_alone_is_merged_into_its_base_or_put_beside_it(family: str) -> None:
    model = with_adapter(policy(family))
    state = state_without_base(model)
    heads = {"value_head.weight", "value_head.bias"}
    assert heads < state.keys()
    matrices = {name.removeprefix("backbone."): value for name, value in state.items() if name not in heads}
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in matrices)
    adapter = Adapter(alpha_of(model.backbone), matrices)
    assert (adapter.alpha, adapter.rank) == (6.0, 2)
    merged, beside = policy(family), policy(family)
    adapter.check(merged.backbone)
    merge_into(merged.backbone, adapter)
    for name, weight in merged_state(model).items():
        assert torch.equal(merged.state_dict()[name], weight), name
    put_on(beside.backbone, adapter)
    assert torch.equal(output(beside), output(model))
    assert not any(parameter.requires_grad for parameter in beside.backbone.parameters())
    names = {name for name, module in beside.backbone.named_modules() if hasattr(module, "base_layer")}
    before = policy(family).backbone.state_dict()
    for name in names:
        weight = beside.backbone.get_parameter(f"{name}.base_layer.weight")
        assert torch.equal(weight, before[f"{name}.weight"]), name


def test_the_merged_weight_is_w_plus_scaled_b_times_a() -> None:
    model = with_adapter(policy())
    layer = "backbone.transformer.layers.1.mlp.up_proj"
    own = model.state_dict()
    a, b = own[f"{layer}.lora_A.default.weight"], own[f"{layer}.lora_B.default.weight"]
    assert (a.shape, b.shape) == ((2, 16), (32, 2))
    expected = own[f"{layer}.base_layer.weight"] + 3 * b @ a  # alpha 6, rank 2
    torch.testing.assert_close(merged_state(model)[f"{layer}.weight"], expected)


def test_targets_and_layers_select_the_adapters() -> None:
    model = with_adapter(policy(), targets=["q_proj", "down_proj"], layers=1)
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    places = ("self_attn.q_proj", "mlp.down_proj")
    assert trained == {f"transformer.layers.1.{place}.lora_{m}.default.weight" for place in places for m in "AB"}


@pytest.mark.parametrize(
    ("family", "trained"),
    [("llama", ("layers.1.", "norm.")), ("gpt2", ("h.1.", "ln_f.")), ("bert", ("encoder.layer.1.",))],
)
def test_the_last_layers_are_trained_with_the_norm_after_them(family: str, trained: tuple[str, ...]) -> None:
    model = policy(family)
    freeze(model.backbone, TrainedPart(layers=1))
    for name, parameter in model.backbone.transformer.named_parameters():
        assert parameter.requires_grad == name.startswith(trained), name


def test_a_copy_shares_frozen_weights_and_copies_trained_ones() -> None:
    model = policy()
    freeze(model.backbone, TrainedPart(layers=1))
    other = copy_sharing_frozen(model)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (one.data_ptr() == two.data_ptr()) == (not one.requires_grad), name
    assert torch.equal(output(other), output(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "distilbert"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    gradients = []
    for on in (False, True):
        model = policy(family)
        if on:
            checkpoint_gradients(model.backbone)
        model(IDS, MASK).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name  # type: ignore[arg-type]


def test_a_copy_of_a_checkpointed_backbone_runs_its_own_layers() -> None:
    model = policy()
    checkpoint_gradients(model.backbone)
    other, before = copy_sharing_frozen(model), output(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(output(model), before)
    assert not torch.equal(output(other), before)


def test_the_digest_is_of_the_frozen_weights() -> None:
    one, same, other = with_adapter(policy()), with_adapter(policy()), policy()
    with torch.no_grad():
        other.backbone.transformer.layers[0].mlp.up_proj.weight.mul_(1.001)  # type: ignore[union-attr,operator]
    assert frozen_digest(one) == frozen_digest(same)
    assert frozen_digest(with_adapter(other)) != frozen_digest(one)
    assert frozen_digest(with_adapter(policy(), targets=["q_proj"])) != ""


def test_an_unknown_target_is_an_error_that_lists_the_linear_layers() -> None:
    message = (
        r"invalid value 'query' for lora_targets: the linear layers of the base model \(llama\) are down_proj, "
        "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    with pytest.raises(UserError, match=message):
        with_adapter(policy(), targets=["q_proj", "query"])


def test_more_layers_than_the_model_has_is_an_error() -> None:
    with pytest.raises(UserError, match="invalid value 3 for train_layers: expected an integer from 1 to 2"):
        freeze(policy().backbone, TrainedPart(layers=3))


def test_a_model_without_linear_layers_is_an_error() -> None:
    model = policy()
    model.backbone.transformer.layers = torch.nn.ModuleList()
    with pytest.raises(UserError, match=r"adapter lora: the base model \(llama\) has no linear layers"):
        with_adapter(model)


def test_a_missing_peft_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"adapter lora requires peft: install it with .* -m pip install .*lora"):
        with_adapter(policy())


def test_new_policies_are_unchanged_without_a_part() -> None:
    model = policy()
    freeze(model.backbone, TrainedPart())
    add_adapter(model.backbone, TrainedPart())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert new_policy(model.backbone, ChatTokenizer("rlchat_1k")).state_dict().keys() == merged_state(model).keys()
