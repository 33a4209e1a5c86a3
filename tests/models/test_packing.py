"""Packing: the place of every token by hand, and the same hidden states and gradients as row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.test_backbones import build, every_family
from torch import Tensor

from rlchat.models.backbones import Backbone
from rlchat.models.packing import plan_packing

NEVER_PACKED = {"mistral"}  # a sliding window


def batch(*rows: str) -> tuple[Tensor, Tensor]:
    """Rows of letters, padded on the right with ids that must not matter."""
    width = max(map(len, rows))
    ids = torch.tensor([[ord(letter) - ord("a") for letter in row.ljust(width, "z")] for row in rows])
    return ids, torch.tensor([[i < len(row) for i in range(width)] for row in rows])


def test_the_example_of_the_docstring() -> None:
    ids, mask = batch("abcd", "abe", "abef")
    packing = plan_packing(ids, mask)
    assert packing is not None
    assert packing.cells.tolist() == [0, 1, 2, 3, 6, 11]
    assert packing.pack(ids).tolist() == [[0, 1, 2, 3, 4, 5]]
    source = packing.source
    assert source[mask].tolist() == [0, 1, 2, 3, 0, 1, 4, 0, 1, 4, 5]


def test_a_batch_without_padding_and_common_prefixes_is_not_packed() -> None:
    assert plan_packing(*batch("abc", "bbc", "cbc")) is None


def test_equal_tokens_after_a_difference_are_not_shared() -> None:
    packing = plan_packing(*batch("abc", "axc", "ay"))
    assert packing is not None
    assert packing.source[0].tolist() == [0, 1, 2]
    assert packing.source[1].tolist() == [0, 3, 4]
    assert packing.source[2, :2].tolist() == [0, 5]


@given(st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=6))
def test_every_token_is_found_again_with_its_whole_prefix(rows: list[str]) -> None:
    ids, mask = batch(*rows)
    packing = plan_packing(ids, mask)
    if packing is None:
        assert len({len(row) for row in rows}) == 1
        return
    width = ids.shape[1]
    for number, row in enumerate(rows):
        for column in range(len(row)):
            cell = int(packing.cells[packing.source[number, column]])
            assert cell % width == column
            assert rows[cell // width][: column + 1] == row[: column + 1]
    assert len(packing.cells) <= sum(map(len, rows))


def ragged(vocabulary: int) -> tuple[Tensor, Tensor, list[int]]:
    lengths = [14, 9, 14, 12, 13, 2]
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocabulary, (6, 14), generator=generator)
    ids[3, :8], ids[4, :11] = ids[2, :8], ids[2, :11]
    return ids, torch.arange(14) < torch.tensor(lengths)[:, None], lengths


@every_family
def test_packed_rows_equal_single_rows_and_so_do_gradients(family: str) -> None:
    backbone = build(family)
    ids, mask, lengths = ragged(backbone.vocab_size)
    weights = torch.randn(6, 14, backbone.hidden_size, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in backbone.parameters() if p.requires_grad]

    def gradients(hidden: list[Tensor]) -> list[Tensor | None]:
        total = torch.stack([(h * weights[i, : len(h)]).sum() for i, h in enumerate(hidden)]).sum()
        return list(torch.autograd.grad(total, parameters, allow_unused=True))

    together = backbone(ids, mask)
    assert backbone._packs is (family not in NEVER_PACKED)
    packed = [together[i, :length] for i, length in enumerate(lengths)]
    single = [backbone(ids[i, None, :length], mask[i, None, :length])[0] for i, length in enumerate(lengths)]
    for one, other in zip(packed, single, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for one_gradient, other_gradient in zip(gradients(packed), gradients(single), strict=True):
        assert (one_gradient is None) == (other_gradient is None)
        if one_gradient is not None and other_gradient is not None:
            torch.testing.assert_close(one_gradient, other_gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [{"sliding_window": 5}, {"layer_types": ["sliding_attention", "full_attention"]}])
def test_layers_with_windows_are_not_packed(more: dict[str, Any]) -> None:
    backbone = build("qwen3", use_sliding_window=True, **{"sliding_window": 8, "max_window_layers": 0, **more})
    ids, mask, _ = ragged(backbone.vocab_size)
    backbone(ids, mask)
    assert backbone._packs is False


def test_another_attention_implementation_is_not_packed() -> None:
    backbone = build("llama")
    backbone.set_attention("eager")
    ids, mask, _ = ragged(backbone.vocab_size)
    backbone(ids, mask)
    assert backbone._packs is False
    assert backbone.transformer.config._attn_implementation == "eager"


def test_a_family_that_ignores_the_packing_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rows, its attention would see the tokens of other rows."""
    monkeypatch.setattr("rlchat.models.packing.packed_attention", lambda query, key, value, *_: value.transpose(1, 2))
    backbone = build("llama")
    ids, mask, lengths = ragged(backbone.vocab_size)
    hidden = backbone(ids, mask)
    assert backbone._packs is False
    assert backbone.transformer.config._attn_implementation == "sdpa"
    torch.testing.assert_close(hidden[1, : lengths[1]], backbone(ids[1:2, : lengths[1]], mask[1:2, : lengths[1]])[0])


def test_a_packed_model_file_is_packed_again() -> None:
    backbone = build("llama")
    ids, mask, _ = ragged(backbone.vocab_size)
    expected = backbone(ids, mask)
    again = Backbone.from_config_json(backbone.config_json()).eval()
    again.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(again(ids, mask)[mask], expected[mask])
    assert again._packs is True
