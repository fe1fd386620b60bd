"""Declare every metric of the system in one catalogue, and write the documentation page from it.

    python -m opd_async.telemetry.metrics    prints docs/metrics.md

Names are `opd_<role>_<what>_<unit>`; counters end in `_total`. `opd_async.telemetry.exporter` makes the metrics of a
process from the catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MetricKind(StrEnum):
    """How a metric behaves; the values are Prometheus's names."""

    COUNTER = "counter"
    """Only grows; look at its rate."""
    GAUGE = "gauge"
    """The value now."""
    HISTOGRAM = "histogram"
    """Observations counted by bucket; look at its quantiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One entry of the catalogue. `buckets` are inclusive upper bounds, without infinity."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    absent: bool = False
    """A gauge that has no value until it is set, and none while it is set to None: what was not computed is not 0."""

    @property
    def role(self) -> str:
        """The role that exports the metric: the second word of its name."""
        return self.name.split("_")[1]


_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)
_TOKENS = tuple(float(2**power) for power in range(6, 18))
_STALENESS = tuple(float(steps) for steps in range(17))


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=name, kind=MetricKind.COUNTER, help=text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=name, kind=MetricKind.GAUGE, help=text, labels=labels)


def _figure(name: str, text: str) -> Metric:
    return Metric(name=name, kind=MetricKind.GAUGE, help=f"{text} Absent where it is not computed.", absent=True)


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name=name, kind=MetricKind.HISTOGRAM, help=text, buckets=buckets)


def _lag(role: str) -> Metric:
    return _histogram(f"opd_{role}_loop_lag_seconds", "How late the event loop woke up from a sleep.", _LAG)


def _strangers(role: str) -> Metric:
    text = "Connections and messages refused: no key of this run, or another's name."
    return _counter(f"opd_{role}_strangers_total", text)


CATALOGUE: tuple[Metric, ...] = (
    _gauge("opd_launcher_step", "Optimizer steps taken."),
    _gauge("opd_launcher_weight_version", "Weight version that every student engine has loaded."),
    _gauge("opd_launcher_leases_active", "Leases out: samples being generated, scored or waiting to be trained."),
    _counter("opd_launcher_restarts_total", "Restarts of a role's process.", "role"),
    _counter("opd_launcher_hangs_total", "Processes that hung: killed where the run started them.", "role"),
    _counter("opd_launcher_slow_engines_total", "Engines found to be far slower than their peers.", "engine"),
    _counter("opd_launcher_foreign_weights_total", "Engines found paused, or with other weights.", "role"),
    _counter("opd_launcher_trained_tokens_total", "Response tokens trained."),
    _counter("opd_launcher_failures_total", "Failures that roles reported.", "kind"),
    _strangers("launcher"),
    _counter("opd_launcher_malformed_total", "Messages dropped because they do not decode, or say what cannot be."),
    _counter("opd_launcher_unwritten_total", "Rows of metrics.jsonl and lines of logs that no disk took.", "kind"),
    _lag("launcher"),
    _counter("opd_rollout_tokens_total", "Response tokens generated."),
    _counter("opd_rollout_chunks_total", "Chunks sent to teachers, resent ones not counted."),
    _gauge("opd_rollout_running_requests", "Generations running in the student engines."),
    _counter("opd_rollout_idle_seconds_total", "Time without any running generation."),
    _counter("opd_rollout_blocked_seconds_total", "Time in which engines were paused for a weight update."),
    _counter("opd_rollout_resent_chunks_total", "Chunks sent again, unacknowledged or after a teacher died."),
    _counter("opd_rollout_engine_errors_total", "Failed requests to student engines.", "kind"),
    _gauge("opd_rollout_breaker_open", "1 while an engine is given no requests because it failed.", "engine"),
    _histogram("opd_rollout_reward_seconds", "From the end of a response to its reward.", _SECONDS),
    _counter("opd_rollout_reward_failures_total", "Responses without a reward: timeout, error, worker_died.", "kind"),
    _gauge("opd_rollout_unacknowledged_chunks", "Chunks kept until the learner acknowledges them."),
    _lag("rollout"),
    _gauge("opd_engine_running_requests", "Requests that hold keys and values."),
    _gauge("opd_engine_waiting_requests", "Requests in the queue."),
    _gauge("opd_engine_kv_used_tokens", "Cache slots held by running requests."),
    _gauge("opd_engine_kv_cached_tokens", "Cache slots that only the prefix cache holds."),
    _counter("opd_engine_generated_tokens_total", "Tokens sampled."),
    _counter("opd_engine_prompt_tokens_total", "Prompt tokens of admitted requests."),
    _counter("opd_engine_cached_tokens_total", "Prompt tokens served from the prefix cache."),
    _counter("opd_engine_finished_requests_total", "Requests that finished or were aborted."),
    _counter("opd_engine_retracted_requests_total", "Times that a request lost its keys and values."),
    _counter("opd_engine_busy_seconds_total", "Time spent in model steps."),
    _counter("opd_engine_steps_total", "Model steps."),
    _histogram("opd_engine_weight_load_seconds", "Receiving and loading one weight update.", _SECONDS),
    _counter("opd_teacher_scored_tokens_total", "Response tokens scored."),
    _counter("opd_teacher_computed_tokens_total", "Tokens that teacher engines computed, prefixes included."),
    _counter("opd_teacher_cached_tokens_total", "Tokens that teacher engines took from their prefix cache."),
    _counter("opd_teacher_batches_total", "Scoring batches sent to teacher engines."),
    _histogram("opd_teacher_batch_tokens", "New tokens in a scoring batch.", _TOKENS),
    _gauge("opd_teacher_queue_tokens", "New tokens that wait for a scoring batch."),
    _counter("opd_teacher_idle_seconds_total", "Time without any scoring batch in flight."),
    _histogram("opd_teacher_score_latency_seconds", "From the last token of a sample to its score.", _SECONDS),
    _strangers("teacher"),
    _counter("opd_teacher_malformed_total", "Frames dropped because they do not decode to the schema.", "kind"),
    _gauge(
        "opd_teacher_held_tokens",
        "New tokens that wait for the end of their response because the prefix cache does not hold.",
    ),
    _gauge("opd_teacher_prefix_share", "Share of known prefixes that the engine still had in its cache.", "engine"),
    _gauge("opd_teacher_breaker_open", "1 while an engine is given no work because it failed.", "engine"),
    _counter("opd_teacher_retries_total", "Scoring batches that failed, to be sent again.", "kind"),
    _counter("opd_teacher_rerouted_chunks_total", "Chunks taken back from an engine that could not score them."),
    _counter("opd_teacher_canaries_total", "Test texts scored, by what they said of the engine.", "result"),
    _counter("opd_teacher_orphan_chunks_total", "Chunks dropped because the start of their sample never came."),
    _lag("teacher"),
    _counter("opd_intake_scored_tokens_total", "Scored tokens received, duplicates not counted."),
    _gauge("opd_intake_backlog_tokens", "Scored tokens that wait to be trained."),
    _counter("opd_intake_duplicates_total", "Chunks received more than once."),
    _strangers("intake"),
    _counter("opd_intake_malformed_total", "Frames dropped because they do not decode to the schema.", "kind"),
    _figure("opd_intake_reward_mean", "Mean reward of the responses that the last step completed."),
    _counter("opd_intake_unwritten_rows_total", "Rows of trained.jsonl that no disk took."),
    _counter("opd_intake_steps_total", "Steps taken from the held tokens and sent to the learner."),
    _histogram("opd_intake_response_tokens", "Length of each response, when a step takes its end.", _TOKENS),
    _figure("opd_intake_at_limit_share", "Share of the responses ending in the last step that the limit ended."),
    _figure("opd_intake_prompt_tokens_mean", "Mean length of the prompts of these responses, in tokens."),
    _figure(
        "opd_intake_sampled_entropy",
        "Mean of -log mu on the last step's tokens, sampled by weights mu: an estimate of mu's entropy, in nats.",
    ),
    _figure("opd_intake_budget_share", "Tokens of the last step for each token of schedule.tokens_per_step."),
    _gauge(
        "opd_intake_teacher_kl",
        "With several teachers: mean of log mu - log q on the last step's tokens that this one scored, in nats.",
        "teacher",
    ),
    _gauge("opd_intake_teacher_share", "With several teachers: share of the last step's tokens.", "teacher"),
    _counter("opd_intake_filtered_total", "Responses that `schedule.filter` kept from being trained."),
    _counter("opd_intake_cuts_total", "Responses trained in part because of a deadline."),
    _histogram("opd_intake_staleness_steps", "Age of each token when it is trained, in steps.", _STALENESS),
    _counter("opd_intake_recompute_tokens_total", "Tokens forwarded again as the prefix of a cut response."),
    _lag("intake"),
    _counter("opd_learner_steps_total", "Optimizer steps taken."),
    _counter("opd_learner_tokens_total", "Response tokens trained, over all data-parallel ranks."),
    _histogram("opd_learner_step_seconds", "Forward, backward and update of a step.", _SECONDS),
    _counter("opd_learner_idle_seconds_total", "Time spent waiting for a step's tokens."),
    _histogram("opd_learner_weight_sync_seconds", "Sending the weights to all engines.", _SECONDS),
    _figure("opd_learner_loss", "Loss of the last step, a mean over its tokens."),
    _figure("opd_learner_grad_norm", "Norm of the last step's gradient before clipping."),
    _figure("opd_learner_learning_rate", "Learning rate of the last step."),
    _figure(
        "opd_learner_reverse_kl",
        "KL(p ‖ q) of the present student p and the teacher q at the last step's prefixes, in nats: exact with "
        "`reverse_kl_full` and `minillm_full`, else estimated by the mean of p/mu (log p - log q) over the tokens that "
        "weights mu sampled.",
    ),
    _figure("opd_learner_ratio_std", "Root mean square of p/mu - 1 over the last step's sampled tokens."),
    _figure("opd_learner_clipped_share", "Share of the last step's tokens whose importance ratio was clipped."),
)
ROLES: tuple[str, ...] = tuple(dict.fromkeys(metric.role for metric in CATALOGUE))


def markdown() -> str:
    """Write the page docs/metrics.md."""
    parts = [_PAGE_HEAD]
    for role in ROLES:
        rows = [_row(metric) for metric in CATALOGUE if metric.role == role]
        parts.append("\n".join([f"## {role.capitalize()}", "", "| metric | kind | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _row(metric: Metric) -> str:
    labels = f"{{{', '.join(metric.labels)}}}" if metric.labels else ""
    buckets = f" Buckets {metric.buckets[0]:g} to {metric.buckets[-1]:g}." if metric.buckets else ""
    return f"| `{metric.name}{labels}` | {metric.kind.value} | {metric.help}{buckets} |"


_PAGE_HEAD = """\
# Metrics

Made by `python -m opd_async.telemetry.metrics` from the catalogue in its source; a test keeps this page equal to it.

Every process answers Prometheus on a port of its own with its role's metrics and no others; none of them carries a
prompt or a response. The run's folder holds `targets.json`, a file for Prometheus' `file_sd_configs` in which every
target has a `process` label (`rollout-0`, `learner-0`, ...), and the engines and actors of a teacher have a `teacher`
label. `dashboards/` has a Grafana dashboard."""


if __name__ == "__main__":
    print(markdown(), end="")
