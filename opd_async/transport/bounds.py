"""What every field of every message may be, whoever sends it: `receive` checks it right behind the wire.

    BOUNDS     by name of a field: a range, a length, or words. A name means the same in every message.
    LENGTHS    by message: arrays with a row for the same things, and arrays that another one cuts into pieces

What depends on the run (who may say it, which samples are leased, which versions are due) is checked by the receiver:
`opd_async.run.control_bounds` in the launcher, `opd_async.plan.chunk_bounds` in teacher actors and intake.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from opd_async.errors import WireError
from opd_async.estimators.topk import NO_TOKEN
from opd_async.transport.kinds import Finish, LeaseKind
from opd_async.transport.wire import Frame, decode

MAX_ID = 2**62 - 1
MAX_COUNT = 2**31 - 1
MAX_TEXT = 1 << 16
MAX_WORDS = 1 << 20
MAX_ENTRIES = 4096
NEVER = 1.0e15
"""Seconds: beyond any clock."""
LONGEST_S = 1.0e6
"""Seconds: longer than a response takes."""


class Range(NamedTuple):
    """Numbers from `low` to `high`, in a field or in every element of an array; `finite` refuses NaN."""

    low: float
    high: float
    finite: bool = True


class Text(NamedTuple):
    """Text of at most `longest` characters; one of `words` if there are any."""

    longest: int = MAX_TEXT
    words: tuple[str, ...] = ()


Bound = Range | Text

_ID = Range(0, MAX_ID)
_COUNT = Range(0, MAX_COUNT)
_LOGPROB = Range(-1.0e30, 1.0e-3)
_ANY = Range(-math.inf, math.inf, finite=False)
_NAME = Text(256)
_FLAG = Range(0, 1)
_COMMANDS = ("Train", "SyncWeights", "SaveCheckpoint", "ExportModel", "AskTeacher")

BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(("sample_id", "sample_ids", "taken_ids", "partial_ids", "prompt_id", "completed", "grant"), _ID),
    **dict.fromkeys(("episode", "further", "again_ids", "completed_below", "further_below"), _ID),
    **dict.fromkeys(("prompt_ids", "episodes"), Range(-1, MAX_ID)),
    **dict.fromkeys(("lengths", "token_versions", "counted", "further_counts", "turn_counts", "micro_batches"), _COUNT),
    **dict.fromkeys(("attempt", "attempts", "actor", "index", "start", "starts", "ends", "partial_ends"), _COUNT),
    **dict.fromkeys(("taken_ends", "prompt_tokens", "response_tokens", "max_tokens", "ready_tokens"), _COUNT),
    **dict.fromkeys(("version", "next_step", "step", "weight_version", "loss_tokens", "part", "rank", "route"), _COUNT),
    **dict.fromkeys(("mb_tokens", "mb_sequences", "mb_rows", "sequence_lengths", "rows", "staleness"), _COUNT),
    **dict.fromkeys(("token_ids", "prompt", "prefix", "given", "context", "tokens", "response"), _COUNT),
    **dict.fromkeys(("taken_tokens", "hold", "answers", "given_tokens", "taken_given", "partial_given"), _COUNT),
    **dict.fromkeys(("teacher_prompt", "teacher_prompt_tokens", "teacher_prompts", "teacher_prompt_lengths"), _COUNT),
    **dict.fromkeys(("contrast_prompt", "contrast_prompt_tokens", "contrast_prompts"), _COUNT),
    **dict.fromkeys(("prompt_lengths", "contrast_prompt_lengths", "given_starts", "given_ends"), _COUNT),
    **dict.fromkeys(("turn_ends", "topk", "scored_version"), _COUNT),
    **dict.fromkeys(("waited_s", "wait_s", "token_s"), Range(0, NEVER)),
    **dict.fromkeys(("partial_tokens", "staleness_counts", "request", "token"), _ID),
    **dict.fromkeys(("mean_behaviour_logprobs", "mean_teacher_logprobs"), Range(-1.0e30, 1.0e-3)),
    **dict.fromkeys(("behaviour_logprobs", "student_logprobs", "teacher_logprobs", "contrast_logprobs"), _LOGPROB),
    **dict.fromkeys(("topk_ids", "student_topk_ids"), Range(NO_TOKEN, MAX_COUNT)),
    **dict.fromkeys(("topk_logprobs", "student_topk_logprobs"), Range(-math.inf, 1.0e-3)),
    **dict.fromkeys(
        (
            "complete",
            "taken_complete",
            "taken_kept",
            "given_chunks",
            "verify",
            "last",
            "idle",
            "own_python",
            "at_once",
            "failed",
            "slow",
            "sampled",
            "away",
        ),
        _FLAG,
    ),
    **dict.fromkeys(("advantages", "weights", "reverse_kl", "forward_kl"), Range(-1.0e30, 1.0e30)),
    **dict.fromkeys(("rewards", "stats", "whole_rewards"), _ANY),
    "segment_weights": Range(-1.0e30, 1.0e30),
    **dict.fromkeys(("reward", "turn_rewards"), Range(-1.0e30, 1.0e30)),
    "counters": Range(-1.0e18, 1.0e18),
    "actors": Range(-1, MAX_COUNT),
    "temperature": Range(0, 1.0e6),
    **dict.fromkeys(
        ("made_at", "clock_s", "latency_s", "chunk_latency_s", "for_s", "usual_s", "still_s"), Range(0, NEVER)
    ),
    "chunk_made_s": Range(-LONGEST_S, LONGEST_S),
    **dict.fromkeys(("chunk_ends", "chunk_versions", "chunk_scored", "part_ends", "part_versions"), _COUNT),
    **dict.fromkeys(("role", "teacher", "teacher_id", "group", "incarnation", "doing", "evaluation_set"), _NAME),
    **dict.fromkeys(("folder", "url", "engines"), Text(4096)),
    **dict.fromkeys(("text", "reason", "error"), Text(MAX_TEXT)),
    **dict.fromkeys(("label", "metadata"), Text(MAX_WORDS)),
    **dict.fromkeys(("number", "count", "gpus", "cores", "lost"), _COUNT),
    **dict.fromkeys(("fence_s", "lost_s", "stop_deadline_s", "again_s"), Range(0, LONGEST_S)),
    **dict.fromkeys(("numbers", "ports", "exit_code", "killed_by"), _COUNT),
    **dict.fromkeys(("host", "before", "address", "versions", "nonce"), _NAME),
    **dict.fromkeys(("seen", "mine", "log", "paths", "words"), Text(4096)),
    # a log line is at most 8192 bytes (`opd_async.telemetry.role_log`), and an environment what the user makes it
    **dict.fromkeys(("lines", "env", "secrets"), Text(MAX_TEXT)),
    "kind": Text(words=tuple(LeaseKind)),
    "finish": Text(words=tuple(Finish)),
    "finishes": Range(-1, len(Finish) - 1),
    "scorers": Range(-1, MAX_ENTRIES),
    "command": Text(words=_COMMANDS),
}
"""`topk_logprobs` may be minus infinity where a teacher rules a token out; no actor (-1) made what a resume brought."""

EQUAL: dict[str, tuple[tuple[str, ...], ...]] = {
    "Acks": (("sample_ids", "attempts", "actors", "ends"),),
    "Held": (
        (
            *("sample_ids", "attempts", "actors", "prompt_ids", "prompt_lengths", "starts", "lengths", "episodes"),
            *(
                "token_versions",
                "given_chunks",
                "counted",
                "mean_behaviour_logprobs",
                "mean_teacher_logprobs",
                "teacher_prompt_lengths",
            ),
            *("contrast_prompt_lengths", "finishes", "scorers", "whole_rewards", "further_counts", "turn_counts"),
        ),
        ("turn_ends", "turn_rewards"),
    ),
    "TakeShare": (("taken_ids", "taken_ends", "taken_complete", "taken_kept", "segment_weights"),),
    "Paused": (("sample_ids", "attempts", "ends"),),
    "SuspectScores": (("sample_ids", "starts", "ends"),),
    "Version": (("sample_ids", "attempts", "ends"),),
    "Drained": (("sample_ids", "attempts", "ends"),),
    "Reclaim": (("sample_ids", "attempts"),),
    "EndAttempts": (("sample_ids", "attempts"),),
    "Prefixes": (("sample_ids", "ends"),),
    "Reclaimed": (("sample_ids", "attempts", "ends", "complete"),),
    "PartStarted": (("taken_ids", "taken_ends", "taken_complete", "taken_given"),),
    "StepStarted": (("taken_ids", "taken_ends", "taken_complete", "taken_given"),),
    "Frontier": (("partial_ids", "partial_ends", "partial_given"),),
    "EvalDone": (
        (
            *("token_ids", "student_logprobs", "teacher_logprobs", "reverse_kl", "forward_kl"),
            *("student_topk_ids", "student_topk_logprobs"),
        ),
    ),
    "AskTeacher": (("sequence_lengths", "prompt_lengths"),),
    "LearnerReply": (("teacher_logprobs", "topk_ids", "topk_logprobs"),),
    "TrainedSample": (
        ("response", "behaviour_logprobs"),
        ("chunk_ends", "chunk_versions", "chunk_made_s", "chunk_latency_s", "chunk_scored"),
        ("part_ends", "part_versions"),
        ("given_starts", "given_ends"),
        ("turn_ends", "turn_rewards"),
    ),
    "Chunk": (("turn_ends", "turn_rewards"),),
    "ScoredChunk": (("turn_ends", "turn_rewards"),),
    "Train": (
        ("mb_tokens", "mb_sequences", "mb_rows"),
        (
            *("rows", "behaviour_logprobs", "advantages", "staleness", "weights", "rewards", "topk_ids"),
            *("topk_logprobs", "contrast_logprobs"),
        ),
        (
            *("sequence_lengths", "sample_ids", "prompt_lengths", "teacher_prompt_lengths"),
            "contrast_prompt_lengths",
        ),
    ),
}
"""Arrays of a message that have as many rows as each other; those that are absent do not count."""
PIECES: dict[str, tuple[tuple[str, str], ...]] = {
    "AskTeacher": (("sequence_lengths", "token_ids"),),
    "Reclaimed": (("ends", "tokens"),),
    "Prefixes": (("ends", "tokens"),),
    "Frontier": (("partial_ends", "partial_tokens"),),
    "Held": (("further_counts", "further"), ("turn_counts", "turn_ends")),
    "Train": (
        ("sequence_lengths", "token_ids"),
        ("teacher_prompt_lengths", "teacher_prompts"),
        ("contrast_prompt_lengths", "contrast_prompts"),
    ),
}
"""The first array of a pair has the lengths of the pieces that the second is made of; one that is absent has none."""


def receive(frames: Sequence[Frame]) -> Any:
    """The message that `frames` hold, within its bounds. Raises `WireError`, as `decode` does, for everything else."""
    message = decode(frames)
    if text := problem(message):
        raise WireError(f"{type(message).__name__}.{text}")
    return message


def problem(message: Any) -> str | None:
    """What is wrong with a message, in words; None if nothing is. Types are those of the dataclass."""
    name, values = type(message).__name__, {field.name: getattr(message, field.name) for field in fields(message)}
    for field, value in values.items():
        if value is not None and (bound := BOUNDS.get(field)) is not None and (text := _breaks(bound, value)):
            return f"{field}: {text}"
    for group in EQUAL.get(name, ()):
        rows = {field: len(values[field]) for field in group if values.get(field) is not None}
        if len(set(rows.values())) > 1:
            return f"lengths that should agree: {rows}"
    for lengths, whole in PIECES.get(name, ()):
        total = 0 if values[lengths] is None else int(values[lengths].sum(dtype=np.int64))
        found = 0 if values[whole] is None else len(values[whole])
        if total != found:
            return f"{whole}: {found} where {lengths} add up to {total}"
    if name == "TrainedSample":
        return _of_trained(values)
    return _of_chunk(values) if name in ("Chunk", "ScoredChunk") else None


def _breaks(bound: Bound, value: Any) -> str | None:
    if isinstance(value, np.ndarray):
        return _array_breaks(bound, value) if isinstance(bound, Range) else "numbers where text belongs"
    if isinstance(value, list | dict):
        if len(value) > MAX_ENTRIES:
            return f"{len(value)} entries"
        items = value.values() if isinstance(value, dict) else value
        longest = max(map(len, value), default=0) if isinstance(value, dict) else 0
        return f"a name of {longest} characters" if longest > MAX_ENTRIES else _first(bound, items)
    if isinstance(bound, Text):
        if len(value) > bound.longest:
            return f"{len(value)} characters"
        return f"{value!r:.80} is none of {bound.words}" if bound.words and value not in bound.words else None
    # NaN is in no range
    inside = bound.low <= value <= bound.high or not bound.finite
    return None if inside and (not bound.finite or math.isfinite(value)) else f"{value!r:.80}"


def _first(bound: Bound, items: Any) -> str | None:
    return next((text for item in items if (text := _breaks(bound, item))), None)


def _array_breaks(bound: Range, array: np.ndarray[Any, Any]) -> str | None:
    if not array.size or not bound.finite:
        return None
    low, high = array.min(), array.max()  # NaN if there is one
    return None if low >= bound.low and high <= bound.high else f"values from {low} to {high}"


def _of_trained(values: Mapping[str, Any]) -> str | None:
    """What the fields of a `TrainedSample` say of each other."""
    count, scores = len(values["response"]), len(values["teacher_logprobs"])
    if scores not in (0, count):
        return f"teacher_logprobs: {scores} for {count} tokens"
    if count > values["response_tokens"]:
        return f"response: {count} of {values['response_tokens']} tokens"
    if len(values["prompt"]) > values["prompt_tokens"]:
        return f"prompt: {len(values['prompt'])} of {values['prompt_tokens']} tokens"
    for field in ("chunk_ends", "part_ends"):
        if (np.diff(values[field]) < 0).any():
            return f"{field}: not in order"
    starts, ends = values["given_starts"], values["given_ends"]
    if starts is not None and ends is not None and not ((starts <= ends) & (ends <= values["response_tokens"])).all():
        return "given_ends: no ranges of the response"
    return None


def _fits(name: str, read: np.ndarray[Any, Any], values: Mapping[str, Any]) -> bool:
    """Whether a prompt of a teacher's comes with the context, and is as long as its chunk says."""
    return values["context"] is not None and bool(len(read)) and len(read) == values.get(f"{name}_tokens", len(read))


def _of_chunk(values: Mapping[str, Any]) -> str | None:
    """What the fields of a chunk say of each other."""
    count, start = len(values["token_ids"]), values["start"]
    context, prompt = values["context"], values["prompt_tokens"]
    if context is not None and len(context) != prompt + start:
        return f"context: {len(context)} where prompt_tokens and start make {prompt + start}"
    if start + count > MAX_COUNT:
        return f"start: {start}"
    for name in ("teacher_prompt", "contrast_prompt"):
        if (read := values[name]) is not None and not _fits(name, read, values):
            return f"{name}: {len(read)} tokens, which nothing else says"
    if not count and values["finish"] is None:
        return "no tokens and no end"
    if values["further"] is not None and values["finish"] is None:
        return "further: what an episode has begun is said at its end"
    if values["turn_ends"] is not None and (values["reward"] is None or values["finish"] is None):
        return "turn_ends: what turns have earned is said at the end, with the reward"
    sampled = count if values["sampled"] else 0
    if not values["sampled"] and values["finish"] is not None:
        return "sampled: given tokens cannot end a response"
    if (made := len(values["behaviour_logprobs"])) != sampled:
        return f"behaviour_logprobs: {made} for {sampled} sampled tokens"
    for name in ("teacher_logprobs", "contrast_logprobs"):
        array = values.get(name)
        if array is not None and len(array) not in (0, sampled):
            return f"{name}: {len(array)} for {sampled} sampled tokens"
    for field in ("topk_ids", "topk_logprobs"):
        if (array := values.get(field)) is not None and len(array) != count:
            return f"{field}: {len(array)} rows for {count} tokens"
    return None
