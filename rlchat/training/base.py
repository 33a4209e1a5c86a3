"""What SFT and PPO share: a LightningModule around a chat model that can be measured, can reply, and can be saved."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from transformers import get_scheduler

from rlchat.conversation import Conversation
from rlchat.data.datamodule import PromptBatch, SequenceBatch
from rlchat.distributed.collectives import anywhere, gather_objects, is_first, shard_networks
from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle, load_policy, new_policy, save_bundle
from rlchat.models.networks import RLChatModel, TokenStats, value_head
from rlchat.models.sampling import Generated, Sampling, Uniforms, addressed_uniforms, generate
from rlchat.rewards import Reply
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.padding import pad

_log = logging.getLogger("rlchat")

# Streams of noise beside those of the training iterations, which are 0, 1, 2, …
VALIDATION_STREAM = -1
PREDICTION_STREAM = -2

DEFAULT_BASE_MODEL = "distilbert-base-uncased"
DEFAULT_ENCODING = "cl100k_base"
DEFAULT_MAX_LENGTH = 512


def open_policy(
    base_model: str | dict[str, Any] | None,
    tiktoken_encoding: str | None,
    max_length: int | None,
    hidden_dim: int | None,
    init_from: str | None,
) -> PolicyBundle:
    """A chat model: from a bundle (``init_from``), or new over ``base_model``.

    Raises :class:`UserError` where the bundle and the other options contradict each other.
    """
    if init_from is None:
        tokenizer = ChatTokenizer(tiktoken_encoding or DEFAULT_ENCODING)
        length = max_length or DEFAULT_MAX_LENGTH
        backbone = Backbone(base_model or DEFAULT_BASE_MODEL, tokenizer.vocab_size, length, tokenizer.base_size)
        return PolicyBundle(new_policy(backbone, tokenizer, hidden_dim or 0), tokenizer, length)
    if base_model is not None:
        raise UserError(
            f"init_from {init_from} brings its own backbone; set --model.base_model null, or leave out init_from"
        )
    bundle = load_policy(init_from)
    check_encoding(init_from, bundle.tokenizer, tiktoken_encoding)
    if max_length is not None and max_length > bundle.max_length:
        raise UserError(f"max_length {max_length} is more than the {bundle.max_length} of init_from {init_from}")
    bundle.max_length = max_length or bundle.max_length
    if hidden_dim is not None and hidden_dim != bundle.model.hidden_dim:
        bundle.model.hidden_dim = hidden_dim
        bundle.model.value_head = value_head(bundle.model.backbone.hidden_size, hidden_dim)
    return bundle


def check_encoding(source: str, tokenizer: ChatTokenizer, asked: str | None) -> None:
    """Raises :class:`UserError` where ``asked`` names an encoding other than the bundle's own."""
    if asked is not None and ChatTokenizer(asked).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"init_from {source} was trained with the encoding {tokenizer.name}, not {asked}; "
            f"leave tiktoken_encoding out, or start from another bundle"
        )


class PolicyModule(L.LightningModule):
    """A chat model with its tokenizer, as a LightningModule."""

    stage: str
    """Names the run's folder: lightning_logs/<stage>/version_N."""
    bundle_name: str
    """The file under checkpoints/ that the best model of this stage becomes."""
    monitor: tuple[str, str]
    """What the best model is best in, and whether that is the max or the min."""

    def __init__(self, bundle: PolicyBundle) -> None:
        super().__init__()
        self.model: RLChatModel = bundle.model.train()
        self.tokenizer = bundle.tokenizer
        self.max_length = bundle.max_length
        self.tally = Tally()
        self.sampling = Sampling(min(100, self.max_length // 2), temperature=1.0)

    def configure_model(self) -> None:
        """Leaves this process a part of each network, where the strategy says so."""
        shard_networks(self)

    def token_stats(self, batch: SequenceBatch) -> TokenStats:
        """Of the assistant's tokens in ``batch``, each predicted from what comes before it; [tokens]."""
        hidden = self.model(batch.ids, batch.attention_mask)
        said = batch.loss_mask[:, 1:]
        return self.model.token_stats(hidden[:, :-1][said], batch.ids[:, 1:][said])

    def tally_sequences(self, batch: SequenceBatch) -> None:
        """Adds held-out conversations to the tally: accuracy and nats per token, for :meth:`Tally.perplexity`."""
        stats = self.token_stats(batch)
        self.tally.add("accuracy", stats.correct)
        self.tally.add("nll", -stats.logprobs)

    def generate(self, ids: Tensor, attention_mask: Tensor, sampling: Sampling, uniforms: Uniforms) -> Generated:
        """Replies to left-padded prompts, sampled in eval mode: dropout would be another distribution.

        Where processes hold the model in shards, all go on until the last has its reply.
        """
        mode = self.model.training
        self.model.eval()
        marks: dict[str, Any] = {"end_id": self.tokenizer.end_id, "pad_id": self.tokenizer.pad_id}
        if self.device_mesh is not None:
            marks["goes_on"] = lambda alive: anywhere(self, alive)
        try:
            return generate(self.model, ids, attention_mask, sampling, uniforms, **marks)
        finally:
            self.model.train(mode)

    def read(self, generated: Generated) -> list[Reply]:
        """The words of ``generated``."""
        lengths = generated.mask.sum(1).tolist()
        return [
            Reply(text=self.tokenizer.decode(row[:length]).strip(), tokens=length, ended=ended)
            for row, length, ended in zip(generated.ids.tolist(), lengths, generated.ended.tolist(), strict=True)
        ]

    def on_predict_start(self) -> None:
        """Starts to count prompts, whose numbers address the noise."""
        self.predicted = 0

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One plain row a prompt: what was asked and what was said."""
        noise = addressed_uniforms(0, PREDICTION_STREAM, self.noise_rows(len(batch.ids), self.predicted))
        self.predicted += len(batch.ids)
        replies = self.read(self.generate(batch.ids, batch.attention_mask, self.sampling, noise))
        return [
            {
                "messages": [{"role": m.role, "content": m.text} for m in prompt.messages],
                "reply": reply.text,
                "tokens": reply.tokens,
                "ended": reply.ended,
                **judgement,
            }
            for prompt, reply, judgement in zip(
                batch.conversations, replies, self.judgements(batch.conversations, replies), strict=True
            )
        ]

    def judgements(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[dict[str, Any]]:
        """What a stage with a reward adds to each row of a prediction."""
        return [{} for _ in replies]

    def noise_rows(self, batch: int, first: int = 0, copies: int = 1) -> Tensor:
        """Global numbers of this process's rows: with N processes, row i of process r is global row i·N + r.

        Where each row comes in ``copies``, these have numbers that follow each other.
        """
        rows = (first + torch.arange(batch)) * self.trainer.world_size + self.global_rank
        return (rows[:, None] * copies + torch.arange(copies)).flatten()

    def respond(self, prompts: Sequence[Conversation]) -> list[Reply]:
        """Replies with the same noise each time, so that what changes is the model."""
        rows = [self.tokenizer.render_prompt(p, self.max_length - self.sampling.max_new_tokens).ids for p in prompts]
        ids, mask = pad(rows, self.tokenizer.pad_id, "left")
        noise = addressed_uniforms(0, VALIDATION_STREAM, torch.arange(len(prompts)))
        return self.read(self.generate(ids.to(self.device), mask.to(self.device), self.sampling, noise))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says which options a run that goes on cannot change."""
        warn_of_kept_options(self, checkpoint)

    def save_bundle(self, path: str | Path) -> None:
        """Writes the chat model as it is now; see :mod:`rlchat.models.model_file`. A collective."""
        save_bundle(path, self.bundle())

    def bundle(self) -> PolicyBundle:
        """The chat model as it is now, with all that it takes to talk to it."""
        about = {"stage": type(self).__name__, "batches": int(self.trainer.fit_loop.total_batch_idx + 1)}
        return PolicyBundle(self.model, self.tokenizer, self.max_length, about)


class Tally:
    """Means over all rows of an evaluation, on all processes; each value weighs the same wherever it was counted."""

    def __init__(self) -> None:
        self._means: dict[str, MeanMetric] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Counts every number in ``values``."""
        if name not in self._means:
            self._means[name] = MeanMetric().to(values.device)
        self._means[name].update(values.detach().float().to(self._means[name].device))

    def means(self, device: torch.device) -> dict[str, float]:
        """The means by name, over every process; empties the tally. ``nll`` also becomes ``perplexity``.

        A collective: every process calls it, also one that counted nothing.
        """
        names = sorted({name for names in gather_objects(list(self._means)) for name in names})
        result: dict[str, float] = {}
        for name in names:
            metric = self._means.get(name) or MeanMetric()
            result[name] = float(metric.to(device).compute())
        self._means.clear()
        if "nll" in result:
            result["perplexity"] = math.exp(min(result.pop("nll"), 700.0))
        return result


def warn_of_kept_options(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Optimizer and schedule go on as they were: warns of options that ask for something else."""
    before = checkpoint.get("hyper_parameters", {})
    names = ("learning_rate", "schedule", "warmup", "weight_decay", "adam_eps", "adam_beta2")
    kept = [
        f"{n} {before[n]} and not {module.hparams[n]}" for n in names if n in before and before[n] != module.hparams[n]
    ]
    if kept and is_first():
        _log.warning("the run goes on with %s; begin a new one with --model.init_from for that", ", ".join(kept))


def seed_dropout(module: L.LightningModule) -> None:
    """Begins PyTorch's own noise anew for this training batch and process.

    Dropout draws from it, and a checkpoint does not hold it: so a resumed run drops what an uninterrupted one would
    have dropped.
    """
    seed = os.environ.get("PL_GLOBAL_SEED", "0")  # seed_everything
    address = f"{seed}/{module.trainer.fit_loop.total_batch_idx}/{module.global_rank}/dropout"
    torch.manual_seed(int.from_bytes(hashlib.sha256(address.encode()).digest()[:7], "big"))


def make_optimizer(
    parameters: Iterable[Tensor], learning_rate: float, weight_decay: float, eps: float = 1e-8, beta2: float = 0.95
) -> torch.optim.AdamW:
    """AdamW that decays matrices only, as is usual: norms and biases have no scale of their own to keep down.

    Raises :class:`UserError` for a size that is negative or no number.
    """
    for name, size in (("learning_rate", learning_rate), ("weight_decay", weight_decay), ("adam_eps", eps)):
        if not size >= 0:
            raise UserError(f"{name} is {size}; it must be 0 or more")
    if not 0 <= beta2 < 1:
        raise UserError(f"adam_beta2 is {beta2}; it must be from 0 up to, but not, 1")
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), eps=eps)


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: str, warmup: float, steps: float) -> LambdaLR:
    """The learning rate over a run of ``steps``: ``constant``, ``linear`` or ``cosine`` to zero, after a warm-up.

    ``warmup`` is a share of the steps. A run without an end (``max_steps: -1``) can only be constant.
    """
    if not math.isfinite(steps):
        if schedule != "constant":
            raise UserError(f"schedule {schedule} needs an end: set trainer.max_epochs")
        return get_scheduler("constant", optimizer)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    return get_scheduler(name, optimizer, num_warmup_steps=round(warmup * steps), num_training_steps=round(steps))
