"""Score responses with the reward that a chat model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlchat.conversation import Conversation
from rlchat.errors import UserError
from rlchat.models.model_file import PolicyBundle
from rlchat.rewards import Factor, FactorError, Reply, Reward
from rlchat.rewards.best_of import best_of
from rlchat.rewards.classifier import HFReward
from rlchat.rewards.described import check_arguments, find_factor
from rlchat.rewards.learned import LearnedQuality


class RewardScorer:
    """The reward in the model file ``path``, and the value head (critic) of its model.

    ``bundle.about["reward"]`` describes the factors: ``[{"class_path": …, "init_args": {…}}, …]``. Their classes are
    found by :func:`rlchat.rewards.described.find_factor`. A reward model is searched at the path that it had in
    training, then next to the chat model.

    ``left_out`` maps unusable factors to the reason. Raises :class:`UserError` if the file contains no reward, or
    if no factor can be used.
    """

    def __init__(self, bundle: PolicyBundle, path: str | Path) -> None:
        described = bundle.about.get("reward")
        if not described:
            raise UserError(f"{path}: the model file contains no reward; only models trained with PPO have one")
        self._bundle = bundle
        self._path = Path(path)
        self._device = str(bundle.model.backbone.head_weight.device)
        self.left_out: dict[str, str] = {}
        factors = []
        for row in described if isinstance(described, list) else [described]:
            class_path, init_args = self._checked(row)
            try:
                factors.append(self._factor(class_path, init_args))
            except UserError as error:
                self.left_out[class_path] = str(error)
        if not factors:
            raise UserError(f"{path}: no factor of the reward can be used: {self.describe_left_out()}")
        self.reward = Reward(factors)

    def describe_left_out(self) -> str:
        """The factors that are left out and why, in one line; empty if there are none."""
        return "; ".join(f"{name} ({why})" for name, why in self.left_out.items())

    def breakdown(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[dict[str, float]]:
        """The weighted score of each factor for each of ``replies``, by the factor's name.

        A factor that cannot score the responses to a prompt, such as :class:`rlchat.rewards.Verified` without an
        answer, is missing in their rows; :meth:`not_scored` has the reason. A factor that fails is added to
        ``left_out`` and not used again. Raises :class:`UserError` if all fail.
        """
        rows: list[dict[str, float]] = [{} for _ in replies]
        for name, factor in list(self.reward.factors.items()):
            alone = Reward([factor])
            try:
                numbers = [i for i, prompt in enumerate(prompts) if not alone.unavailable(prompt)]
                if not numbers:
                    continue
                scored = alone.breakdown([prompts[i] for i in numbers], [replies[i] for i in numbers])
            except FactorError as error:  # a factor can be any code; if one fails, the others are still shown
                self.left_out[name] = str(error)
                del self.reward.factors[name]
                continue
            for i, score in zip(numbers, next(iter(scored.values())).tolist(), strict=True):
                rows[i][name] = score
        if not self.reward.factors:
            raise UserError(f"{self._path}: no factor of the reward can be used: {self.describe_left_out()}")
        return rows

    def not_scored(self, prompt: Conversation) -> dict[str, str]:
        """The factors that do not score responses to ``prompt``, with the reason."""
        return self.left_out | self.reward.unavailable(prompt)

    def score(self, prompt: Conversation, reply: Reply) -> dict[str, float]:
        """The factors of one response. Raises :class:`UserError` if none can score it."""
        factors = self.breakdown([prompt], [reply])[0]
        if not factors:
            why = "; ".join(f"{name} ({reason})" for name, reason in self.not_scored(prompt).items())
            raise UserError(f"{self._path}: no factor of the reward can score this response: {why}")
        return factors

    def best(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[Reply]:
        """For each of ``prompts``, the response with the highest reward; the first if no factor can score them.

        ``replies`` are n responses to the first prompt, then n to the second, and so on.
        """
        n = len(replies) // len(prompts) if prompts else 1
        factors = self.breakdown([prompt for prompt in prompts for _ in range(n)], replies)
        return [replies[i] for i in best_of([sum(row.values()) for row in factors], n)]

    def score_text(
        self, prompt: Conversation, text: str, *, ended: bool = True
    ) -> tuple[dict[str, float], float | None]:
        """The factors of one response whose tokens are not known, and the critic's value of its prompt.

        ``ended`` is False for a truncated response.
        """
        tokens = len(self._bundle.tokenizer.encode(text)) + ended  # the end marker counts
        return self.score(prompt, Reply(text, tokens, ended)), self.value(prompt)

    @torch.no_grad()
    def value(self, prompt: Conversation) -> float | None:
        """The critic's estimate of the reward at the end of ``prompt``; None if the file has no trained critic."""
        model, tokenizer = self._bundle.model, self._bundle.tokenizer
        ids = torch.tensor([tokenizer.render_prompt(prompt, self._bundle.max_length).ids], device=self._device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        if self._bundle.critic is not None:
            return float(self._bundle.critic(ids, mask)[0, -1])
        last = model.value_head[-1] if isinstance(model.value_head, nn.Sequential) else model.value_head
        if not any(bool(parameter.any()) for parameter in last.parameters()):  # all zeros: the initial value
            return None
        return float(model.values(model(ids, mask)[0, -1]))

    def _checked(self, row: Any) -> tuple[str, dict[str, Any]]:
        init_args = row.get("init_args", {}) if isinstance(row, dict) else None
        if not isinstance(init_args, dict) or not isinstance(row.get("class_path"), str):
            raise UserError(f"{self._path}: the reward in this model file is damaged; train the model again")
        return row["class_path"], init_args

    def _factor(self, class_path: str, init_args: dict[str, Any]) -> Factor:
        """The factor that a row describes. Raises :class:`UserError` with the reason if it cannot be constructed."""
        factor = find_factor(class_path)
        if factor is LearnedQuality:
            bundle = self._reward_model(init_args.get("bundle"))
            init_args = {**init_args, "bundle": str(bundle), "device": self._device}
        elif issubclass(factor, HFReward):
            init_args = {**init_args, "device": self._device}
        check_arguments(factor, init_args)
        try:
            return factor(**init_args)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"cannot be constructed: {error}") from error

    def _reward_model(self, path: Any) -> Path:
        there = Path(str(path))
        beside = self._path.parent / there.name
        if not there.is_file() and not beside.is_file():
            raise UserError(f"reward model not found: copy it to {there} or {beside}")
        return there if there.is_file() else beside
