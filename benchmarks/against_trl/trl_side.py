"""TRL's side of the comparison: the unchanged PPOTrainer with the setup of :mod:`common`.

    python3 -m venv .venv-trl
    .venv-trl/bin/pip install -e . trl==1.12.0 accelerate==1.15.0
    .venv-trl/bin/python benchmarks/against_trl/trl_side.py --size S --seed 0 --out benchmarks/.against_trl/trl-S-0.json

It needs a separate environment, so that rlchat's environment does not contain TRL's dependencies.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
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
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # by version of transformers


def make_policy(initial: PreTrainedModel, size: Size) -> PreTrainedModel:
    """A copy of ``initial`` that cannot sample the special ids: rlchat's policies cannot either, and to TRL, a sampled
    padding id is the end of the response."""

    def silence(_: nn.Module, __: Any, output: Any) -> None:
        output.logits[..., size.sayable :] = -1e30

    policy = copy.deepcopy(initial)
    # A hook instead of a subclass, because `generate` inspects the signature of `forward`.
    policy.register_forward_hook(silence)
    return policy


class RewardRule(nn.Module):
    """The rule as a reward model for TRL: the hidden states of its backbone are the ids, and its head is the rule."""

    base_model_prefix = "backbone"

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.backbone = lambda input_ids, **_: SimpleNamespace(hidden_states=(input_ids,))

    def score(self, ids: Tensor) -> Tensor:
        """Scores [batch, time, 1] of ``ids`` Long [batch, prompt + response]; TRL reads that of the last token."""
        replies = ids[:, -self.size.response :].tolist()
        scores = torch.tensor([reward(row, self.size) for row in replies], device=ids.device)
        return scores[:, None, None].expand(*ids.shape, 1)


class Recorded(PPOTrainer):
    """TRL's trainer, which passes its metrics to a record and uses the prompts in their order, without shuffling."""

    def __init__(self, record: Record, **options: Any) -> None:
        super().__init__(**options)
        self.record = record
        ordered = DataLoader(options["train_dataset"], self.args.batch_size, collate_fn=self.data_collator)
        self.dataloader = self.accelerator.prepare(ordered)

    def train(self) -> None:
        self.record.start()
        super().train()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if logs["val/num_eos_tokens"]:
            raise RuntimeError("an end marker was sampled, so the responses no longer have the same length")
        self.record.add(logs["episode"], logs["objective/scores"], logs["objective/kl"])


def make_tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """A tokenizer with padding and end ids, which TRL requires; it never encodes text."""
    words = {f"w{token}": token for token in range(size.sayable)}
    words |= {"<pad>": size.pad_id, "<system>": size.pad_id + 1, "<user>": size.pad_id + 2}
    words |= {"<assistant>": size.pad_id + 3, "<end>": size.end_id}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
    )


def make_critic(initial: PreTrainedModel, size: Size) -> PreTrainedModel:
    """The backbone of the initial model with a head of zeros."""
    config = model_config(size)
    config.num_labels = 1
    config.pad_token_id = size.pad_id
    critic = AutoModelForSequenceClassification.from_config(config)
    critic.base_model.load_state_dict(initial.base_model.state_dict())
    nn.init.zeros_(critic.score.weight)
    return critic


def make_trainer(
    record: Record,
    h: Hyperparameters,
    size: Size,
    seed: int,
    initial: PreTrainedModel,
    prompts: list[list[int]],
    gpu: bool = False,
) -> Recorded:
    """TRL's trainer with the common hyperparameters."""
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        seed=seed,
        total_episodes=len(prompts),
        per_device_train_batch_size=h.batch_size,
        local_rollout_forward_batch_size=h.batch_size,
        response_length=size.response,
        num_ppo_epochs=h.ppo_epochs,
        num_mini_batches=h.minibatches,
        learning_rate=h.learning_rate,
        lr_scheduler_type=h.schedule,
        adam_beta2=h.adam_beta2,
        adam_epsilon=h.adam_eps,
        cliprange=h.clip_eps,
        cliprange_value=h.value_clip,
        vf_coef=h.value_coef,
        kl_coef=h.kl_coef,
        gamma=h.gamma,
        lam=h.lam,
        temperature=h.temperature,
        use_cpu=not gpu,
        bf16=gpu,
        **{name: False for name in CHECKPOINTING if name in PPOConfig.__dataclass_fields__},
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return Recorded(
        record,
        args=config,
        processing_class=make_tokenizer(size),
        model=make_policy(initial, size),
        ref_model=make_policy(initial, size),
        reward_model=RewardRule(size),
        value_model=make_critic(initial, size),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
    )


def main() -> None:
    options = make_parser(__doc__).parse_args()
    size = SIZES[options.size]
    h = replace(Hyperparameters(size.learning_rate), **dict(options.set))
    initial = initial_model(size, options.seed)
    prompts = make_prompts(size, options.seed, h.iterations * h.batch_size)
    record = Record(
        options.out,
        contestant="trl",
        size=options.size,
        seed=options.seed,
        digest=digest(initial, prompts),
        hyperparameters=asdict(h),
        versions={"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )
    make_trainer(record, h, size, options.seed, initial, prompts, options.gpu).train()


if __name__ == "__main__":
    main()
