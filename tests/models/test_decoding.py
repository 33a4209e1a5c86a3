"""Decoding with a cache of fixed size; tests/test_cuda.py runs it as a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.small_ppo import BACKBONES
from torch.utils._python_dispatch import TorchDispatchMode

from rlchat.models.backbones import Backbone
from rlchat.models.decoding import FixedDecoder, _groups_by_length, can_decode_fixed, read_rows
from rlchat.models.networks import RLChatModel
from rlchat.models.probe import can_fix_cache
from rlchat.models.sampling import Generated, Sampling, addressed_uniforms, generate, sample
from rlchat.utils.padding import pad

VOCABULARY, PAD, END = 24, 23, 22
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 0], [11, 12, 13, 14]]
ENDS: dict[str, Any] = {"end_id": END, "pad_id": PAD}
DECODERS = ("llama", "qwen3", "gpt_neox", "gpt2")


def policy(family: str, **config: Any) -> RLChatModel:
    torch.manual_seed(0)
    options = {"model_type": family, **BACKBONES[family], "initializer_range": 0.3, **config}
    return RLChatModel(Backbone(options, VOCABULARY, 40), unsayable=[PAD]).eval()


def counted_rows(monkeypatch: pytest.MonkeyPatch, method: str = "logits") -> list[int]:
    """The number of rows of each later call of ``method`` of a model, in a list that grows with them.

    ``logits`` are computed in every step; ``forward`` is called in those that go through transformers.
    """
    rows: list[int] = []
    original = getattr(RLChatModel, method)

    def counting(self: RLChatModel, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(ids))
        result: torch.Tensor = original(self, ids, *rest)
        return result

    monkeypatch.setattr(RLChatModel, method, counting)
    return rows


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("check_every", [1, 4, 32])
def test_the_same_tokens_as_with_a_growing_cache(family: str, check_every: int) -> None:
    model, (ids, mask) = policy(family), pad([PROMPTS[0], *PROMPTS], PAD, "left")  # the first one is read once
    sampling = [Sampling(n, temperature=1.0) for n in (7, 1, 9, 12, 5)]
    noise = addressed_uniforms(3, 0, torch.arange(5))
    expected: Generated = generate(model, ids, mask, sampling, noise, **ENDS)
    decoder = FixedDecoder(model, ids.shape[1] + 12)
    steps = list(sample(model, ids, mask, sampling, noise, **ENDS, decode=decoder, check_every=check_every))
    assert len(steps) <= 12
    width = expected.ids.shape[1]
    tokens, logprobs = (torch.stack(column, 1) for column in zip(*steps, strict=True))
    assert torch.equal(tokens[:, :width], expected.ids)
    assert (tokens[:, width:] == PAD).all()
    torch.testing.assert_close(logprobs[:, :width], expected.logprobs, atol=1e-5, rtol=0)


def test_a_cache_that_is_just_large_enough() -> None:
    """7 columns for the prompts and 9 for the responses; the keys of the last token are never needed."""
    model, (ids, mask) = policy("llama"), pad(PROMPTS, PAD, "left")
    model.unsayable[END] = 1
    sampling, noise = Sampling(9, temperature=1.0), addressed_uniforms(3, 0, torch.arange(4))
    expected = generate(model, ids, mask, sampling, noise, **ENDS)
    steps = list(sample(model, ids, mask, sampling, noise, **ENDS, decode=FixedDecoder(model, 16)))
    assert torch.equal(torch.stack([step.tokens for step in steps], 1), expected.ids)
    assert expected.ids.shape == (4, 9)


@pytest.mark.parametrize("family", [*DECODERS, "distilbert"])
def test_a_prompt_of_several_responses_is_read_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, four = policy(family), [PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[1], PROMPTS[0], PROMPTS[0], PROMPTS[2]]
    ids, mask = pad(four, PAD, "left")
    read = counted_rows(monkeypatch)
    noise = addressed_uniforms(3, 0, torch.arange(7))
    found = generate(model, ids, mask, Sampling(6, temperature=1.0), noise, **ENDS)
    assert read[0] == 4  # of seven rows; the first prompt comes twice, but not in adjacent rows
    assert max(read[1:]) == 7
    for row, prompt in enumerate(four):
        one = torch.tensor([prompt])
        alone = generate(
            model, one, torch.ones_like(one, dtype=torch.bool), Sampling(6, temperature=1.0),
            addressed_uniforms(3, 0, torch.tensor([row])), **ENDS,
        )  # fmt: skip
        width = alone.ids.shape[1]
        assert torch.equal(found.ids[row, :width], alone.ids[0])
        torch.testing.assert_close(found.logprobs[row, :width], alone.logprobs[0], atol=1e-5, rtol=0)
        assert not found.mask[row, width:].any()


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([3, 9, 4, 8], [[1, 3, 2, 0]]),  # (9 - 4) x 2 tokens saved are fewer than 12
        ([3, 16, 4, 9], [[1, 3], [2, 0]]),  # 9 is more than half of 16; (16 - 4) x 2 are enough
        ([2, 30, 8, 8, 2, 2], [[1], [2, 3], [0, 4, 5]]),  # 22 x 5, then 6 x 3
        ([5], [[0]]),
    ],
)
def test_rows_of_similar_length_are_read_together(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], groups: list[list[int]]
) -> None:
    monkeypatch.setattr("rlchat.models.decoding._WORTH_A_PASS", 12)
    assert _groups_by_length(lengths) == groups


@pytest.mark.parametrize("family", ["llama", "gpt2", "distilbert"])
def test_prompts_read_in_several_passes_give_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = policy(family), pad([[8], *PROMPTS, [9, 5]], PAD, "left")
    whole, split = model.backbone.new_cache(), model.backbone.new_cache()
    hidden, row = read_rows(model, ids, mask, whole)
    monkeypatch.setattr("rlchat.models.decoding._WORTH_A_PASS", 1)
    rows = counted_rows(monkeypatch, "forward")
    hidden_split, row_split = read_rows(model, ids, mask, split)
    assert rows == [2, 2, 2]  # of 7 and 4, of 3 and 2, of 1 and 1
    assert torch.equal(row, row_split)
    torch.testing.assert_close(hidden_split, hidden)
    step, longer = ids[:, -1:], torch.cat([mask, mask[:, -1:]], 1)
    torch.testing.assert_close(model(step, longer, split), model(step, longer, whole))


def test_weights_that_were_cast_once_are_not_used_after_an_update() -> None:
    model, other, (ids, mask) = policy("llama"), policy("llama"), pad(PROMPTS, PAD, "left")
    noise = addressed_uniforms(3, 0, torch.arange(4))
    replies = []
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as Lightning does
        for _ in range(2):
            replies.append(generate(model, ids, mask, Sampling(12, temperature=1.0), noise, **ENDS).ids)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.neg_()
        with torch.no_grad():
            for weight in other.parameters():
                weight.neg_()
        expected = generate(other, ids, mask, Sampling(12, temperature=1.0), noise, **ENDS).ids
        assert model.backbone(ids, mask).requires_grad
    assert torch.equal(replies[1], expected)
    assert not torch.equal(replies[0], replies[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_trained_weights_are_cast_once(autocast: bool) -> None:
    model, (ids, mask) = policy("llama"), pad(PROMPTS, PAD, "left")
    weights = {weight.data_ptr() for weight in model.parameters()}

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                Casts.count += 1
            return function(*args, **(kwargs or {}))

    noise = addressed_uniforms(3, 0, torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False), Casts():
        generate(model, ids, mask, Sampling(6, temperature=1.0), noise, **ENDS)
    assert Casts.count == (14 if autocast else 0)  # seven matrices in each of two layers


def test_rows_leave_at_the_steps_that_check(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = policy("llama"), pad(PROMPTS, PAD, "left")
    sampling = [Sampling(n, temperature=1.0) for n in (2, 11, 3, 4)]
    model.unsayable[END] = 1
    noise = addressed_uniforms(3, 0, torch.arange(4))
    expected = generate(model, ids, mask, sampling, noise, **ENDS)
    assert expected.mask.sum(1).tolist() == [2, 11, 3, 4]
    rows = counted_rows(monkeypatch)
    monkeypatch.setattr("rlchat.models.sampling._steps_between_checks", lambda device: 4)
    found = generate(model, ids, mask, sampling, noise, **ENDS)
    assert rows == [4, 4, 4, 4, 2, 2, 2, 2, 1, 1, 1]  # the limit of four tokens is seen at the next check
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.ended, expected.ended)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_the_newer_switch_of_pytorch_for_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this PyTorch has only the older switch")
    model, (ids, mask) = policy("llama"), pad(PROMPTS, PAD, "left")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert can_fix_cache(model.backbone, lambda columns: FixedDecoder(model, columns))
        generate(model, ids, mask, Sampling(2), addressed_uniforms(3, 0, torch.arange(4)), **ENDS)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("family", DECODERS)
def test_these_families_can_have_a_fixed_cache(family: str) -> None:
    model = policy(family)
    assert can_fix_cache(model.backbone, lambda columns: FixedDecoder(model, columns))


def test_a_cache_that_gives_other_logits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy("llama")
    right = Backbone.decode

    def shifted(self: Backbone, ids: torch.Tensor, visible: torch.Tensor, positions: torch.Tensor, cache: Any) -> Any:
        return right(self, ids, visible, positions + 1, cache)

    monkeypatch.setattr(Backbone, "decode", shifted)
    assert not can_fix_cache(model.backbone, lambda columns: FixedDecoder(model, columns))


def test_a_sliding_window_and_an_encoder_keep_their_caches() -> None:
    for model in (policy("mistral", sliding_window=8), policy("distilbert")):
        assert not can_fix_cache(model.backbone, lambda columns, model=model: FixedDecoder(model, columns))


def test_on_a_cpu_the_cache_grows() -> None:
    assert not can_decode_fixed(policy("llama"))
