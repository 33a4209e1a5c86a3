"""rlchat's side of the comparison: PPOModule under Lightning's Trainer, with the setup of :mod:`common`.

    python benchmarks/against_trl/rlchat_side.py --size S --seed 0 --out benchmarks/.against_trl/separate-S-0.json

uses a separate critic; ``--critic shared`` uses a value head on the policy's backbone.
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from common import (
    SIZES,
    Hyperparameters,
    Record,
    Size,
    digest,
    initial_model,
    make_parser,
    make_prompts,
    model_config,
    reward,
)
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from rlchat.conversation import Conversation, Message
from rlchat.data.batches import PromptBatch
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle, new_policy, save_bundle
from rlchat.models.sampling import Generated, Sampling, Uniforms, generate
from rlchat.ppo.module import PPOModule
from rlchat.rewards import Reply, ReplyFactor, Reward
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.ranks import format_ranks
from rlchat.utils.padding import pad

# Hyperparameters with which a value head on the policy's backbone learns better than with the common ones.
TUNED = {("shared", "S"): {"learning_rate": 5e-3}}


class InSet(ReplyFactor):
    """The benchmark's reward, for responses whose text is a list of ids."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return reward([int(token) for token in reply.text.split()], self.size)


class IdPPO(PPOModule):
    """PPO with two changes: the text of a response is a list of ids, and the end of a turn cannot be sampled.

    With ``shortest``, responses have between that number of tokens and ``max_new_tokens``, all lengths equally likely.
    """

    shortest: int | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for model in (self.model, self.reference):
            model.unsayable[self.tokenizer.end_id] = True

    def generate(self, ids: Tensor, attention_mask: Tensor, sampling: Sampling, uniforms: Uniforms) -> Generated:
        if self.shortest is None:
            return super().generate(ids, attention_mask, sampling, uniforms)
        generator = torch.Generator().manual_seed(self.iterations)
        lengths = torch.randint(self.shortest, sampling.max_new_tokens + 1, (len(ids),), generator=generator).tolist()
        each = [replace(sampling, max_new_tokens=length) for length in lengths]
        return generate(
            self.model,
            ids,
            attention_mask,
            each,
            uniforms,
            end_id=self.tokenizer.end_id,
            pad_id=self.tokenizer.pad_id,
        )

    def decode(self, generated: Generated) -> list[Reply]:
        rows = zip(generated.ids.tolist(), generated.mask.sum(1).tolist(), generated.ended.tolist(), strict=True)
        return [Reply(" ".join(map(str, row[:length])), length, ended) for row, length, ended in rows]


class Recorder(L.Callback):
    """Passes the logged metrics to the record."""

    def __init__(self, record: Record, size: Size) -> None:
        self.record = record
        self.size = size

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.record.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: IdPPO, *_: Any) -> None:  # type: ignore[override]
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if pl_module.shortest is None and logged["train/response_length"] != self.size.response:
            raise RuntimeError("a response ended early, so the responses no longer have the same length")
        phases = {name: round(logged[f"time/{name}"], 3) for name in ("rollout_s", "score_s", "update_s")}
        self.record.add(int(logged["train/episodes"]), logged["train/reward"], logged["train/kl"], **phases)


def make_tokenizer(size: Size, folder: Path) -> ChatTokenizer:
    """An encoding of the right size, with markers as the last ids; it never encodes text."""
    ranks = {bytes([token]) if token < 256 else b"w%d" % token: token for token in range(size.sayable)}
    path = folder / "ids.tiktoken"
    path.write_bytes(format_ranks(ranks))
    return ChatTokenizer(str(path))


def save_initial(initial: PreTrainedModel, size: Size, path: Path) -> None:
    """Saves a model file with the weights of ``initial`` and a value head of zeros."""
    tokenizer = make_tokenizer(size, path.parent)
    config = model_config(size)
    backbone = Backbone.from_config_json(config.to_json_string(use_diff=False))
    backbone.transformer.load_state_dict(initial.base_model.state_dict())
    save_bundle(path, PolicyBundle(new_policy(backbone, tokenizer), tokenizer, config.max_position_embeddings))


def make_batches(prompts: Sequence[list[int]], size: Size, batch_size: int) -> list[PromptBatch]:
    """The prompts in their order, in the batches that rlchat's data module would return."""
    return [
        PromptBatch(
            *pad(rows, size.pad_id, "left"),
            tuple(Conversation((Message("user", " ".join(map(str, row))),)) for row in rows),
        )
        for rows in (prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size))
    ]


def options_of(
    h: Hyperparameters, size: Size, seed: int, critic: str, initial: PreTrainedModel, folder: Path
) -> dict[str, Any]:
    """The options of :class:`IdPPO`; the initial model is saved in ``folder``."""
    save_initial(initial, size, folder / "initial.pt")
    return {
        "init_from": str(folder / "initial.pt"),
        "reward": Reward([InSet(size)]),
        "max_new_tokens": size.response,
        "temperature": h.temperature,
        "learning_rate": h.learning_rate,
        "schedule": h.schedule,
        "adam_beta2": h.adam_beta2,
        "adam_eps": h.adam_eps,
        "ppo_epochs": h.ppo_epochs,
        "minibatches": h.minibatches,
        "critic": critic,
        "clip_eps": h.clip_eps,
        "value_clip": h.value_clip,
        "value_coef": h.value_coef,
        "kl_coef": h.kl_coef,
        "gamma": h.gamma,
        "lam": h.lam,
        "max_grad_norm": math.inf,  # TRL's PPO has this option but never clips
        "seed": seed,
    }


def fit(module: IdPPO, batches: list[PromptBatch], *callbacks: L.Callback, gpu: bool = False, **trainer: Any) -> None:
    """Trains on the batches in their order, without writing files; ``trainer`` are more options of the Trainer."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    options: dict[str, Any] = {
        "accelerator": "gpu" if gpu else "cpu",
        "devices": 1,
        "precision": "bf16-mixed" if gpu else "32-true",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
    }
    L.Trainer(**(options | trainer)).fit(module, DataLoader(batches, batch_size=None))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--critic", choices=("separate", "shared"), default="separate")
    parser.add_argument("--shortest", type=int, help="responses of different lengths, from this number of tokens on")
    options = parser.parse_args()
    size = SIZES[options.size]
    tuned = TUNED.get((options.critic, options.size), {})
    h = replace(Hyperparameters(size.learning_rate), **(tuned | dict(options.set)))
    initial = initial_model(size, options.seed)
    prompts = make_prompts(size, options.seed, h.iterations * h.batch_size)
    record = Record(
        options.out,
        contestant=options.critic,
        size=options.size,
        seed=options.seed,
        digest=digest(initial, prompts),
        hyperparameters=asdict(h),
        versions={"lightning": L.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )
    module = IdPPO(**options_of(h, size, options.seed, options.critic, initial, Path(tempfile.mkdtemp())))
    module.shortest = options.shortest
    del initial  # the module has loaded a copy; this one would count as rlchat's memory
    fit(module, make_batches(prompts, size, h.batch_size), Recorder(record, size), gpu=options.gpu)


if __name__ == "__main__":
    main()
