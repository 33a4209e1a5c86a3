"""`LearnedQuality`: the score of a trained reward model as a factor. It works without Lightning, for the chat."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from rlchat.conversation import Conversation, Message
from rlchat.distributed.collectives import is_first
from rlchat.errors import UserError
from rlchat.models.file_content import holds_adapter
from rlchat.models.model_file import PolicyBundle, RewardBundle, load_reward_adapter, load_reward_model
from rlchat.rewards.base import Factor, Reply, RowCount
from rlchat.utils.padding import pad

_log = logging.getLogger("rlchat")


class LearnedQuality(Factor):
    """The standardized score of a trained reward model.

    To the model, every response ends with the end marker, even if it was truncated, as in its training. A response
    that exceeds the reward model's ``max_length`` is truncated to it; a warning counts these, at the first and then
    at each power of ten. In PPO with an adapter, a reward model that is an adapter of the same base shares the policy's
    frozen weights, unless they will be sharded.

    Args:
        bundle: the reward model's file, for example ``checkpoints/reward_model.pt``.
        weight: of the factor.
        clip: scores are clipped to ± this many standard deviations, which limits the effect of the model's errors.
        batch_size: responses per forward pass.
        device: of the reward model; ``auto`` is the device of the policy that is trained or evaluated.
        base_model: the path of the base of an adapter file; by default where it was in training, or beside ``bundle``.
    """

    def __init__(
        self,
        bundle: str,
        weight: float = 1.0,
        clip: float = 4.0,
        batch_size: int = 64,
        device: str = "auto",
        base_model: str | None = None,
    ) -> None:
        super().__init__(weight)
        if clip <= 0 or batch_size < 1:
            raise UserError(
                f"invalid values for LearnedQuality: clip {clip} and batch_size {batch_size} must be above 0"
            )
        self.device_named(device)  # so that an error comes now
        self.bundle = bundle
        self.device = device
        self.base_model = base_model
        self.clip = clip
        self.batch_size = batch_size
        self.cut = RowCount()
        """The responses that were truncated to the reward model's ``max_length``."""
        if not holds_adapter(bundle):
            _ = self.reward_model  # so that an error comes now

    @cached_property
    def reward_model(self) -> RewardBundle:
        """The reward model. One in an adapter file is loaded when it is used, because it may share weights."""
        return load_reward_model(self.bundle, "cpu" if self.device == "auto" else self.device, self.base_model)

    def to(self, device: torch.device) -> None:
        """Moves the reward model to ``device``, unless the configuration sets another."""
        if self.device == "auto":
            model = self.reward_model.model.to(device)
            # Shared weights have the type of the policy's, and the adapter must have the same.
            model.backbone.to(model.backbone.head_weight.dtype)

    def share_weights(self, policy: PolicyBundle | None) -> None:
        """If the reward model is an adapter of the same base, it uses the frozen weights of ``policy`` as its own."""
        # Random numbers are kept, so that the policy's adapter starts from the same values with and without sharing.
        with torch.random.fork_rng(devices=[]):
            shared = None
            if policy is not None and self.device == "auto" and holds_adapter(self.bundle):
                shared = load_reward_adapter(self.bundle, policy)
            self.reward_model = shared or self.reward_model  # loads it now, so that an error comes before the training
        if shared is not None and is_first():
            _log.info("%s is an adapter of the policy's base model: they share the frozen weights", self.bundle)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        """Scores ``[batch]``, in standard deviations above the mean human response."""
        model, tokenizer = self.reward_model.model, self.reward_model.tokenizer
        rendered = [
            tokenizer.render_response(prompt, Message("assistant", reply.text), self.reward_model.max_length)
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        if self.cut.add(sum(row.response_cut for row in rendered), len(rendered)):
            _log.warning(
                "LearnedQuality: %d of %d responses were longer than max_length %d of the reward model %s and were "
                "truncated",
                self.cut.found,
                self.cut.rows,
                self.reward_model.max_length,
                self.bundle,
            )
        rows = [row.ids for row in rendered]
        scores = []
        device = model.backbone.device
        model.to(device)  # shared weights move with the policy, and the adapter must follow
        for start in range(0, len(rows), self.batch_size):
            ids, mask = pad(rows[start : start + self.batch_size], tokenizer.pad_id, "right")
            scores.append(model.standardised(model(ids.to(device), mask.to(device))).cpu())
        return torch.cat(scores).clamp(-self.clip, self.clip) if scores else torch.zeros(0)
