"""What a token costs on its way: the whole data plane with null engines, and the wire format alone.

    python -m bench.wire [--only plane | intakes | codec] [--seconds 8] [--core 0] [--encrypt all | control]
                         [--json FILE] [--tokens 16384] [--runs 9] [--samples 20]

    data plane   null engine -> rollout actor -> teacher actor (null engine) -> intake -> null learner, dispatcher
    intakes      chunks -> one intake, or two -> null learner, without and with the teacher's top 8; with `--core` the
                 intakes share that one, so that each is busy all the time, as one that needs another is
    codec        arrays -> encode -> PUSH -> loopback TCP -> PULL -> decode -> arrays

Data plane: a run as the launcher starts it, every role a process, but for engines and learner, which answer at once
and are counted apart. `tokens/s/core` is tokens through the intake by the CPU seconds of rollout actor, teacher actor,
intake and dispatcher together; with `--core` all four share that one core. Null engines are servers of their own, so
that HTTP and JSON count, or sit in the actors, so that they don't. The learner checks every token. 16,384-token
responses, 32 at a time, a step and a weight update for every 524,288 tokens (131,072 where chunks are below 256).

Codec: all start from the same int32 and float32 arrays (token ids, behaviour and teacher logprobs) and must end with
equal ones, since that is what a learner packs. A sample travels whole, or as chunks of 512 tokens. The codecs take
turns within each run, so that a slow moment of the machine hits all of them; figures are microseconds per sample, the
median of the runs and their extremes. Pickle is used here alone, as the alternative that is not taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zmq

from opd_async.bench.wire import cases, intakes, roles
from opd_async.bench.wire.run import Figures
from opd_async.bench.wire.run import measure as measure_plane
from opd_async.files import write_atomically
from opd_async.transport.messages import ScoredChunk
from opd_async.transport.wire import Frame, decode, encode

CHUNK_TOKENS = cases.CHUNK
DEADLINE_MS = 30_000
ARRAYS = {"token_ids": np.int32, "behaviour_logprobs": np.float32, "teacher_logprobs": np.float32, "context": np.int32}


@dataclasses.dataclass(frozen=True, slots=True)
class Codec:
    """One way to put a chunk into frames and to get it back."""

    name: str
    encode: Callable[[ScoredChunk], Sequence[Frame]]
    decode: Callable[[Sequence[Frame]], ScoredChunk]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Figures of one codec and layout, per sample; `us_*` over runs; `ratio` is the time relative to our frames."""

    layout: str
    codec: str
    bytes: int
    us_median: float
    us_min: float
    us_max: float
    ratio: float


def _to_lists(chunk: ScoredChunk) -> dict[str, Any]:
    fields = {field.name: getattr(chunk, field.name) for field in dataclasses.fields(chunk)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


def _from_lists(fields: dict[str, Any]) -> ScoredChunk:
    arrays = {name: np.array(fields[name], dtype) for name, dtype in ARRAYS.items() if fields[name] is not None}
    return ScoredChunk(**fields | arrays)


CODECS = (
    Codec("frames", encode, decode),
    Codec(
        "json",
        lambda chunk: [json.dumps(_to_lists(chunk), separators=(",", ":")).encode()],
        lambda frames: _from_lists(json.loads(bytes(frames[0]))),
    ),
    Codec(
        "pickled lists",
        lambda chunk: [pickle.dumps(_to_lists(chunk), pickle.HIGHEST_PROTOCOL)],
        lambda frames: _from_lists(pickle.loads(frames[0])),
    ),
)


def make_sample(tokens: int, chunk_tokens: int) -> list[ScoredChunk]:
    """A scored response of `tokens` tokens in chunks; ids below 150k, logprobs as a model would give them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 150_000, tokens).astype(np.int32)
    behaviour, teacher = (-rng.exponential(0.7, (2, tokens))).astype(np.float32)
    chunks = []
    for start in range(0, tokens, chunk_tokens):
        part = slice(start, start + chunk_tokens)
        finish = "stop" if start + chunk_tokens >= tokens else None
        context = np.arange(64, dtype=np.int32) if start == 0 else None
        chunks.append(
            ScoredChunk(
                sample_id=7,
                attempt=0,
                actor=0,
                prompt_id=3,
                prompt_tokens=64,
                start=start,
                weight_version=11,
                finish=finish,
                label="label",
                teacher_id="teacher-0",
                latency_s=0.5,
                token_ids=ids[part],
                behaviour_logprobs=behaviour[part],
                teacher_logprobs=teacher[part],
                context=context,
            )
        )
    return chunks


@contextmanager
def loopback() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """A connected PUSH and PULL pair over TCP, with deadlines."""
    with zmq.Context() as context, context.socket(zmq.PULL) as pull, context.socket(zmq.PUSH) as push:
        for socket in (pull, push):
            socket.linger = 0
            socket.rcvtimeo = socket.sndtimeo = DEADLINE_MS
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        push.connect(f"tcp://127.0.0.1:{port}")
        yield push, pull


def transfer(
    codec: Codec, chunks: Sequence[ScoredChunk], push: zmq.Socket[bytes], pull: zmq.Socket[bytes]
) -> list[ScoredChunk]:
    """Send one sample and receive it again. `zmq.Again` after the deadline."""
    for chunk in chunks:
        push.send_multipart(codec.encode(chunk), copy=False)
    received = []
    for _ in chunks:
        frames = pull.recv_multipart(copy=False)
        received.append(codec.decode([frame.buffer for frame in frames]))
    return received


def is_equal(left: Sequence[ScoredChunk], right: Sequence[ScoredChunk]) -> bool:
    """Whether two samples agree in every field, arrays bit by bit."""
    return len(left) == len(right) and all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name))
        for a, b in zip(left, right, strict=True)
        for field in dataclasses.fields(ScoredChunk)
    )


def measure(tokens: int, runs: int, samples: int) -> list[Row]:
    """Time every codec and layout; raises `AssertionError` when a codec does not give back what it got."""
    rows: list[Row] = []
    with loopback() as (push, pull):
        for size in (tokens, min(CHUNK_TOKENS, tokens)):
            chunks = make_sample(tokens, size)
            for codec in CODECS:  # also warms up connections and allocators
                assert is_equal(chunks, transfer(codec, chunks, push, pull)), f"{codec.name} changes the data"
            times: dict[str, list[float]] = {codec.name: [] for codec in CODECS}
            for _ in range(runs):
                for codec in CODECS:
                    began = time.perf_counter()
                    for _ in range(samples):
                        transfer(codec, chunks, push, pull)
                    times[codec.name].append((time.perf_counter() - began) / samples * 1e6)
            rows += [_row(codec, chunks, times) for codec in CODECS]
    return rows


def _row(codec: Codec, chunks: Sequence[ScoredChunk], times: dict[str, list[float]]) -> Row:
    mine = times[codec.name]
    size = sum(len(frame) for chunk in chunks for frame in codec.encode(chunk))
    layout = f"{len(chunks)} x {len(chunks[0].token_ids)}"
    return Row(
        layout=layout,
        codec=codec.name,
        bytes=size,
        us_median=median(mine),
        us_min=min(mine),
        us_max=max(mine),
        ratio=median(mine) / median(times["frames"]),
    )


def table(rows: Sequence[Row]) -> str:
    """The figures as text."""
    lines = [f"{'layout':>12}  {'codec':<14} {'bytes':>9} {'us median':>10} {'min':>9} {'max':>9} {'ratio':>7}"]
    for row in rows:
        figures = f"{row.bytes:>9} {row.us_median:>10.0f} {row.us_min:>9.0f} {row.us_max:>9.0f} {row.ratio:>7.1f}"
        lines.append(f"{row.layout:>12}  {row.codec:<14} {figures}")
    return "\n".join(lines)


def plane(seconds: float, core: int | None, encrypt: str) -> list[Figures]:
    """Measure every case; with `core` the data plane has that core and no other."""
    if core is not None:
        os.environ[roles.CORE_ENV] = str(core)  # read by the null roles, which go elsewhere
        os.sched_setaffinity(0, {core})
    return [measure_plane(dataclasses.replace(case, seconds=seconds, encrypt=encrypt)) for case in cases.CASES]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write the figures where `--json` says."""
    parser = argparse.ArgumentParser(description="Cost of a token on its way from the student's engine to the learner.")
    parser.add_argument("--only", choices=("plane", "codec", "intakes"))
    parser.add_argument("--seconds", type=float, default=8.0, help="data plane: of each case, in whole steps")
    parser.add_argument("--core", type=int, help="data plane: run all of it on this core, intakes: run them")
    parser.add_argument("--encrypt", choices=("all", "control"), default="all", help="data plane: network.encrypt")
    parser.add_argument("--tokens", type=int, default=16_384, help="codec: of a sample")
    parser.add_argument("--runs", type=int, default=9, help="codec")
    parser.add_argument("--samples", type=int, default=20, help="codec: per run and codec")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"tokens": options.tokens, "runs": options.runs, "samples": options.samples}
    if options.only in (None, "codec"):
        rows = measure(options.tokens, options.runs, options.samples)
        print(table(rows))
        report["rows"] = [dataclasses.asdict(row) for row in rows]
    if options.only in (None, "plane"):
        figures = plane(options.seconds, options.core, options.encrypt)
        print(cases.table(figures))
        report["plane"] = [dataclasses.asdict(row) for row in figures]
    if options.only in (None, "intakes"):
        carried = [
            intakes.measure(dataclasses.replace(case, seconds=options.seconds, encrypt=options.encrypt), options.core)
            for case in cases.SHARED
        ]
        print(intakes.table(carried))
        report["intakes"] = [dataclasses.asdict(row) for row in carried]
    if options.json is not None:
        write_atomically(options.json, json.dumps(report, indent=2).encode())


if __name__ == "__main__":
    main()
