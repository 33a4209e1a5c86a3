"""Packing: the place of every token by hand, and the same hidden states and gradients as row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.test_backbones import build, every_family
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlchat.models.backbones import Backbone
from rlchat.models.packing import PACKABLE_SDPA, check_plain, packed_attention, plan_packing

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


def test_a_row_of_padding_only_has_any_token() -> None:
    """The index is valid, also where no token comes before."""
    packing = plan_packing(*batch("", "ab", "a"))
    assert packing is not None
    assert packing.cells.tolist() == [2, 3]
    assert packing.source[1].tolist() == [0, 1]
    assert packing.source[2, 0] == 0
    assert ((packing.source >= 0) & (packing.source < 2)).all()
    assert packing.spread(torch.tensor([[5.0, 6.0], [7.0, 8.0]])).shape == (3, 2, 2)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_of_packed_tokens_by_plain_operations(heads: int, scaling: float | None) -> None:
    """Four query heads, which share ``heads`` heads of keys and values; a token attends to its row so far."""
    ids, mask = batch("abcd", "abe", "abef")
    packing = plan_packing(ids, mask)
    assert packing is not None
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 6, 8, generator=generator) for n in (4, heads, heads))
    out = packed_attention(query, key, value, packing, scaling, 0.0)
    assert out.shape == (1, 6, 4, 8)
    rows = [[0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5]]  # the packed tokens of each row
    for row in rows:
        for end, token in enumerate(row, 1):
            for head in range(4):
                keys, values = (x[0, head * heads // 4, row[:end]] for x in (key, value))
                scores = keys @ query[0, head, token] * (scaling or 8**-0.5)
                torch.testing.assert_close(out[0, token, head], scores.softmax(0) @ values, atol=1e-5, rtol=1e-5)


def test_the_attention_function_passes_its_arguments_on() -> None:
    """At a dropout of 1, all weights are dropped."""
    packing = plan_packing(*batch("ab", "a"))
    assert packing is not None
    x = torch.ones(1, 2, 2, 4)
    attention = AttentionInterface()[PACKABLE_SDPA]
    for dropout, expected in ((0.0, 1.0), (1.0, 0.0)):
        out, _ = attention(torch.nn.Module(), x, x, x, None, dropout=dropout, rlchat_packing=packing)
        torch.testing.assert_close(out, torch.full((1, 2, 2, 4), expected))
    y = torch.randn(1, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    out, _ = attention(torch.nn.Module(), y, y, y, None, scaling=0.3, rlchat_packing=packing)
    torch.testing.assert_close(out, packed_attention(y, y, y, packing, 0.3, 0.0))
    with pytest.raises(NotImplementedError, match="softcap"):
        attention(torch.nn.Module(), y, y, y, None, softcap=2.0, rlchat_packing=packing)


def test_without_a_packing_it_is_the_attention_of_transformers() -> None:
    """With all its arguments: two query heads share a head here, and ``is_causal`` is not the module's own."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 3, 8, generator=generator) for n in (4, 2, 2))
    mask = torch.tensor([[0.0, -1.0, 2.0]] * 3)[None, None]
    attention = AttentionInterface()[PACKABLE_SDPA]
    for more in ({"attention_mask": mask}, {"attention_mask": None, "is_causal": False}, {"attention_mask": None}):
        expected, _ = sdpa_attention_forward(module, query, key, value, scaling=0.3, **more)  # type: ignore[arg-type]
        found, _ = attention(module, query, key, value, scaling=0.3, **more)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    dropped, _ = attention(module, query, key, value, mask, dropout=1.0)
    assert not dropped.any()


@pytest.mark.parametrize("option", ["sliding_window", "softcap", "s_aux", "position_bias"])
def test_attention_that_is_not_plain_is_refused(option: str) -> None:
    check_plain({option: None, "is_causal": True})
    with pytest.raises(NotImplementedError, match=f"^its attention uses {option}$"):
        check_plain({option: 4})


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
