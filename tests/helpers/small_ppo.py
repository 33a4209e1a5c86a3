"""A tiny PPO for tests: models of two layers over single bytes, questions, and a fast fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rlchat.conversation import Conversation, Message
from rlchat.data.datamodule import PromptBatch, SequenceBatch
from rlchat.ppo.module import Iteration, PPOModule
from rlchat.ppo.rollouts import Rollout
from rlchat.rewards import Reply, ReplyFactor, Reward
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.padding import pad

_DECODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_ENCODER = {**_DECODER, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
# A small model of each family, with dropout everywhere.
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {**_DECODER, "attention_dropout": 0.3},
    "qwen3": {**_DECODER, "head_dim": 8, "attention_dropout": 0.3},
    "mistral": {**_DECODER, "attention_dropout": 0.3},
    "gpt_neox": {**_DECODER, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "dropout": 0.3, "attention_dropout": 0.3},
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "electra": {**_ENCODER, "embedding_size": 16},
}
# Where the number of optimizer steps does not matter: one per iteration.
ONE_STEP: dict[str, Any] = {"minibatches": 1, "ppo_epochs": 1}
QUESTIONS = ("Hi", "What is your name?", "x", "Who are you", "Tell me a story.", "", "Why", "Say e")


class LetterE(ReplyFactor):
    """The fraction of the letter e in the response."""

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return reply.text.count("e") / max(len(reply.text), 1)


class Letters(ReplyFactor):
    """The fraction of ASCII letters in the response: an untrained model generates some."""

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return sum(c.isascii() and c.isalpha() for c in reply.text) / 8


def ppo(encoding: str, family: str = "llama", **options: Any) -> PPOModule:
    torch.manual_seed(0)
    reward = options.pop("reward", None) or Reward([Letters()])
    return PPOModule(
        base_model={"model_type": family, **BACKBONES[family]},
        tiktoken_encoding=encoding,
        max_length=48,
        reward=reward,
        **{"max_new_tokens": 8, "learning_rate": 1e-2, "schedule": "constant", **options},
    )


def prompts(tokenizer: ChatTokenizer, questions: Sequence[str] = QUESTIONS, mixed: bool = False) -> PromptBatch:
    conversations = tuple(Conversation((Message("user", text),)) for text in questions)
    ids, mask = pad([tokenizer.render_prompt(c).ids for c in conversations], tokenizer.pad_id, "left")
    return PromptBatch(ids, mask, conversations, sequences(tokenizer) if mixed else None)


THREADS = (("Hi", "Hello."), ("Who are you", "A machine"), ("x", "y"))


def sequences(tokenizer: ChatTokenizer, talk: Sequence[tuple[str, str]] = THREADS) -> SequenceBatch:
    rendered = [tokenizer.render(Conversation((Message("user", q), Message("assistant", a)))) for q, a in talk]
    ids, mask = pad([r.ids for r in rendered], tokenizer.pad_id, "right")
    loss_mask, _ = pad([r.loss_mask for r in rendered], False, "right")
    return SequenceBatch(ids, mask, loss_mask.bool())


class Log(L.Callback):
    """Records the metrics of every training batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def serve(batches: Iterable[Any]) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        enable_model_summary=False,
        max_epochs=1,
        **{"log_every_n_steps": 1, **quiet, **options},
    )


def fit(module: PPOModule, iterations: int, batch: PromptBatch | None = None, **options: Any) -> list[dict[str, float]]:
    """Trains for ``iterations`` on the same prompts; returns the metrics of each."""
    log = Log()
    batch = batch or prompts(module.tokenizer, mixed=module.data_needs.mix_sequences)
    trainer(callbacks=[*options.pop("callbacks", []), log], **options).fit(module, serve([batch] * iterations))
    return log.rows


def alone(module: PPOModule, world: int = 1, rank: int = 0) -> PPOModule:
    """``module`` as process ``rank`` of ``world``, without a Trainer."""
    module.trainer = SimpleNamespace(world_size=world, global_rank=rank, training=False)  # type: ignore[assignment]
    return module


def iterated(module: PPOModule, rollout: Rollout, scores: Tensor) -> Iteration:
    """``rollout`` with its advantages and returns, for a reward of one factor."""
    rewards = module.token_rewards(rollout, scores)
    return Iteration(rollout, {"scores": scores}, scores, rewards, *module.compute_advantages(rollout, rewards))


def rolled_out(module: PPOModule, batch: PromptBatch | None = None) -> Rollout:
    batch = batch or prompts(module.tokenizer)
    return alone(module).roll_out(batch, torch.arange(len(batch.ids)), stream=0)
