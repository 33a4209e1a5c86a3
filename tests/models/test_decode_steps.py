"""Decode steps without modules give what the forward pass of the backbone gives, and are not used where they cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlchat.models.adapters import TrainedPart, add_adapter
from rlchat.models.backbones import Backbone
from rlchat.models.decode_steps import step as steps
from rlchat.models.decode_steps.gpt2 import GPT2Step
from rlchat.models.decode_steps.step import StepDecoder, step_decoder
from rlchat.models.networks import RLChatModel
from rlchat.models.sampling import Generated, Sampling, addressed_uniforms, generate
from rlchat.utils.padding import pad

VOCABULARY = 24
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}
BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2 with another scale": {**GPT2, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
    "llama": {"model_type": "llama", **BLOCKS},
    "llama with shared key heads": {"model_type": "llama", **BLOCKS, "num_key_value_heads": 2, "attention_bias": True},
    "mistral": {"model_type": "mistral", **BLOCKS, "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **BLOCKS, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", **BLOCKS, "num_key_value_heads": 2, "head_dim": 8},
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def backbone(name: str = "gpt2", **more: Any) -> Backbone:
    """Every weight is random, also those that are initially 0 or 1."""
    torch.manual_seed(0)
    built = Backbone({**CONFIGS[name], **more}, VOCABULARY, 32).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


def responses(model: RLChatModel) -> Generated:
    ids, mask = pad([[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 0]], 23, "left")
    uniforms = addressed_uniforms(0, 0, torch.arange(3))
    return generate(model, ids, mask, Sampling(12, temperature=1.0), uniforms, end_id=22, pad_id=23)


@every_config
@torch.no_grad()
def test_a_step_equals_the_forward_pass(name: str) -> None:
    trunk = backbone(name)
    ids, mask = torch.randint(0, VOCABULARY, (3, 20)), torch.ones(3, 20, dtype=torch.bool)
    mask[0, :4] = False
    mask[1, 15:] = False  # a row that has ended
    one, other = trunk.new_cache(), trunk.new_cache()
    for cache in (one, other):
        trunk(ids[:, :10], mask[:, :10], cache)
    decoder = step_decoder(trunk, one)
    assert decoder is not None
    for end in range(11, 21):
        new, seen = ids[:, end - 1 : end], mask[:, :end]
        expected, found = trunk(new, seen, other)[:, 0], decoder(new, seen)
        real = seen[:, -1]
        torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=2e-5)
        assert found.isfinite().all()


@every_config
def test_responses_are_those_of_the_forward_pass(name: str) -> None:
    model = RLChatModel(backbone(name), unsayable=[23]).eval()
    quick = responses(model)
    assert model.backbone.steps is True
    model.backbone.steps = False
    plain = responses(model)
    assert quick.ids.tolist() == plain.ids.tolist()
    torch.testing.assert_close(quick.logprobs, plain.logprobs, rtol=1e-5, atol=1e-5)


def test_a_step_with_an_adapter_equals_the_forward_pass() -> None:
    pytest.importorskip("peft")
    trunk = backbone()
    add_adapter(trunk, TrainedPart(adapter="lora", rank=2))
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model = RLChatModel(trunk.eval(), unsayable=[23]).eval()
    quick = responses(model)
    assert trunk.steps is True
    trunk.steps = False
    torch.testing.assert_close(quick.logprobs, responses(model).logprobs, rtol=1e-5, atol=1e-5)


def test_trained_weights_are_used() -> None:
    model: Any = RLChatModel(backbone(), unsayable=[23]).eval()
    before = responses(model)
    with torch.no_grad():
        model.backbone.transformer.h[0].mlp.c_fc.weight.mul_(3)
    after = responses(model)
    model.backbone.steps = False
    assert after.ids.tolist() == responses(model).ids.tolist() != before.ids.tolist()


def _train(trunk: Backbone) -> None:
    trunk.train()


def _hook(trunk: Any) -> None:
    trunk.transformer.h[1].mlp.register_forward_hook(lambda module, inputs, output: output * 0)


def _eager(trunk: Backbone) -> None:
    trunk.set_attention("eager")


@pytest.mark.parametrize("change", [_train, _hook, _eager])
def test_not_used_where_the_forward_pass_does_more(change: Any) -> None:
    trunk = backbone()
    change(trunk)
    assert step_decoder(trunk, trunk.new_cache()) is None


def test_not_used_under_autocast_with_sliding_windows_and_for_other_families() -> None:
    trunk = backbone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert step_decoder(trunk, trunk.new_cache()) is None
    sliding = backbone("mistral", sliding_window=6)
    assert step_decoder(sliding, sliding.new_cache()) is None
    other = Backbone({"model_type": "gpt_neox", **BLOCKS}, VOCABULARY, 32).eval()
    assert step_decoder(other, other.new_cache()) is None


class _Wrong(GPT2Step):
    def __call__(self, *args: Any) -> Tensor:
        return super().__call__(*args) * 1.01


class _Broken(GPT2Step):
    def __init__(self, trunk: Any) -> None:
        raise AttributeError("no attribute 'wte'")


@pytest.mark.parametrize("kind", [_Wrong, _Broken])
def test_a_step_that_does_not_fit_the_installed_transformers_is_not_used(
    kind: type[GPT2Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = responses(RLChatModel(backbone(), unsayable=[23]).eval())
    monkeypatch.setitem(steps._FAMILIES, "gpt2", kind)
    model = RLChatModel(backbone(), unsayable=[23]).eval()
    assert responses(model).ids.tolist() == expected.ids.tolist()
    assert model.backbone.steps is False


def test_changing_the_attention_compares_again() -> None:
    trunk = backbone()
    assert isinstance(step_decoder(trunk, trunk.new_cache()), StepDecoder)
    trunk.set_attention("eager")
    assert trunk.steps is None
