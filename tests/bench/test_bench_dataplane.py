"""The data plane with null engines: every token arrives once and unchanged, and the watcher reads what roles export."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from opd_async.bench.wire import cases, intakes
from opd_async.bench.wire.learner import Account
from opd_async.bench.wire.pattern import LOGPROBS, PROMPT_TOKENS, SCORES, TOKENS, prompts
from opd_async.bench.wire.run import ROLES, Case, buckets, measure, quantile, value
from opd_async.errors import RoleError
from opd_async.scheduling.packing import micro_batch
from opd_async.scheduling.segments import Segment
from opd_async.transport.step_batch import MicroBatch

SMALL = Case(chunk_tokens=32, event_tokens=8, http=False, response_tokens=200, slots=4, step_tokens=800, seconds=0.3)


@pytest.mark.parametrize("http", [False, True], ids=["in process", "HTTP"])
def test_a_null_run(http: bool) -> None:
    """A token that is lost, changed or comes twice would end it: see `Account`."""
    figures = measure(dataclasses.replace(SMALL, http=http))
    assert figures.steps > 0
    assert figures.checked_tokens >= figures.tokens > 0
    assert figures.seconds > SMALL.seconds
    assert set(figures.us_per_chunk) == {*ROLES, "null"}
    assert set(figures.lag_p99_ms) == set(ROLES)
    assert len(cases.table([figures]).splitlines()) == 2


def test_a_null_run_with_two_intakes() -> None:
    figures = measure(dataclasses.replace(SMALL, intakes=2, topk=8))
    assert figures.checked_tokens >= figures.tokens > 0


def test_two_intakes_alone() -> None:
    """Nothing but intakes is real: each takes in its share, and every token is checked behind them."""
    # processor time comes in hundredths of a second, of which each needs one
    carried = intakes.measure(dataclasses.replace(SMALL, intakes=2, topk=8, seconds=1.0), core=0)
    assert len(carried.us_per_chunk) == 2 and min(carried.us_per_chunk) > 0.0 and carried.tokens > 0
    head, row = intakes.table([carried]).splitlines()
    assert row.split()[:3] == [str(SMALL.chunk_tokens), "8", "2"] and "a core each" in head


def batch(prompt: int, start: int, end: int) -> MicroBatch:
    """Response tokens [start, end) of one prompt, as the learner gets them."""
    ids = np.concatenate([prompts()[prompt].token_ids, TOKENS[PROMPT_TOKENS : PROMPT_TOKENS + end]])
    new = slice(PROMPT_TOKENS + start, PROMPT_TOKENS + end)
    versions = np.zeros(end - start, np.int32)
    return micro_batch(
        [
            Segment(
                sample_id=0,
                prompt_tokens=PROMPT_TOKENS,
                start=start,
                end=end,
                complete=False,
                token_ids=ids,
                behaviour_logprobs=LOGPROBS[new],
                teacher_logprobs=SCORES[new],
                versions=versions,
            )
        ],
        0,
    )


def test_the_account_adds_up() -> None:
    account = Account()
    assert [account.check(batch(7, 0, 5)), account.check(batch(7, 5, 9)), account.check(batch(8, 0, 2))] == [5, 4, 2]
    assert account.tokens == 11


@pytest.mark.parametrize(("start", "end"), [(4, 9), (6, 9), (0, 5)], ids=["twice", "a gap", "all again"])
def test_what_comes_twice_or_is_missing_is_noticed(start: int, end: int) -> None:
    account = Account()
    account.check(batch(7, 0, 5))
    with pytest.raises(RoleError, match="prompt 7: what came behind its response token 5"):
        account.check(batch(7, start, end))


@pytest.mark.parametrize("field", ["token_ids", "behaviour_logprobs", "teacher_logprobs"])
def test_what_was_changed_is_noticed(field: str) -> None:
    values = getattr(one := batch(7, 0, 5), field).copy()
    values[-1] += 1
    with pytest.raises(RoleError):
        Account().check(dataclasses.replace(one, **{field: values}))


PAGE = """\
# TYPE opd_intake_scored_tokens counter
opd_intake_scored_tokens_total 42.0
# TYPE lag histogram
lag_bucket{le="0.01"} 1.0
lag_bucket{le="0.1"} 3.0
lag_bucket{le="+Inf"} 4.0
lag_sum 0.5
"""


def test_what_roles_export_is_read() -> None:
    assert value(PAGE, "opd_intake_scored_tokens_total") == 42.0
    assert buckets(PAGE, "lag") == {0.01: 1.0, 0.1: 3.0, float("inf"): 4.0}


def test_quantiles_are_those_between_two_looks() -> None:
    before = {1.0: 10.0, 2.0: 10.0, float("inf"): 10.0}
    after = {1.0: 10.0, 2.0: 110.0, float("inf"): 110.0}
    assert quantile(before, after, 0.5) == pytest.approx(1.5)
    assert quantile(before, before, 0.5) == 0.0
    assert quantile({}, {1.0: 1.0, float("inf"): 100.0}, 0.99) == 1.0
