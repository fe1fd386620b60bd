"""What is measured of the data plane, and the table of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from opd_async.bench.wire.run import ROLES, Case, Figures
from opd_async.config.topology import RolloutSection

INTERVAL = RolloutSection().stream_interval
CHUNK = RolloutSection().chunk_tokens


def _small_steps(case: Case) -> Case:
    """Small chunks take long: steps of a quarter are enough."""
    return dataclasses.replace(case, step_tokens=case.step_tokens // 4) if case.chunk_tokens < 256 else case


LARGE = 2048
SHARED = tuple(
    Case(chunk_tokens=size, event_tokens=size, http=False, topk=topk, intakes=intakes)
    for size in (CHUNK, LARGE)
    for topk in (0, 8)
    for intakes in (1, 2)
)
"""One intake against two."""
CASES = (
    *(_small_steps(Case(chunk_tokens=size, event_tokens=size, http=False)) for size in (16, 64, 256, CHUNK, LARGE)),
    Case(chunk_tokens=CHUNK, event_tokens=INTERVAL, http=False),
    *(Case(chunk_tokens=CHUNK, event_tokens=events, http=True) for events in (CHUNK, 64, INTERVAL)),
)


def table(rows: Sequence[Figures]) -> str:
    """The figures as text."""
    head = f"{'null engines':<13}{'chunk':>6}{'event':>6}{'tokens/s/core':>15}{'tokens/s':>11}"
    lines = [f"{head}   {'us a chunk: ' + ' '.join(ROLES):<44} null   lag p99, ms"]
    for row in rows:
        case = row.case
        where = "HTTP servers" if case.http else "in process"
        cost = " ".join(f"{row.us_per_chunk[role]:>{len(role)}.0f}" for role in ROLES)
        lag = " ".join(f"{role} {row.lag_p99_ms[role]:.0f}" for role in ROLES)
        rates = f"{row.tokens_per_core_s:>15,.0f}{row.tokens_per_s:>11,.0f}"
        indent = " " * len("us a chunk: ")
        lines.append(
            f"{where:<13}{case.chunk_tokens:>6}{case.event_tokens:>6}{rates}   {indent}{cost} "
            f"{row.us_per_chunk['null']:>7.0f}   {lag}"
        )
    return "\n".join(lines)
