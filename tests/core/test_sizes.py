"""Sizes that a topology leaves open: chosen from models, prompts and memory, never against what a user wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import make_model, topology_data, write_lines, write_topology

from opd_async.checks.inputs import examine
from opd_async.checks.validation import validate
from opd_async.config.section import Auto
from opd_async.config.topology import Topology
from opd_async.forecast.sizes import Longest, fitted

GIB = 1 << 30
OPEN = (
    *(f"engines.{side}.{size}" for side in ("student", "teacher") for size in ("context_tokens", "kv_tokens")),
    *("engines.student.max_running", "engines.teacher.max_running", "rollout.slots", "rollout.chunk_tokens"),
    *("rollout.stream_interval", "teacher.batch_tokens", "learner.micro_batch_tokens", "learner.bucket_mib"),
)


def open_data(root: Path, **schedule: Any) -> dict[str, Any]:
    """A valid topology without a single size."""
    data = topology_data(root)
    data["schedule"] |= schedule
    return data | {"engines": {}, "rollout": {"sampling": {"max_response_tokens": 32}}}


def sizes(topology: Topology, longest: Longest | None = None, memory: int = 16 * GIB) -> dict[str, int]:
    """The numbers that were chosen, by key."""
    return {choice.key: choice.value for choice in fitted(topology, longest, memory)[1]}


def test_sizes_follow_from_prompts_and_limits(tmp_path: Path) -> None:
    found = sizes(Topology.model_validate(open_data(tmp_path)), Longest(train=4, held_out=(6, 32)))
    assert found == {
        "engines.student.context_tokens": 38,  # 6 + 32
        "engines.teacher.context_tokens": 38,
        "rollout.slots": 8,  # 64 tokens in responses of 16 are 4: as few as there may be
        "rollout.chunk_tokens": 32,
        "rollout.stream_interval": 32,
        "engines.student.max_running": 8,
        "engines.student.kv_tokens": 8 * 38,
        "engines.teacher.max_running": 8,
        "engines.teacher.kv_tokens": 8 * 38,
        "teacher.batch_tokens": 4096,
        "learner.micro_batch_tokens": 16384,
        "learner.bucket_mib": 16,
    }
    assert set(found) == set(OPEN)


def test_steps_decide_how_many_responses_are_under_way(tmp_path: Path) -> None:
    tokens = open_data(tmp_path, tokens_per_step=1024)
    assert sizes(Topology.model_validate(tokens))["rollout.slots"] == 64  # 1024 / 16
    tokens["rollout"]["group_size"] = 3
    assert sizes(Topology.model_validate(tokens))["rollout.slots"] == 63
    tokens["engines"] = {"student": {"replicas": 2, "max_running": 5}}
    found = sizes(Topology.model_validate(tokens))
    assert found["rollout.slots"] == 9  # whole groups in 2 x 5
    assert found["engines.student.kv_tokens"] == 5 * found["engines.student.context_tokens"]
    samples = open_data(tmp_path, train_on="samples", samples_per_step=24)
    assert sizes(Topology.model_validate(samples))["rollout.slots"] == 24


def test_large_models_get_what_memory_has_room_for(tmp_path: Path) -> None:
    data = open_data(tmp_path, tokens_per_step=65536)
    shape = {"hidden_size": 576, "num_hidden_layers": 30, "num_key_value_heads": 3, "num_attention_heads": 9}
    large = shape | {"head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 2048}
    for side in ("student", "teacher"):
        make_model(tmp_path / side, **large)
    data["rollout"]["sampling"]["max_response_tokens"] = 512
    longest = Longest(train=500)
    roomy = sizes(Topology.model_validate(data), longest, 1024 * GIB)
    assert roomy["engines.student.kv_tokens"] == 256 * 1012
    weights = 30 * (576 * 64 * (2 * 9 + 2 * 3) + 3 * 576 * 1536) + 49152 * 576
    found = sizes(Topology.model_validate(data), longest, 16 * GIB)
    token = 2 * 30 * 3 * 64 * 4  # keys and values in float32
    assert found["engines.student.kv_tokens"] == (4 * GIB - 4 * weights) // token  # half of 16, for two engines
    assert found["teacher.batch_tokens"] == 1024  # 256 MiB of logits hold 1365
    activations = 34 * 576 * 30 * 2  # bytes a token, in float32
    assert (
        found["learner.micro_batch_tokens"] * activations
        <= 4 * GIB
        < 2 * found["learner.micro_batch_tokens"] * activations
    )
    assert found["learner.bucket_mib"] == 64  # an eighth of 513 MiB
    on_gpu = data | {"engines": {side: {"devices": ["cuda:0"]} for side in ("student", "teacher")}}
    assert sizes(Topology.model_validate(on_gpu), longest, 16 * GIB)["engines.student.kv_tokens"] == 256 * 1012


@settings(max_examples=40, deadline=None)
@given(
    response=st.integers(1, 100),
    longest=st.one_of(st.none(), st.integers(1, 200)),
    tokens=st.integers(1, 100_000),
    group=st.integers(1, 8),
    replicas=st.integers(1, 3),
    memory=st.integers(1, 64 * GIB),
)
def test_what_is_chosen_is_valid(
    tmp_path_factory: pytest.TempPathFactory,
    response: int,
    longest: int | None,
    tokens: int,
    group: int,
    replicas: int,
    memory: int,
) -> None:
    root = tmp_path_factory.getbasetemp() / "open-sizes"
    root.mkdir(exist_ok=True)
    data = open_data(root, tokens_per_step=tokens)
    data["rollout"] |= {"group_size": group, "sampling": {"max_response_tokens": response}}
    data["engines"] = {"student": {"replicas": replicas}, "teacher": {"replicas": replicas}}
    topology, choices = fitted(Topology.model_validate(data), None if longest is None else Longest(longest), memory)
    assert {choice.key for choice in choices} == set(OPEN)
    assert [problem for problem in validate(topology) if "memory" not in problem] == []
    assert not any(
        isinstance(getattr(topology.engines.student, name), Auto) for name in ("kv_tokens", "context_tokens")
    )
    again, nothing = fitted(topology, Longest(1), memory)
    assert again == topology
    assert nothing == ()


def test_a_number_that_was_written_stays(tmp_path: Path) -> None:
    data = topology_data(tmp_path)
    data["learner"] = {"bucket_mib": "auto"}
    topology, choices = fitted(Topology.model_validate(data), Longest(4))
    assert "learner.bucket_mib" in {choice.key for choice in choices}
    assert not {choice.key for choice in choices} & {"rollout.slots", "engines.student.kv_tokens"}
    assert topology.engines.student.kv_tokens == 1024


def test_a_check_says_what_it_read_and_chose(tmp_path: Path) -> None:
    data = open_data(tmp_path)
    rows = [{"prompt": "a" * length} for length in (1, 2, 3, 4, 200)]
    data["data"]["train"]["path"] = str(write_lines(tmp_path / "five.jsonl", *rows))
    said: list[str] = []
    topology, _ = examine(write_topology(tmp_path, data), (), said.append, details=True)
    text = "\n".join(said)
    assert "4 prompts, median 4, p99 5, longest 5 tokens; 1 skipped as too long" in text  # <bos> in front
    assert "a response ends with: 2 '<eos>', 5 'c'" in text
    assert "    '<bos>a'" in said
    assert topology.engines.student.context_tokens == 37
    assert any(line.split() == ["engines.student.context_tokens:", "37", *line.split()[2:]] for line in said)
    quiet: list[str] = []
    examine(write_topology(tmp_path, data), (), quiet.append)
    assert len(quiet) == 1  # that one prompt was skipped


def test_a_check_shows_a_prompt_as_each_side_reads_it(tmp_path: Path) -> None:
    data = open_data(tmp_path)
    data["data"]["train"]["path"] = str(write_lines(tmp_path / "hinted.jsonl", {"prompt": "ab", "hint": "cd"}))
    said: list[str] = []
    file = write_topology(tmp_path, data)
    examine(file, ["data.privileged_key=hint"], said.append, details=True)
    at = said.index("the first prompt, 3 tokens, as the student reads it:")
    assert said[at + 1 : at + 4] == ["    '<bos>ab'", "as its teacher reads it, 5 tokens:", "    '<bos>abcd'"]
    said.clear()
    examine(file, (), said.append, details=True)
    assert "the first prompt, 3 tokens, as student and teacher read it:" in said
