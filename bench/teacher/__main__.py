"""Streamed against whole-sample scoring: a real teacher actor and a real engine, responses that grow as if generated.

    python -m bench.teacher [--engine sglang --python .venv-sglang/bin/python] [--slots 16] [--rate 40]
                            [--lengths 600,2400,3000] [--tools 0.5] [--json FILE]

    streamed   a chunk goes to the teacher actor every `--chunk` tokens, while the response grows
    whole      a response goes to it when it has ended

With `--tools` responses are episodes: turns of `--turn` tokens, and between them a tool that takes so many seconds and
says `--given` tokens, which nobody scores.

Actor and engine are processes started from a plan, as in a run (`scoring.py`). Each slot "generates" one response
after another at `--rate` tokens a second; the model has random weights and is made on the fly. The modes take turns,
round by round, with the same lengths and times and with different tokens, so that neither finds the other's prefixes in
the engine's cache.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opd_async.bench.convert import make_model
from opd_async.bench.teacher.scoring import COUNTERS, Round, Work, running
from opd_async.config.topology import Topology
from opd_async.files import write_atomically
from opd_async.forecast.lengths import LogNormal
from opd_async.plan.plan import Plan
from opd_async.plan.resolve import make_plan

MODES = ("streamed", "whole")
START_S = 400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All rounds of one mode.

    `score_p50_s`, `score_p99_s`: from a response's last token to its score, in seconds. `computed_per_scored`: tokens
    that the engine computed, by its own count, for each that was scored; prompts are computed too. `computed_per_new`:
    the same for each token of prompts and responses: 1 if the engine computes none twice. `requests`: HTTP requests to
    the engine. `busy_share`: of the time, with a request under way.
    """

    mode: str
    responses: int
    score_p50_s: float
    score_p99_s: float
    computed_per_scored: float
    computed_per_new: float
    scored_tokens_per_s: float
    requests: int
    busy_share: float


def row_of(rounds: Sequence[Round]) -> Row:
    """The figures of all rounds of one mode together."""
    counted = {name: sum(one.counted[name] for one in rounds) for name in COUNTERS}
    latencies_s = [latency for one in rounds for latency in one.latencies_s]
    seconds = sum(one.seconds for one in rounds)
    # what a round counts after its end, while the actor's idle time settles, is idle
    idle_s = counted["idle_seconds"] - sum(one.settled_s for one in rounds)
    return Row(
        mode=rounds[0].mode,
        responses=len(latencies_s),
        score_p50_s=float(np.percentile(latencies_s, 50)),
        score_p99_s=float(np.percentile(latencies_s, 99)),
        computed_per_scored=counted["computed_tokens"] / counted["scored_tokens"],
        computed_per_new=counted["computed_tokens"] / sum(one.new_tokens for one in rounds),
        scored_tokens_per_s=counted["scored_tokens"] / seconds,
        requests=round(counted["batches"]),
        busy_share=max(1 - idle_s / seconds, 0.0),
    )


def plan_of(options: argparse.Namespace, folder: Path) -> Plan:
    """A plan with one teacher engine and one teacher actor of which only those two are started."""
    model = folder / "model"
    make_model(model, options.layers, options.hidden, options.vocab)
    prompts = folder / "prompts.jsonl"  # nobody reads it
    engine = {"kv_tokens": options.kv_tokens, "context_tokens": options.context, "max_running": options.slots * 4}
    teacher = engine | {"kind": options.engine} | ({"python": options.python} if options.python else {})
    topology = {
        "name": "bench",
        "run_dir": folder / "runs",
        "models": {"student": {"path": model}, "teacher": {"path": model}},
        "data": {"train": {"path": prompts}},
        "engines": {"student": engine, "teacher": teacher},
        "rollout": {"chunk_tokens": options.chunk},
        "teacher": {"batch_tokens": options.batch_tokens, "max_wait_ms": options.max_wait_ms},
        "schedule": {"steps": 1, "train_on": "samples"},
        "supervisor": {"start_deadline_s": START_S},
    }
    return make_plan(Topology.model_validate(topology))


async def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Both modes in turns, after a few short responses that do not count."""
    median, p99, cap = (int(part) for part in options.lengths.split(","))
    z = np.random.default_rng(options.seed).standard_normal(options.responses)
    room, turn = options.context - options.prompt, options.turn
    if options.tools is not None:
        room = room * turn // (turn + options.given)
    lengths = LogNormal(median, p99, min(cap, room)).of(z).tolist()
    work = Work(
        lengths=lengths,
        slots=options.slots,
        rate=options.rate,
        prompt_tokens=options.prompt,
        chunk_tokens=options.chunk,
        vocab=options.vocab,
        turn_tokens=turn if options.tools is not None else None,
        tool_s=options.tools or 0.0,
        given_tokens=options.given,
    )
    rounds: list[Round] = []
    async with running(plan_of(options, folder)) as bench:
        await bench.wait_until_ready(START_S)
        await bench.round(dataclasses.replace(work, lengths=[options.chunk] * options.slots), "whole", options.seed)
        for number in range(options.rounds * len(MODES)):
            mode = MODES[number % len(MODES)]
            rounds.append(await bench.round(work, mode, options.seed + 1 + number))
            print(f"round {number + 1} of {options.rounds * len(MODES)}: {mode}", file=sys.stderr, flush=True)
    return [row_of([one for one in rounds if one.mode == mode]) for mode in MODES]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row for each mode."""
    names = (
        "scoring",
        "responses",
        "score p50 (s)",
        "p99 (s)",
        "computed per scored",
        "per new",
        "scored tokens/s",
        "requests",
    )
    lines = ["| " + " | ".join((*names, "busy")) + " |", "|---" + "|---:" * len(names) + "|"]
    for row in rows:
        cells = [row.mode, str(row.responses), f"{row.score_p50_s:.3f}", f"{row.score_p99_s:.3f}"]
        cells += [
            f"{row.computed_per_scored:.2f}",
            f"{row.computed_per_new:.2f}",
            f"{row.scored_tokens_per_s:,.0f}",
            f"{row.requests:,}",
        ]
        lines.append("| " + " | ".join([*cells, f"{row.busy_share:.0%}"]) + " |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.teacher", description="Streamed against whole scoring.")
    parser.add_argument("--engine", choices=("embedded", "sglang"), default="embedded")
    parser.add_argument("--python", type=Path, help="of the environment that has SGLang")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="channels; a multiple of 128")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--context", type=int, default=4096, help="tokens of the longest prompt with its response")
    parser.add_argument("--kv-tokens", type=int, default=65_536, help="the engine's cache")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--max-wait-ms", type=float, default=10.0)
    parser.add_argument("--slots", type=int, default=16, help="responses that grow at once")
    parser.add_argument("--rate", type=float, default=40.0, help="tokens a second of each")
    parser.add_argument("--lengths", default="600,2400,3000", help="median, p99, longest response in tokens")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--chunk", type=int, default=64, help="tokens between two chunks")
    parser.add_argument("--tools", type=float, help="responses are episodes; seconds that each of their tools takes")
    parser.add_argument("--turn", type=int, default=128, help="sampled tokens of a turn, with --tools")
    parser.add_argument("--given", type=int, default=32, help="tokens that a tool says")
    parser.add_argument("--responses", type=int, default=64, help="in each round")
    parser.add_argument("--rounds", type=int, default=2, help="of each mode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the figures where `--json` says."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        rows = asyncio.run(measure(options, Path(name)))
    print(table(rows))
    if options.json is not None:
        given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        report = {"options": given, "rows": [dataclasses.asdict(row) for row in rows]}
        write_atomically(options.json, json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
