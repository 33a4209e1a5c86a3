"""Every backbone family: no leak from later tokens, no effect of cache and padding, gradients for every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.utils import _to_kwargs
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)
from transformers.activations import NewGELUActivation

from rlchat.distributed.sharding import to_be_sharded, weights_on_first
from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.models.causal_attention import causal_mask
from rlchat.models.kv_cache import EncoderCache, shorten

VOCABULARY = 40
POSITIONS = 16
LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LAYERS,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2},
    "qwen3": {**LAYERS, "head_dim": 8},
    "gpt_neox": LAYERS,
    "mistral": LAYERS,
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "initializer_range": 0.2},
    "bert": LAYERS,
    "roberta": LAYERS,
    "electra": {**LAYERS, "embedding_size": 8},
    "data2vec-text": LAYERS,
    "roberta-prelayernorm": LAYERS,
    "xlm-roberta-xl": LAYERS,
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str, **more: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone({"model_type": family, **FAMILIES[family], **more}, VOCABULARY, POSITIONS).eval()


def row(*ids: int) -> tuple[Tensor, Tensor]:
    tokens = torch.tensor([ids])
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def cached(backbone: Backbone, ids: Tensor, mask: Tensor, chunks: tuple[int, ...]) -> Tensor:
    """Hidden states of ``ids``, fed in pieces of the sizes ``chunks``."""
    cache, end, out = backbone.new_cache(), 0, []
    for size in chunks:
        end += size
        out.append(backbone(ids[:, end - size : end], mask[:, :end], cache))
    assert end == ids.shape[1]
    return torch.cat(out, 1)


def embeddings(model: PreTrainedModel) -> Tensor:
    """[vocabulary, width]"""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


# Eight tokens; id 0 is among them, which many configurations take for padding.
IDS = (0, 7, 3, 0, 11, 39, 5, 21)


@every_family
@pytest.mark.parametrize("chunks", [None, (4, 1, 1, 1, 1), (5, 2, 1), (8,)], ids=str)
@torch.no_grad()
def test_a_position_ignores_what_follows_it(family: str, chunks: tuple[int, ...] | None) -> None:
    backbone = build(family)
    ids, mask = row(*IDS)

    def hidden(tokens: Tensor) -> Tensor:
        return backbone(tokens, mask) if chunks is None else cached(backbone, tokens, mask, chunks)

    before = hidden(ids)
    for changed in range(len(IDS)):
        other = ids.clone()
        other[0, changed] = 17
        after = hidden(other)
        torch.testing.assert_close(after[:, :changed], before[:, :changed], atol=1e-6, rtol=0)
        # The position itself and the last one change, so the test is not passed by a model that ignores its input.
        assert (after[:, changed] - before[:, changed]).abs().max() > 1e-3
        assert (after[:, -1] - before[:, -1]).abs().max() > 1e-4


@every_family
@torch.no_grad()
def test_cached_and_padded_equal_plain(family: str) -> None:
    backbone = build(family)
    short = (9, 0, 4, 30, 2)
    pad = 13
    ids = torch.tensor([IDS, (pad, pad, pad, *short)])
    mask = torch.tensor([[True] * 8, [False] * 3 + [True] * 5])
    full = backbone(ids, mask)
    alone = backbone(*row(*short))
    torch.testing.assert_close(full[1:, 3:], alone, atol=1e-5, rtol=0)
    right = backbone(torch.tensor([[*short, pad, pad, pad]]), mask[1:].flip(1))
    torch.testing.assert_close(right[:, :5], alone, atol=1e-5, rtol=0)
    for chunks in ((4, 1, 1, 1, 1), (2, 3, 3)):
        torch.testing.assert_close(cached(backbone, ids, mask, chunks)[mask], full[mask], atol=1e-5, rtol=0)


@every_family
@torch.no_grad()
def test_finished_rows_in_the_cache_are_not_seen(family: str) -> None:
    """A finished row continues as padding next to other rows, whose results must not change."""
    backbone = build(family)
    ids = torch.tensor([IDS, IDS])
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    hidden = cached(backbone, ids, mask, (4, 1, 1, 1, 1))
    torch.testing.assert_close(hidden[0], backbone(*row(*IDS))[0], atol=1e-5, rtol=0)
    assert hidden.isfinite().all()


@every_family
@torch.no_grad()
def test_a_shortened_cache_equals_a_shorter_one(family: str) -> None:
    backbone = build(family)
    cache = backbone.new_cache()
    backbone(*row(*IDS[:3], 33, 34, 35), cache)
    assert shorten(cache, 3)
    assert shorten(cache, 3)  # already short enough
    rest, _ = row(*IDS[3:])
    hidden = backbone(rest, torch.ones(1, 8, dtype=torch.bool), cache)
    torch.testing.assert_close(hidden, backbone(*row(*IDS))[:, 3:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_cache_with_a_full_window_cannot_be_shortened() -> None:
    backbone = build("mistral", sliding_window=4)
    cache = backbone.new_cache()
    backbone(*row(*IDS), cache)
    assert shorten(cache, 8)
    assert not shorten(cache, 7)


@torch.no_grad()
def test_a_cache_cannot_be_lengthened() -> None:
    backbone = build("llama")
    cache = backbone.new_cache()
    backbone(*row(*IDS[:3]), cache)
    assert not shorten(cache, 4)


def test_the_causal_mask_by_hand() -> None:
    """Padding attends to itself, because a softmax over nothing is NaN on some devices."""
    real = torch.tensor([[False, True, True, False]])
    seen = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert causal_mask(real, 4).int().tolist() == [[seen]]
    assert causal_mask(real, 2).int().tolist() == [[seen[2:]]]  # two tokens after two cached ones


@every_family
def test_padding_causes_no_nan_and_id_0_gets_gradients(family: str) -> None:
    backbone = build(family)
    ids = torch.tensor([IDS, IDS, IDS])
    mask = torch.tensor([[True] * 8, [False] * 7 + [True], [True] + [False] * 7])
    hidden = backbone(ids, mask)
    assert hidden.isfinite().all()
    torch.manual_seed(1)
    (hidden * torch.randn_like(hidden))[mask].sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    embedding = embeddings(backbone.transformer)
    assert embedding.grad is not None
    assert embedding.grad[0].abs().sum() > 1e-3  # the first token of row 0, and the fourth
    assert embedding.grad[8].abs().sum() == 0  # does not occur


@every_family
@torch.no_grad()
def test_config_json_builds_the_same_shape(family: str) -> None:
    backbone = build(family)
    twin = Backbone.from_config_json(backbone.config_json()).eval()
    twin.load_state_dict(backbone.state_dict())
    ids, mask = row(*IDS)
    assert torch.equal(twin(ids, mask), backbone(ids, mask))
    assert torch.equal(cached(twin, ids, mask, (5, 2, 1)), cached(backbone, ids, mask, (5, 2, 1)))
    assert torch.equal(twin.head_weight, backbone.head_weight)
    assert (twin.hidden_size, twin.vocab_size, twin.config_json()) == (16, VOCABULARY, backbone.config_json())
    assert getattr(twin.transformer.get_input_embeddings(), "padding_idx", None) is None


@every_family
def test_the_head_fits_the_vocabulary(family: str) -> None:
    backbone = build(family)
    assert backbone.head_weight.shape == (VOCABULARY, 16)
    own = {"llama", "qwen3", "gpt_neox", "mistral", "electra"}  # not tied, or (ELECTRA) not as wide as the embeddings
    assert (backbone.head is not None) == (family in own)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "new", "auto_map": {"AutoConfig": "configuration_new.New"}}')
    (tmp_path / "configuration_new.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the answer to transformers' question
    with pytest.raises(
        UserError, match=r"needs its own code \(configuration_new\.py\), which rlchat does not run, because a"
    ):
        Backbone(str(tmp_path), VOCABULARY, POSITIONS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "albert", **LAYERS, "embedding_size": 8}, "sees later tokens"),
        ({"model_type": "t5", "d_model": 16, "num_layers": 1, "num_heads": 2}, "is an encoder-decoder"),
        ({"model_type": "no-such-family"}, "unknown model_type"),
        ({"hidden_size": 16}, "unknown model_type"),
        ({"model_type": "llama", "hidden_size": 15}, r"(invalid configuration for|cannot build a) llama"),
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 3}, "cannot build a gpt2 model"),
        ({"model_type": "gpt2", **FAMILIES["gpt2"], "max_position_embeddings": 8}, "exceeds the 8 positions"),
        ({"model_type": "roberta", **LAYERS, "max_position_embeddings": 16}, "exceeds the 15 positions"),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_unusable_base_models_are_errors(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Backbone(config, VOCABULARY, POSITIONS)


@every_family
@torch.no_grad()
def test_every_position_can_be_used(family: str) -> None:
    backbone = build(family)
    ids, mask = row(*(i % VOCABULARY for i in range(POSITIONS)))
    assert backbone(ids, mask).isfinite().all()


# ---- from a folder ---------------------------------------------------------------------------------------------------


KEPT = [(token,) for token in range(30)] + [()] * 5  # the rows of 30 tokens, and five new ones


def saved(model: PreTrainedModel, folder: Path) -> str:
    """The path of ``model``, saved; its vocabulary has 30 tokens."""
    model.save_pretrained(folder)
    return str(folder)


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, max_position_embeddings=POSITIONS, **{**LAYERS, **more})).eval()


@torch.no_grad()
def test_an_untied_model_with_the_same_vocabulary_keeps_rows_and_head(tmp_path: Path) -> None:
    model = llama()
    backbone = Backbone(saved(model, tmp_path), 35, POSITIONS, rows=KEPT).eval()
    embedding = embeddings(backbone.transformer)
    assert torch.equal(embedding[:30], embeddings(model))
    assert backbone.head is not None
    assert torch.equal(backbone.head.weight[:30], model.lm_head.weight)
    # New rows have the same scale as the others: 0.2.
    for weight in (embedding, backbone.head.weight):
        assert weight.shape == (35, 16)
        assert 0.1 < weight[30:].std() < 0.3
    ids, mask = row(3, 1, 4, 1, 5)
    logits = backbone(ids, mask) @ backbone.head_weight.T
    torch.testing.assert_close(logits[..., :30], model(ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_tied_model_with_the_same_vocabulary_keeps_rows_and_tie(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=POSITIONS, **FAMILIES["gpt2"])).eval()
    backbone = Backbone(saved(model, tmp_path), 35, POSITIONS, rows=KEPT).eval()
    assert backbone.head is None
    assert backbone.head_weight is embeddings(backbone.transformer)
    assert torch.equal(backbone.head_weight[:30], model.transformer.wte.weight)
    ids, mask = row(3, 1, 4, 1, 5)
    logits = backbone(ids, mask) @ backbone.head_weight.T
    torch.testing.assert_close(logits[..., :30], model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_without_kept_rows_every_row_is_initialized_randomly(tmp_path: Path, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    backbone = Backbone(saved(model, tmp_path), 35, POSITIONS)
    old_rows, new_rows = embeddings(model), embeddings(backbone.transformer)
    assert (old_rows - new_rows[:30]).abs().amax(1).min() > 0.01  # every row is different
    assert 0.15 < new_rows.std() < 0.25
    assert (backbone.head is None) == tied
    if backbone.head is not None:
        assert (model.lm_head.weight - backbone.head.weight[:30]).abs().amax(1).min() > 0.01
    inside = "layers.1.mlp.up_proj.weight"
    assert torch.equal(backbone.transformer.get_parameter(inside), model.model.get_parameter(inside))  # kept


@torch.no_grad()
def test_a_smaller_vocabulary_works(tmp_path: Path) -> None:
    backbone = Backbone(saved(llama(), tmp_path), 20, POSITIONS)
    assert backbone.head_weight.shape == embeddings(backbone.transformer).shape == (20, 16)


@torch.no_grad()
def test_an_encoder_from_a_folder_is_causal_with_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=30, max_position_embeddings=POSITIONS, **FAMILIES["distilbert"])
    model = DistilBertForMaskedLM(config).eval()
    backbone = Backbone(saved(model, tmp_path), 35, POSITIONS, rows=KEPT).eval()
    assert torch.equal(backbone.head_weight[:30], model.distilbert.embeddings.word_embeddings.weight)
    inside = "transformer.layer.1.ffn.lin1.weight"
    assert torch.equal(backbone.transformer.get_parameter(inside), model.distilbert.get_parameter(inside))
    before, after = backbone(*row(3, 1, 4)), backbone(*row(3, 1, 9))
    assert torch.equal(before[:, :2], after[:, :2])


def test_a_reloaded_backbone_has_the_shape_in_its_json(tmp_path: Path) -> None:
    for name, model in {"llama": llama(), "tied": llama(tie_word_embeddings=True)}.items():
        backbone = Backbone(saved(model, tmp_path / name), 35, POSITIONS, rows=KEPT)
        twin = Backbone.from_config_json(backbone.config_json())
        twin.load_state_dict(backbone.state_dict())
        assert twin.vocab_size == 35


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "distilbert"])
def test_a_backbone_without_weights_has_the_same_shape(family: str, tmp_path: Path) -> None:
    """Untied, tied, with a bias of the output layer, and an encoder."""
    torch.manual_seed(0)
    shape = {"gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 8}}.get(family) or FAMILIES[family]
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = AutoConfig.for_model(family, vocab_size=30, max_position_embeddings=POSITIONS, **shape, **ids)
    auto = AutoModel if family == "distilbert" else AutoModelForCausalLM
    folder = saved(auto.from_config(config).bfloat16(), tmp_path)
    whole = Backbone(folder, 35, POSITIONS, rows=KEPT)
    with to_be_sharded(first=False), weights_on_first() as weights:
        empty = Backbone(folder, 35, POSITIONS, rows=KEPT, weights=weights)
    assert all(parameter.is_meta for parameter in empty.parameters())
    described = [
        {name: (weight.shape, weight.dtype) for name, weight in backbone.state_dict().items()}
        for backbone in (whole, empty)
    ]
    assert described[0] == described[1]
    assert whole.config_json() == empty.config_json()
    assert whole.logits_form == empty.logits_form
    assert empty.logits_form.bias == (family == "gptj")
    for (name, table), (other, expected) in zip(empty.named_buffers(), whole.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(table, expected)


def test_half_precision_weights_are_trained_in_float32(tmp_path: Path) -> None:
    backbone = Backbone(saved(llama().bfloat16(), tmp_path), 35, POSITIONS, rows=KEPT)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    twin = Backbone.from_config_json(backbone.config_json())
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32}


def test_too_few_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_length 17 exceeds the 16 positions"):
        Backbone(saved(llama(), tmp_path / "llama"), 35, POSITIONS + 1)
    roberta = RobertaModel(RobertaConfig(vocab_size=30, max_position_embeddings=18, **LAYERS))
    folder = saved(roberta, tmp_path / "roberta")  # its padding id 1 takes the first two positions
    assert Backbone(folder, 35, 16).hidden_size == 16
    with pytest.raises(UserError, match="max_length 17 exceeds the 16 positions"):
        Backbone(folder, 35, 17)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_folder_is_reported(tmp_path: Path, file: str) -> None:
    folder = saved(llama(), tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:300])
    with pytest.raises(UserError, match=r"transformers cannot load it|has no complete model"):
        Backbone(folder, 35, POSITIONS)


def in_hub_cache(folder: Path, config: PretrainedConfig, name: str) -> Path:
    """``config`` in a cache of the hub below ``folder``; returns the folder of its files."""
    snapshot = folder / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    config.save_pretrained(snapshot)
    return snapshot


def test_without_a_network_only_the_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request in all, which fails: transformers would repeat it for each file for 24 s."""
    request = mock.Mock(side_effect=ConnectionError)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", request)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", mock.Mock(side_effect=AssertionError))
    model = llama()
    folder = in_hub_cache(tmp_path, model.config, "some/half-cached")
    with pytest.raises(UserError) as error:
        Backbone("some/half-cached", 35, POSITIONS)
    assert str(error.value).startswith(
        "base_model some/half-cached: its config.json has been downloaded before, but not its weights, and the hub "
        "cannot be reached now (ConnectionError); connect to a network and start again, or download its config.json"
    )
    model.save_pretrained(folder)
    backbone = Backbone("some/half-cached", 35, POSITIONS)
    assert backbone.transformer.config.rlchat_base["hub"] == "some/half-cached"
    assert request.call_count == 1


def test_a_missing_base_model_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at import
    with pytest.raises(UserError, match="no-such-owner/no-such-model is neither a folder nor a model"):
        Backbone("no-such-owner/no-such-model", 35, POSITIONS)
    with pytest.raises(UserError, match=r"the folder contains no config\.json, expected a model of transformers"):
        Backbone(str(tmp_path), 35, POSITIONS)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"contains an adapter of peft, not a whole model; merge it into its base"):
        Backbone(str(tmp_path), 35, POSITIONS)


def test_a_leak_is_an_error_for_a_folder_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    albert = AlbertModel(AlbertConfig(vocab_size=30, max_position_embeddings=POSITIONS, embedding_size=8, **LAYERS))
    with pytest.raises(UserError, match="'albert' sees later tokens"):
        Backbone(saved(albert, tmp_path), 35, POSITIONS)


def test_moving_inputs_does_not_copy_the_cache_of_an_encoder() -> None:
    """FSDP2 on a GPU moves the inputs of a forward pass; additions to a copy of the cache would be lost."""
    cache = EncoderCache({torch.nn.Identity(): (torch.zeros(1), torch.zeros(1))})
    _, (passed_on,) = _to_kwargs((), {"cache": cache}, torch.device("cpu"), False)
    assert passed_on["cache"] is cache


def test_gelu_is_one_operation_with_the_values_of_transformers() -> None:
    backbone = build("gpt2", activation_function="gelu_new")
    activations = [part for part in backbone.modules() if isinstance(part, NewGELUActivation | nn.GELU)]
    assert [type(part) for part in activations] == [nn.GELU] * FAMILIES["gpt2"]["n_layer"]
    x = torch.linspace(-6, 6, 1001)
    torch.testing.assert_close(activations[0](x), NewGELUActivation()(x), atol=1e-6, rtol=0)
