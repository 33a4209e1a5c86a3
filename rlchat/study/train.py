"""The trainings of the study, each with rlchat's own module: SFT, a reward model, and PPO against it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from rlchat.conversation import Conversation
from rlchat.data.datamodule import PromptBatch
from rlchat.ppo.module import PPOModule
from rlchat.rewards import LearnedQuality, Reply, Reward
from rlchat.study.data import Asked, Comparison, prompt_batch, prompt_batches, ranked_batches, sequence_batches
from rlchat.study.settings import ENCODING, MAX_LENGTH, Settings
from rlchat.training.base import VALIDATION_STREAM, StageModule
from rlchat.training.reward_model import RewardModelModule
from rlchat.training.sft import SFTModule

NO_CLIP = 1e6
"""Standard deviations: the proxy reward is not clipped, so that a policy can exploit all of it."""


def network(width: int) -> dict[str, Any]:
    """A Llama with random weights: two layers of ``width`` units."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    }


def train_sft(path: Path, width: int, asked: Sequence[Asked], settings: Settings, seed: int) -> dict[str, float]:
    """Trains a chat model of ``width`` on all replies, and writes its model file. Returns its last metrics."""
    L.seed_everything(seed, verbose=False)
    module = SFTModule(
        base_model=network(width),
        tiktoken_encoding=ENCODING,
        max_length=MAX_LENGTH,
        learning_rate=settings.sft_learning_rate,
        weight_decay=0.1,
        seed=seed,
    )
    batches = sequence_batches(module.tokenizer, asked, settings.sft_batch, settings.sft_epochs, seed)
    metrics = _fit(module, batches)
    module.save_bundle(path)
    return metrics


def train_proxy(
    path: Path,
    start: Path,
    labelled: Sequence[Comparison],
    held_out: Sequence[Comparison],
    settings: Settings,
    seed: int,
) -> dict[str, float]:
    """Trains a reward model on ``labelled``, from the SFT model ``start``, and writes its model file.

    Its scores are standardized on ``held_out``, responses of the initial policy. Returns its metrics on them.
    """
    L.seed_everything(seed, verbose=False)
    module = RewardModelModule(init_from=str(start), learning_rate=settings.proxy_learning_rate, weight_decay=0.1)
    tokenizer, size = module.tokenizer, settings.proxy_batch
    epochs = settings.proxy_epochs(len(labelled))
    batches = ranked_batches(tokenizer, labelled, size, epochs, seed)
    validation = ranked_batches(tokenizer, held_out, 128, 1, seed)
    metrics = _fit(module, batches, validation)
    module.save_bundle(path)
    return metrics


class Recorder(L.Callback):
    """Measures the policy on held-out prompts before the first iteration, and after every ``every`` iterations.

    It ends the run above a KL of ``most_kl`` nats per response.

    Attributes:
        points: one dict per measurement: ``iteration``, ``kl`` in nats per response, and the means of ``gold``,
            ``proxy`` and ``tokens`` over the prompts; ``example`` is a response to the first prompt.
    """

    def __init__(
        self,
        prompts: Sequence[Conversation],
        gold: Callable[[Sequence[Conversation], Sequence[Reply]], torch.Tensor],
        every: int,
        most_kl: float,
    ) -> None:
        self.prompts, self.gold, self.every, self.most_kl = prompts, gold, every, most_kl
        self.points: list[dict[str, Any]] = []
        self._batch: PromptBatch | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The initial policy."""
        self._measure(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """The policy after an iteration."""
        if pl_module.iterations % self.every == 0 or trainer.is_last_batch:  # type: ignore[operator]
            self._measure(pl_module)
            trainer.should_stop = self.points[-1]["kl"] > self.most_kl

    def _measure(self, module: Any) -> None:
        self._batch = self._batch or prompt_batch(module.tokenizer, self.prompts)
        # the same random numbers each time, so that differences come from the policy
        rollout = module.roll_out(self._batch, torch.arange(len(self.prompts)), VALIDATION_STREAM)
        proxy = module.reward(rollout.conversations, rollout.replies)
        self.points.append(
            {
                "iteration": module.iterations,
                "kl": float(rollout.kl.mean()),
                "gold": float(self.gold(rollout.conversations, rollout.replies).mean()),
                "proxy": float(proxy.mean()),
                "tokens": sum(reply.tokens for reply in rollout.replies) / len(rollout.replies),
                "example": rollout.replies[0].text,
            }
        )


def train_ppo(
    policy: Path,
    proxy: Path,
    prompts: Sequence[Conversation],
    recorder: Recorder,
    settings: Settings,
    kl_coef: float,
    seed: int,
) -> None:
    """PPO from the model file ``policy`` with the reward model ``proxy`` as its only reward; ``recorder`` measures."""
    L.seed_everything(seed, verbose=False)
    module = PPOModule(
        init_from=str(policy),
        reward=Reward([LearnedQuality(str(proxy), clip=NO_CLIP, batch_size=256)]),
        max_new_tokens=settings.max_new_tokens,
        learning_rate=settings.ppo_learning_rate,
        schedule="constant",
        adam_beta2=0.95,
        ppo_epochs=2,
        minibatches=2,
        kl_coef=kl_coef,
        entropy_coef=settings.entropy_coef,
        critic_warmup=settings.critic_warmup,
        seed=seed,
    )
    batches = prompt_batches(module.tokenizer, prompts, settings.ppo_batch, settings.ppo_iterations, seed)
    _fit(module, batches, callbacks=[recorder])


def _fit(
    module: StageModule, batches: Sequence[Any], validation: Sequence[Any] = (), callbacks: Sequence[L.Callback] = ()
) -> dict[str, float]:
    """Trains on ``batches`` in their order, and validates at the end. Returns the last metrics."""
    with _quiet():
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            gradient_clip_val=1.0 if module.automatic_optimization else None,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, _loader(batches), _loader(validation) if validation else None)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _loader(batches: Sequence[Any]) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's advice about devices, loaders and loggers does not concern a run inside the study."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        log.setLevel(level)
