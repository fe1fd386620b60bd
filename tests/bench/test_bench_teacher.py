"""The teacher's benchmark: where responses are cut, what rounds add up to, and both modes on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import patience

from opd_async.bench.teacher.__main__ import row_of, table
from opd_async.bench.teacher.scoring import Part, Round, Work, cuts, parts

ROOT = Path(__file__).parents[2]


def test_where_a_response_is_cut() -> None:
    assert cuts(10, 4, "streamed") == [4, 8, 10]
    assert cuts(8, 4, "streamed") == [4, 8]
    assert cuts(10, 4, "whole") == [10]


def test_an_episode_is_cut_at_its_turns() -> None:
    work = Work(
        lengths=[14],
        slots=1,
        rate=2.0,
        prompt_tokens=3,
        chunk_tokens=4,
        vocab=9,
        turn_tokens=6,
        tool_s=5.0,
        given_tokens=3,
    )
    streamed = [(4, True, 2.0), (6, True, 3.0), (9, False, 8.0), (13, True, 10.0), (15, True, 11.0), (18, False, 16.0)]
    assert parts(14, work, "streamed") == [Part(*one) for one in [*streamed, (20, True, 17.0)]]
    ends = [(6, True), (9, False), (15, True), (18, False), (20, True)]
    assert parts(14, work, "whole") == [Part(end, sampled, 17.0) for end, sampled in ends]
    assert work.tokens_of(14) == 20 and work.tokens_of(6) == 6


def test_rounds_add_up() -> None:
    counted = {"scored_tokens": 100.0, "cached_tokens": 50.0, "computed_tokens": 120.0, "batches": 3.0}
    rounds = [
        Round(
            mode="whole",
            seconds=10.0,
            latencies_s=[0.1, 0.3],
            counted=counted | {"idle_seconds": 6.0},
            settled_s=1.0,
            new_tokens=150,
        ),
        Round(
            mode="whole",
            seconds=30.0,
            latencies_s=[0.2],
            counted=counted | {"idle_seconds": 26.0},
            settled_s=1.0,
            new_tokens=50,
        ),
    ]
    row = row_of(rounds)
    assert (row.responses, row.requests) == (3, 6)
    assert (row.score_p50_s, row.computed_per_scored, row.scored_tokens_per_s) == pytest.approx((0.2, 1.2, 5.0))
    assert row.busy_share == pytest.approx(0.25)
    assert "| whole | 3 | 0.200 | 0.298 | 1.20 | 1.20 | 5 | 6 | 25% |" in table([row])


@pytest.mark.parametrize("tools", [(), ("--tools", "0.05", "--turn", "16", "--given", "5")], ids=["plain", "tools"])
def test_both_modes_score_every_token(tmp_path: Path, tools: tuple[str, ...]) -> None:
    model = ("--layers", "2", "--hidden", "128", "--vocab", "64", "--context", "128", "--kv-tokens", "2048")
    work = ("--lengths", "20,40,60", "--prompt", "8", "--chunk", "8", "--slots", "4", "--rate", "200")
    command = [sys.executable, "-m", "opd_async.bench.teacher", *model, *work, "--responses", "6", "--rounds", "1"]
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [*command, *tools, "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(200),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    streamed, whole = json.loads(file.read_text())["rows"]
    assert (streamed["mode"], whole["mode"]) == ("streamed", "whole")
    assert streamed["responses"] == whole["responses"] == 6
    assert streamed["computed_per_scored"] >= 1 and whole["computed_per_scored"] >= 1
    # each request computes the token before its first one again, and none its last one: the cache has all else,
    # also behind a tool
    assert 0.9 < streamed["computed_per_new"] < 1.25 and 0.9 < whole["computed_per_new"] < 1.25
    assert 0 < streamed["score_p50_s"] <= streamed["score_p99_s"]
    assert whole["requests"] <= 6 or tools
    assert "| streamed | 6 |" in done.stdout
