"""One step's work packed into flat arrays. Pure numpy, no torch.

All tokens of a step lie back to back in one row of length T, so linear layers see no padding. Attention runs per group
of sequences with similar lengths; only inside a group are queries and keys padded. Suffixes: T packed tokens,
S sampled rows, R scored rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from opd_async.actors.engine.request import Request
from opd_async.actors.engine.sampling import SamplingParams
from opd_async.actors.engine.scheduler import Work
from opd_async.actors.engine.slots import IntArray

LongArray = npt.NDArray[np.int64]

# What one more attention group costs, in padded (query, key) pairs; measured on one CPU thread.
GROUP_COST = 6000


@dataclass(slots=True, kw_only=True)
class Group:
    """Sequences that attend together: packed tokens [first, end), padded to `q_len` queries and `kv_len` keys.

    `kv_slots` int32 [rows * kv_len] (0 = padding), `q_pos` int64 [rows, q_len] are the absolute positions of the
    queries. `gather` int64 [rows * q_len] maps padded queries to packed tokens and `scatter` int64 [end - first] maps
    back; both are None when every row has exactly `q_len` queries. `full` says that no key is masked for any query.
    """

    first: int
    end: int
    rows: int
    q_len: int
    kv_len: int
    kv_slots: IntArray
    q_pos: LongArray
    gather: LongArray | None
    scatter: LongArray | None
    full: bool


@dataclass(slots=True, kw_only=True)
class SampleRows:
    """Rows whose next-token distribution is wanted, and how to sample each. A scoring request's row is not sampled."""

    requests: list[Request]
    index_S: LongArray
    temperature_S: npt.NDArray[np.float32]
    greedy_S: npt.NDArray[np.bool_]
    top_k_S: LongArray
    top_p_S: npt.NDArray[np.float32]
    min_p_S: npt.NDArray[np.float32]
    filtered: bool
    top: int


@dataclass(slots=True)
class ScoreRows:
    """Rows that predict a given prompt token: `spans` lists (request, row count) in row order."""

    spans: list[tuple[Request, int]]
    index_R: LongArray
    target_R: LongArray
    top: int


@dataclass(slots=True, kw_only=True)
class Batch:
    """Everything the model needs for a step."""

    works: list[Work]
    input_ids_T: LongArray
    positions_T: LongArray
    slots_T: LongArray
    groups: list[Group]
    sample: SampleRows | None
    score: ScoreRows | None


class RowParams:
    """Sampling parameters by table row, so that a step gathers them instead of reading every request."""

    def __init__(self, rows: int) -> None:
        self.temperature = np.ones(rows, dtype=np.float32)
        self.greedy = np.zeros(rows, dtype=np.bool_)
        self.top_k = np.zeros(rows, dtype=np.int64)
        self.top_p = np.ones(rows, dtype=np.float32)
        self.min_p = np.zeros(rows, dtype=np.float32)
        self.filtered = np.zeros(rows, dtype=np.bool_)

    def set(self, row: int, params: SamplingParams) -> None:
        """Store the parameters of the request that now owns `row`."""
        self.temperature[row] = params.temperature
        # A scoring request's tail row is reported at temperature 1 and never sampled.
        self.greedy[row] = params.greedy or params.max_new_tokens == 0
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.filtered[row] = params.filtered


def build_batch(works: list[Work], table: IntArray, params: RowParams) -> Batch:
    """Pack `works` (not empty). `table` is the scheduler's slot table, int32 [rows, context]."""
    starts = np.array([work.start for work in works], dtype=np.int64)
    counts = np.array([work.count for work in works], dtype=np.int64)
    # Sorted by length, so that neighbours pad little; the scheduler does not care for the order.
    order = np.lexsort((starts + counts, counts))
    works = [works[i] for i in order.tolist()]
    starts, counts = starts[order], counts[order]
    rows = np.array([work.request.table_row for work in works], dtype=np.int64)
    ends = np.cumsum(counts)
    firsts = ends - counts
    positions_T = np.repeat(starts - firsts, counts) + np.arange(ends[-1])
    # extend copies at C speed; one numpy array per sequence would cost more than the whole list.
    ids: list[int] = []
    for work in works:
        ids.extend(work.request.tokens[work.start : work.start + work.count])
    return Batch(
        works=works,
        input_ids_T=np.array(ids, dtype=np.int64),
        positions_T=positions_T,
        slots_T=table[np.repeat(rows, counts), positions_T].astype(np.int64),
        groups=_groups(table, rows, starts, counts, firsts),
        sample=_sample_rows(works, ends, rows, params),
        score=_score_rows(works, firsts),
    )


def split_groups(counts: list[int], kv_lens: list[int], group_cost: int = GROUP_COST) -> list[tuple[int, int]]:
    """Cut sequences, sorted by length, into runs [a, b): a sequence joins a run while that pads less than a new run."""
    cuts: list[tuple[int, int]] = []
    first, max_q, max_kv = 0, 0, 0
    for index, (count, kv_len) in enumerate(zip(counts, kv_lens, strict=True)):
        size = index - first
        new_q, new_kv = max(max_q, count), max(max_kv, kv_len)
        # Areas of padded (query, key) pairs stand for attention's cost; linear layers see no padding at all.
        joined = (size + 1) * new_q * new_kv
        apart = size * max_q * max_kv + count * kv_len + group_cost
        if size and joined > apart:
            cuts.append((first, index))
            first, new_q, new_kv = index, count, kv_len
        max_q, max_kv = new_q, new_kv
    cuts.append((first, len(counts)))
    return cuts


def _groups(table: IntArray, rows: LongArray, starts: LongArray, counts: LongArray, firsts: LongArray) -> list[Group]:
    kv_lens = starts + counts
    groups = []
    for a, b in split_groups(counts.tolist(), kv_lens.tolist()):
        q_len, kv_len = int(counts[a:b].max()), int(kv_lens[a:b].max())
        first, end = int(firsts[a]), int(firsts[b - 1] + counts[b - 1])
        kv_slots = table[rows[a:b], :kv_len]
        equal = bool((kv_lens[a:b] == kv_len).all())
        # numpy's advanced indexing copied, so this does not write to the scheduler's table.
        if not equal:
            # Stale slot numbers past a sequence's end could point at another's non-finite KV: read the zero slot.
            kv_slots *= np.arange(kv_len) < kv_lens[a:b, None]
        # Padded queries repeat the last real one: a valid position, and never a fully masked row.
        steps = np.minimum(np.arange(q_len), counts[a:b, None] - 1)
        gather = scatter = None
        if (end - first) != (b - a) * q_len:
            gather = (firsts[a:b, None] + steps).ravel()
            scatter = np.flatnonzero(np.arange(q_len) < counts[a:b, None])
        groups.append(
            Group(
                first=first,
                end=end,
                rows=b - a,
                q_len=q_len,
                kv_len=kv_len,
                kv_slots=kv_slots.ravel(),
                q_pos=starts[a:b, None] + steps,
                gather=gather,
                scatter=scatter,
                full=equal and q_len == 1,
            )
        )
    return groups


def _sample_rows(works: list[Work], ends: LongArray, rows: LongArray, params: RowParams) -> SampleRows | None:
    chosen = [i for i, work in enumerate(works) if work.completes and _wants_next(work.request)]
    if not chosen:
        return None
    requests = [works[i].request for i in chosen]
    own = rows[chosen]
    greedy = params.greedy[own]
    return SampleRows(
        requests=requests,
        index_S=ends[chosen] - 1,
        temperature_S=np.where(greedy, np.float32(1.0), params.temperature[own]),
        greedy_S=greedy,
        top_k_S=params.top_k[own],
        top_p_S=params.top_p[own],
        min_p_S=params.min_p[own],
        filtered=bool(params.filtered[own].any()),
        top=max(request.logprob.top for request in requests),
    )


def _wants_next(request: Request) -> bool:
    return not request.prefill_only or request.logprob.top > 0 or bool(request.logprob.ids)


def _score_rows(works: list[Work], firsts: LongArray) -> ScoreRows | None:
    spans: list[tuple[Request, int]] = []
    index: list[LongArray] = []
    targets: list[int] = []
    for work, first in zip(works, firsts.tolist(), strict=True):
        request = work.request
        # Prompts are scored once: not again after a retraction.
        if request.prompt_done or request.logprob.start < 0:
            continue
        # The row of position i predicts token i + 1, so the last prompt token's row scores nothing.
        low = max(request.logprob.start, work.start)
        high = min(len(request.input_ids) - 1, work.start + work.count)
        if high > low:
            spans.append((request, high - low))
            index.append(np.arange(first + low - work.start, first + high - work.start))
            targets.extend(request.input_ids[low + 1 : high + 1])
    if not spans:
        return None
    top = max(request.logprob.top for request, _ in spans)
    return ScoreRows(spans, np.concatenate(index), np.array(targets, dtype=np.int64), top)
