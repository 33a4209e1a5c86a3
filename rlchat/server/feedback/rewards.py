"""The endpoint `/reward`: a response is scored with the reward and the critic of the version that generated it."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI

from rlchat.chat.learning.supervisor import Supervisor
from rlchat.chat.scoring import RewardScorer
from rlchat.errors import UserError
from rlchat.models.model_file import PolicyBundle
from rlchat.server.engine import Engine
from rlchat.server.errors import APIError
from rlchat.server.feedback.names import FileNames
from rlchat.server.schemas import RewardReply, RewardRequest

log = logging.getLogger("rlchat")

_KEPT = 2  # scorers in memory: of the active version, and of one before


class Rewards:
    """The rewards of a model and its versions. Each is loaded when the first response is scored with it.

    Args:
        engine: has the active version in memory.
        file: the model file.
        load: loads the file of another version, to score with it.
        supervisor: knows the versions; None: there is only ``file``.
    """

    def __init__(
        self, engine: Engine, file: Path, load: Callable[[Path], PolicyBundle], supervisor: Supervisor | None = None
    ) -> None:
        self._engine, self._file, self._load, self._supervisor = engine, file, load, supervisor
        self._scorers: OrderedDict[str, RewardScorer] = OrderedDict()  # by the name of the file, the last used one last
        folders = [] if supervisor is None else [supervisor.path_of("1.pt").parent]
        self._names = FileNames([file], folders)
        self._lock = threading.Lock()  # one response at a time

    @property
    def available(self) -> bool:
        """Whether the file of the active version contains a reward."""
        return bool(self._engine.loaded.bundle.about.get("reward"))

    def score(self, request: RewardRequest) -> RewardReply:
        """The reward of a response by the version that ``request.model`` names, or else by the active one.

        That is also so if the file of the named version was deleted or replaced. The reply names the file.

        Raises:
            UserError: the file contains no reward, or no factor of it can be used.
        """
        with self._lock:
            name, scorer = self._scorer(request.model)
            factors, value = scorer.score_text(request.prompt, request.reply, ended=request.ended)
            left_out = {factor: self.public(why) for factor, why in scorer.not_scored(request.prompt).items()}
        total = sum(factors.values())
        return RewardReply(reward=total, factors=factors, value=value, left_out=left_out, model=name)

    def public(self, sentence: str) -> str:
        """``sentence`` without folders of this machine; what a factor says may have any."""
        if not (public := self._names.public(sentence, "")):
            log.error("%s", sentence)
        return public or "it cannot be computed: see the server's log"

    def _scorer(self, name: str | None) -> tuple[str, RewardScorer]:
        active = self._engine.loaded
        bundle = active.bundle
        if name is not None and name != active.version and name not in self._scorers:
            try:
                path = self._path(name)
                if self._supervisor is not None and path == self._file:
                    self._supervisor.check_original()
                bundle = self._load(path)
            except UserError:
                name = None
        name = name or active.version
        if name not in self._scorers:
            self._scorers[name] = RewardScorer(bundle, self._path(name))
        self._scorers.move_to_end(name)
        while len(self._scorers) > _KEPT:
            self._scorers.popitem(last=False)
        return name, self._scorers[name]

    def _path(self, name: str) -> Path:
        if self._supervisor is not None and self._supervisor.owns(name):
            return self._supervisor.path_of(name)
        if name != self._file.name:
            raise UserError(f"{name}: not a version of {self._file.name}")
        return self._file


def add_reward(app: FastAPI, rewards: Rewards) -> None:
    """Adds `/reward`."""

    @app.post("/reward")
    def reward(body: RewardRequest) -> RewardReply:
        """The reward of a response and its factors, from the reward that its model was trained with."""
        try:
            return rewards.score(body)
        except UserError as error:
            raise APIError(400, rewards.public(str(error))) from error
