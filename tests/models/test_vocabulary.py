"""Rows of a base model's embedding by the bytes of the tokens, and what becomes of the rest."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from helpers.hf_tokenizers import CHATML, CORPUS, LLAMA3, tokenizer_folder, tokenizer_json
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.models.base.embeddings import rows_from
from rlchat.models.model_file import load_policy, save_bundle
from rlchat.models.vocabulary import AVERAGE, plan_rows
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.ranks import from_byte_letters
from rlchat.training.initial_model import open_policy, open_tokenizer

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def base_model(
    folder: Path, raw: dict[str, Any], template: str | None = CHATML, rows: int = 450, **more: Any
) -> LlamaForCausalLM:
    """A small Llama with a tokenizer in ``folder``; its embedding has more rows than the tokenizer has ids."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**SHAPE, "vocab_size": rows, "max_position_embeddings": 64, "initializer_range": 0.3, **more}
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer_folder(folder, raw, template)
    return model


def shuffled(raw: dict[str, Any]) -> dict[str, Any]:
    vocabulary = raw["model"]["vocab"]
    ids = list(vocabulary.values())
    random.Random(1).shuffle(ids)
    raw["model"]["vocab"] = dict(zip(vocabulary, ids, strict=True))
    return raw


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("order", ["merges", "shuffled"])
@torch.no_grad()
def test_the_own_vocabulary_gives_the_logits_of_the_base_model(tmp_path: Path, tied: bool, order: str) -> None:
    raw = tokenizer_json(LLAMA3)
    whole = base_model(tmp_path, shuffled(raw) if order == "shuffled" else raw, tie_word_embeddings=tied)
    bundle = open_policy(str(tmp_path), None, 64, None, None)
    model, tokenizer = bundle.model.eval(), bundle.tokenizer
    assert tokenizer.has_own_format
    ids = tokenizer.render_prompt(Conversation((Message("user", CORPUS[0]),))).ids[:60]
    from rlchat.tokenizer.convert import convert

    moved = convert(raw, "own").moved
    back = {new: old for old, new in moved.items()}
    assert bool(back) == (order == "shuffled")
    theirs = whole(torch.tensor([[back.get(token, token) for token in ids]])).logits
    ours = model.logits(model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)))
    said = [token for token in range(tokenizer.vocab_size) if token not in tokenizer.unsayable_ids]
    expected = theirs[..., [back.get(token, token) for token in said]]
    torch.testing.assert_close(ours[..., said], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_model_file_keeps_vocabulary_format_and_logits(tmp_path: Path) -> None:
    base_model(tmp_path / "base", tokenizer_json(LLAMA3))
    bundle = open_policy(str(tmp_path / "base"), None, 64, None, None)
    save_bundle(tmp_path / "own.pt", bundle)
    again = load_policy(tmp_path / "own.pt")
    assert again.tokenizer.state() == bundle.tokenizer.state()
    assert again.tokenizer.fingerprint == bundle.tokenizer.fingerprint
    ids = torch.tensor([again.tokenizer.encode("the fox")])
    mask = torch.ones_like(ids, dtype=torch.bool)
    bundle.model.eval()
    assert torch.equal(again.model.logits(again.model(ids, mask)), bundle.model.logits(bundle.model(ids, mask)))


@torch.no_grad()
def test_a_head_with_a_bias_keeps_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    raw = tokenizer_json(LLAMA3)
    whole = PhiForCausalLM(PhiConfig(**SHAPE, vocab_size=450, max_position_embeddings=64, pad_token_id=None)).eval()
    whole.lm_head.bias.normal_()
    whole.save_pretrained(tmp_path)
    tokenizer_folder(tmp_path, raw)
    bundle = open_policy(str(tmp_path), None, 64, None, None)
    ids = torch.tensor([bundle.tokenizer.encode(CORPUS[0])[:20]])
    ours = bundle.model.eval().logits(bundle.model(ids, torch.ones_like(ids, dtype=torch.bool)))
    torch.testing.assert_close(ours[..., :400], whole(ids).logits[..., :400], atol=1e-5, rtol=0)
    save_bundle(tmp_path / "own.pt", bundle)
    again = load_policy(tmp_path / "own.pt").model
    assert torch.equal(again.logits(again(ids, torch.ones_like(ids, dtype=torch.bool))), ours)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
@torch.no_grad()
def test_scale_and_soft_cap_of_logits_are_those_of_the_family(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    more: dict[str, Any] = {
        "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 4.0},
    }[family]
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        family,
        **SHAPE,
        num_key_value_heads=2,
        vocab_size=450,
        max_position_embeddings=64,
        initializer_range=0.3,
        **ids,
        **more,
    )
    whole = AutoModelForCausalLM.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    tokenizer_folder(tmp_path, tokenizer_json(LLAMA3))
    bundle = open_policy(str(tmp_path), None, 64, None, None)
    tokens = torch.tensor([bundle.tokenizer.encode(CORPUS[0])[:20]])
    ours = bundle.model.eval().logits(bundle.model(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    torch.testing.assert_close(ours[..., :400], whole(tokens).logits[..., :400], atol=1e-4, rtol=0)


def test_another_vocabulary_is_matched_by_bytes_pieces_and_roles(tmp_path: Path) -> None:
    raw = tokenizer_json(LLAMA3)
    base_model(tmp_path, raw)
    vocabulary = raw["model"]["vocab"]
    tokenizer = ChatTokenizer("rlchat_1k")
    plan = plan_rows(str(tmp_path), tokenizer)
    assert plan is not None
    assert len(plan.sources) == tokenizer.vocab_size
    names = {number: name for name, number in vocabulary.items()}
    known = {from_byte_letters(name) for name in vocabulary}
    letters = [tokenizer.encode(letter)[0] for letter in "ax!"]
    assert [plan.sources[token] for token in letters] == [(vocabulary[letter],) for letter in "ax!"]
    several = {token: source for token, source in enumerate(plan.sources[:-5]) if len(source) > 1}
    assert len(several) == plan.composed > 100
    for token, source in several.items():
        text = tokenizer.token_bytes(token)
        assert b"".join(from_byte_letters(names[piece]) for piece in source) == text
        assert text not in known
    start, end, nothing = (raw["added_tokens"][n]["id"] for n in (1, 2, 0))
    pad, system, user, assistant, ends = plan.sources[-5:]
    assert (ends, pad) == ((end,), (end,))
    assert user == (start, *ids_of(raw, "user\n"))
    assert assistant == (start, *ids_of(raw, "assistant\n"))
    assert system == (start, *ids_of(raw, "system\n"))
    assert (plan.copied, plan.by_role) == (sum(len(s) == 1 for s in plan.sources[:-5]), 5)
    assert plan.copied + plan.composed == tokenizer.base_size
    assert nothing not in {token for source in plan.sources for token in source}


def ids_of(raw: dict[str, Any], text: str) -> list[int]:
    from helpers.hf_tokenizers import reference

    return list(reference(raw).encode(text).ids)


@pytest.mark.parametrize("match_norm", [True, False])
def test_rows_from_pieces_are_their_mean_or_have_their_norm(match_norm: bool) -> None:
    old = torch.tensor([[3.0, 0.0], [0.0, 5.0], [1.0, 1.0]])
    new = rows_from(old, [(2,), (0, 1), AVERAGE], 1.0, match_norm)
    assert torch.equal(new[0], old[2])
    # The mean of (3, 0) and (0, 5) is (1.5, 2.5), of norm 2.915; the norms of the two have the mean 4.
    factor = 4 / 2.9154759 if match_norm else 1.0
    torch.testing.assert_close(new[1], torch.tensor([1.5, 2.5]) * factor)
    torch.testing.assert_close(new[2], torch.tensor([4 / 3, 2.0]))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_only_an_input_embedding_is_scaled(tmp_path: Path, tied: bool) -> None:
    whole = base_model(tmp_path, tokenizer_json(LLAMA3), tie_word_embeddings=tied)
    plan = plan_rows(str(tmp_path), ChatTokenizer("rlchat_1k"))
    assert plan is not None
    row, pieces = next((row, list(pieces)) for row, pieces in enumerate(plan.sources) if len(pieces) == 2)
    backbone = open_policy(str(tmp_path), "rlchat_1k", 64, None, None).model.backbone
    inputs, outputs = (layer.weight[pieces] for layer in (whole.get_input_embeddings(), whole.get_output_embeddings()))
    torch.testing.assert_close(backbone.head_weight[row], outputs.sum(0) / 2)
    embedded = backbone.transformer.get_input_embeddings().weight[row]
    if tied:
        assert torch.equal(embedded, backbone.head_weight[row])
    else:
        torch.testing.assert_close(embedded.norm(), inputs.norm(dim=1).mean())


def test_padding_and_truncation_in_tokenizer_files_have_no_effect(tmp_path: Path) -> None:
    raw = tokenizer_json(LLAMA3)
    base_model(tmp_path, raw)
    without = plan_rows(str(tmp_path), ChatTokenizer("rlchat_1k"))
    fixed = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None}
    raw["padding"] = {**fixed, "pad_id": 400, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    raw["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    tokenizer_folder(tmp_path, raw)
    assert plan_rows(str(tmp_path), ChatTokenizer("rlchat_1k")) == without
    assert open_tokenizer(str(tmp_path), None).has_own_format


def test_wordpiece_is_transplanted(tmp_path: Path) -> None:
    raw = tokenizer_json(LLAMA3)
    vocabulary = ["[PAD]", "[UNK]", "[SEP]", "the", "##s", "a", "##he", "t", "bad"]
    raw.update(
        added_tokens=[
            {**raw["added_tokens"][0], "content": name, "id": number} for number, name in enumerate(vocabulary[:3])
        ],
        normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder=None,
        model={
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {name: number for number, name in enumerate(vocabulary)},
        },
    )
    base_model(tmp_path, raw, None, rows=9)
    tokenizer = ChatTokenizer("rlchat_1k")
    plan = plan_rows(str(tmp_path), tokenizer)
    assert plan is not None
    (the,), (s,), (a,) = (tokenizer.encode(text) for text in (" the", "s", " a"))
    assert [plan.sources[token] for token in (the, s, a)] == [(3,), (4,), (5,)]
    assert plan.sources[tokenizer.encode("\n")[0]] == AVERAGE
    assert (plan.sources[tokenizer.end_id], plan.sources[tokenizer.pad_id]) == ((2,), (0,))
    with pytest.raises(UserError, match="a WordPiece model; only byte-level BPE"):
        open_tokenizer(str(tmp_path), None)


def test_embeddings_start_anew_only_on_request(tmp_path: Path) -> None:
    model = base_model(tmp_path, tokenizer_json(LLAMA3))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / file).unlink()
    for encoding in ("rlchat_1k", None):
        with pytest.raises(UserError, match=r"has no tokenizer files.*set --model.new_embeddings true"):
            open_policy(str(tmp_path), encoding, 64, None, None)
    policy = open_policy(str(tmp_path), "rlchat_1k", 64, None, None, new_embeddings=True).model
    old, new = model.get_input_embeddings().weight, policy.backbone.transformer.get_input_embeddings().weight
    assert isinstance(old, torch.Tensor)
    assert isinstance(new, torch.Tensor)
    assert not torch.equal(old[:100], new[:100])
    assert plan_rows({"model_type": "llama"}, ChatTokenizer("rlchat_1k")) is None


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    base_model(tmp_path, tokenizer_json(LLAMA3), rows=300)
    with pytest.raises(UserError, match="has ids up to 402, but its embedding has 300 rows"):
        open_policy(str(tmp_path), None, 64, None, None)


def test_a_special_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    """Although the number of tokens fits: the ids have a gap."""
    raw = tokenizer_json(LLAMA3)
    raw["added_tokens"][-1]["id"] = 500
    base_model(tmp_path, raw, None, rows=420)
    for encoding in (None, "rlchat_1k"):
        with pytest.raises(UserError, match="has ids up to 500, but its embedding has 420 rows"):
            open_policy(str(tmp_path), encoding, 64, None, None)


def test_damaged_tokenizer_files_are_named(tmp_path: Path) -> None:
    base_model(tmp_path, tokenizer_json(LLAMA3))
    (tmp_path / "tokenizer.json").write_text("not JSON")
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read"):
        open_policy(str(tmp_path), None, 64, None, None)


def test_weights_that_lack_a_tensor_or_have_another_shape_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base_model(tmp_path, tokenizer_json(LLAMA3))
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    without = {key: value for key, value in state.items() if key != name}
    shapes = re.escape(
        f"its weight {name} has shape (3, 16), but its config.json describes {tuple(state[name].shape)}; "
    )
    for changed, message in ((without, f"lack {name} of a llama model"), ({**state, name: torch.zeros(3, 16)}, shapes)):
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=message):
            open_policy(str(tmp_path), None, 64, None, None)


def test_the_chat_format_can_be_chosen(tmp_path: Path) -> None:
    base_model(tmp_path, tokenizer_json(LLAMA3))
    assert open_tokenizer(str(tmp_path), None, "rlchat").format.name == "rlchat"
    assert open_tokenizer(str(tmp_path), "rlchat_1k").format.name == "rlchat"
    with pytest.raises(UserError, match="invalid value 'own' for chat_format"):
        open_tokenizer(str(tmp_path), "rlchat_1k", "own")
    assert open_tokenizer({"model_type": "llama"}, "rlchat_1k").name == "rlchat_1k"


def test_an_attention_implementation_that_does_not_exist(tmp_path: Path) -> None:
    base_model(tmp_path, tokenizer_json(LLAMA3))
    policy = open_policy(str(tmp_path), None, 64, None, None, attn_implementation="eager")
    assert policy.model.backbone.transformer.config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"transformers cannot load it: .*fast"):
        open_policy(str(tmp_path), None, 64, None, None, attn_implementation="fast")
    with pytest.raises(UserError, match="invalid value 'fast' for attn_implementation: llama cannot run with it"):
        policy.model.backbone.set_attention("fast")


@pytest.mark.parametrize(("name", "kept"), [("gpt2", True), ("cl100k_base", False)])
def test_gpt2_without_tokenizer_files_is_kept_under_its_own_encoding_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, kept: bool
) -> None:
    ranks = {**{bytes([i]): i for i in range(256)}, **{b"token%d" % i: i for i in range(256, 50257)}}
    encoding = tiktoken.Encoding(name, pat_str=".", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: encoding)
    GPT2Config(vocab_size=50257).save_pretrained(tmp_path / "model")
    if kept:
        plan = plan_rows(str(tmp_path / "model"), ChatTokenizer(name))
        assert plan is not None
        assert plan.sources[:3] == ((0,), (1,), (2,))
        assert plan.copied == 50257
        assert "kept as those of GPT-2" in caplog.text
    else:
        with pytest.raises(UserError, match="has no tokenizer files"):
            plan_rows(str(tmp_path / "model"), ChatTokenizer(name))


def test_an_old_layout_of_files_is_read(tmp_path: Path) -> None:
    """GPT-2's own: vocab.json and merges.txt."""
    raw = tokenizer_json(None)
    GPT2Config(vocab_size=450).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(raw["model"]["vocab"] | {"<|endoftext|>": 400}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in raw["model"]["merges"])]))
    plan = plan_rows(str(tmp_path), ChatTokenizer("rlchat_1k"))
    assert plan is not None
    (a,) = ChatTokenizer("rlchat_1k").encode("a")
    assert plan.sources[a] == (raw["model"]["vocab"]["a"],)
