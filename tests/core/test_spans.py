"""Tokens that the student did not sample: context of what is behind them, trained and counted nowhere."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored_chunks import chunk, context_to, scored
from staleness_oracle import BrokenInvariant
from staleness_sim import Setup, Simulation, play

from opd_async.config.topology import TrainOn
from opd_async.run.trained import TrainedRecord, TrainedStep, main, read_trained
from opd_async.scheduling import frontier
from opd_async.scheduling.admission import DeadlineAdmission
from opd_async.scheduling.assembly import Assembler, Sample, Verdict
from opd_async.scheduling.filled_steps import FilledSteps
from opd_async.scheduling.leases import LeaseBook, PromptOrder
from opd_async.scheduling.outbox import Outbox
from opd_async.scheduling.packing import micro_batch, pack
from opd_async.scheduling.step_policy import DeadlineCuts
from opd_async.transport.bounds import problem
from opd_async.transport.messages import LeaseDone, ScoredChunk

NOTHING = np.zeros(0, np.float32)


def given(sample_id: int, start: int, end: int, context: bool = False, **fields: Any) -> ScoredChunk:
    """Given tokens at positions [start, end)."""
    bare = {"behaviour_logprobs": NOTHING, "teacher_logprobs": NOTHING, "sampled": False}
    return scored(sample_id, start, end, context, **bare | fields)


def episode(assembler: Assembler, *, finish: str | None = "stop") -> Sample:
    """[0, 3) sampled from weights 0, [3, 5) given, [5, 7) sampled from weights 1, [7, 8) given, [8, 9) sampled."""
    parts = [
        scored(4, 0, 3, context=True),
        given(4, 3, 5),
        scored(4, 5, 7, weight_version=1),
        given(4, 7, 8, weight_version=1),
        scored(4, 8, 9, weight_version=1, finish=finish),
    ]
    assert [assembler.add(part) for part in parts] == [Verdict.ACCEPTED] * 5
    return assembler.samples[4]


def test_a_segment_trains_what_was_sampled_and_has_the_rest_as_context() -> None:
    assembler = Assembler()
    sample = episode(assembler)
    assert (sample.untrained_tokens, sample.scored_end, sample.given) == (6, 9, 3)
    segment = assembler.take(sample)
    assert segment is not None and segment.positions is not None
    assert (segment.start, segment.end, segment.tokens) == (0, 9, 6)
    assert segment.positions.tolist() == [0, 1, 2, 5, 6, 8]
    assert segment.token_ids.tolist() == context_to(9).tolist()
    assert segment.versions.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(segment.behaviour_logprobs) == len(segment.teacher_logprobs) == 6
    assert segment.versioned_runs() == [(0, 3, 0, 0), (5, 7, 1, 1), (8, 9, 1, 1)]
    assert segment.given_runs() == [(3, 5), (7, 8)]
    assert [facts.end for facts in segment.chunks] == [3, 5, 7, 8, 9]


def test_a_cut_behind_given_tokens_takes_them_along() -> None:
    assembler = Assembler()
    for part in (scored(4, 0, 3, context=True), given(4, 3, 5)):
        assembler.add(part)
    first = assembler.take(assembler.samples[4])
    assert first is not None and first.positions is not None
    assert (first.end, first.positions.tolist(), first.given_runs()) == (5, [0, 1, 2], [(3, 5)])
    assembler.add(scored(4, 5, 7, finish="stop"))
    second = assembler.take(assembler.samples[4])
    assert second is not None and second.positions is None and (second.start, second.end) == (5, 7)
    assert second.token_ids.tolist() == context_to(7).tolist()


def test_given_tokens_alone_are_nothing_to_train() -> None:
    assembler = Assembler()
    assembler.add(given(4, 0, 5, context=True))
    sample = assembler.samples[4]
    assert sample.untrained_tokens == 0
    for policy in (DeadlineCuts(1, 1), FilledSteps(1, 1)):
        assert policy.ready_tokens(assembler, 9) == 0
        assert policy.round(assembler, 9, 0).samples == []
    assembler.add(scored(4, 5, 5, finish="stop"))
    assert assembler.take(sample) is None and 4 in assembler.completed


def test_only_sampled_tokens_grow_old() -> None:
    assembler = Assembler()
    assembler.add(given(4, 0, 2, context=True))
    assembler.add(scored(4, 2, 3, weight_version=6))
    assert assembler.samples[4].oldest_version == 6
    assert DeadlineCuts(1, 1).ready_tokens(assembler, 6) == 0
    assert DeadlineCuts(1, 1).ready_tokens(assembler, 7) == 1


def test_a_tools_answer_may_come_however_late() -> None:
    """It came during an update, under weights whose tokens have long been trained: no mark has it, and no age."""
    assembler = Assembler()
    assembler.add(scored(4, 0, 3, context=True, weight_version=2))
    assert assembler.add(given(4, 3, 5, weight_version=1), oldest=7) is Verdict.ACCEPTED
    assert assembler.add(scored(4, 5, 6, weight_version=6), oldest=7) is Verdict.MALFORMED
    assert assembler.add(scored(4, 5, 6, weight_version=7), oldest=7) is Verdict.ACCEPTED


def test_given_tokens_wait_for_what_stands_before_them() -> None:
    assembler = Assembler()
    assembler.add(scored(4, 0, 1, context=True))
    assert assembler.add(given(4, 3, 5)) is Verdict.EARLY
    assert assembler.add(scored(4, 1, 3)) is Verdict.ACCEPTED
    assert assembler.samples[4].scored_end == 5 and assembler.samples[4].untrained_tokens == 3
    assert assembler.add(given(4, 3, 5)) is Verdict.DUPLICATE


@pytest.mark.parametrize(
    "fields",
    [
        {"behaviour_logprobs": np.full(2, -0.5, np.float32)},
        {"teacher_logprobs": np.full(2, -0.5, np.float32)},
        {"finish": "stop"},
        {"topk_ids": np.zeros((2, 1), np.int32), "topk_logprobs": np.zeros((2, 1), np.float32)},
    ],
    ids=["behaviour", "teacher", "finish", "topk"],
)
def test_given_tokens_with_what_only_sampled_ones_have_are_refused(fields: dict[str, Any]) -> None:
    assembler = Assembler()
    assembler.add(scored(4, 0, 3, context=True))
    assert problem(given(4, 3, 5)) is None
    assert assembler.add(given(4, 3, 5, **fields)) is Verdict.MALFORMED
    assert "topk_ids" in fields or problem(given(4, 3, 5, **fields)) is not None
    assert assembler.add(given(4, 3, 5)) is Verdict.ACCEPTED


def test_rows_are_those_of_sampled_tokens() -> None:
    assembler = Assembler()
    segment = assembler.take(episode(assembler))
    assert segment is not None
    batch = micro_batch([segment], 3)
    assert batch.token_ids[batch.rows + 1].tolist() == [100, 101, 102, 105, 106, 108]
    assert batch.staleness.tolist() == [3, 3, 3, 2, 2, 2]
    assert len(batch.token_ids) == 11
    assert [step.loss_tokens for step in pack([segment], 3, 2, 100)] == [6, 6]


def test_a_checkpoint_knows_what_was_given() -> None:
    assembler = Assembler()
    sample = episode(assembler, finish=None)
    assembler.take(sample)
    assembler.add(given(4, 9, 12))
    state = frontier.snapshot(assembler, 3)
    assert state.partial_ends.tolist() == [9] and state.partial_given is not None
    assert state.partial_given.tolist() == [3]
    assert frontier.restore(state).samples[4].given == 3
    assert frontier.snapshot(Assembler(), 3).partial_given is None


def test_waiting_tokens_are_those_that_a_step_can_train() -> None:
    """A response that ends with a tool's answer must not hold up admission for ever: no step could ever take it."""
    state = frontier.empty(0)
    book = LeaseBook(state, PromptOrder(3, 1, 0, True), DeadlineAdmission(4, 1), slots=2)
    assert book.lease("a", 0) is not None
    done = LeaseDone(0, 0, response_tokens=20, finish="stop", given_tokens=17)
    book.ended(done.sample_id, done.attempt, done.response_tokens - done.given_tokens)
    assert book.waiting_tokens == 3
    book.trained(0, 15, False, 13)
    assert book.waiting_tokens == 1 and book.trained_end(0) == 15
    book.trained(0, 20, True, 17)
    assert book.waiting_tokens == 0


def test_a_lease_goes_on_behind_given_tokens() -> None:
    assembler = Assembler()
    assembler.take(episode(assembler, finish=None))
    book = LeaseBook(frontier.snapshot(assembler, 1), PromptOrder(9, 1, 0, True), DeadlineAdmission(9, 1), slots=2)
    spec = book.lease("a", 1)
    assert spec is not None and spec.prefix.tolist() == context_to(9)[2:].tolist()
    book.ended(4, 0, response_tokens=8)  # 11 tokens, of which 3 were given
    assert book.waiting_tokens == 2


def test_an_episode_that_waits_for_a_tool_needs_no_slot() -> None:
    book = LeaseBook(frontier.empty(0), PromptOrder(99, 1, 0, True), DeadlineAdmission(99, 1), slots=2)
    assert [book.lease("a", 0) is not None for _ in range(3)] == [True, True, False]
    book.away(0, 0, True)
    book.away(0, 0, True)  # said twice
    assert book.generating == 1 and book.lease("b", 0) is not None and book.lease("b", 0) is None
    book.away(0, 0, False)  # back: one more than slots for a while
    assert book.generating == 3
    book.away(1, 7, True)  # of no attempt that there is
    assert book.generating == 3
    book.away(1, 0, True)
    book.ended(1, 0, 5)  # while it was away
    assert book.generating == 2 and book.generating_by("a") == 1
    book.away(2, 0, True)
    book.give_back(2, 1, np.zeros(0, np.int32), complete=False)  # its actor died
    assert book.generating == 1


def test_tools_that_never_answer_let_no_end_of_leases_out() -> None:
    book = LeaseBook(frontier.empty(0), PromptOrder(99, 1, 0, True), DeadlineAdmission(99, 1), slots=2)
    leased = 0
    while (spec := book.lease("a", 0)) is not None:
        leased += 1
        book.away(spec.sample_id, 0, True)
    assert leased == 8


def test_what_is_sent_again_has_given_tokens_in_its_context() -> None:
    outbox = Outbox()
    outbox.open(4, 0, 0, context_to(0), np.zeros(0, np.int32))
    outbox.add(chunk(4, 0, 3), 0.0)
    outbox.add(chunk(4, 3, 5, behaviour_logprobs=NOTHING, sampled=False), 0.0)
    outbox.add(chunk(4, 5, 7), 0.0)
    outbox.acknowledge(4, 0, 3, 0.0)
    (_, first), (_, second) = outbox.overdue(100.0, 1.0)
    assert not first.sampled and first.context is not None and first.context.tolist() == context_to(3).tolist()
    assert second.sampled and second.start == 5
    outbox.acknowledge(4, 0, 5, 0.0)
    ((_, again),) = outbox.overdue(300.0, 1.0)
    assert again.context is not None and again.context.tolist() == context_to(5).tolist()


def test_the_record_of_a_step_tells_trained_from_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = TrainedRecord(tmp_path, print, 0, None)
    ranges = np.array([(4, 0, 3, 0, 0), (4, 5, 7, 1, 1)], np.int64)
    record.write(0, ranges, given=[(4, 3, 5)])
    record.write(1, ranges)
    record.close()
    first, second = read_trained(tmp_path)
    assert isinstance(first, TrainedStep) and first.given == ((4, 3, 5),) and second.given == ()
    assert first.ranges.tolist() == second.ranges.tolist() == ranges.tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["trained", str(tmp_path)])
        main()
    assert '"given": [[4, 3, 5]]' in capsys.readouterr().out.splitlines()[0]


# --- whole schedules: `test_staleness.py` draws them at random, with spans in every second one ------------------------


@pytest.mark.parametrize("filled", [False, True], ids=["whole", "filled"])
@pytest.mark.parametrize("train_on", list(TrainOn))
def test_spans_are_cut_lost_and_resumed_like_everything_else(train_on: TrainOn, filled: bool) -> None:
    among, cuts, resumed = 0, 0, 0
    for seed in range(16):
        simulation = Simulation(Setup(2, train_on, seed=seed, filled=filled, spans=True))
        simulation.run(random.Random(seed).randbytes(4000))
        state = simulation.checkpoint
        resumed += 0 if state.partial_given is None else int(state.partial_given.sum())
        simulation.finish()
        rows = [row for _, rows in simulation.oracle.steps for row in rows if row.segment is not None]
        among += sum(row.segment.positions is not None for row in rows if row.segment)
        cuts += sum(not row.complete and row.given > 0 for row in rows)
    assert among > 100
    assert (cuts > 0 and resumed > 0) == (train_on is TrainOn.TOKENS)


class Generous(DeadlineCuts):
    """Trains what was given."""

    def choose(self, assembler: Assembler, version: int) -> list[Sample]:
        chosen = super().choose(assembler, version)
        for sample in chosen:
            for piece in sample.untrained:
                if not piece.sampled:
                    piece.sampled = True
                    piece.behaviour_logprobs = piece.teacher_logprobs = np.full(len(piece.token_ids), -1.0, np.float32)
            sample.untrained_given = 0
        return chosen


def test_a_given_token_that_is_trained_is_caught() -> None:
    with pytest.raises(BrokenInvariant, match="were sampled"):
        for seed in range(10):
            play(Setup(1, spans=True), random.Random(seed).randbytes(3000), Generous(8, 1))
