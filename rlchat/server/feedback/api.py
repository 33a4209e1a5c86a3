"""The endpoints `/feedback` and `/learning`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastapi import FastAPI, Request
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rlchat.chat.feedback import Correction, append_feedback, client_digest, feedback_id
from rlchat.chat.learning.rounds import Outcome
from rlchat.chat.learning.supervisor import Supervisor
from rlchat.chat.learning.tally import Tally, names_of
from rlchat.chat.verdicts import recent_clients
from rlchat.errors import UserError
from rlchat.server.engine import Engine, Loaded
from rlchat.server.errors import APIError
from rlchat.server.feedback.caps import HOUR, Caps, VerdictCounter
from rlchat.server.feedback.clients import Addresses
from rlchat.server.feedback.names import FileNames
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

_SEE_LOG = "see the server's log"


def add_feedback(
    app: FastAPI, path: Path, engine: Engine, metrics: Metrics, supervisor: Supervisor | None, caps: Caps
) -> None:
    """Adds `/feedback`, which appends verdicts to the file ``path``. ``caps`` limit them if there is a supervisor.

    The verdicts of the last hour in the file count, so that a restart does not lift the limits. If there is a
    supervisor, each line has a digest of the address that it came from. A client without a name is its address.

    Raises:
        UserError: the file cannot be read; the key of the digests of addresses cannot be read or written.
    """
    addresses = None if supervisor is None else Addresses(path)
    before = () if supervisor is None else recent_clients(path, HOUR, caps.in_all)
    counter, lock = VerdictCounter(caps, before), threading.Lock()
    standing, names = Tally(path, lambda _: True), FileNames([path])

    @app.post("/feedback")
    def add_feedback(body: FeedbackRequest, request: Request) -> FeedbackKept:
        """Save feedback on a response as training data. The last verdict on a response replaces earlier ones."""
        verdict = body.verdict or Correction(body.correction or "")
        model, model_id = _model_of(body, engine.loaded, supervisor)
        address = "" if addresses is None or request.client is None else addresses.digest(request.client.host)
        client = body.client or (f"address {address}" if address else "")
        keys = {"model": model, "model_id": model_id, "client": client, "address": address}
        with lock:
            try:
                if verdict == "none":  # always possible, but only once for each verdict: a client cannot fill the disk
                    standing.update()
                    if not standing.has(feedback_id(body.prompt, body.reply, client)):
                        return FeedbackKept(kept=False)
                elif supervisor is not None and (refusal := counter.refusal(client_digest(client))) is not None:
                    sentence, seconds = refusal
                    raise APIError(429, sentence, headers={"Retry-After": str(seconds)})
                append_feedback(path, body.prompt, body.reply, verdict, **keys)
            except UserError as error:
                raise _api_error(error, names, "the server cannot write feedback: see its log") from error
            if supervisor is not None:
                counter.take(client_digest(client))
        metrics.feedback.labels(body.verdict or "corrected").inc()
        if supervisor is not None:
            supervisor.notify()
        return FeedbackKept()


def add_learning(app: FastAPI, supervisor: Supervisor) -> None:
    """Adds `/learning`."""

    names = FileNames([supervisor.model, supervisor.feedback], [supervisor.path_of("1.pt").parent])

    @app.get("/learning")
    def learning() -> LearningStatus:
        """What the model has learned from feedback so far, and whether it learns now."""
        return _status(supervisor, names)

    @app.post("/learning")
    def switch(body: LearningSwitch) -> LearningStatus:
        """Turn learning on or off. Off ends a round that runs; its verdicts stay new."""
        return _changed(supervisor, names, lambda: supervisor.set_learning(body.on))

    @app.post("/learning/rollback")
    def rollback(body: RollbackRequest) -> LearningStatus:
        """Use an earlier version again. Learning continues with the next verdicts."""
        return _changed(supervisor, names, lambda: supervisor.rollback(body.version))


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


def _changed(supervisor: Supervisor, names: FileNames, change: Callable[[], object]) -> LearningStatus:
    """Where learning stands after ``change``. Raises :class:`APIError` if that fails."""
    try:
        change()
    except UserError as error:
        raise _api_error(error, names, "the server cannot write its state: see its log") from error
    return _status(supervisor, names)


def _api_error(error: UserError, names: FileNames, if_disk: str) -> APIError:
    if isinstance(error.__cause__, OSError):  # not the client's fault, and it must not see the path
        log.error("%s", error)
        return APIError(507, if_disk)
    if not (sentence := names.public(str(error), "")):
        log.error("%s", error)
    return APIError(400, sentence or f"the server cannot do that: {_SEE_LOG}")


def _status(supervisor: Supervisor, names: FileNames) -> LearningStatus:
    status = supervisor.status()
    usable = [number for number in status.previous if number in status.versions]
    return LearningStatus(
        on=status.on,
        every=status.every,
        verdicts=status.verdicts,
        new=status.new,
        bad_lines=status.bad_lines,
        others=sum(status.others.values()),
        other_models=names.public(names_of(status.others), "other models"),
        version=status.active,
        file=status.path.name,
        versions=list(status.versions),
        previous=usable[-1] if usable else None,
        training_seconds=None if status.training_since is None else max(0.0, time.time() - status.training_since),
        rounds=[_round(outcome, names) for outcome in status.rounds],
        error=None if status.error is None else names.public(status.error, f"learning has failed: {_SEE_LOG}"),
        notices=[names.public(notice, f"a file of a version has changed: {_SEE_LOG}") for notice in status.notices],
        failures=status.failures,
    )


def _round(outcome: Outcome, names: FileNames) -> LearningRound:
    unknown = "a figure of this round is only in the server's folder of versions"
    return LearningRound(
        version=outcome.number,
        sentence=names.public(outcome.sentence, unknown),
        remarks=[names.public(remark, unknown) for remark in outcome.remarks],
        learned_from=names.public(outcome.learned_from, unknown),
        date=outcome.date,
        verdicts=outcome.verdicts,
        before=measures_of(outcome.before),
        after=measures_of(outcome.after),
        seconds=outcome.seconds,
    )
