"""Prometheus metrics of one engine, in a registry of their own. They carry no prompts and no ids."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class EngineMetrics:
    """Counters and gauges named `opd_engine_<what>_<unit>`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.running = self._gauge("running_requests", "Requests that hold KV")
        self.waiting = self._gauge("waiting_requests", "Requests in the queue")
        self.kv_used = self._gauge("kv_used_tokens", "KV slots held by running requests")
        self.kv_cached = self._gauge("kv_cached_tokens", "KV slots that only the prefix cache holds")
        self.generated = self._counter("generated_tokens", "Tokens sampled")
        self.prompt = self._counter("prompt_tokens", "Prompt tokens of admitted requests")
        self.cached = self._counter("cached_tokens", "Prompt tokens served from the prefix cache")
        self.requests = self._counter("finished_requests", "Requests that finished or were aborted")
        self.retractions = self._counter("retracted_requests", "Times that a request lost its KV")
        self.busy = self._counter("busy_seconds", "Time spent in model steps")
        self.steps = self._counter("steps", "Model steps")
        self.weight_load = Histogram(
            "opd_engine_weight_load_seconds", "Time to receive and load weights", registry=self.registry
        )

    def render(self) -> bytes:
        """The text exposition of all metrics."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"opd_engine_{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"opd_engine_{name}", text, registry=self.registry)
