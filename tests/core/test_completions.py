"""Given responses: which samples they are, how they are read, and what does not go with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import make_model, small_topology, topology_data, write_lines, write_topology

from opd_async.checks.inputs import read_inputs
from opd_async.checks.validation import validate
from opd_async.config.topology import CompletionsSection
from opd_async.config.topology_file import load_topology
from opd_async.data.completions import Completion, Mix, load_completions
from opd_async.data.prompts import Prompt, TeacherChoice
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError

EVERYBODY = TeacherChoice()


def completions(count: int) -> list[Completion]:
    nothing = np.zeros(0, np.int32)
    return [Completion(Prompt(index, nothing, "", {}), np.array([index], np.int32)) for index in range(count)]


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0.0, 1.0), count=st.integers(1, 7), seed=st.integers(0, 3))
def test_the_share_holds_and_all_rows_come_in_turn(share: float, count: int, seed: int) -> None:
    mix, samples = Mix(completions(count), share, seed, shuffle=True), 200
    found = [mix.of(sample_id) for sample_id in range(samples)]
    rows = [int(one.response[0]) for one in found if one is not None]
    assert abs(samples - len(rows) - samples * share) <= 1.0
    for start in range(0, len(rows) - count + 1, count):
        assert sorted(rows[start : start + count]) == list(range(count))
    again = Mix(completions(count), share, seed, shuffle=True)  # a resumed run asks for later samples only
    later = [again.of(sample_id) for sample_id in range(150, samples)]
    assert [one and one.prompt.prompt_id for one in later] == [one and one.prompt.prompt_id for one in found[150:]]


def test_without_completions_everything_is_generated() -> None:
    assert all(Mix((), 1.0, 0, shuffle=True).of(sample_id) is None for sample_id in range(50))


def test_responses_end_with_the_end_token_and_are_short_enough(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    rows = [{"prompt": "ab", "completion": "cde"}, {"prompt": "ab", "completion": "c" * 9}, {"prompt": "abcdefg"}]
    section = CompletionsSection(path=write_lines(tmp_path / "given.jsonl", *rows[:2]))
    found = load_completions(section, Tokenizer(model), (5, 6), (2, 5), EVERYBODY)
    (only,) = found.completions
    assert only.prompt.token_ids.tolist() == [1, 3, 4] and only.response.tolist() == [5, 6, 7, 2]
    assert found.skipped_too_long == 1
    with pytest.raises(InputError, match="no response has at most 2 tokens; raise rollout"):
        load_completions(section, Tokenizer(model), (5, 2), (2,), EVERYBODY)
    write_lines(section.path, rows[0], rows[2])
    with pytest.raises(InputError, match="1 rows have no text under 'completion', the first is row 2"):
        load_completions(section, Tokenizer(model), (20, 6), (2,), EVERYBODY)


WRONG = [
    (["opd.gkd_lambda=0.5"], False, "opd.gkd_lambda: 0.5, but nothing is given to mix in; write data.completions"),
    ([], True, "data.completions: given, but opd.gkd_lambda is 1, so that none is taken; write less than 1"),
    (["opd.gkd_lambda=0.5", "opd.loss=reverse_kl"], True, "opd.loss: reverse_kl, but given responses were not sampled"),
    (["opd.gkd_lambda=0.5", "opd.use_opd=false"], True, "opd.use_opd: false, but given responses are there to be"),
    (["opd.gkd_lambda=0.5", "data.completions.path=x.jsonl"], True, "data.completions.path: no file x.jsonl; write"),
    (["opd.gkd_lambda=0.5", "data.completions.path=x.csv"], True, "data.completions.path: no file x.csv; write"),
    (["opd.gkd_lambda=0.5", "advantage.reference_kl_coef=0.1"], True, "advantage.reference_kl_coef: 0.1, but the pull"),
    (["opd.gkd_lambda=0.5", "opd.loss=sft"], True, "opd.loss: sft, but a share of 0.5 of the samples is the student's"),
    (["opd.loss=sft"], False, "opd.loss: sft, but a share of 1 of the samples is the student's own"),
    (["opd.gkd_lambda=0", "opd.loss=sft"], True, None),
    (["opd.gkd_lambda=0.5"], True, None),
]


@pytest.mark.parametrize(("overrides", "there", "expected"), WRONG)
def test_what_does_not_go_together_is_named(
    tmp_path: Path, overrides: list[str], there: bool, expected: str | None
) -> None:
    data = topology_data(tmp_path)
    if there:
        path = write_lines(tmp_path / "given.jsonl", {"prompt": "ab", "completion": "cd"})
        data["data"]["completions"] = {"path": str(path)}
    data["opd"] = {"loss": "jsd_topk", "topk": 8}
    topology = load_topology(write_topology(tmp_path, data), overrides)
    found = [line for line in validate(topology) if "advantage.estimator" not in line and "reward" not in line]
    assert [line for line in found if expected is not None and line.startswith(expected)] == found
    assert len(found) == (expected is not None)
    if expected is None:
        assert read_inputs(topology).completions.completions[0].response.tolist() == [5, 6, 2]


def test_no_file_means_no_completions(tmp_path: Path) -> None:
    assert read_inputs(small_topology(tmp_path)).completions.completions == ()
