"""Prometheus metrics of the server."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rlchat.server.engine import Engine

# Buckets from the latency of a small model to that of a large one under load.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters and histograms of one server and its ``engine``. ``paths`` are the known request paths."""

    def __init__(self, engine: Engine) -> None:
        self.paths: frozenset[str] = frozenset()
        self._registry = CollectorRegistry()
        self._requests = Counter("rlchat_requests", "HTTP responses sent.", ["path", "status"], registry=self._registry)
        self._seconds = Histogram(
            "rlchat_request_seconds",
            "Time from a request to the end of its HTTP response.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            "rlchat_first_token_seconds",
            "Time from a request to the first piece of its response if streamed, else to the whole response.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.feedback = Counter("rlchat_feedback", "Feedback saved.", ["verdict"], registry=self._registry)
        self._registry.register(_EngineCollector(engine))
        ProcessCollector(registry=self._registry)  # memory, processor time, open files; on Linux

    def add(self, collector: Collector) -> None:
        """Also show the metrics of ``collector``."""
        self._registry.register(collector)

    def observe(self, path: str, status: int, seconds: float) -> None:
        """Count an HTTP response; ``status`` is 0 if the client disconnected before it."""
        known = path if path in self.paths else "other"  # clients must not be able to create labels
        self._requests.labels(known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format, version 0.0.4."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's totals when metrics are requested."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, counts = self._engine, self._engine.counts
        yield GaugeMetricFamily("rlchat_replies_running", "Responses being generated.", engine.running)
        yield GaugeMetricFamily("rlchat_replies_waiting", "Responses in the queue.", engine.waiting)
        yield CounterMetricFamily("rlchat_prompt_tokens", "Prompt tokens processed.", counts.prompt_tokens)
        yield CounterMetricFamily("rlchat_generated_tokens", "Tokens generated.", counts.generated_tokens)
        yield CounterMetricFamily("rlchat_steps", "Forward passes of the model, one token per response.", counts.steps)
        yield CounterMetricFamily("rlchat_cancelled", "Responses cancelled by clients.", counts.cancelled)
