"""A second prompt of the teacher, behind which the same response is scored again: made of a row, carried, checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored_chunks import PROMPT, chunk, scored, token_ids
from small_runs import make_model, small_topology, topology_data, write_lines, write_topology

from opd_async.actors.teacher.known_tokens import KnownTokens
from opd_async.checks.inputs import examine
from opd_async.checks.validation import validate
from opd_async.config.inputs import DataSection, PromptsSection
from opd_async.data import prompt_cache
from opd_async.data.own_prompts import SECTION
from opd_async.data.prompts import PromptSet, Reading, TeacherChoice, load_prompts, read_row
from opd_async.data.teacher_prompts import TeacherPrompts
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError, WireError
from opd_async.plan.chunk_bounds import ChunkBounds
from opd_async.plan.resolve import make_plan
from opd_async.run.fingerprints import fingerprints
from opd_async.scheduling.assembly import Assembler, Verdict
from opd_async.scheduling.outbox import Outbox
from opd_async.scheduling.score_batches import TokenBudgetBatcher
from opd_async.transport.bounds import receive
from opd_async.transport.wire import encode

RIGHT = np.array([9, 9, 9, 8], np.int32)
WRONG = np.array([6, 5, 6], np.int32)
BOTH: dict[str, Any] = {"teacher_prompt_tokens": len(RIGHT), "contrast_prompt_tokens": len(WRONG)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_model(tmp_path_factory.mktemp("model")))


def choice(tokenizer: Tokenizer, limit: int = 64, **keys: Any) -> TeacherChoice:
    made = DataSection(**keys), tokenizer, {"": (limit, "engines.teacher.context_tokens")}
    return TeacherChoice(prompts=TeacherPrompts.of(*made), contrast=TeacherPrompts.of_contrast(*made))


def load(path: Path, tokenizer: Tokenizer, *rows: object, **keys: Any) -> PromptSet:
    section = PromptsSection(path=write_lines(path / "rows.jsonl", *rows))
    return load_prompts(section, tokenizer, 64, choice(tokenizer, **keys))


def read(found: PromptSet) -> list[tuple[list[int] | None, list[int] | None]]:
    pairs = [(one.teacher_ids, one.contrast_ids) for one in found.prompts]
    return [(None if a is None else a.tolist(), None if b is None else b.tolist()) for a, b in pairs]


@pytest.mark.parametrize("large", [False, True])
def test_both_prompts_are_made_of_the_row(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:  # kept as files, and found there again
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(prompt_cache, "SMALL_BYTES", 0)
    rows = [{"prompt": "ab", "s": "c", "w": "d"}, {"prompt": "a", "s": "e", "w": "ii"}]
    for _ in range(2):
        found = load(tmp_path, tokenizer, *rows, privileged_key="s", contrast_prompt="{{ row.w }}{{ text }}")
        assert read(found) == [
            tuple(tokenizer.encode(text) for text in texts) for texts in (("abc", "dab"), ("ae", "iia"))
        ]
        assert found.longest_read == 4
    keys = {"contrast_prompt": "w"}
    assert read(load(tmp_path, tokenizer, *rows, **keys)) == [(None, tokenizer.encode(text)) for text in ("d", "ii")]
    one = read_row(0, rows[0], Reading(SECTION, tokenizer, choice(tokenizer, **keys)), 64)
    assert one.contrast_ids is not None and one.contrast_ids.tolist() == tokenizer.encode("d")
    assert read(load(tmp_path, tokenizer, *rows)) == [(None, None)] * 2


def test_a_row_without_a_text_of_its_own_reads_the_students_prompt_where_that_is_wanted(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [{"prompt": "ab", "s": "c", "w": "d"}, {"prompt": "ab", "s": "c"}, {"prompt": "a"}]
    keys = {"privileged_key": "s", "contrast_prompt": "{{ text }}{{ row.w }}"}
    found = load(tmp_path, tokenizer, *rows, teacher_prompt_missing="plain", **keys)
    plain = tokenizer.encode("ab"), tokenizer.encode("a")
    right, wrong = tokenizer.encode("abc"), tokenizer.encode("abd")
    assert read(found) == [(right, wrong), (right, plain[0]), (None, plain[1])]
    with pytest.raises(InputError, match=r"2 broken rows\n.*has no attribute 'w'; write it"):
        load(tmp_path, tokenizer, *rows[:2], {"prompt": "a", "s": "c"}, **keys)
    with pytest.raises(InputError, match=r"data\.contrast_prompt fails: .* by zero"):
        load(tmp_path, tokenizer, rows[0], contrast_prompt="{{ 1 // 0 }}")
    with pytest.raises(InputError, match="1 rows are too long for their teacher, row 1 most: the teacher's prompt has"):
        load(tmp_path, tokenizer, {"prompt": "a", "w": "b" * 20}, contrast_prompt="w", limit=10)


def test_topologies_that_nobody_would_score_so_are_refused(tmp_path: Path) -> None:
    values = topology_data(tmp_path)
    write_lines(tmp_path / "train.jsonl", {"prompt": "ab", "w": "c" * 40}, {"prompt": "a", "w": "d"})
    (tmp_path / "contrast_hooks.py").write_text("def loss(rows): ...\n")
    values["data"]["contrast_prompt"] = "w"

    def refused(*overrides: str) -> str:
        with pytest.raises(InputError) as caught:
            examine(write_topology(tmp_path, values), overrides, str)
        return str(caught.value)

    assert "data.contrast_prompt: given, but no loss here looks at a second score; write opd.function" in refused()
    said = refused("opd.use_opd=false")
    assert "data.contrast_prompt: given, but opd.use_opd is false and no teacher reads it; remove it" in said
    assert "at most 32 leave room for the response; raise engines.teacher.context_tokens" in refused()
    values["rollout"] |= {"endpoint": True, "function": "contrast_hooks:loss"}
    assert "data.contrast_prompt cannot replace" in refused()


def test_a_cache_that_is_left_open_has_room_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = topology_data(tmp_path)
    write_lines(tmp_path / "train.jsonl", {"prompt": "ab", "w": "c" * 40})
    (tmp_path / "contrast_hooks.py").write_text("def loss(rows): ...\n")
    monkeypatch.chdir(tmp_path)
    values["engines"], values["opd"] = {}, {"function": "contrast_hooks:loss"}
    plain, _ = examine(write_topology(tmp_path, values), [], str)
    topology, _ = examine(write_topology(tmp_path, values), ["data.contrast_prompt=w"], str)
    assert validate(topology) == []
    assert (plain.engines.teacher.context_tokens, topology.engines.teacher.context_tokens) == (35, 32 + 41)
    assert plain.engines.teacher.kv_tokens == 35 * plain.rollout.slots
    assert topology.engines.teacher.kv_tokens == 2 * 73 * topology.rollout.slots
    assert topology.engines.student.kv_tokens == plain.engines.student.kv_tokens


def test_a_run_that_goes_on_needs_the_same_contrast(tmp_path: Path) -> None:
    topology = small_topology(tmp_path)
    tokenizer = Tokenizer(topology.models.student.path)

    def digest(**keys: Any) -> str:
        found = load(tmp_path, tokenizer, {"prompt": "ab", "w": "c", "v": "d"}, **keys)
        return fingerprints(topology, found, {}, ())["data.train"]  # type: ignore[arg-type]

    digests = {digest(), digest(contrast_prompt="w"), digest(contrast_prompt="v"), digest(teacher_prompt="w")}
    assert len(digests) == 4


# --- on the way -------------------------------------------------------------------------------------------------------


def test_every_context_brings_it_along() -> None:
    box = Outbox()
    box.open(4, 0, 1, PROMPT, token_ids(0, 0), RIGHT, WRONG)
    first, second = (box.add(chunk(4, *span, **BOTH), 0.0) for span in ((0, 3), (3, 5)))
    assert first.contrast_prompt is WRONG and second.contrast_prompt is None
    assert first.read_prompts == second.read_prompts == (4, 3)
    box.acknowledge(4, 0, 3, 0.0)
    ((_, again),) = box.teacher_restarted(1, 1.0)
    assert receive(encode(again)).contrast_prompt.tolist() == WRONG.tolist()
    assert chunk(4, 0, 3).read_prompts == (len(PROMPT),)


@pytest.mark.parametrize(
    "wrong", [{"context": None}, {"contrast_prompt_tokens": 2}, {"contrast_prompt": np.array([-1, 2, 3], np.int32)}]
)
def test_one_that_does_not_fit_its_chunk_is_dropped(wrong: dict[str, Any]) -> None:
    good = replace(chunk(4, 0, 3, **BOTH), context=PROMPT, teacher_prompt=RIGHT, contrast_prompt=WRONG)
    receive(encode(good))
    with pytest.raises(WireError, match=r"teacher_prompt|contrast_prompt"):
        receive(encode(replace(good, **wrong)))


def test_the_teachers_context_bounds_it(tmp_path: Path) -> None:
    topology = small_topology(tmp_path, "engines.student.context_tokens=64", "engines.teacher.context_tokens=80")
    bounds = ChunkBounds(make_plan(topology), None)
    one = replace(
        chunk(0, 0, 3, teacher="teacher", contrast_prompt_tokens=77, token_ids=np.arange(3, dtype=np.int32)),
        context=np.array([3, 4], np.int32),
        contrast_prompt=np.full(77, 5, np.int32),
    )
    assert bounds.of_chunk(None, one) is None
    assert "in the teacher's context of 80" in (bounds.of_chunk(None, replace(one, contrast_prompt_tokens=78)) or "")
    assert "without the contrast's prompt" in (bounds.of_chunk(None, replace(one, contrast_prompt=None)) or "")
    foreign = replace(one, contrast_prompt=np.full(77, 32, np.int32))
    assert bounds.of_chunk(None, foreign) == "contrast_prompt: 32 in a vocabulary of 32"


def test_a_teacher_actor_asks_behind_both_prompts() -> None:
    """Two sequences that end with the same tokens; a chunk that says another length of prompt is none of the sample."""
    known, batcher = KnownTokens(), TokenBudgetBatcher(12, 1.0)
    first = replace(chunk(4, 0, 3, **BOTH), context=PROMPT, teacher_prompt=RIGHT, contrast_prompt=WRONG)
    second = chunk(4, 3, 5, **BOTH)
    for one in (first, second):
        assert known.extend(one)
        batcher.add(one, 0.0)
    assert not known.extend(chunk(4, 5, 6, teacher_prompt_tokens=len(RIGHT)))
    assert batcher.waiting_tokens == 10 and batcher.take(0.0) == []
    (item,) = batcher.take(1.0)
    assert (item.reads, item.new_tokens, item.response_tokens, item.context) == (2, 10, 5, 9 + 8)
    response = token_ids(0, 5).tolist()
    asked = [(ids.tolist(), start) for ids, start in known.requests(item)]
    assert asked == [([*RIGHT, *response], 4), ([*WRONG, *response], 3)]
    assert known.scored_before(item) == [0, 0]
    batcher.add(chunk(4, 5, 9, **BOTH), 2.0)
    batcher.drop(4)
    assert batcher.waiting_tokens == 0
    batcher.done([4])
    assert known.extend(chunk(4, 5, 8, **BOTH))
    batcher.add(chunk(4, 5, 8, **BOTH), 3.0)
    (item,) = batcher.take(9.0)
    assert [start for _, start in known.requests(item)] == [9, 8] and known.scored_before(item) == [8, 7]


def test_the_intake_takes_both_scores_or_none() -> None:
    both = {"contrast_logprobs": np.array([-1.0, -2.0], np.float32)}
    plain, wanted = Assembler(), Assembler(contrast=True)
    assert plain.add(scored(1, 0, 2, context=True, **both)) is Verdict.MALFORMED
    assert wanted.add(scored(1, 0, 2, context=True)) is Verdict.MALFORMED
    for bad in ([-1.0], [-1.0, np.nan], [-1.0, 0.5]):
        values = {"contrast_logprobs": np.array(bad, np.float32)}
        assert wanted.add(scored(1, 0, 2, context=True, **values)) is Verdict.MALFORMED
    assert wanted.add(scored(1, 0, 2, context=True, **both)) is Verdict.ACCEPTED
    given = {"sampled": False, **dict.fromkeys(("behaviour_logprobs", "teacher_logprobs"), np.zeros(0, np.float32))}
    assert wanted.add(scored(1, 2, 5, **given)) is Verdict.ACCEPTED
    last = {"contrast_logprobs": np.array([-3.0], np.float32)}
    assert wanted.add(scored(1, 5, 6, finish="stop", **last)) is Verdict.ACCEPTED
    segment = wanted.take(wanted.samples[1])
    assert segment is not None and segment.contrast_logprobs is not None
    assert segment.contrast_logprobs.tolist() == [-1.0, -2.0, -3.0] and segment.tokens == 3


def test_the_intake_keeps_the_prompt_for_a_teacher_in_the_learner() -> None:
    assembler = Assembler(teacher=False)
    nothing = {"teacher_logprobs": np.zeros(0, np.float32), "contrast_prompt": RIGHT}
    assert assembler.add(scored(1, 0, 2, context=True, **nothing)) is Verdict.ACCEPTED
    first = assembler.take(assembler.samples[1])
    assembler.give_up_attempt(1, 0)
    assert assembler.add(scored(1, 2, 5, context=True, attempt=1, finish="stop", **nothing)) is Verdict.ACCEPTED
    second = assembler.take(assembler.samples[1])
    for segment, end in ((first, 2), (second, 5)):
        assert segment is not None and segment.contrast_prompt is not None
        assert segment.contrast_prompt.tolist() == RIGHT.tolist()
        assert segment.longest == len(RIGHT) + end, "micro-batches are filled by the longest that is read"
