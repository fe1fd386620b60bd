"""Declare every metric of the system in one catalogue, and write the documentation page from it.

    python -m opd_async.telemetry.metrics    prints docs/metrics.md

Names are `opd_<role>_<what>_<unit>`; counters end in `_total`. `opd_async.telemetry.exporter` makes the metrics of a
process from the catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from opd_async.errors import EngineFault


class MetricKind(StrEnum):
    """How a metric behaves; the values are Prometheus's names."""

    COUNTER = "counter"
    """Only grows; look at its rate."""
    GAUGE = "gauge"
    """The value now."""
    HISTOGRAM = "histogram"
    """Observations counted by bucket; look at its quantiles."""


class Feature(StrEnum):
    """What a run may do without. Where it does, the metrics of it have no series."""

    REWARDS = "rewards"
    TEACHERS = "several teachers"
    FILTER = "`schedule.filter`"
    BUDGET = "`schedule.train_on: tokens`"
    BOUND = "`schedule.max_staleness`"
    EVALUATION = "held-out prompts"
    SLOW_ENGINES = "`supervisor.slow_engine`"
    TRACKERS = "`tracking.trackers`"
    EPISODES = "`rollout.function`"
    ENDPOINT = "`rollout.endpoint: true`"
    TOOLS = "`rollout.tools`"
    UPLOADS = "`checkpoint.upload`"


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
    begins: tuple[str, ...] = ()
    """Values of a counter's one label that are there from the start, at 0: of a series that begins at 1, Prometheus'
    `increase` misses the first event. Values that only a plan knows are begun by `RoleMetrics.begin`."""
    needs: Feature | None = None
    """The metric is only of runs that do this."""

    @property
    def role(self) -> str:
        """The role that exports the metric: the second word of its name."""
        return self.name.split("_")[1]


_PREFERRED = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)
"""Ten numbers a decade (Renard's): a quantile that is interpolated between two of them is off by an eighth at most."""


def _decades(first: int, last: int) -> tuple[float, ...]:
    """Bounds from 10**first to 10**last."""
    inner = (float(f"{step}e{power}") for power in range(first, last) for step in _PREFERRED)
    return (*inner, 10.0**last)


_LAG = _decades(-4, 1)
_SECONDS = _decades(-3, 3)
_TOKENS = (*map(float, range(1, 8)), *(float(2**power * part // 8) for power in range(3, 17) for part in range(8, 16)))
"""Each bound is an eighth or less above the one before."""
_STALENESS = (*map(float, range(17)), 20.0, 24.0, 32.0, 48.0, 64.0, 128.0)


def _counter(name: str, text: str, *labels: str, begins: tuple[str, ...] = (), needs: Feature | None = None) -> Metric:
    return Metric(name=name, kind=MetricKind.COUNTER, help=text, labels=labels, begins=begins, needs=needs)


def _gauge(name: str, text: str, *labels: str, needs: Feature | None = None) -> Metric:
    return Metric(name=name, kind=MetricKind.GAUGE, help=text, labels=labels, needs=needs)


def _figure(name: str, text: str, needs: Feature | None = None) -> Metric:
    text = f"{text} Absent where it is not computed."
    return Metric(name=name, kind=MetricKind.GAUGE, help=text, absent=True, needs=needs)


def _histogram(name: str, text: str, buckets: tuple[float, ...], needs: Feature | None = None) -> Metric:
    return Metric(name=name, kind=MetricKind.HISTOGRAM, help=text, buckets=buckets, needs=needs)


def _lag(role: str) -> Metric:
    return _histogram(f"opd_{role}_loop_lag_seconds", "How late the event loop woke up from a sleep.", _LAG)


def _strangers(role: str) -> Metric:
    text = "Connections and messages refused: no key of this run, or another's name."
    return _counter(f"opd_{role}_strangers_total", text)


_FAULTS = tuple(fault.value for fault in EngineFault)

CATALOGUE: tuple[Metric, ...] = (
    _gauge("opd_launcher_step", "Optimizer steps taken."),
    _gauge("opd_launcher_steps_wanted", "Optimizer steps of the whole run: `schedule.steps`."),
    _gauge("opd_launcher_learner_ranks", "Ranks of the learner: fewer while the run goes on without one of its hosts."),
    _gauge("opd_launcher_weight_version", "Weight version that every student engine has loaded."),
    _gauge("opd_launcher_leases_active", "Leases out: samples being generated, scored or waiting to be trained."),
    _counter("opd_launcher_restarts_total", "Restarts of a role's process.", "role"),
    _counter("opd_launcher_hangs_total", "Processes that hung: killed where the run started them.", "role"),
    _counter(
        "opd_launcher_slow_engines_total",
        "Engines found to be far slower than their peers.",
        "engine",
        needs=Feature.SLOW_ENGINES,
    ),
    _counter("opd_launcher_foreign_weights_total", "Engines found paused, or with other weights.", "role"),
    _counter("opd_launcher_trained_tokens_total", "Response tokens trained."),
    _counter(
        "opd_launcher_failures_total", "Failures that roles reported.", "kind", begins=("rollout", "teacher", "intake")
    ),
    _strangers("launcher"),
    _counter("opd_launcher_malformed_total", "Messages dropped because they do not decode, or say what cannot be."),
    _counter(
        "opd_launcher_unwritten_total",
        "Rows of metrics.jsonl and lines of logs that no disk took.",
        "kind",
        begins=("row", "line"),
    ),
    _counter(
        "opd_launcher_tracker_lost_total",
        "Rows that a tracker did not get: it raised, hung, or was slower than the run.",
        "tracker",
        needs=Feature.TRACKERS,
    ),
    _counter(
        "opd_launcher_uploads_total",
        "Checkpoints and exports copied to `checkpoint.upload`, or not.",
        "result",
        begins=("done", "failed", "skipped"),
        needs=Feature.UPLOADS,
    ),
    _figure(
        "opd_launcher_tokens_per_device_second",
        "Tokens that the last step trained, for each second since the step before and each device of the run.",
    ),
    _figure(
        "opd_launcher_planned_share",
        "Tokens a second of the last step, as a share of telemetry.planned_tokens_per_s.",
    ),
    _gauge(
        "opd_launcher_evaluation_score",
        "Share of right responses in the student's last evaluation, where answers or rewards judge.",
        "set",
        needs=Feature.EVALUATION,
    ),
    _gauge(
        "opd_launcher_evaluation_reverse_kl",
        "Reverse KL to the teacher in the student's last evaluation, where the teacher judges, in nats a token.",
        "set",
        needs=Feature.EVALUATION,
    ),
    _gauge(
        "opd_launcher_evaluation_forward_kl",
        "Forward KL to the teacher in the student's last evaluation, with evaluation.teacher_topk, in nats a token.",
        "set",
        needs=Feature.EVALUATION,
    ),
    _gauge(
        "opd_launcher_evaluation_step",
        "Steps behind the weights of the student's last evaluation.",
        "set",
        needs=Feature.EVALUATION,
    ),
    _lag("launcher"),
    _counter("opd_rollout_tokens_total", "Response tokens generated."),
    _counter("opd_rollout_chunks_total", "Chunks sent to teachers, resent ones not counted."),
    _gauge("opd_rollout_running_requests", "Generations running in the student engines."),
    _counter("opd_rollout_idle_seconds_total", "Time without any running generation."),
    _counter("opd_rollout_blocked_seconds_total", "Time in which engines were paused for a weight update."),
    _counter("opd_rollout_resent_chunks_total", "Chunks sent again, unacknowledged or after a teacher died."),
    _counter("opd_rollout_engine_errors_total", "Failed requests to student engines.", "kind", begins=_FAULTS),
    _gauge("opd_rollout_breaker_open", "1 while an engine is given no requests because it failed.", "engine"),
    _counter(
        "opd_rollout_episodes_total",
        "Episodes that have ended: finished, empty (nothing sampled), full; or failed: raised, deadline, diverged.",
        "end",
        begins=("finished", "empty", "full", "raised", "deadline", "diverged"),
        needs=Feature.EPISODES,
    ),
    _counter(
        "opd_rollout_tool_calls_total",
        "Calls of tools: answered, cut (answered, too long); or raised, unknown (no such tool), deadline, died.",
        "result",
        begins=("answered", "cut", "raised", "unknown", "deadline", "died"),
        needs=Feature.TOOLS,
    ),
    _counter(
        "opd_rollout_chat_requests_total",
        "Chat requests of agents: extended (went on with a conversation), begun (another one); or refused, full, "
        "unauthorized (no episode has the key), left (its agent or episode was gone before the answer).",
        "result",
        begins=("extended", "begun", "refused", "full", "unauthorized", "left"),
        needs=Feature.ENDPOINT,
    ),
    _histogram("opd_rollout_reward_seconds", "From the end of a response to its reward.", _SECONDS, Feature.REWARDS),
    _counter(
        "opd_rollout_reward_failures_total",
        "Responses without a reward: timeout, error, worker_died.",
        "kind",
        begins=("timeout", "error", "worker_died"),
        needs=Feature.REWARDS,
    ),
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
    _counter(
        "opd_teacher_malformed_total", "Frames and chunks dropped because they cannot be.", "kind", begins=("chunk",)
    ),
    _gauge(
        "opd_teacher_held_tokens",
        "New tokens that wait for the end of their response because the prefix cache does not hold.",
    ),
    _gauge("opd_teacher_prefix_share", "Share of known prefixes that the engine still had in its cache.", "engine"),
    _gauge("opd_teacher_breaker_open", "1 while an engine is given no work because it failed.", "engine"),
    _counter("opd_teacher_retries_total", "Scoring batches that failed, to be sent again.", "kind", begins=_FAULTS),
    _counter("opd_teacher_rerouted_chunks_total", "Chunks taken back from an engine that could not score them."),
    _counter(
        "opd_teacher_canaries_total",
        "Test texts scored, by what they said of the engine.",
        "result",
        begins=("passed", "failed", "insane"),
    ),
    _counter("opd_teacher_orphan_chunks_total", "Chunks dropped because the start of their sample never came."),
    _lag("teacher"),
    _counter("opd_intake_scored_tokens_total", "Scored tokens received, duplicates not counted."),
    _gauge("opd_intake_backlog_tokens", "Scored tokens that wait to be trained."),
    _counter("opd_intake_duplicates_total", "Chunks received more than once."),
    _counter("opd_intake_late_answers_total", "Answers of other intakes that nobody waited for any more."),
    _strangers("intake"),
    _counter(
        "opd_intake_malformed_total",
        "Frames and chunks dropped because they cannot be.",
        "kind",
        begins=("frame", "chunk"),
    ),
    _figure("opd_intake_reward_mean", "Mean reward of the responses that the last step completed.", Feature.REWARDS),
    _counter("opd_intake_unwritten_rows_total", "Rows of trained.jsonl that no disk took."),
    _counter("opd_intake_steps_total", "Steps taken from the held tokens and sent to the learner."),
    _histogram("opd_intake_response_tokens", "Length of each response, when a step takes its end.", _TOKENS),
    _figure("opd_intake_at_limit_share", "Share of the responses ending in the last step that the limit ended."),
    _figure("opd_intake_prompt_tokens_mean", "Mean length of the prompts of these responses, in tokens."),
    _figure(
        "opd_intake_sampled_entropy",
        "Mean of -log mu on the last step's tokens, sampled by weights mu: an estimate of mu's entropy, in nats.",
    ),
    _figure(
        "opd_intake_budget_share", "Tokens of the last step for each token of schedule.tokens_per_step.", Feature.BUDGET
    ),
    _gauge(
        "opd_intake_teacher_kl",
        "With several teachers: mean of log mu - log q on the last step's tokens that this one scored, in nats.",
        "teacher",
        needs=Feature.TEACHERS,
    ),
    _gauge(
        "opd_intake_teacher_share",
        "With several teachers: share of the last step's tokens.",
        "teacher",
        needs=Feature.TEACHERS,
    ),
    _counter(
        "opd_intake_filtered_total", "Responses that `schedule.filter` kept from being trained.", needs=Feature.FILTER
    ),
    _counter("opd_intake_cuts_total", "Responses trained in part because of a deadline."),
    _histogram("opd_intake_staleness_steps", "Age of each token when it is trained, in steps.", _STALENESS),
    _figure("opd_intake_oldest_steps", "Age of the oldest token of the last step, in steps."),
    _gauge("opd_intake_bound_steps", "Largest age that a trained token may have, in steps.", needs=Feature.BOUND),
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
    _counter("opd_host_busy_seconds_total", "Processor time of everything on the host, over all cores."),
    _gauge("opd_host_cores", "Cores of the host."),
    _gauge("opd_host_memory_bytes", "Memory of the host."),
    _gauge("opd_host_memory_available_bytes", "Memory that processes of the host could still get."),
    _gauge("opd_host_gpu_memory_bytes", "Memory of each GPU, where NVML answers.", "gpu"),
    _gauge("opd_host_gpu_memory_used_bytes", "Memory in use of each GPU, by whomever, where NVML answers.", "gpu"),
    _gauge("opd_host_gpu_busy_share", "Share of time in which a kernel ran on each GPU, where NVML answers.", "gpu"),
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
    needs = f" Only with {metric.needs.value}." if metric.needs is not None else ""
    return f"| `{metric.name}{labels}` | {metric.kind.value} | {metric.help}{buckets}{needs} |"


_PAGE_HEAD = """\
# Metrics

Made by `python -m opd_async.telemetry.metrics` from the catalogue in its source; a test keeps this page equal to it.

Every process answers Prometheus on a port of its own with its role's metrics, and `process_*` of itself: processor
time, memory, open files. None of them carries a prompt or a response. The run's folder holds `targets.json`, a file
for Prometheus' `file_sd_configs` in which every target has the labels `run` (the topology's `name`) and `process`
(`rollout-0`, `learner-0`, ...), `role` (`rollout`, `learner`, ..., `launcher`) and `host` (its name); the engines and
actors of a teacher have a `teacher` label too. It is empty once the run is over. What is said of a host comes from
its agent (`process="agent-h1"`, at `cluster.port` of that host), or from the launcher of its own. `dashboards/` has a
Grafana dashboard and alert rules.

Counters with a label begin at 0, so that `increase` sees their first event. Counters and histograms of a role
go on after a restart and after `--resume` from what was last scraped (`counters/` in the run's folder). They count
work, so steps that are taken again count again. A metric of something that a run does not do has no series there."""


if __name__ == "__main__":
    print(markdown(), end="")
