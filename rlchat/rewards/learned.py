"""`LearnedQuality`: the reward factor that asks a trained reward model, without Lightning, so that a chat can too."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.models.model_file import load_reward_model
from rlchat.rewards.base import Factor, Reply
from rlchat.utils.padding import pad


class LearnedQuality(Factor):
    """Base quality, learned: the standardised score of a trained reward model.

    Args:
        bundle: the reward model's file, such as ``checkpoints/reward_model.pt``.
        weight: of the factor.
        clip: scores are clipped to ± this many standard deviations, so that no flaw of the model pays without limit.
        batch_size: replies scored at one time.
        device: ``auto`` takes this process's GPU where there is one.
    """

    def __init__(
        self, bundle: str, weight: float = 1.0, clip: float = 4.0, batch_size: int = 64, device: str = "auto"
    ) -> None:
        super().__init__(weight)
        if clip <= 0 or batch_size < 1:
            raise UserError(f"LearnedQuality: clip {clip} and batch_size {batch_size} must be above 0")
        if device == "auto":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.bundle = bundle
        self.device = device
        self.judge = load_reward_model(bundle, device)
        self.clip = clip
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        """Scores [batch], in standard deviations above the mean human reply."""
        model, tokenizer = self.judge.model, self.judge.tokenizer
        rows = [
            tokenizer.render(prompt.with_reply(Message("assistant", reply.text)), self.judge.max_length).ids
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        scores = []
        for start in range(0, len(rows), self.batch_size):
            ids, mask = pad(rows[start : start + self.batch_size], tokenizer.pad_id, "right")
            device = model.mean.device
            scores.append(model.standardised(model(ids.to(device), mask.to(device))).cpu())
        return torch.cat(scores).clamp(-self.clip, self.clip) if scores else torch.zeros(0)
