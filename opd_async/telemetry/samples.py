"""Write a few responses of each step and each evaluation to `samples.jsonl`, with text, logprobs, ages and waits.

    TrainedSample, EvalDone -> bounded queue -> thread: token ids to text -> samples.jsonl -> the page of `opd samples`

Nothing here can end a run or hold it up: a row that cannot be written, or for which there is no time, is left out and
counted. A row is about one response; docs/running.md has its keys. `{"rewind": n}` says that the run has gone back to
step n: earlier rows of later steps are about responses that were trained again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from opd_async.data.jsonl import JsonlRecord, read_jsonl
from opd_async.errors import InputError
from opd_async.telemetry.report import on_set
from opd_async.telemetry.token_text import TokenText, shown, text_of_tokens
from opd_async.transport.messages import TrainedSample

log = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
MAX_WAITING = 256
CLOSE_DEADLINE_S = 10.0
STILL_LARGE = 0.75
"""Share of the largest size: a file that is still larger after it was thinned gets no more rows."""
PRINTED_PROMPT, PRINTED_RESPONSE = 200, 400
DIGITS = 3


class EvaluatedSample(NamedTuple):
    """One sampled response of an evaluation: right or wrong, or, where the teacher judges, with scores float32[n]."""

    who: str
    set: str
    step: int
    prompt_id: int
    prompt: NDArray[np.int32]
    response: NDArray[np.int32]
    finish: str
    label: str
    right: bool | None
    reward: float | None
    student_logprobs: NDArray[np.float32] | None = None
    teacher_logprobs: NDArray[np.float32] | None = None


class _Rewind(NamedTuple):
    step: int


class Text(Protocol):
    """Of a tokenizer, what is needed here."""

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Return the text of token ids."""


class SampleRecord:
    """A context manager around a thread that writes `samples.jsonl`. Its methods never wait and never fail."""

    def __init__(self, path: Path, tokenizer: Text | None, largest: int, say: Callable[[str], None]) -> None:
        """`largest` in bytes; `say` gets the first response of each kind, and a line about each kind of trouble."""
        self._path = path
        self._tokenizer = tokenizer
        self._largest = largest
        self._say = say
        self._waiting: queue.Queue[TrainedSample | EvaluatedSample | _Rewind | None] = queue.Queue()
        self._thread = threading.Thread(target=self._write_all, name="samples", daemon=True)
        self._record: JsonlRecord | None = None
        self._every = 1
        """Of so many steps one is recorded."""
        self._printed: set[tuple[str, int]] = set()
        self.left_out = 0
        self.on_row: Callable[[dict[str, Any]], None] = lambda row: None
        """Called in the thread with each row about a response, as it goes to the file."""

    def __enter__(self) -> SampleRecord:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join(CLOSE_DEADLINE_S)
        if self.left_out:
            self._say(f"warning: {self._path.name}: {self.left_out} responses were left out")

    def add(self, sample: TrainedSample | EvaluatedSample) -> None:
        """Record a response, unless too many wait already."""
        if self._waiting.qsize() < MAX_WAITING:
            self._waiting.put(sample)
        else:
            self.left_out += 1

    def rewind(self, step: int) -> None:
        """Note that the run goes on from `step`: later steps will be taken again."""
        self._waiting.put(_Rewind(step))

    # --- the thread --------------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                self._write(item)
            except Exception as error:  # the edge of the thread: a response that cannot be shown must not end it
                self.left_out += 1
                if self.left_out == 1:
                    self._say(f"warning: {self._path.name}: a response cannot be recorded ({error!r}); the run goes on")
                log.debug("samples", exc_info=error)
        if self._record is not None:
            self._record.close()

    def _write(self, item: TrainedSample | EvaluatedSample | _Rewind) -> None:
        if isinstance(item, _Rewind):
            if self._path.exists():
                self._to_file({"rewind": item.step})
            return
        if self._tokenizer is None:
            return
        if not self._every:
            self.left_out += 1
        elif isinstance(item, TrainedSample):
            if item.version % self._every == 0:
                self._print(("step", 0), row := trained_row(item, self._tokenizer))
                self._to_file(row)
                self.on_row(row)
        else:
            self._print((on_set(item.who, item.set), item.step), row := evaluated_row(item, self._tokenizer))
            self._to_file(row)
            self.on_row(row)

    def _to_file(self, row: dict[str, Any]) -> None:
        if self._record is None:
            with contextlib.suppress(OSError):  # the record says what is wrong
                self._path.touch(0o600)  # it quotes prompts
            self._record = JsonlRecord(self._path, self._say)
        self._record.write({"time": time.time(), **row})
        if self._record.size > self._largest:
            self._thin()

    def _thin(self) -> None:
        """Leave every second recorded step out of the file, and half as many from now on."""
        assert self._record is not None
        self._record.close()
        self._every *= 2
        thin = self._path.with_name(f"{self._path.name}.new")
        thin.unlink(missing_ok=True)
        thin.touch(0o600)
        kept = JsonlRecord(thin, self._say)
        for row in read_jsonl(self._path):
            if "evaluation" in row or "rewind" in row or (row["step"] - 1) % self._every == 0:
                kept.write(row)
        whole, small = not kept.lost, kept.size <= STILL_LARGE * self._largest
        kept.close()
        if whole:
            thin.replace(self._path)
        else:
            thin.unlink(missing_ok=True)
        self._record = JsonlRecord(self._path, self._say)
        if not (whole and small):
            self._every = 0
            self._say(f"warning: {self._path.name} is full: no more responses go there; raise telemetry.samples_mib")

    def _print(self, kind: tuple[str, int], row: dict[str, Any]) -> None:
        """Say the first response of this launch's steps, and the first of each evaluation."""
        if kind not in self._printed:
            self._printed.add(kind)
            self._say(printed(row))


# --- rows ------------------------------------------------------------------------------------------------------------


def trained_row(sample: TrainedSample, tokenizer: Text) -> dict[str, Any]:
    """Make the row of a response that a step has taken to its end."""
    text = text_of_tokens(tokenizer, sample.response.tolist())
    parts = zip(sample.part_ends.tolist(), sample.part_versions.tolist(), strict=True)
    chunks = zip(
        sample.chunk_ends.tolist(),
        sample.chunk_versions.tolist(),
        _rounded(sample.chunk_made_s),
        _rounded(sample.chunk_latency_s),
        *([] if sample.chunk_scored is None else [sample.chunk_scored.tolist()]),
        strict=True,
    )
    return {
        "step": sample.version + 1,
        "sample": sample.sample_id,
        **({} if sample.episode is None else {"episode": sample.episode}),
        "prompt_id": sample.prompt_id,
        "teacher": sample.teacher,
        "finish": sample.finish,
        "reward": sample.reward,
        **_turns(sample),
        "prompt": tokenizer.decode(sample.prompt.tolist(), skip_special=False),
        "prompt_tokens": sample.prompt_tokens,
        **_response(text, sample.response_tokens),
        "student_logprobs": _rounded(sample.behaviour_logprobs),
        "teacher_logprobs": _rounded(sample.teacher_logprobs) if len(sample.teacher_logprobs) else None,
        **_given(sample),
        "made_at": sample.made_at,
        "chunks": [list(chunk) for chunk in chunks],
        "parts": [[end, version + 1] for end, version in parts],
    }


def _turns(sample: TrainedSample) -> dict[str, Any]:
    """What turns have earned, if that was told."""
    if sample.turn_ends is None or sample.turn_rewards is None:
        return {}
    turns = zip(sample.turn_ends.tolist(), _rounded(sample.turn_rewards), strict=True)
    return {"turn_rewards": [list(turn) for turn in turns]}


def _given(sample: TrainedSample) -> dict[str, Any]:
    """Where tokens were given and not sampled, if any were."""
    if sample.given_starts is None or sample.given_ends is None:
        return {}
    return {"given": np.stack((sample.given_starts, sample.given_ends), axis=1).tolist()}


def evaluated_row(sample: EvaluatedSample, tokenizer: Text) -> dict[str, Any]:
    """Make the row of a response of an evaluation."""
    return {
        "evaluation": sample.who,
        "set": sample.set,
        "step": sample.step,
        "prompt_id": sample.prompt_id,
        "finish": sample.finish,
        "reward": sample.reward,
        "label": sample.label,
        **({} if sample.right is None else {"right": sample.right}),
        **_scores_of(sample),
        "prompt": tokenizer.decode(sample.prompt.tolist(), skip_special=False),
        "prompt_tokens": len(sample.prompt),
        **_response(text_of_tokens(tokenizer, sample.response.tolist()), len(sample.response)),
    }


def _scores_of(sample: EvaluatedSample) -> dict[str, Any]:
    """The logprobs of a response of an evaluation, where the teacher has scored it."""
    if sample.student_logprobs is None or sample.teacher_logprobs is None:
        return {}
    return {
        "student_logprobs": _rounded(sample.student_logprobs),
        "teacher_logprobs": _rounded(sample.teacher_logprobs),
    }


def _response(text: TokenText, tokens: int) -> dict[str, Any]:
    return {"response": text.text, "ends": text.ends, "response_tokens": tokens}


def _rounded(values: NDArray[np.float32]) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]


def printed(row: dict[str, Any]) -> str:
    """Write a row for the terminal: what it is, the end of its prompt, the beginning of its response."""
    whose = f"of the {on_set(row['evaluation'], row['set'])} at" if "evaluation" in row else "of"
    facts = [f"{row['response_tokens']:,} tokens", f"ended by {row['finish']}"]
    if row.get("teacher_logprobs"):
        difference = np.subtract(row["teacher_logprobs"], row["student_logprobs"])
        given = [np.arange(start, min(end, len(difference))) for start, end in row.get("given", ())]
        difference = np.delete(difference, np.concatenate(given)) if given else difference
        facts.append(f"mean log q - log p {float(difference.mean()):.3f}")
    if row.get("reward") is not None:
        facts.append(f"reward {row['reward']:g}")
    if "right" in row:
        facts.append("right" if row["right"] else "wrong")
    prompt, response = shown(row["prompt"]), shown(row["response"])
    return (
        f"a response {whose} step {row['step']}, {', '.join(facts)}\n"
        f"    prompt    {_cut(prompt, PRINTED_PROMPT, end=True)}\n    response  {_cut(response, PRINTED_RESPONSE)}"
    )


def quoted(sample: EvaluatedSample, tokenizer: Text) -> str:
    """Write a response on one line, for messages: the end of its prompt, its beginning, and the label."""
    row = evaluated_row(sample, tokenizer)
    prompt, response = shown(row["prompt"]), shown(row["response"])
    return (
        f"prompt {_cut(prompt, PRINTED_PROMPT, end=True)!r}, response {_cut(response, PRINTED_RESPONSE)!r} "
        f"(ended by {row['finish']}), label {_cut(shown(row['label']), PRINTED_PROMPT)!r}"
    )


def _cut(text: str, length: int, *, end: bool = False) -> str:
    """Write the beginning of a text, or its end, with dots for what is left out."""
    if len(text) <= length:
        return text
    return f"...{text[-length:]}" if end else f"{text[:length]}..."


# --- reading ---------------------------------------------------------------------------------------------------------


def read_samples(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line of `samples.jsonl` and its row, without those of steps that the run has gone back behind.

    Raises `InputError` if there is no such file, or a line is no row. Half a line at the end is left out.
    """
    _check(path)
    rewinds = list(_rewinds(path))
    with path.open("rb") as lines:
        for index, line in enumerate(lines):
            if not line.endswith(b"\n") or _is_rewind(line):
                continue
            try:
                row = json.loads(line)
                now = row["step"]
                gone = any(index < at and now > step for at, step in rewinds)
            except (ValueError, LookupError, TypeError):
                raise InputError(f"{path}:{index + 1}: no row about a response; remove the line") from None
            if not gone:
                yield line, row


def count_samples(path: Path) -> int:
    """Count the rows that `read_samples` yields, or a few more after a rewind; parses none. Raises `InputError`."""
    _check(path)
    with path.open("rb") as lines:
        return sum(line.endswith(b"\n") and not _is_rewind(line) for line in lines)


def _check(path: Path) -> None:
    if not path.is_file():
        raise InputError(
            f"no file {path}; a run writes it from its first step on, unless telemetry.samples_per_step is 0"
        )


def _is_rewind(line: bytes) -> bool:
    return b'"rewind"' in line[:64]


def _rewinds(path: Path) -> Iterator[tuple[int, int]]:
    """Find the rows that say `rewind`, as (number of the row, step), without parsing any other."""
    with path.open("rb") as lines:
        for index, line in enumerate(lines):
            if _is_rewind(line) and line.endswith(b"\n"):
                yield index, json.loads(line)["rewind"]
