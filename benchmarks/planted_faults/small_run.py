"""A small PPO run: GPT-2 of two layers, which first learns to answer, and then to use the letter e."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from rlchat.callbacks.alarms import Alarms
from rlchat.conversation import Conversation, Message
from rlchat.data.datamodule import PromptBatch
from rlchat.models.model_file import PolicyBundle, save_bundle
from rlchat.ppo.module import PPOModule
from rlchat.rewards import Reply, ReplyFactor, Reward
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.training.initial_model import open_policy
from rlchat.utils.padding import pad

# Learned positions, since relative ones hide wrong positions; with dropout, which PPO has to switch off.
BASE = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
ENCODING, MAX_LENGTH, NEW_TOKENS, PROMPTS = "rlchat_1k", 64, 12, 16
WORDS = ["the", "a", "green", "little", "tree", "sees", "knows", "three", "people", "never"]
WORDS += ["here", "where", "we", "stone", "bird", "sun", "and", "who", "is", "old"]

OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW_TOKENS,
    "temperature": 0.9,
    "learning_rate": 5e-4,
    "schedule": "constant",
    "ppo_epochs": 2,
    "minibatches": 2,
    "entropy_coef": 0.01,
    "kl_coef": 0.2,
    "kl_target": 3.0,
    "clip_eps": 0.1,
}
"""The options of a run, if a fault does not need others."""

VARIANTS: dict[str, dict[str, Any]] = {
    "as the faults": {},
    "separate critic": {"critic": "separate", "learning_rate": 2e-4, "whiten_rewards": True},
    "rloo": {"advantage": "rloo", "group_size": 2},
    "grpo, KL in the loss": {"advantage": "grpo", "group_size": 2, "kl_in": "loss", "kl_target": None},
    "dual clip, k3": {"dual_clip": 3.0, "clip_eps_high": 0.28, "kl_kind": "k3", "kl_target": None, "gamma": 0.99},
}
"""The options in which healthy runs differ from OPTIONS."""


class LetterE(ReplyFactor):
    """The fraction of the letter e in the response, times 4."""

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return 4 * reply.text.count("e") / max(len(reply.text), 1)


def sentence(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


class Prompts(IterableDataset[PromptBatch]):
    """Endless batches of different prompts."""

    def __init__(self, tokenizer: ChatTokenizer, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed

    def __iter__(self) -> Iterator[PromptBatch]:
        rng = random.Random(self.seed)
        while True:
            chats = tuple(Conversation((Message("user", sentence(rng, 8)),)) for _ in range(PROMPTS))
            rows = [self.tokenizer.render_prompt(chat, MAX_LENGTH - NEW_TOKENS).ids for chat in chats]
            ids, mask = pad(rows, self.tokenizer.pad_id, "left")
            yield PromptBatch(ids, mask, chats, None)


def write_start(path: Path, steps: int = 60) -> None:
    """Trains a policy to answer with a few words, and writes its model file to ``path``."""
    torch.manual_seed(0)
    bundle: PolicyBundle = open_policy(BASE, ENCODING, MAX_LENGTH, 0, None)
    model, tokenizer, rng = bundle.model, bundle.tokenizer, random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        chats = [
            Conversation((Message("user", sentence(rng, 8)), Message("assistant", sentence(rng, 5)))) for _ in range(32)
        ]
        rendered = [tokenizer.render(chat, MAX_LENGTH) for chat in chats]
        ids, mask = pad([r.ids for r in rendered], tokenizer.pad_id, "right")
        targets = pad([r.loss_mask for r in rendered], False, "right")[0].bool()[:, 1:]
        stats = model.token_stats(model(ids, mask)[:, :-1][targets], ids[:, 1:][targets])
        optimizer.zero_grad()
        (-stats.logprobs.mean()).backward()
        optimizer.step()
    save_bundle(path, bundle)


def make_module(start: Path, seed: int, **options: Any) -> PPOModule:
    """A PPO module that starts from the model file ``start``."""
    return PPOModule(init_from=str(start), reward=Reward([LetterE()]), seed=seed, **{**OPTIONS, **options})


class UntilNoticed(L.Callback):
    """Ends the run after the first iteration that raises an alarm."""

    def __init__(self, alarms: Alarms) -> None:
        self.alarms = alarms

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = bool(self.alarms.raised)


def run(module: PPOModule, seed: int, iterations: int) -> tuple[list[str], int]:
    """Trains until an alarm is raised: the names of the alarms, and the number of iterations."""
    L.seed_everything(seed, verbose=False)
    alarms = Alarms()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=iterations,
        callbacks=[alarms, UntilNoticed(alarms)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(Prompts(module.tokenizer, seed), batch_size=None))
    return alarms.raised, module.iterations
