"""The setup that rlchat and TRL share: initial model, prompts, reward and hyperparameters.

The reward of a response is the fraction of its tokens that are in the first eighth of the vocabulary. Prompts are
random tokens, and all responses of a size have the same length, so that a curve only shows how well the policy is
optimized.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

SHORTEST_PROMPT, LONGEST_PROMPT = 8, 32
SPECIALS = 5  # rlchat's markers are the last ids of the vocabulary: the first is padding, the last the end of a turn


class Size(NamedTuple):
    """The shape of a model, a learning rate with which it learns in 40 iterations, and the tokens of a response."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    learning_rate: float
    response: int = 16
    key_heads: int | None = None  # None is a GPT-2; otherwise a Llama with that many key heads
    intermediate: int | None = None

    @property
    def sayable(self) -> int:
        """Prompts contain only ids below this one, and only these can be sampled."""
        return self.vocabulary - SPECIALS

    @property
    def pad_id(self) -> int:
        return self.sayable

    @property
    def end_id(self) -> int:
        return self.vocabulary - 1


SIZES = {"T": Size(512, 2, 64, 2, 6e-3), "S": Size(8192, 4, 128, 4, 3e-3)}
# For `benchmarks.ppo`, which measures time and memory of a few iterations.
SIZES |= {"S64": SIZES["S"]._replace(response=64), "M64": Size(50257, 6, 384, 6, 1e-4, 64)}
# For `benchmarks.gpu`: GPT-2 124M, and a Llama with the shape of Qwen2.5-0.5B.
SIZES |= {"G": Size(50257, 12, 768, 12, 1e-5, 128), "L": Size(151936, 24, 896, 14, 1e-5, 128, 2, 4864)}


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of both sides, under rlchat's names."""

    learning_rate: float
    iterations: int = 40
    batch_size: int = 64
    schedule: str = "linear"
    adam_beta2: float = 0.95
    adam_eps: float = 1e-5
    ppo_epochs: int = 4
    minibatches: int = 4
    clip_eps: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    kl_coef: float = 0.002
    gamma: float = 1.0
    lam: float = 0.95
    temperature: float = 1.0


def model_config(size: Size) -> PretrainedConfig:
    """The configuration, without dropout, so that the sampled and the trained distribution are the same."""
    if size.key_heads is not None:
        return LlamaConfig(
            vocab_size=size.vocabulary,
            max_position_embeddings=LONGEST_PROMPT + size.response,
            num_hidden_layers=size.layers,
            hidden_size=size.width,
            intermediate_size=size.intermediate,
            num_attention_heads=size.heads,
            num_key_value_heads=size.key_heads,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    return GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=LONGEST_PROMPT + size.response,
        n_layer=size.layers,
        n_embd=size.width,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )


def initial_model(size: Size, seed: int) -> PreTrainedModel:
    """Random weights, the same for a seed with equal versions of torch and transformers."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(model_config(size))


def make_prompts(size: Size, seed: int, count: int) -> list[list[int]]:
    """``count`` rows of random ids, in the order in which both sides use them."""
    rng = random.Random(seed)
    return [
        [rng.randrange(size.sayable) for _ in range(rng.randint(SHORTEST_PROMPT, LONGEST_PROMPT))] for _ in range(count)
    ]


def reward(reply: Sequence[int], size: Size) -> float:
    """The fraction of the ids of ``reply`` in the first eighth of the vocabulary: 0..1, about 1/8 for random ids."""
    return sum(token < size.vocabulary // 8 for token in reply) / len(reply)


def digest(model: PreTrainedModel, prompts: list[list[int]]) -> str:
    """A hash of initial weights and prompts; runs with the same hash can be compared."""
    sha = hashlib.sha256(repr(prompts).encode())
    for name, weight in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(weight.contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def peak_mb() -> int:
    """The peak of the memory that PyTorch has used on the GPU, or of the process if it has not used one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Record:
    """The curve of a run, written after each iteration, so that an interrupted run leaves a partial curve."""

    def __init__(self, path: Path, **about: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = {**about, "curve": []}
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Starts both clocks, and limits PyTorch to one thread so that CPU seconds measure work."""
        torch.set_num_threads(1)
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def add(self, episodes: int, reward: float, kl: float, **more: float) -> None:
        """Adds an iteration; ``reward`` is the mean over the sampled responses, before the update."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        row = {
            "episodes": episodes,
            "reward": round(reward, 5),
            "kl": round(kl, 4),
            "cpu_s": round(time.process_time() - self.cpu, 2),
            "wall_s": round(time.perf_counter() - self.wall, 2),
            "peak_mb": peak_mb(),
            **more,
        }
        self.content["curve"].append(row)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1))
        unfinished.replace(self.path)
        print(self.path.stem, *(f"{name} {value}" for name, value in row.items()), flush=True)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The command-line options of both sides."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights, the prompts and the sampling")
    parser.add_argument("--gpu", action="store_true", help="run on a GPU, in bfloat16 mixed precision")
    parser.add_argument("--out", type=Path, required=True, help="output file for the curve")
    parser.add_argument(
        "--set", nargs="*", type=_setting, default=[], metavar="NAME=VALUE", help="hyperparameters for this run only"
    )
    return parser


def _setting(text: str) -> tuple[str, Any]:
    name, value = text.split("=", 1)
    return name, json.loads(value)
