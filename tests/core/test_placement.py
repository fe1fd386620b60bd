"""Placement: random clusters and topologies, the rules that hold for each, and the words where there is no room."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.config.topology import Topology
from opd_async.errors import InputError
from opd_async.plan.placement import Placement, describe_hosts, place, shortage
from opd_async.plan.plan import RoleKind

ENGINES = (RoleKind.STUDENT_ENGINE, RoleKind.TEACHER_ENGINE)


def topology(cluster: dict[str, Any], learner: dict[str, Any], student: dict[str, Any], **more: Any) -> Topology:
    """A run on several hosts; its files need not be there."""
    return Topology(
        name="x",
        models={"student": {"path": "s"}, "teacher": {"path": "t"}},
        data={"train": {"path": "p.jsonl"}},
        schedule={"steps": 1, "tokens_per_step": 1},
        cluster={"backend": "agents", **cluster},
        learner=learner,
        engines={"student": student, "teacher": more.pop("teacher", {})},
        **more,
    )


def owners(placement: Placement) -> Counter[tuple[int, str]]:
    """How often each GPU, or a slot of each host's CPU, is given out."""
    working = (*ENGINES, RoleKind.LEARNER)
    return Counter((spot.host, device) for kind in working for spot in placement.spots[kind] for device in spot.devices)


@st.composite
def clusters(draw: st.DrawFn) -> Topology:
    """Clusters of 1 to 8 hosts with 0 to 8 GPUs, and topologies that may or may not fit."""
    devices = st.sampled_from((["cpu"], ["cuda"]))
    sizes = st.sampled_from((1, 2, 4, 8))
    sides = [
        {
            "kind": "sglang",
            "devices": draw(devices),
            "replicas": draw(st.integers(1, 6)),
            "tensor_parallel": draw(sizes),
        }
        for _ in range(2)
    ]
    learner = {"devices": draw(devices), "tensor_parallel": draw(sizes), "data_parallel": draw(st.integers(1, 4))}
    cluster = {
        "nodes": draw(st.integers(1, 8)),
        "gpus_per_node": draw(st.sampled_from((0, 1, 4, 8))),
        "slots_per_node": draw(st.integers(1, 8)),
        "launcher_takes_devices": draw(st.booleans()),
    }
    actors = {"rollout": {"replicas": draw(st.integers(1, 4))}, "teacher_actors": draw(st.integers(1, 4))}
    made = topology(cluster, learner, sides[0], teacher=sides[1], rollout=actors["rollout"])
    intake = made.intake.model_copy(update={"replicas": draw(st.integers(1, 3))})
    teacher = made.teacher.model_copy(update={"replicas": actors["teacher_actors"]})
    return made.model_copy(update={"teacher": teacher, "intake": intake})


@settings(max_examples=400)
@given(clusters())
def test_every_placement_keeps_the_rules(made: Topology) -> None:
    cluster, learner = made.cluster, made.learner
    try:
        placement = place(made)
    except InputError as error:
        assert "; write " in str(error)
        return
    spots, given_out = placement.spots, owners(placement)
    assert all(0 <= spot.host < cluster.nodes for each in spots.values() for spot in each)
    # each GPU once, and no more of a host than it has
    for (host, device), times in given_out.items():
        assert times <= (cluster.slots_per_node if device == "cpu" else 1)
        assert device == "cpu" or int(device.removeprefix("cuda:")) < cluster.gpus_per_node
        assert host != 0 or cluster.launcher_takes_devices
    # launcher and intake together
    assert spots[RoleKind.INTAKE][0].host == 0
    # other intakes with the ranks that they feed
    others = [spot.host for spot in spots[RoleKind.INTAKE][1:]]
    assert len(others) == made.intake.replicas - 1 and set(others) <= {spot.host for spot in spots[RoleKind.LEARNER]}
    # ranks in the order of hosts, whole layers on one host, whole hosts but for the last
    hosts = [spot.host for spot in spots[RoleKind.LEARNER]]
    assert hosts == sorted(set(hosts))
    assert sum(len(spot.devices) for spot in spots[RoleKind.LEARNER]) == learner.ranks
    assert all(len(spot.devices) % learner.tensor_parallel == 0 for spot in spots[RoleKind.LEARNER])
    each = cluster.slots_per_node if learner.devices == ("cpu",) else cluster.gpus_per_node
    for spot in spots[RoleKind.LEARNER][:-1]:
        assert each - len(spot.devices) < learner.tensor_parallel
    # an engine is on one host and has all of its devices
    for kind, section in zip(ENGINES, (made.engines.student, made.engines.teacher), strict=True):
        assert [len(spot.devices) for spot in spots[kind]] == [section.tensor_parallel] * section.replicas
    # an actor is on the host of most of its engines
    for actors, engines in ((RoleKind.ROLLOUT, ENGINES[0]), (RoleKind.TEACHER, ENGINES[1])):
        for index, spot in enumerate(spots[actors]):
            there = Counter(engine.host for engine in spots[engines][index :: len(spots[actors])])
            assert not there or there[spot.host] == max(there.values())
    assert place(made) == placement
    lines = describe_hosts(made).splitlines()
    assert len(lines) == 1 + cluster.nodes and "launcher" in lines[1]


@settings(max_examples=200)
@given(clusters())
def test_what_fits_by_its_sums_and_has_one_size_is_placed(made: Topology) -> None:
    """With parallel sizes of 1 nothing but the number of devices can stand in the way."""
    ones = made.model_copy(
        update={
            "learner": made.learner.model_copy(update={"tensor_parallel": 1}),
            "engines": made.engines.model_copy(
                update={
                    side: getattr(made.engines, side).model_copy(update={"tensor_parallel": 1})
                    for side in ("student", "teacher")
                }
            ),
        }
    )
    if shortage(ones) is None:
        place(ones)
    else:
        with pytest.raises(InputError, match="the run needs"):
            place(ones)


def test_the_hosts_of_a_large_run() -> None:
    sglang = {"kind": "sglang", "devices": ["cuda"], "tensor_parallel": 2}
    made = topology(
        {"nodes": 6, "gpus_per_node": 8},
        {"devices": ["cuda"], "tensor_parallel": 4, "data_parallel": 4},
        {**sglang, "replicas": 8},
        teacher={**sglang, "replicas": 8},
        rollout={"replicas": 4},
    )
    spots = place(made).spots
    assert [(spot.host, len(spot.devices)) for spot in spots[RoleKind.LEARNER]] == [(0, 8), (1, 8)]
    assert [spot.host for spot in spots[RoleKind.STUDENT_ENGINE]] == [2, 3, 4, 5] * 2
    assert spots[RoleKind.STUDENT_ENGINE][4].devices == ("cuda:2", "cuda:3")
    assert [spot.host for spot in spots[RoleKind.ROLLOUT]] == [2, 3, 4, 5]
    assert "learner-1 (ranks 8 to 15)" in describe_hosts(made)


def test_too_few_devices_are_counted() -> None:
    made = topology(
        {"nodes": 2, "gpus_per_node": 4},
        {"devices": ["cuda"], "data_parallel": 8},
        {"kind": "sglang", "devices": ["cuda"], "replicas": 2},
    )
    with pytest.raises(InputError) as found:
        place(made)
    assert str(found.value) == (
        "cluster.nodes: 2 hosts x 4 GPUs are 8, and the run needs 10 (8 for the learner and 2 for the engines of "
        "student)"
        "; write nodes: 3, or fewer replicas and ranks"
    )


def test_ranks_of_one_layer_stay_on_one_host() -> None:
    made = topology(
        {"nodes": 4, "gpus_per_node": 4},
        {"devices": ["cuda"], "tensor_parallel": 8},
        {"kind": "sglang", "devices": ["cuda"]},
    )
    with pytest.raises(InputError, match=r"^learner.tensor_parallel: 8 ranks share each layer .* hosts of 4 GPUs"):
        place(made)
