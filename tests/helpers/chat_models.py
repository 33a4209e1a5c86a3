"""Small policies for tests: one with random weights, and one with a scripted response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rlchat.conversation import Conversation
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle, new_policy
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


def random_policy(tokenizer: ChatTokenizer, max_length: int = 64, seed: int = 0, hidden_dim: int = 0) -> PolicyBundle:
    """An untrained model, with weights large enough for its tokens to depend on the whole context."""
    torch.manual_seed(seed)
    shape = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    backbone = Backbone(shape, tokenizer.vocab_size, max_length)
    with torch.no_grad():
        for weight in backbone.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)
    return PolicyBundle(new_policy(backbone, tokenizer, hidden_dim), tokenizer, max_length)


def scripted_policy(tokenizer: ChatTokenizer, follows: Mapping[int, int], max_length: int = 64) -> PolicyBundle:
    """A model that generates ``follows[token]`` after ``token``, and the end marker after any other token.

    Its layers add nothing, each token of ``follows`` is embedded in a separate dimension, and the head reads it.
    """
    width = 2 * (len(follows) // 2 + 1)
    shape = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 2,
    }
    backbone = Backbone(shape, tokenizer.vocab_size, max_length)
    with torch.no_grad():
        embedding = backbone.transformer.get_input_embeddings().weight
        embedding.zero_()
        embedding[:, 0] = 1
        backbone.head_weight.zero_()
        backbone.head_weight[tokenizer.end_id, 0] = 100
        for dimension, (token, following) in enumerate(follows.items(), 1):
            embedding[token] = torch.nn.functional.one_hot(torch.tensor(dimension), width).float()
            backbone.head_weight[following, dimension] = 100
        for layer in backbone.transformer.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return PolicyBundle(new_policy(backbone, tokenizer), tokenizer, max_length)


def chain(tokenizer: ChatTokenizer, reply: Sequence[int], endless: bool = False) -> dict[int, int]:
    """For :func:`scripted_policy`: the tokens of ``reply`` in order, once or endlessly."""
    assert len(set(reply)) == len(reply), "each token determines the next one, so none may occur twice"
    (opening,) = tokenizer.render_prompt(Conversation(())).ids
    follows = dict(zip([opening, *reply], reply, strict=False))
    return {**follows, reply[-1]: reply[0]} if endless else follows
