"""Prompts that only a teacher reads: made of a row, refused before the start, and carried to whoever scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scored_chunks import PROMPT, chunk, context_to, scored, token_ids
from small_runs import make_model, small_topology, topology_data, write_lines, write_topology

from opd_async.checks.inputs import examine
from opd_async.config.inputs import DataSection, PromptsSection
from opd_async.data import prompt_cache
from opd_async.data.own_prompts import SECTION
from opd_async.data.prompts import PromptSet, Reading, TeacherChoice, load_prompts, read_row
from opd_async.data.rows import RowError
from opd_async.data.teacher_prompts import TeacherPrompts
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError, WireError
from opd_async.plan.chunk_bounds import ChunkBounds
from opd_async.plan.resolve import make_plan
from opd_async.run.fingerprints import fingerprints
from opd_async.scheduling.assembly import Assembler, Verdict
from opd_async.scheduling.outbox import Outbox
from opd_async.scheduling.packing import from_message, micro_batch, pack, to_message
from opd_async.scheduling.segments import Segment
from opd_async.transport import messages as m
from opd_async.transport.bounds import receive
from opd_async.transport.step_batch import MicroBatch
from opd_async.transport.wire import decode, encode

HINT = np.array([9, 9, 9, 8], np.int32)
CHAT = [{"role": "system", "content": "i"}, {"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_model(tmp_path_factory.mktemp("model")))


def choice(tokenizer: Tokenizer, limit: int = 64, teacher: str = "", **keys: Any) -> TeacherChoice:
    limits = {teacher: (limit, "engines.teacher.context_tokens")}
    return TeacherChoice((teacher,), None, TeacherPrompts(DataSection(**keys), tokenizer, limits))


def load(path: Path, tokenizer: Tokenizer, *rows: object, limit: int = 64, **keys: Any) -> PromptSet:
    section = PromptsSection(path=write_lines(path / "rows.jsonl", *rows))
    return load_prompts(section, tokenizer, 64, choice(tokenizer, limit, **keys))


def read(found: PromptSet) -> list[list[int] | None]:
    return [None if one.teacher_ids is None else one.teacher_ids.tolist() for one in found.prompts]


CASES: list[tuple[dict[str, Any], dict[str, Any], Callable[[Tokenizer], list[int]]]] = [
    # a key of the row: text, or messages
    ({"prompt": "ab", "t": "abc"}, {"teacher_prompt": "t"}, lambda t: t.encode("abc")),
    ({"prompt": "ab", "metadata": {"t": CHAT}}, {"teacher_prompt": "t"}, lambda t: t.encode_chat(CHAT)),
    # what is privileged stands behind what the student reads, special tokens once
    ({"prompt": "ab", "s": "cd"}, {"privileged_key": "s"}, lambda t: t.encode("abcd")),
    ({"prompt": CHAT, "s": "cd"}, {"privileged_key": "s"}, lambda t: [*t.encode_chat(CHAT), *t.encode("cd")[1:]]),
    # a template over the row
    (
        {"prompt": "ab", "label": "7", "metadata": {"h": "c"}},
        {"teacher_prompt": "{{ metadata.h }}{{ label }}{{ prompt }}"},
        lambda t: t.encode("c7ab"),
    ),
    (
        {"prompt": "ab", "row_key": ["d", "e"]},
        {"teacher_prompt": "{% for one in row.row_key %}{{ one }}{% endfor %}{{ text }}"},
        lambda t: t.encode("deab"),
    ),
    # the student's chat template as a function: a system prompt that the student does not have
    (
        {"prompt": "ab", "metadata": {"rule": "i"}},
        {"teacher_prompt": "{{ chat([{'role': 'system', 'content': metadata.rule}] + messages) }}"},
        lambda t: t.encode_chat(CHAT),
    ),
    (
        {"prompt": CHAT[1:], "s": "j"},
        {"privileged_key": "s", "teacher_prompt": "{{ chat(messages) }}{{ privileged }}"},
        lambda t: [*t.encode_chat(CHAT[1:]), *t.encode("j")[1:]],
    ),
]


@pytest.mark.parametrize(("row", "keys", "expected"), CASES)
def test_what_a_teacher_reads(
    tmp_path: Path, tokenizer: Tokenizer, row: Any, keys: Any, expected: Callable[[Tokenizer], list[int]]
) -> None:
    (found,) = read(load(tmp_path, tokenizer, row, **keys))
    assert found == expected(tokenizer)
    one = read_row(0, row, Reading(SECTION, tokenizer, choice(tokenizer, **keys)), 64)
    assert one.teacher_ids is not None and one.teacher_ids.tolist() == found
    assert (
        one.token_ids.tolist()
        == load(tmp_path, tokenizer, row, teacher_prompt="x{{ text }}").prompts[0].token_ids.tolist()
    ), "the student reads what it always reads"


@pytest.mark.parametrize("form", ["{{ 'abc'.__class__ }}", "{{ messages.append(1) }}"])
def test_a_template_can_neither_reach_classes_nor_change_the_row(
    tmp_path: Path, tokenizer: Tokenizer, form: str
) -> None:
    with pytest.raises(InputError, match=r"data\.teacher_prompt"):
        load(tmp_path, tokenizer, {"prompt": "ab"}, teacher_prompt=form)


@pytest.mark.parametrize(
    ("rows", "keys", "said"),
    [
        (
            [{"prompt": "ab", "s": "c"}, {"prompt": "ab"}, {"prompt": "ab", "s": None}, {"prompt": "b", "s": ""}],
            {"privileged_key": "s"},
            r"3 broken rows\n.*rows.jsonl:2: the text that only the teacher is shown is missing: no 's' in the row or "
            r"its metadata; write it, or data.teacher_prompt_missing: plain \(and 2 more rows\)$",
        ),
        (
            [{"prompt": "ab", "metadata": {"h": None}}],
            {"teacher_prompt": "{{ metadata.h }}"},
            "1 broken row\n.*is missing: a value that is none; write it, or data.teacher_prompt_missing",
        ),
        ([{"prompt": "ab"}], {"teacher_prompt": "{{ metadata.h }}"}, "is missing: .* has no attribute 'h'; write it"),
        ([{"prompt": "ab"}], {"teacher_prompt": "{{ '' }}"}, "is missing: .*makes an empty text of the row"),
        ([{"prompt": "ab"}], {"teacher_prompt": "{{ 1 // 0 }}"}, "data.teacher_prompt fails: .* by zero"),
        (
            [{"prompt": "ab"}],
            {"teacher_prompt": "{{ chat([{'role': 'tool', 'content': ''}]) }}"},
            "data.teacher_prompt fails: .*no tools here",
        ),
        ([{"prompt": "ab", "t": 7}], {"teacher_prompt": "t"}, "'t' is neither text nor a list of chat messages"),
        (
            [{"prompt": "ab", "t": "a" * 20}, {"prompt": "ab", "t": "a" * 31}, {"prompt": "ab", "t": "a"}],
            {"teacher_prompt": "t", "limit": 10},
            "rows.jsonl: 2 rows are too long for their teacher, row 2 most: the teacher's prompt has 32 tokens, and at "
            "most 10 leave room for the response; raise engines.teacher.context_tokens, or shorten",
        ),
    ],
)
def test_rows_without_a_prompt_for_the_teacher_are_refused_in_one_message(
    tmp_path: Path, tokenizer: Tokenizer, rows: list[Any], keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        load(tmp_path, tokenizer, *rows, **keys)
    with pytest.raises(RowError):
        for index, row in enumerate(rows):
            read_row(index, row, Reading(SECTION, tokenizer, choice(tokenizer, **keys)), 64)


def test_rows_without_it_are_trained_plainly_where_that_is_wanted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "ab", "s": "c"}, {"prompt": "ab"}, {"prompt": "b" * 70}, {"prompt": "a", "s": None}]
    found = load(tmp_path, tokenizer, *rows, privileged_key="s", teacher_prompt_missing="plain")
    assert read(found) == [tokenizer.encode("abc"), None, None]
    assert (found.skipped_too_long, found.read_plainly, found.longest_read) == (1, 2, 4)


def test_kept_prompts_keep_their_teachers_side(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prompt_cache, "SMALL_BYTES", 0)
    rows = [{"prompt": "ab", "s": "c"}, {"prompt": "abc"}, {"prompt": "a", "s": "dd"}]
    keys = {"privileged_key": "s", "teacher_prompt_missing": "plain"}
    expected = [tokenizer.encode("abc"), None, tokenizer.encode("add")]
    assert [read(load(tmp_path, tokenizer, *rows, **keys)) for _ in range(2)] == [expected] * 2
    other = read(load(tmp_path, tokenizer, *rows, teacher_prompt="{{ text }}e"))
    assert other == [tokenizer.encode(text) for text in ("abe", "abce", "ae")]


def test_a_topology_is_checked_before_the_start(tmp_path: Path) -> None:
    def examined(*rows: object, **data: object) -> list[str]:
        values = topology_data(tmp_path)
        write_lines(tmp_path / "train.jsonl", *rows)
        values["data"] |= data
        said: list[str] = []
        examine(write_topology(tmp_path, values), [], said.append)
        return said

    rows = ({"prompt": "ab", "s": "c"}, {"prompt": "ab"})
    said = examined(*rows, privileged_key="s", teacher_prompt_missing="plain")
    assert any("1 of 2 prompts have no text for their teacher" in line for line in said)
    refused = [
        ({"privileged_key": "s"}, "data.train.path: .*1 broken row"),
        ({"teacher_prompt": "{{ text"}, "data.teacher_prompt, line 1: "),
        ({"teacher_prompt": "{{ text }}" + "a" * 40}, r"most 32 leave room .* raise engines.teacher.context_tokens"),
        ({"teacher_prompt_missing": "plain"}, "data.teacher_prompt_missing: plain, but teachers read what the student"),
    ]
    for data, words in refused:
        with pytest.raises(InputError, match=words):
            examined(*rows, **data)
    with pytest.raises(InputError, match=r"data\.teacher_prompt: given, but opd.use_opd is false"):
        examine(tmp_path / "topology.yaml", ["opd.use_opd=false", "data.teacher_prompt=s"], str)


@pytest.mark.parametrize(("shown", "context"), [("c", 32 + 3), ("c" * 30, 32 + 31), ("c" * 95, 32 + 96)])
def test_a_context_that_is_left_open_has_room_for_what_the_teacher_reads(
    tmp_path: Path, shown: str, context: int
) -> None:
    values = topology_data(tmp_path)
    write_lines(tmp_path / "train.jsonl", {"prompt": "ab", "t": shown}, {"prompt": "a", "t": "a"})
    values["data"]["teacher_prompt"] = "t"
    values["engines"] = {}
    topology, _ = examine(write_topology(tmp_path, values), [], str)
    assert topology.engines.student.context_tokens == 32 + 3
    assert topology.engines.teacher.context_tokens == context
    write_lines(tmp_path / "train.jsonl", {"prompt": "ab", "t": "a" * 96})
    with pytest.raises(InputError, match="1 rows are too long for their teacher"):
        examine(tmp_path / "topology.yaml", [], str)


def test_a_run_that_goes_on_needs_the_same_prompts_for_its_teacher(tmp_path: Path) -> None:
    topology = small_topology(tmp_path)
    tokenizer = Tokenizer(topology.models.student.path)

    def digest(**keys: Any) -> str:
        found = load(tmp_path, tokenizer, {"prompt": "ab", "s": "c"}, **keys)
        return fingerprints(topology, found, {}, ())["data.train"]  # type: ignore[arg-type]

    digests = {digest(privileged_key="s"), digest(teacher_prompt="{{ text }}d"), digest(teacher_prompt="s")}
    assert len(digests) == 3 and digest(privileged_key="s") in digests


# --- on the way -------------------------------------------------------------------------------------------------------


def test_every_context_brings_the_teachers_prompt_along() -> None:
    box = Outbox()
    box.open(4, 0, 1, PROMPT, token_ids(0, 0), HINT)
    parts = [chunk(4, 0, 3, teacher_prompt_tokens=4), chunk(4, 3, 5, teacher_prompt_tokens=4)]
    first, second = (box.add(one, 0.0) for one in parts)
    assert first.teacher_prompt is HINT and second.teacher_prompt is None
    assert (first.scored_prompt_tokens, second.scored_prompt_tokens) == (4, 4)
    box.acknowledge(4, 0, 3, 0.0)
    ((_, again),) = box.teacher_restarted(1, 1.0)
    assert again.context is not None and again.context.tolist() == context_to(3).tolist()
    assert again.teacher_prompt is HINT
    assert receive(encode(again)).teacher_prompt.tolist() == HINT.tolist()


@pytest.mark.parametrize(
    "wrong", [{"context": None}, {"teacher_prompt_tokens": 3}, {"teacher_prompt": np.array([-1, 2, 3, 4], np.int32)}]
)
def test_a_prompt_that_does_not_fit_its_chunk_is_dropped(wrong: dict[str, Any]) -> None:
    good = replace(chunk(4, 0, 3, teacher_prompt_tokens=4), context=PROMPT, teacher_prompt=HINT)
    receive(encode(good))
    with pytest.raises(WireError, match="teacher_prompt"):
        receive(encode(replace(good, **wrong)))


def test_the_teachers_own_context_bounds_what_it_reads(tmp_path: Path) -> None:
    topology = small_topology(tmp_path, "engines.student.context_tokens=64", "engines.teacher.context_tokens=80")
    plan = make_plan(topology)
    bounds = ChunkBounds(plan, None)
    room = 80 - 3
    one = replace(
        chunk(0, 0, 3, teacher="teacher", teacher_prompt_tokens=room, token_ids=np.arange(3, dtype=np.int32)),
        context=np.array([3, 4], np.int32),
        teacher_prompt=np.full(room, 5, np.int32),
    )
    assert bounds.of_chunk(None, one) is None
    assert "in the teacher's context of 80" in (bounds.of_chunk(None, replace(one, teacher_prompt_tokens=78)) or "")
    assert "without the teacher's prompt" in (bounds.of_chunk(None, replace(one, teacher_prompt=None)) or "")
    foreign = replace(one, teacher_prompt=np.full(room, 32, np.int32))
    assert bounds.of_chunk(None, foreign) == "teacher_prompt: 32 in a vocabulary of 32"


def test_the_intake_keeps_it_for_a_teacher_in_the_learner() -> None:
    assembler = Assembler(teacher=False)
    nothing = {"teacher_logprobs": np.zeros(0, np.float32)}
    assert assembler.add(scored(1, 0, 2, context=True, teacher_prompt=HINT, **nothing)) is Verdict.ACCEPTED
    first = assembler.take(assembler.samples[1])
    assembler.give_up_attempt(1, 0)
    again = scored(1, 2, 5, context=True, teacher_prompt=HINT, attempt=1, finish="stop", **nothing)
    assert assembler.add(again) is Verdict.ACCEPTED
    second = assembler.take(assembler.samples[1])
    assert first is not None and second is not None
    for segment, end in ((first, 2), (second, 5)):
        assert segment.teacher_prompt is not None and segment.teacher_prompt.tolist() == HINT.tolist()
        assert segment.longest == len(HINT) + end


# --- in the learner ---------------------------------------------------------------------------------------------------


def segment(sample_id: int, prompt: int, own: int, start: int, count: int) -> Segment:
    """Every token says which sample and position it belongs to; the teacher's prompt has `own` tokens, 0: none."""
    zeros = np.zeros(count, np.float32)
    return Segment(
        sample_id=sample_id,
        prompt_tokens=prompt,
        start=start,
        end=start + count,
        complete=True,
        token_ids=(1000 * sample_id + np.arange(prompt + start + count)).astype(np.int32),
        behaviour_logprobs=zeros,
        teacher_logprobs=np.zeros(0, np.float32),
        versions=np.zeros(count, np.int32),
        teacher_prompt=(-1000 * sample_id - 1 - np.arange(own)).astype(np.int32) if own else None,
    )


def enumerated(segments: list[Segment], batch: MicroBatch) -> tuple[list[int], list[int], list[int]]:
    """Tokens, bounds and rows behind the teachers' prompts, token by token."""
    tokens: list[int] = []
    bounds, rows = [0], []
    by_id = {one.sample_id: one for one in segments}
    assert batch.sample_ids is not None
    for one in (by_id[number] for number in batch.sample_ids.tolist()):
        prompt = one.token_ids[: one.prompt_tokens] if one.teacher_prompt is None else one.teacher_prompt
        first = len(tokens) + len(prompt)
        tokens += [*prompt.tolist(), *one.token_ids[one.prompt_tokens :].tolist()]
        rows += [first + position - 1 for position in range(one.start, one.end)]
        bounds.append(len(tokens))
    return tokens, bounds, rows


SIZES = st.lists(st.tuples(*(st.integers(*span) for span in ((1, 6), (0, 9), (0, 7), (1, 7)))), max_size=9)


@settings(deadline=None)
@given(SIZES, st.integers(1, 3), st.integers(1, 30))
def test_rows_are_the_same_tokens_behind_another_prompt(
    sizes: list[tuple[int, int, int, int]], ranks: int, budget: int
) -> None:
    segments = [segment(index + 1, *size) for index, size in enumerate(sizes)]
    for batch in pack(segments, 0, ranks, budget):
        travelled = from_message(decode(encode(to_message(batch))))
        for mb, arrived in zip(batch.micro_batches, travelled.micro_batches, strict=True):
            for one in (mb, arrived):
                theirs = one.as_read_by_teacher()
                tokens, bounds, rows = enumerated(segments, mb)
                assert theirs.token_ids.tolist() == tokens
                assert (theirs.cu_seqlens.tolist(), theirs.rows.tolist()) == (bounds, rows)
                assert theirs.token_ids[theirs.rows + 1].tolist() == one.token_ids[one.rows + 1].tolist()
                assert theirs.rows.dtype == theirs.cu_seqlens.dtype == np.int32
            alone = len(mb.cu_seqlens) == 2
            assert alone or max(enumerated(segments, mb)[1][-1], len(mb.token_ids)) <= budget


def test_a_step_whose_teacher_prompts_do_not_add_up_is_dropped() -> None:
    def train(prompt: NDArray[np.int32]) -> m.Train:
        one = replace(segment(1, 2, 0, 0, 3), teacher_prompt=prompt)
        batch = pack([one], 0, 1, 100)[0]
        assert batch.micro_batches[0].teacher_prompts is not None
        return to_message(batch)

    good = train(HINT)
    assert receive(encode(good)).teacher_prompts.tolist() == HINT.tolist()
    for wrong in ({"teacher_prompts": HINT[1:]}, {"teacher_prompts": None}, {"prompt_lengths": HINT}):
        with pytest.raises(WireError, match=r"teacher_prompts|lengths that should agree"):
            receive(encode(replace(good, **wrong)))


def test_without_teachers_prompts_nothing_travels() -> None:
    batch = micro_batch([segment(1, 2, 0, 0, 3)], 0)
    assert batch.teacher_prompts is None and batch.as_read_by_teacher() is batch
