"""What a chat model was rewarded for, said of the replies that it gives now."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlchat import rewards
from rlchat.conversation import Conversation
from rlchat.errors import UserError
from rlchat.models.model_file import PolicyBundle
from rlchat.rewards import Factor, Reply, Reward
from rlchat.rewards.learned import LearnedQuality


class Judge:
    """The reward that the bundle in ``path`` describes, and its critic.

    ``bundle.about["reward"]`` describes the factors in plain values: ``[{"class_path": …, "init_args": {…}}, …]``. A
    file names what is known already and brings no code: factors of rlchat's own are made by the last part of their
    class path, and ``left_out`` names the others. A reward model is looked for at the path that it had, then beside the
    chat model.

    Raises :class:`UserError` where the bundle describes no reward, or one that cannot be had.
    """

    def __init__(self, bundle: PolicyBundle, path: str | Path) -> None:
        described = bundle.about.get("reward")
        if not described:
            raise UserError(f"{path}: the bundle carries no reward; those that PPO trained do")
        self._bundle = bundle
        self._path = Path(path)
        self._device = str(bundle.model.unsayable.device)
        self.left_out: list[str] = []
        rows = described if isinstance(described, list) else [described]
        factors = [factor for row in rows if (factor := self._factor(row)) is not None]
        if not factors:
            raise UserError(f"{path}: the reward is made of {', '.join(self.left_out)} alone, which is not in rlchat")
        self.reward = Reward(factors)

    def breakdown(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[dict[str, float]]:
        """What each factor contributes to the reward of each of ``replies``, its weight included, by name."""
        columns = {name: scores.tolist() for name, scores in self.reward.breakdown(prompts, replies).items()}
        return [{name: column[row] for name, column in columns.items()} for row in range(len(replies))]

    @torch.no_grad()
    def value(self, prompt: Conversation) -> float | None:
        """The reward that the critic expects before a word is said; None where the bundle has no trained critic."""
        model, tokenizer = self._bundle.model, self._bundle.tokenizer
        ids = torch.tensor([tokenizer.render_prompt(prompt, self._bundle.max_length).ids], device=self._device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        if self._bundle.critic is not None:
            return float(self._bundle.critic(ids, mask)[0, -1])
        last = model.value_head[-1] if isinstance(model.value_head, nn.Sequential) else model.value_head
        if not any(bool(parameter.any()) for parameter in last.parameters()):  # as it was made: nobody trained it
            return None
        return float(model.values(model(ids, mask)[0, -1]))

    def _factor(self, row: Any) -> Factor | None:
        init_args = row.get("init_args", {}) if isinstance(row, dict) else None
        if not isinstance(init_args, dict) or not isinstance(row.get("class_path"), str):
            raise UserError(f"{self._path}: its description of the reward is damaged; make the bundle again")
        class_path: str = row["class_path"]
        package, _, name = class_path.rpartition(".")
        factor = _factors().get(name) if package.partition(".")[0] == "rlchat" else None
        if factor is None:
            self.left_out.append(class_path)
            return None
        if factor is LearnedQuality:
            bundle = self._reward_model(init_args.get("bundle"))
            init_args = {**init_args, "bundle": str(bundle), "device": self._device}
        try:
            return factor(**init_args)
        except TypeError as error:
            raise UserError(f"{self._path}: {class_path} cannot be made as it describes it: {error}") from error

    def _reward_model(self, path: Any) -> Path:
        there = Path(str(path))
        beside = self._path.parent / there.name
        if not there.is_file() and not beside.is_file():
            raise UserError(f"{self._path}: it was rewarded by the reward model {there}; put that there or at {beside}")
        return there if there.is_file() else beside


def _factors() -> dict[str, type[Factor]]:
    """rlchat's own factors, by name."""
    exported = [getattr(rewards, name) for name in rewards.__all__]
    known = [value for value in exported if isinstance(value, type) and issubclass(value, Factor)]
    return {factor.__name__: factor for factor in known if not inspect.isabstract(factor)}
