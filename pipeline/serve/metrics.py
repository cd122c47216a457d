"""Counters of a running server: for Prometheus, and as one log line a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from logitcask.pipeline.serve.service import CACHE, KEPT, UPSTREAM, Service

logger = logging.getLogger(__name__)

_SOURCES = (CACHE, KEPT, UPSTREAM)
_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The counters of one server, apart from those of any other in the process."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "logitcask_requests", "Requests to /v1/completions.", ["status"], registry=registry
        )
        self._prompts = Counter(
            "logitcask_prompts", "Prompts answered, by source.", ["source"], registry=registry
        )
        self._tokens = Counter(
            "logitcask_tokens", "Tokens of these prompts.", ["source"], registry=registry
        )
        self._seconds = Histogram(
            "logitcask_request_seconds",
            "Time from a request's last byte to its answer.",
            buckets=_BUCKETS,
            registry=registry,
        )
        for source in _SOURCES:
            self._prompts.labels(source)
            self._tokens.labels(source)
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "logitcask_upstream_requests": (
                "Requests sent to the upstream server.",
                lambda: service.upstream.asked if service.upstream else 0,
            ),
            "logitcask_kept_tokens": (
                "Tokens put on disk by this process.",
                lambda: service.keeper.kept_tokens if service.keeper else 0,
            ),
            "logitcask_open_tokens": (
                "Tokens answered and not yet on disk.",
                lambda: service.keeper.cache.open_tokens if service.keeper else 0,
            ),
        }
        for name, (description, value) in gauges.items():
            Gauge(name, description, registry=registry).set_function(value)
        self._new = dict.fromkeys(_SOURCES, 0)
        self._new_tokens = 0
        self._slowest = 0.0
        self._since = time.monotonic()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def answered(self, source: str, tokens: int) -> None:
        """A prompt of so many tokens."""
        self._prompts.labels(source).inc()
        self._tokens.labels(source).inc(tokens)
        self._new[source] += 1
        self._new_tokens += tokens

    def took(self, seconds: float) -> None:
        """The time of a request that was answered."""
        self._seconds.observe(seconds)
        self._slowest = max(self._slowest, seconds)

    def log(self) -> None:
        """One line about the requests since the last line; none without requests."""
        now = time.monotonic()
        keeper = self._service.keeper
        if any(self._new.values()):
            logger.info(
                "%.0f s: %s prompts of %s tokens: %s from caches, %s kept before, %s from upstream; slowest %.2f s%s",
                now - self._since,
                f"{sum(self._new.values()):,}",
                f"{self._new_tokens:,}",
                *(f"{self._new[source]:,}" for source in _SOURCES),
                self._slowest,
                f"; {keeper.cache.sequences:,} sequences kept" if keeper else "",
            )
        self._new, self._new_tokens = dict.fromkeys(_SOURCES, 0), 0
        self._slowest, self._since = 0.0, now
