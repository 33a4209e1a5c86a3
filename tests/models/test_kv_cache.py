"""A key-value cache that grows without copying all columns at each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.small_ppo import BACKBONES
from torch import LongTensor
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlchat.models.backbones import Backbone
from rlchat.models.kv_cache import GrowingLayer, can_append, decoder_cache
from rlchat.models.networks import RLChatModel
from rlchat.models.sampling import Sampling, addressed_uniforms, generate
from rlchat.utils.padding import pad

VOCABULARY, PAD, END = 24, 23, 22
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 0], [9, 10, 0], [11, 12, 13, 14], [2, 2]]


def columns(count: int, rows: int = 3, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [rows, 1, count, 1] with a different number in each place."""
    keys = torch.arange(first, first + rows * count, dtype=torch.float32).view(rows, 1, count, 1)
    return keys, -keys


def of_size(family: str, **more: Any) -> Any:
    return AutoConfig.for_model(family, **BACKBONES[family], **more)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2"])
def test_the_same_tokens_as_with_the_cache_of_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left-padded prompts, one of them twice; rows leave at four times; the room is enlarged several times."""
    monkeypatch.setattr("rlchat.models.kv_cache._LEAST_ROOM", 3)
    torch.manual_seed(0)
    config = {"model_type": family, **BACKBONES[family], "initializer_range": 0.3}
    model = RLChatModel(Backbone(config, VOCABULARY, 48), unsayable=[PAD, END]).eval()
    (ids, mask), noise = pad(PROMPTS, PAD, "left"), addressed_uniforms(3, 0, torch.arange(6))
    sampling = [Sampling(count, temperature=1.0) for count in (40, 3, 17, 30, 9, 40)]
    found = generate(model, ids, mask, sampling, noise, end_id=END, pad_id=PAD)
    assert all(type(layer) is GrowingLayer for layer in model.backbone.new_cache().layers)  # type: ignore[union-attr]
    monkeypatch.setattr(model.backbone, "new_cache", lambda: DynamicCache(config=model.backbone.transformer.config))
    expected = generate(model, ids, mask, sampling, noise, end_id=END, pad_id=PAD)
    assert expected.mask.sum(1).tolist() == [40, 3, 17, 30, 9, 40]
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_columns_before_a_new_one_stay_where_they_are_while_there_is_room() -> None:
    layer, places = GrowingLayer(), []
    for column in range(1 + 33 + 34):
        keys, _ = layer.update(*columns(1, first=10 * column))
        places.append(keys.data_ptr())
    assert keys[0, 0, :, 0].tolist() == [10.0 * column for column in range(68)]
    # The second column makes room for 32 more, the least; the 35th column makes room again, and the 68th.
    assert len(set(places[1:34])) == 1
    assert len(set(places[34:67])) == 1
    assert len({places[0], places[1], places[34], places[67]}) == 4


def test_columns_after_a_shorter_cache_other_rows_and_fewer_columns() -> None:
    """The same as with the layer of transformers after each change that rlchat makes to a layer."""
    layers = GrowingLayer(), DynamicLayer()
    for layer in layers:
        layer.update(*columns(5))
        layer.update(*columns(1, first=100))
        layer.crop(-2)
        layer.update(*columns(2, first=200))
        layer.reorder_cache(LongTensor([2, 0]))
        layer.update(*columns(1, rows=2, first=300))
        layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]
        layer.update(*columns(1, rows=2, first=400))
        layer.update(*columns(3, rows=2, first=500))
    grown, plain = layers
    assert torch.equal(grown.keys, plain.keys)
    assert torch.equal(grown.values, plain.values)
    assert grown.keys.shape == (2, 1, 9, 1)
    assert grown.get_seq_length() == 9


def test_a_cache_that_was_shortened_does_not_overwrite_what_it_returned() -> None:
    layer = GrowingLayer()
    layer.update(*columns(2))
    before, _ = layer.update(*columns(2, first=100))
    copy = before.clone()
    layer.crop(-2)
    layer.update(*columns(2, first=200))
    assert torch.equal(before, copy)


def test_gradients_through_a_cache() -> None:
    """Columns that the backward pass needs are not overwritten by later ones."""
    grown, plain = [], []
    for layer, gradients in ((GrowingLayer(), grown), (DynamicLayer(), plain)):
        inputs = [columns(1, first=number)[0].requires_grad_() for number in range(4)]
        loss = sum((layer.update(x * 2, x * 3)[0] ** 3).sum() for x in inputs)
        gradients += torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(grown, plain)


def test_layers_with_a_sliding_window_and_other_devices_keep_the_cache_of_transformers() -> None:
    windows = decoder_cache(of_size("mistral", sliding_window=4), torch.device("cpu"))
    assert {type(layer) for layer in windows.layers} == {DynamicSlidingWindowLayer}
    assert not can_append(windows)
    plain = decoder_cache(of_size("llama"), torch.device("cuda"))
    assert {type(layer) for layer in plain.layers} == {DynamicLayer}
    assert can_append(plain)
    assert can_append(decoder_cache(of_size("llama"), torch.device("cpu")))
