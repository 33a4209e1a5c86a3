"""Encoders with a WordPiece vocabulary as base models: rows under another encoding, causality, the cache."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from helpers.hf_tokenizers import wordpiece_json
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, PreTrainedModel

from rlchat.conversation import Conversation, Message
from rlchat.models.model_file import PolicyBundle
from rlchat.models.sampling import Sampling, generate, generator_uniforms
from rlchat.models.vocabulary import AVERAGE, plan_rows
from rlchat.training.initial_model import open_policy

LETTERS = tuple(string.ascii_lowercase)
WORDS = (*LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "##ing", "where", "dog", "live", "##,", ",", "user")
IDS = wordpiece_json(WORDS)["model"]["vocab"]


def encoder(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {"vocab_size": len(IDS), "max_position_embeddings": 64, "initializer_range": 0.3}
    if family == "distilbert":
        return DistilBertModel(DistilBertConfig(dim=16, hidden_dim=32, n_layers=2, n_heads=2, **common))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(**shape, **common))


@pytest.fixture(params=["distilbert", "bert"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, PolicyBundle, Path]:
    """An encoder, and the chat model of its folder, which has the layout of bert-base-uncased: vocab.txt alone."""
    model = encoder(request.param)
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(IDS))
    bundle = open_policy(str(tmp_path), "rlchat_1k", 64, None, None)
    bundle.model.eval()
    return model, bundle, tmp_path


@torch.no_grad()
def test_rows_come_from_the_words_and_their_continuations(
    opened: tuple[PreTrainedModel, PolicyBundle, Path],
) -> None:
    model, bundle, folder = opened
    plan = plan_rows(str(folder), bundle.tokenizer)
    assert plan is not None
    old, new = model.get_input_embeddings().weight, bundle.model.backbone.head_weight
    for text, pieces in {
        " the": ["the"],
        "The": ["the"],
        "ing": ["##ing"],
        ",": [","],
        " dog": ["dog"],
        "er": ["##e", "##r"],
        " is": ["i", "##s"],
    }.items():
        (token,) = bundle.tokenizer.encode(text)
        assert plan.sources[token] == tuple(IDS[piece] for piece in pieces), text
        mean = torch.stack([old[IDS[piece]] for piece in pieces]).mean(0)
        torch.testing.assert_close(new[token], mean)
    (line_break,) = bundle.tokenizer.encode("\n")
    assert plan.sources[line_break] == AVERAGE
    tokenizer = bundle.tokenizer
    assert (plan.sources[tokenizer.end_id], plan.sources[tokenizer.pad_id]) == ((IDS["[SEP]"],), (IDS["[PAD]"],))
    assert IDS["##,"] not in {row for source in plan.sources for row in source}


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logits(opened: tuple[PreTrainedModel, PolicyBundle, Path]) -> None:
    model, tokenizer = opened[1].model, opened[1].tokenizer
    ids = torch.tensor([tokenizer.encode("Where does the dog live, and what does it eat? The dog lives here.")])
    (comma,) = tokenizer.encode(",")
    mask = torch.ones_like(ids, dtype=torch.bool)
    before = model.logits(model(ids, mask))
    for changed in (1, 10, ids.shape[1] - 1):
        other = ids.clone()
        assert other[0, changed] != comma
        other[0, changed] = comma
        after = model.logits(model(other, mask))
        torch.testing.assert_close(after[:, :changed], before[:, :changed], atol=1e-5, rtol=0)
        assert (after[:, changed] - before[:, changed]).abs().max() > 1e-2


@torch.no_grad()
def test_greedy_generation_with_the_cache_equals_full_forward_passes(
    opened: tuple[PreTrainedModel, PolicyBundle, Path],
) -> None:
    model, tokenizer = opened[1].model, opened[1].tokenizer
    rows = [
        tokenizer.render_prompt(Conversation((Message("user", text),))).ids for text in ("Where does a dog live?", "Hi")
    ]
    for prompt in rows:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids, dtype=torch.bool)
        more = {"end_id": tokenizer.end_id, "pad_id": tokenizer.pad_id}
        uniforms = generator_uniforms(torch.Generator(), 1)
        generated = generate(model, ids, mask, Sampling(12, 0.0), uniforms, **more).ids[0].tolist()
        full = list(prompt)
        for _ in generated:
            seen = torch.tensor([full])
            logits = model.logits(model(seen, torch.ones_like(seen, dtype=torch.bool)))[0, -1]
            logits[list(tokenizer.unsayable_ids)] = -torch.inf
            full.append(int(logits.argmax()))
        assert generated == full[len(prompt) :]
        assert len(generated) == 12 or generated[-1] == tokenizer.end_id
