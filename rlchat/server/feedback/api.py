"""The endpoints `/feedback` and `/learning`."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastapi import FastAPI, Request
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rlchat.chat.feedback import Correction, append_feedback, client_digest
from rlchat.chat.learning.rounds import Outcome
from rlchat.chat.learning.supervisor import Supervisor
from rlchat.chat.verdicts import recent_clients
from rlchat.errors import UserError
from rlchat.server.engine import Engine, Loaded
from rlchat.server.errors import APIError
from rlchat.server.feedback.caps import HOUR, Caps, VerdictCounter
from rlchat.server.feedback.schemas import (
    FeedbackKept,
    FeedbackRequest,
    LearningRound,
    LearningStatus,
    LearningSwitch,
    RollbackRequest,
    measures_of,
)
from rlchat.server.metrics import Metrics

log = logging.getLogger("rlchat")

# What is before the last part of a path, if that has a dot.
_FOLDERS = re.compile(r"(?<![\w.])(?:[\w.~-]+|[A-Za-z]:)?(?:[/\\][\w.~-]+)*[/\\](?=[\w-]*\.\w)")


def add_feedback(
    app: FastAPI, path: Path, engine: Engine, metrics: Metrics, supervisor: Supervisor | None, caps: Caps
) -> None:
    """Adds `/feedback`, which appends verdicts to the file ``path``. ``caps`` limit them if there is a supervisor.

    The verdicts of the last hour in the file count, so that a restart does not lift the limits.

    Raises:
        UserError: the file cannot be read.
    """
    before = () if supervisor is None else recent_clients(path, HOUR, caps.in_all)
    counter, lock = VerdictCounter(caps, before), threading.Lock()

    @app.post("/feedback")
    def add_feedback(body: FeedbackRequest, request: Request) -> FeedbackKept:
        """Save feedback on a response as training data. The last verdict on a response replaces earlier ones."""
        verdict = body.verdict or Correction(body.correction or "")
        client, (model, model_id) = body.client, _model_of(body, engine.loaded, supervisor)
        if supervisor is not None and not client and request.client is not None:
            client = f"address {request.client.host}"
        with lock:
            counts = supervisor is not None and verdict != "none"  # taking a verdict back is always possible
            if counts and (refusal := counter.refusal(client_digest(client))) is not None:
                sentence, seconds = refusal
                raise APIError(429, f"{sentence}: try again later", headers={"Retry-After": str(seconds)})
            try:
                append_feedback(path, body.prompt, body.reply, verdict, model=model, model_id=model_id, client=client)
            except UserError as error:
                raise _api_error(error, "the server cannot write feedback: see its log") from error
            if counts:
                counter.take(client_digest(client))
        metrics.feedback.labels(body.verdict or "corrected").inc()
        if supervisor is not None:
            supervisor.notify()
        return FeedbackKept()


def add_learning(app: FastAPI, supervisor: Supervisor) -> None:
    """Adds `/learning`."""

    @app.get("/learning")
    def learning() -> LearningStatus:
        """What the model has learned from feedback so far, and whether it learns now."""
        return _status(supervisor)

    @app.post("/learning")
    def switch(body: LearningSwitch) -> LearningStatus:
        """Turn learning on or off. Off ends a round that runs; its verdicts stay new."""
        return _changed(supervisor, lambda: supervisor.set_learning(body.on))

    @app.post("/learning/rollback")
    def rollback(body: RollbackRequest) -> LearningStatus:
        """Use an earlier version again. Learning continues with the next verdicts."""
        return _changed(supervisor, lambda: supervisor.rollback(body.version))


class LearningCollector(Collector):
    """Reads the figures of a supervisor when metrics are requested."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        status = self._supervisor.status()
        yield GaugeMetricFamily("rlchat_version", "Number of the active version; 0: the original model.", status.active)
        yield GaugeMetricFamily("rlchat_verdicts", "Verdicts that count.", status.verdicts)
        yield GaugeMetricFamily("rlchat_verdicts_new", "Verdicts that no round has used.", status.new)
        yield GaugeMetricFamily(
            "rlchat_training", "Whether a round of training runs.", status.training_since is not None
        )
        yield CounterMetricFamily("rlchat_versions_accepted", "Versions that passed the gate.", status.accepted)
        yield CounterMetricFamily("rlchat_versions_rejected", "Versions that did not pass.", status.rejected)
        yield CounterMetricFamily("rlchat_training_seconds", "Time of all rounds.", status.training_seconds)


def _model_of(body: FeedbackRequest, active: Loaded, supervisor: Supervisor | None) -> tuple[str, str]:
    """The file name and the identity of the model that generated the judged response; it may be another server's."""
    if body.model in (None, active.version):
        return active.version, active.model_id
    return body.model, "" if supervisor is None else supervisor.model_id_of(body.model)


def _changed(supervisor: Supervisor, change: Callable[[], object]) -> LearningStatus:
    """Where learning stands after ``change``. Raises :class:`APIError` if that fails."""
    try:
        change()
    except UserError as error:
        raise _api_error(error, "the server cannot write its state: see its log") from error
    return _status(supervisor)


def _api_error(error: UserError, if_disk: str) -> APIError:
    if isinstance(error.__cause__, OSError):  # not the client's fault, and it must not see the path
        log.error("%s", error)
        return APIError(507, if_disk)
    return APIError(400, _without_folders(str(error)))


def _without_folders(text: str) -> str:
    """``text`` with names of files in place of their paths."""
    return _FOLDERS.sub("", text)


def _status(supervisor: Supervisor) -> LearningStatus:
    status = supervisor.status()
    usable = [number for number in status.previous if number in status.versions]
    return LearningStatus(
        on=status.on,
        every=status.every,
        verdicts=status.verdicts,
        new=status.new,
        bad_lines=status.bad_lines,
        version=status.active,
        file=status.path.name,
        versions=list(status.versions),
        previous=usable[-1] if usable else None,
        training_seconds=None if status.training_since is None else max(0.0, time.time() - status.training_since),
        rounds=[_round(outcome) for outcome in status.rounds],
        error=None if status.error is None else _without_folders(status.error),
        notices=[_without_folders(notice) for notice in status.notices],
        failures=status.failures,
    )


def _round(outcome: Outcome) -> LearningRound:
    return LearningRound(
        version=outcome.number,
        sentence=_without_folders(outcome.sentence),
        notes=list(outcome.notes),
        date=outcome.date,
        verdicts=outcome.verdicts,
        before=measures_of(outcome.before),
        after=measures_of(outcome.after),
        seconds=outcome.seconds,
    )
