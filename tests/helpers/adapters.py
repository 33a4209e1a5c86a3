"""A small pretrained base model, and modules whose adapters have random values, as after a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.hf_tokenizers import tokenizer_folder, tokenizer_json
from rlchat.models.model_file import PolicyBundle, RewardBundle, save_bundle
from rlchat.ppo.module import PPOModule
from rlchat.training.base import StageModule
from rlchat.training.reward_model import RewardModelModule

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LORA: dict[str, Any] = {"adapter": "lora", "lora_rank": 2, "lora_alpha": 6.0, "merge_adapter": False}
IDS = torch.tensor([[5, 6, 7, 8, 90], [9, 10, 11, 12, 13]])
MASK = torch.ones(2, 5, dtype=torch.bool)


def base_folder(folder: Path, seed: int = 0, **shape: Any) -> str:
    """A Llama with random weights and its own tokenizer."""
    torch.manual_seed(seed)
    options = {**SHAPE, "vocab_size": 450, "max_position_embeddings": 512, "initializer_range": 0.3, **shape}
    LlamaForCausalLM(LlamaConfig(**options)).save_pretrained(folder)
    tokenizer_folder(folder, tokenizer_json())
    return str(folder)


def scrambled(module: StageModule, seed: int = 0) -> None:
    """Fills everything that is not frozen with random values, and mean and standard deviation of a reward model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    if isinstance(module, RewardModelModule):
        module.model.mean.fill_(0.3)
        module.model.std.fill_(2.0)


def ppo_with_adapter(**options: Any) -> PPOModule:
    module = PPOModule(**{"max_new_tokens": 8, **LORA, **options})
    scrambled(module)
    return module


def reward_with_adapter(**options: Any) -> RewardModelModule:
    module = RewardModelModule(**{**LORA, **options})
    scrambled(module, seed=1)
    return module


def save(module: PPOModule | RewardModelModule, path: Path, merge_adapter: bool = False) -> Path:
    """The model file of ``module``, which needs no Trainer."""
    bundle: PolicyBundle | RewardBundle
    if isinstance(module, PPOModule):
        bundle = PolicyBundle(module.model, module.tokenizer, module.max_length, critic=module.critic, base=module.base)
    else:
        bundle = RewardBundle(module.model, module.tokenizer, module.max_length, base=module.base)
    save_bundle(path, bundle, merge_adapter)
    return path


@torch.no_grad()
def outputs(bundle: PolicyBundle | RewardBundle) -> list[Tensor]:
    """Logits, values and the critic's values, or scores, for fixed ids."""
    if isinstance(bundle, RewardBundle):
        return [bundle.model.standardised(bundle.model(IDS, MASK))]
    hidden = bundle.model(IDS, MASK)
    critic = [] if bundle.critic is None else [bundle.critic(IDS, MASK)]
    return [bundle.model.logits(hidden), bundle.model.values(hidden), *critic]
