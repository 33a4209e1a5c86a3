"""Trains both sides on the same responses in the same minibatches: the final weights must be equal.

    .venv-trl/bin/python benchmarks/against_trl/same_replies.py

TRL trains first; rlchat's PPOModule then uses TRL's responses and permutations instead of its own. Two small
differences are removed, so that only rounding remains: TRL's whitening uses the biased variance as rlchat's
does, and rlchat's value head keeps a bias of zero, because TRL's has no bias. The exit code is 1 if the weights differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rlchat_side
import torch
import trl_side
from common import SIZES, Hyperparameters, initial_model, make_prompts
from torch import Tensor, nn
from trl.experimental.ppo import ppo_trainer

from rlchat.models.sampling import Generated

TOLERANCE = 1e-4  # of the distance that the weights moved
# A sixth of the benchmark's learning rate, at which Adam amplifies rounding to 3e-2 of the distance in some runs.
LEARNING_RATE = 1e-3


class Listener:
    """Used in place of a record: keeps TRL's responses and permutations."""

    def __init__(self) -> None:
        self.replies: list[Tensor] = []
        self.shuffles: list[Tensor] = []
        self.logged: list[tuple[float, float]] = []
        self.batch_generation = ppo_trainer.batch_generation
        self.permutation = np.random.permutation

    def start(self) -> None:
        """Marks the start of training: from here on, all permutations belong to updates."""
        ppo_trainer.batch_generation = self.generate
        np.random.permutation = self.permute
        ppo_trainer.masked_var = partial(ppo_trainer.masked_var, unbiased=False)

    def generate(self, model: nn.Module, queries: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        ids, logits = self.batch_generation(model, queries, *args)
        self.replies.append(ids[:, queries.shape[1] :].clone())
        return ids, logits

    def permute(self, count: int) -> np.ndarray:
        shuffled = self.permutation(count)
        self.shuffles.append(torch.from_numpy(shuffled))
        return shuffled

    def add(self, episodes: int, reward: float, kl: float) -> None:
        self.logged.append((reward, kl))


class Follower(rlchat_side.IdPPO):
    """Uses TRL's responses instead of sampling, and trains on them in the same order."""

    def __init__(self, listener: Listener, **options: Any) -> None:
        super().__init__(**options)
        self.listener = listener
        self.logged: list[tuple[float, float]] = []
        assert self.critic is not None
        self.critic.value_head.bias.requires_grad_(False)

    def generate(self, *_: Any) -> Generated:
        said = self.listener.replies[self.iterations]
        everywhere = torch.ones_like(said, dtype=torch.bool)
        return Generated(said, everywhere, ended=~everywhere[:, 0], logprobs=torch.zeros(said.shape))

    def minibatches(self, rows: int, epoch: int) -> list[list[Tensor]]:
        order = self.listener.shuffles[self.iterations * self.options.ppo_epochs + epoch]
        return [[part] for part in order.tensor_split(self.options.minibatches)]

    def on_train_batch_end(self, *_: Any) -> None:
        metrics = self.trainer.callback_metrics
        self.logged.append((float(metrics["train/reward"]), float(metrics["train/kl"])))


def distance(a: nn.Module, b: nn.Module) -> float:
    """The Euclidean distance over all weights."""
    other = b.state_dict()
    return sum(float(((weight - other[name]) ** 2).sum()) for name, weight in a.state_dict().items()) ** 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="T")
    parser.add_argument("--iterations", type=int, default=3)
    options = parser.parse_args()
    size, seed = SIZES[options.size], 0
    h = Hyperparameters(LEARNING_RATE, iterations=options.iterations)
    initial = initial_model(size, seed)
    prompts = make_prompts(size, seed, h.iterations * h.batch_size)
    listener = Listener()
    trainer = trl_side.make_trainer(listener, h, size, seed, initial, prompts)
    trainer.train()
    with tempfile.TemporaryDirectory() as folder:
        module = Follower(listener, **rlchat_side.options_of(h, size, seed, "separate", initial, Path(folder)))
    rlchat_side.fit(module, rlchat_side.make_batches(prompts, size, h.batch_size))
    for theirs, ours in zip(listener.logged, module.logged, strict=True):
        print(f"reward TRL {theirs[0]:.6f} rlchat {ours[0]:.6f}", end="  ")
        print(f"KL TRL {theirs[1]:.6f} rlchat {ours[1]:.6f}")
    assert module.critic is not None
    pairs = {
        "policy": (trainer.policy_model.transformer, module.model.backbone.transformer),
        "critic": (trainer.value_model.transformer, module.critic.backbone.transformer),
    }
    alike = True
    for name, (theirs, ours) in pairs.items():
        moved, apart = distance(theirs, initial.transformer), distance(theirs, ours)
        print(f"{name}: moved {moved:.4f}, the two sides are {apart:.2g} apart ({apart / moved:.1g} of it)")
        alike &= apart < TOLERANCE * moved
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
