"""Prometheus metrics of one engine, in a registry of their own. They carry no prompts and no ids."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import generate_latest

from opd_async.telemetry.exporter import RoleMetrics


class EngineMetrics:
    """The `opd_engine_*` part of the catalogue in `opd_async.telemetry.metrics`, by short names."""

    def __init__(self, counters_file: Path | None = None) -> None:
        """Counters go on from `counters_file`, and are kept there."""
        metrics = RoleMetrics("engine", counters_file=counters_file)
        self.registry = metrics.registry
        self.running = metrics["opd_engine_running_requests"]
        self.waiting = metrics["opd_engine_waiting_requests"]
        self.kv_used = metrics["opd_engine_kv_used_tokens"]
        self.kv_cached = metrics["opd_engine_kv_cached_tokens"]
        self.generated = metrics["opd_engine_generated_tokens_total"]
        self.prompt = metrics["opd_engine_prompt_tokens_total"]
        self.cached = metrics["opd_engine_cached_tokens_total"]
        self.requests = metrics["opd_engine_finished_requests_total"]
        self.retractions = metrics["opd_engine_retracted_requests_total"]
        self.busy = metrics["opd_engine_busy_seconds_total"]
        self.steps = metrics["opd_engine_steps_total"]
        self.weight_load = metrics["opd_engine_weight_load_seconds"]

    def render(self) -> bytes:
        """The text exposition of all metrics."""
        return generate_latest(self.registry)
