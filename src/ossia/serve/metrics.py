"""Figures for Prometheus, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 400, 800)


class Metrics:
    """Counts of one process. Labels take values from fixed sets only: paths of the API, names of served models."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("ossia_requests", "Requests answered", ["endpoint", "status"], registry=self.registry)
        self.prompt_tokens = Counter("ossia_prompt_tokens", "Tokens of prompts", ["model"], registry=self.registry)
        self.answer_tokens = Counter("ossia_completion_tokens", "Tokens generated", ["model"], registry=self.registry)
        self.cancelled = Counter(
            "ossia_cancelled", "Answers given up because the client left or a stop text came", registry=self.registry
        )
        self.first_token = Histogram(
            "ossia_time_to_first_token_seconds",
            "From admission to the first token of an answer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.rate = Histogram(
            "ossia_tokens_per_second",
            "Rate of one answer after its first token",
            buckets=_RATES,
            registry=self.registry,
        )

    def watch(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Report how many answers wait for their first token and how many are being generated."""
        for name, help, count in (
            ("ossia_queue_depth", "Answers that wait for their first token", waiting),
            ("ossia_running", "Answers that are being generated", running),
        ):
            Gauge(name, help, registry=self.registry).set_function(count)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)
