"""Which keys of a topology may differ when a run is resumed: those of the place where it goes on, not of what it is."""

from __future__ import annotations

from enum import StrEnum
from fnmatch import fnmatch

from opd_async.config.evaluating import SETS

MAY_CHANGE = (
    *("schedule.steps", "run_dir", "checkpoint.*", "evaluation.*", "supervisor.*", "network.*", "shared_devices"),
    *("telemetry.*", "tracking.*", "cluster.*", "models.allow_token_differences"),
    *("reward.workers", "reward.concurrency", "reward.timeout_s"),
    *(
        "engines.*.kind",
        "engines.*.replicas",
        "engines.*.urls",
        "engines.*.router",
        "engines.*.python",
        "engines.*.args",
    ),
    *("engines.*.tensor_parallel", "engines.*.devices", "engines.*.kv_tokens", "engines.*.max_running"),
    *("engines.*.threads", "engines.*.api_key", "engines.*.admin_api_key"),
    *("rollout.replicas", "rollout.slots", "rollout.chunk_tokens", "rollout.stream_interval"),
    *("rollout.request_retries", "rollout.request_deadline_s", "rollout.resend_after_s", "teacher.*"),
    *("rollout.episode_deadline_s", "rollout.tools.workers", "rollout.tools.deadline_s", "rollout.tools.memory_mib"),
    *("rollout.tools.command", "intake.*"),
    *("learner.devices", "learner.tensor_parallel", "learner.pipeline_parallel", "learner.data_parallel"),
    *("learner.context_parallel", "learner.expert_parallel", "learner.micro_batch_tokens"),
    *("learner.logprob_chunk_rows", "learner.recompute", "learner.kernels", "learner.threads", "learner.bucket_mib"),
    *("learner.weight_transport", "opd.teacher_offload"),
)
"""Keys of the place where a run goes on, and of how long it does: they may differ when it is resumed."""
LEARNING_RATE = (
    *("learner.optimizer.lr", "learner.optimizer.warmup_steps", "learner.optimizer.decay"),
    *("learner.optimizer.min_lr_ratio", "advantage.critic.lr"),
)
"""Keys of the learning rate: they may differ with `--change-lr`."""
BY_CONTENT = {
    "data.train.path": "data.train",
    "data.held_out.path": "data.held_out",
    "data.completions.path": "data.completions",
    "data.chat_template": "data.train",
    "models.student.path": "models.student",
    "models.teacher.path": "models.teacher",
}
"""Keys that may differ as long as what they name is the same, by section of `opd_async.run.fingerprints`."""


class Change(StrEnum):
    """Whether a key of the topology may have another value when a run is resumed."""

    YES = "yes"
    WITH_FLAG = "with --change-lr"
    SAME_CONTENT = "another place of the same content"
    NO = "no"


def may_change(key: str) -> Change:
    """Whether `key`, dotted, may differ when a run is resumed; those of several teachers are as those of one."""
    if content_of(key) is not None:
        return Change.SAME_CONTENT
    if any(fnmatch(key, pattern) for pattern in MAY_CHANGE):
        return Change.YES
    if key in LEARNING_RATE:
        return Change.WITH_FLAG
    return Change.NO


def content_of(key: str) -> str | None:
    """The section of the fingerprints that holds the content of what `key` names; None for other keys."""
    if fnmatch(key, "models.teachers.*.path") or fnmatch(key, f"{SETS}.*.path"):
        return key.removesuffix(".path")
    return BY_CONTENT.get(key)
