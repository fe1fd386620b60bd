"""A whole run of episodes on real servers: five turns, weights that change inside them, a teacher that computes what is
new."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import ROOT, Launch, check_trained, left_running, make_inputs, rows, steps, write_topology
from test_pipeline import STEPS, on_sglang

from opd_async.run.trained import read_trained

pytestmark = pytest.mark.timeout(900)

TURNS = 5
EPISODE = f"""
async def episode(session, row):
    for turn in range({TURNS}):
        said = await session.generate(max_tokens=24)
        assert len(said.token_ids) <= 24
        await session.give(f"t{{100 + turn}} t{{150 + len(said.token_ids)}} t99")
    return 1.0
"""


def test_five_turns_with_given_text_whose_weights_change_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "turns_episode.py").write_text(EPISODE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    values = on_sglang(
        make_inputs(tmp_path / "inputs"),
        tmp_path,
        schedule__tokens_per_step=128,
        rollout__function="turns_episode:episode",
        reward__kind="episode",
        telemetry__samples_per_step=8,
    )
    folder = tmp_path / "run"
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        assert run.wait(800.0) == 0, run.text()
    ranges = check_trained(folder, 1, STEPS)
    assert any(parts[0][2] < parts[-1][3] for parts in ranges.values()), "weights changed inside an episode"
    given = [one for step in read_trained(folder) for one in step.given]
    assert len(given) > 10 and all(end - start == 3 for _, start, end in given)
    report = json.loads((folder / "report.json").read_text())
    assert report["staleness"]["max"] <= 1 and not report["counters"].get("episodes_failed")

    whole = [row for row in rows(folder / "samples.jsonl") if row.get("reward") == 1.0]
    assert whole, "an episode was trained to its end"
    assert any(len({version for _, version, *_ in row["chunks"]}) > 1 for row in whole)
    for row in whole:
        words = row["response"].split()
        assert len(row["given"]) == TURNS
        for turn, (start, end) in enumerate(row["given"]):
            assert words[start] == f"t{100 + turn}" and words[end - 1] == "t99"
            assert all(value == 0.0 for value in row["teacher_logprobs"][start:end])
            assert all(value < 0.0 for value in row["teacher_logprobs"][end : end + 1])

    # of each request the token before the new ones is computed again, for its logits; a prompt has three tokens
    taken = steps(folder)
    computed = sum(row["teacher_computed_tokens"] for row in taken)
    cached = sum(row["teacher_cached_tokens"] for row in taken)
    scored = sum(row["tokens"] for row in taken) + 3 * len(given)
    assert computed < 2 * scored and cached > computed, (computed, cached, scored)
    assert left_running(folder) == []
