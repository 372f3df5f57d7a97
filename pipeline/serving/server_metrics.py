"""Metrics of a server in the format of Prometheus, served under /metrics."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class ServerMetrics:
    """The metrics of one server; each server of a process has its own."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "mmerge_serve_requests",
            "Requests by model and HTTP status; 499 where the client left first.",
            ["model", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "mmerge_serve_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.answer_tokens = Counter(
            "mmerge_serve_answer_tokens", "Tokens of answers.", registry=registry
        )
        self.queued = Gauge("mmerge_serve_queued", "Prompts that wait.", registry=registry)
        self.running = Gauge(
            "mmerge_serve_running", "Requests from their first byte to the end.", registry=registry
        )
        self.waited = Histogram(
            "mmerge_serve_wait_seconds",
            "Seconds from the arrival of a prompt to its generation.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "mmerge_serve_first_token_seconds",
            "Seconds from the arrival of a prompt to the first text of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.took = Histogram(
            "mmerge_serve_request_seconds",
            "Seconds from the arrival of a prompt to the end of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "mmerge_serve_batch_prompts",
            "Prompts that are generated together.",
            buckets=_SIZES,
            registry=registry,
        )
        self.swaps = Counter(
            "mmerge_serve_swaps",
            "Changes to a newer build, by result: done or failed.",
            ["result"],
            registry=registry,
        )
        self.build = Gauge(
            "mmerge_serve_build", "1 for the build that answers.", ["build"], registry=registry
        )

    def show_build(self, build: str) -> None:
        """Note which build answers."""
        self.build.clear()
        self.build.labels(build).set(1)

    def to_text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self._registry)
