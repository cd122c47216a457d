"""Counters of a running server: for Prometheus, and as one log line a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from logitcask.pipeline.serve.service import CACHE, KEPT, UPSTREAM, Service

logger = logging.getLogger(__name__)

_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The counters of one server, apart from those of any other in the process."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "logitcask_requests", "Requests to /v1/completions.", ["status"], registry=registry
        )
        self.prompts = Counter(
            "logitcask_prompts", "Prompts answered, by source.", ["source"], registry=registry
        )
        self.tokens = Counter(
            "logitcask_tokens", "Tokens of these prompts.", ["source"], registry=registry
        )
        self.seconds = Histogram(
            "logitcask_request_seconds",
            "Time from a request's last byte to its answer.",
            buckets=_BUCKETS,
            registry=registry,
        )
        for source in (CACHE, KEPT, UPSTREAM):
            self.prompts.labels(source)
            self.tokens.labels(source)
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
        self._before: dict[str, float] = {}
        self._slowest = 0.0
        self._since = time.monotonic()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def took(self, seconds: float) -> None:
        self.seconds.observe(seconds)
        self._slowest = max(self._slowest, seconds)

    def log(self) -> None:
        """One line about the requests since the last line; none without requests."""
        now = {
            f"{name} {source}": counter.labels(source)._value.get()
            for name, counter in (("prompts", self.prompts), ("tokens", self.tokens))
            for source in (CACHE, KEPT, UPSTREAM)
        }
        new = {name: value - self._before.get(name, 0) for name, value in now.items()}
        self._before = now
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        slowest, self._slowest = self._slowest, 0.0
        prompts = sum(value for name, value in new.items() if name.startswith("prompts"))
        if not prompts:
            return
        tokens = sum(value for name, value in new.items() if name.startswith("tokens"))
        keeper = self._service.keeper
        logger.info(
            "%.0f s: %s prompts of %s tokens: %s from caches, %s kept before, %s from upstream; slowest %.2f s%s",
            seconds,
            f"{prompts:,.0f}",
            f"{tokens:,.0f}",
            f"{new[f'prompts {CACHE}']:,.0f}",
            f"{new[f'prompts {KEPT}']:,.0f}",
            f"{new[f'prompts {UPSTREAM}']:,.0f}",
            slowest,
            f"; {keeper.cache.sequences:,} sequences kept" if keeper else "",
        )
