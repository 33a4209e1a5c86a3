"""What a server tells Prometheus about itself."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rlchat.server.engine import Engine

# From a small model's quick answer to a large one's long wait.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters and histograms of one server, with those of its ``engine``; ``paths`` are the ones it answers."""

    def __init__(self, engine: Engine, paths: tuple[str, ...]) -> None:
        self._paths = paths
        self._registry = CollectorRegistry()
        self._requests = Counter("rlchat_requests", "Answers sent.", ["path", "status"], registry=self._registry)
        self._seconds = Histogram(
            "rlchat_request_seconds",
            "From a request to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            "rlchat_first_token_seconds",
            "From a request to the first piece of its reply, where it is streamed; else to the whole reply.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.feedback = Counter("rlchat_feedback", "Pieces of feedback kept.", ["verdict"], registry=self._registry)
        self._registry.register(_EngineCollector(engine))
        ProcessCollector(registry=self._registry)  # memory, processor time, open files; on Linux

    def observe(self, path: str, status: int, seconds: float) -> None:
        """Counts an answer; ``status`` is 0 where the client went away before there was one."""
        known = path if path in self._paths else "other"  # a stranger cannot make up a million labels
        self._requests.labels(known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def text(self) -> bytes:
        """Everything in Prometheus's text format, version 0.0.4."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's own counts when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, counts = self._engine, self._engine.counts
        yield GaugeMetricFamily("rlchat_replies_running", "Replies being generated.", engine.running)
        yield GaugeMetricFamily("rlchat_replies_waiting", "Replies waiting for their turn.", engine.waiting)
        yield CounterMetricFamily("rlchat_prompt_tokens", "Tokens of prompts read.", counts.prompt_tokens)
        yield CounterMetricFamily("rlchat_generated_tokens", "Tokens of replies sampled.", counts.generated_tokens)
        yield CounterMetricFamily("rlchat_steps", "Steps of the model, a token of each reply.", counts.steps)
        yield CounterMetricFamily("rlchat_cancelled", "Replies that nobody wanted any more.", counts.cancelled)
