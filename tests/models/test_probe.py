"""The probe of a new backbone: each missing property is named, and backbones that pass have all properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from rlchat.errors import UserError
from rlchat.models import families
from rlchat.models.backbones import Backbone
from rlchat.models.probe import check_cache_is_used, probe

LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def build(family: str, length: int = 16, **more: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone({"model_type": family, **LAYERS, **more}, 40, length).eval()


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Declares encoder families for one test, as a new module in ``families`` would."""

    def declare(*names: str) -> None:
        known = {**families.encoder_families(), **{name: families.EncoderFamily(name) for name in names}}
        for module in ("probe", "backbones", "base_models"):
            monkeypatch.setattr(f"rlchat.models.{module}.encoder_families", lambda: known)

    return declare


def test_families_are_found_automatically() -> None:
    found = families.encoder_families()
    assert {"bert", "distilbert", "electra", "roberta", "xlm-roberta", "camembert"} <= found.keys()
    assert all(name == family.model_type for name, family in found.items())


def test_a_declared_encoder_with_windows_is_refused(declare: Any) -> None:
    declare("modernbert")
    with pytest.raises(UserError, match=r"'modernbert' attends within a sliding window of \d+ tokens"):
        build("modernbert")


def test_a_declared_encoder_whose_layers_share_modules_is_refused(declare: Any) -> None:
    declare("albert")
    with pytest.raises(UserError, match="'albert' fails with a cache"):
        build("albert", embedding_size=8)


def test_different_results_with_left_padding_are_an_error() -> None:
    # In transformers 5.0, this family has no cache.
    with pytest.raises(
        UserError, match=r"'recurrent_gemma' (gives different results for a left-padded row|ignores the c)"
    ):
        Backbone(
            {
                "model_type": "recurrent_gemma",
                "hidden_size": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "lru_width": 16,
                "attention_window_size": 8,
            },
            40,
            16,
        )


def test_a_family_with_a_cache_class_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match="'minimax' fails with a cache"):
        build("minimax", head_dim=8)


def test_narrow_embeddings_of_opt_give_a_head_that_fits() -> None:
    shape = {"hidden_size": 16, "word_embed_proj_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = Backbone({"model_type": "opt", "ffn_dim": 16, **shape}, 40, 16).eval()
    assert (backbone.hidden_size, backbone.head_weight.shape) == (8, (40, 8))
    assert backbone(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)).shape == (1, 2, 8)


def test_an_infinite_value_in_a_configuration_is_restored() -> None:
    if hasattr(DynamicCache, "has_previous_state"):
        backbone = build(
            "granitemoehybrid", mamba_n_heads=4, mamba_expand=2, mamba_d_head=8, layer_types=["mamba", "attention"]
        )
    else:  # in transformers 5.0, this family does not work with a cache
        backbone = build("llama")
        backbone.transformer.config.time_step_limit = (0.0, float("inf"))
    assert "Infinity" in backbone.config_json()
    twin = Backbone.from_config_json(backbone.config_json())
    assert twin.config_json() == backbone.config_json()
    twin.load_state_dict(backbone.state_dict())


# ---- faults put into a family that has none --------------------------------------------------------------------------


def swallow(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a version of transformers that has renamed the argument: the old keyword lands in ``**kwargs``."""
    plain = type(backbone.transformer).forward

    def forward(self: Any, ids: Tensor, **kwargs: Any) -> Any:
        kwargs.pop("cache", None)
        kwargs.pop("past_key_values", None)
        return plain(self, ids, **{**kwargs, "attention_mask": None, "position_ids": None})

    monkeypatch.setattr(type(backbone.transformer), "forward", forward)


def test_an_ignored_cache_argument_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build("llama")
    check_cache_is_used(backbone)
    swallow(backbone, monkeypatch)
    for check in (check_cache_is_used, lambda backbone: probe(backbone, 16)):
        with pytest.raises(UserError, match="'llama' ignores the cache argument"):
            check(backbone)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("leak", "sees later tokens"),
        ("cache", "different results with and without a cache"),
        ("padding", "different results for a left-padded row"),
        ("width", "gives hidden states of width 15, expected 16"),
        ("nan", "hidden states that are not finite"),
        ("error", "fails on a short row .RuntimeError: broken"),
    ],
)
def test_every_property_is_checked(fault: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build("llama")
    plain = Backbone.forward

    def forward(self: Backbone, ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        hidden = plain(self, ids, mask, cache)
        if fault == "leak":
            hidden = hidden + 0.05 * hidden.flip(1)
        elif (fault == "cache" and cache is not None and ids.shape[1] == 1) or (fault == "padding" and not mask.all()):
            hidden = hidden * 1.05
        elif fault == "width":
            hidden = hidden[..., :15]
        elif fault == "nan":
            hidden = hidden * torch.nan
        elif fault == "error":
            raise RuntimeError("broken")
        return hidden

    probe(backbone, 16)
    monkeypatch.setattr(Backbone, "forward", forward)
    with pytest.raises(UserError, match=reason) as error:
        probe(backbone, 16)
    assert "\n" not in str(error.value)


def test_a_row_longer_than_the_window_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    build("mistral", sliding_window=12)
    plain = Backbone.forward

    def forward(self: Backbone, ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        hidden = plain(self, ids, mask, cache)
        return hidden * 1.05 if cache is not None and mask.shape[1] > 12 else hidden

    monkeypatch.setattr(Backbone, "forward", forward)
    with pytest.raises(UserError, match="when a row is longer than its window"):
        build("mistral", sliding_window=12)


def test_the_probe_does_not_change_mode_and_random_numbers() -> None:
    torch.manual_seed(3)
    backbone = Backbone({"model_type": "llama", **LAYERS}, 40, 16)
    assert backbone.training
    state = torch.get_rng_state()
    probe(backbone, 16)
    assert backbone.training
    assert torch.equal(torch.get_rng_state(), state)
