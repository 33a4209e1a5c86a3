"""What packed batches and logits in blocks earn: CPU seconds of a training step with and without them, in one run.

    OMP_NUM_THREADS=1 python benchmarks/packing.py data/demo.jsonl checkpoints/sft_model.pt

The data and the model are those of `rlchat demo`. For SFT and the reward model, it prints the tokens of a batch
(padded, without padding, packed) and the median CPU time of forward and backward pass. The two variants alternate. For
the policy head, it compares `rlchat.models.token_stats` with plain operations at three vocabulary sizes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlchat.data.datamodule import OASST2DataModule
from rlchat.models.backbones import Backbone
from rlchat.models.base_models import LogitsForm
from rlchat.models.packing import plan_packing
from rlchat.models.token_stats import Head, token_stats
from rlchat.training.reward_model import RewardModelModule, ranking_loss
from rlchat.training.sft import SFTModule

BATCHES = 12
ROUNDS = 3


def cpu_seconds(step: Callable[[], Any]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def compare_packing(name: str, backbone: Backbone, batches: list[Any], loss: Callable[[Any], Tensor]) -> None:
    """Prints tokens per batch, and milliseconds per step with and without packing."""
    plans = [plan_packing(batch.ids, batch.attention_mask) for batch in batches]
    padded = sum(batch.ids.numel() for batch in batches) / len(batches)
    real = sum(int(batch.attention_mask.sum()) for batch in batches) / len(batches)
    packed = sum(b.ids.numel() if p is None else len(p.cells) for b, p in zip(batches, plans, strict=True)) / len(plans)
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(ROUNDS + 1):
        for batch in batches:
            for packs in (True, False):
                backbone._packs = packs
                seconds = cpu_seconds(lambda batch=batch: loss(batch).backward())
                if turn:  # the first round warms up
                    times[packs].append(seconds)
    with_packing, without = (1000 * statistics.median(times[packs]) for packs in (True, False))
    print(
        f"{name:13s} tokens per batch: {padded:6.0f} padded, {real:6.0f} real, {packed:6.0f} packed; "
        f"CPU ms per step: {without:6.1f} padded, {with_packing:6.1f} packed, "
        f"{without / with_packing:.2f} times as fast"
    )


def plain_stats(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (hidden @ weight.T).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def compare_heads(vocabulary: int, width: int, tokens: int = 1024) -> None:
    """Prints milliseconds of log-probs, entropies and the gradient of the log-probs."""
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    head = Head(weight, None, LogitsForm(), torch.zeros(vocabulary, dtype=torch.bool), 1.0)
    variants: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_stats(hidden, weight, targets)[0].sum().backward(),
        "blocks": lambda: token_stats(hidden, targets, head).logprobs.sum().backward(),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(ROUNDS + 1):
        for name, step in variants.items():
            seconds = cpu_seconds(step)
            if turn:
                times[name].append(seconds)
    plain, blocks = (1000 * statistics.median(times[name]) for name in variants)
    print(
        f"policy head, {tokens} tokens of width {width}, vocabulary {vocabulary:7,}: CPU ms {plain:7.1f} plain, "
        f"{blocks:7.1f} in blocks, {plain / blocks:.2f} times as fast"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("model", help="the model file of an SFT model")
    options = parser.parse_args()
    sft = SFTModule(init_from=options.model)
    reward = RewardModelModule(init_from=options.model)
    batches: dict[str, list[Any]] = {}
    for module, batch_size in ((sft, 32), (reward, 12)):
        data = OASST2DataModule(path=options.data, min_quality=None, best_rank_only=False, batch_size=batch_size)
        data.needs = module.data_needs
        data.prepare_data()
        data.setup("fit")
        batches[module.stage] = [batch for batch, _ in zip(data.train_dataloader(), range(BATCHES), strict=False)]
    compare_packing("SFT", sft.model.backbone, batches["sft"], lambda batch: -sft.token_stats(batch).logprobs.mean())
    compare_packing(
        "reward model",
        reward.model.backbone,
        batches["reward"],
        lambda batch: ranking_loss(reward.model(batch.ids, batch.attention_mask), batch).pair_loss.sum(),
    )
    for vocabulary, width in ((1_000, 128), (8_192, 128), (50_257, 384)):
        compare_heads(vocabulary, width)


if __name__ == "__main__":
    main()
