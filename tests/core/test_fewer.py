"""A learner that goes on with fewer hosts: what those that are left can carry, and the words where they cannot."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plans_on_hosts import nodes_of, on_hosts, plan_of

from opd_async.config.topology import Topology
from opd_async.errors import InputError
from opd_async.plan.fewer import carried
from opd_async.plan.placement import place
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import ports_of_seat, with_seat


@pytest.fixture(scope="module")
def base() -> Iterator[Topology]:
    """A topology whose files are there, for plans of every size."""
    with tempfile.TemporaryDirectory() as folder:
        yield on_hosts(Path(folder), 2, 2)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    cuda = draw(st.booleans())
    each = draw(st.sampled_from((2, 4, 8)))
    return {
        "cluster": {"nodes": draw(st.integers(2, 6)), "gpus_per_node": each, "slots_per_node": each},
        "learner": {
            "devices": ("cuda",) if cuda else ("cpu",),
            "tensor_parallel": draw(st.sampled_from((1, 2, 4))),
            "context_parallel": draw(st.sampled_from((1, 2))),
            "pipeline_parallel": draw(st.sampled_from((1, 2))),
            "expert_parallel": draw(st.sampled_from((1, 1, 2, 4))),
            "data_parallel": draw(st.integers(1, 8)),
        },
        "student": {"devices": ("cuda",) if draw(st.booleans()) else ("cpu",), "replicas": draw(st.integers(1, 4))},
        "takes": draw(st.booleans()),
        "intakes": draw(st.integers(1, 3)),
        "lost": draw(st.sets(st.integers(1, 5), max_size=3)),
    }


def sized(base: Topology, of: dict[str, Any]) -> Topology:
    student = base.engines.student.model_copy(update=of["student"])
    cluster = {**of["cluster"], "launcher_takes_devices": of["takes"]}
    return base.model_copy(
        update={
            "cluster": base.cluster.model_copy(update=cluster),
            "learner": base.learner.model_copy(update=of["learner"]),
            "engines": base.engines.model_copy(update={"student": student}),
            "intake": base.intake.model_copy(update={"replicas": of["intakes"]}),
        }
    )


def free(plan: Plan, node: str) -> list[str]:
    """The devices of a host that no engine has."""
    learner, cluster = plan.topology.learner, plan.topology.cluster
    taken = [
        device
        for role in plan.roles
        if role.node == node and role.kind in (RoleKind.STUDENT_ENGINE, RoleKind.TEACHER_ENGINE)
        for device in role.devices
    ]
    if learner.devices == ("cpu",):
        return ["cpu"] * (cluster.slots_per_node - taken.count("cpu"))
    return [name for name in (f"cuda:{n}" for n in range(cluster.gpus_per_node)) if name not in taken]


@settings(max_examples=100, deadline=None)
@given(of=sizes())
def test_every_smaller_learner_keeps_the_rules(base: Topology, of: dict[str, Any]) -> None:
    topology = sized(base, of)
    learner, intakes = topology.learner, topology.intake.replicas
    assume(learner.data_parallel % intakes == 0)
    assume(learner.ranks // learner.pipeline_parallel % learner.expert_parallel == 0)
    try:
        place(topology)
    except InputError:
        assume(False)
    begun = plan_of(topology)
    everywhere, lost = set(nodes_of(begun)), {f"h{number}" for number in of["lost"]}
    assert carried(begun, begun, everywhere) == begun, "nothing is lost"
    there = everywhere - lost
    homes = [role for role in begun.of_kind(RoleKind.LEARNER) if role.node in there]
    room = [len(free(begun, home.node)) // learner.tensor_parallel * learner.tensor_parallel for home in homes]

    def can(groups: int) -> bool:
        ranks = learner.model_copy(update={"data_parallel": groups}).ranks
        sharing = ranks // learner.pipeline_parallel
        return ranks <= sum(room) and groups % intakes == 0 and sharing % learner.expert_parallel == 0

    try:
        plan = carried(begun, begun, there)
    except InputError as error:
        beside = [role for role in begun.roles if role.node in everywhere & lost and role.kind is not RoleKind.LEARNER]
        assert beside or not any(can(groups) for groups in range(1, learner.data_parallel + 1)), str(error)
        return
    check(begun, plan, there)
    most = plan.topology.learner.data_parallel
    assert can(most) and not any(can(groups) for groups in range(most + 1, learner.data_parallel + 1))
    # who is back is taken again, and the plan is what it was
    assert carried(plan, begun, everywhere) == begun


def check(begun: Plan, plan: Plan, there: set[str]) -> None:
    """Nothing but the learner has changed, and it is on hosts that are there, in their order, on devices of its own."""
    learner = plan.topology.learner
    assert learner.model_copy(update={"data_parallel": begun.topology.learner.data_parallel}) == begun.topology.learner
    assert [role for role in plan.roles if role.kind is not RoleKind.LEARNER] == [
        role for role in begun.roles if role.kind is not RoleKind.LEARNER
    ]
    assert plan.scored == begun.scored and plan.batches == begun.batches and set(plan.peers) <= set(begun.peers)
    roles = plan.of_kind(RoleKind.LEARNER)
    assert [role.index for role in roles] == list(range(len(roles)))
    assert sum(len(role.devices) for role in roles) == learner.ranks
    assert (
        nodes_of(plan) == [node for node in nodes_of(begun) if node in set(nodes_of(plan))]
        and set(nodes_of(plan)) <= there
    )
    for role in roles:
        home = next(one for one in begun.of_kind(RoleKind.LEARNER) if one.node == role.node)
        assert (role.host, role.ports) == (home.host, home.ports)
        assert len(role.devices) % learner.tensor_parallel == 0
        assert not [
            device for device in set(role.devices) if role.devices.count(device) > free(plan, role.node).count(device)
        ]
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_one_of_two_ranks_goes_on_alone_and_without_torchrun(tmp_path: Path) -> None:
    begun = plan_of(on_hosts(tmp_path, 4, 1, "learner.data_parallel=2"))
    plan = carried(begun, begun, {""})
    (rank,) = plan.of_kind(RoleKind.LEARNER)
    assert "opd_async.cluster.ranks" not in rank.command and rank.env["WORLD_SIZE"] == "1"
    assert set(begun.peers) - set(plan.peers) == {"learner-1", "rank-1"}
    assert plan.device_count == begun.device_count - 1


def test_ranks_move_up_where_the_first_host_is_lost(tmp_path: Path) -> None:
    changes = ("cluster.launcher_takes_devices=false", "learner.data_parallel=3")
    begun = plan_of(on_hosts(tmp_path, 6, 1, *changes))
    assert nodes_of(begun) == ["h1", "h2", "h3"]
    plan = carried(begun, begun, {"h2", "h3"})
    first, second = plan.of_kind(RoleKind.LEARNER)
    assert (first.name, first.node, second.node) == ("learner-0", "h2", "h3")
    for number, role in enumerate((first, second)):
        text = " ".join(role.command)
        assert f"--nnodes 2 --log-dir /dev/null --node-rank {number} --nproc-per-node 1 " in text
        assert f"--master-addr {first.host} --master-port {first.ports['master']} -m" in text
    again = carried(plan, begun, {"h3", "h1"})  # another one is lost, and the first is back
    assert nodes_of(again) == ["h1", "h3"]


def test_a_host_with_room_beside_its_ranks_takes_more(tmp_path: Path) -> None:
    begun = plan_of(on_hosts(tmp_path, 4, 4, "learner.data_parallel=6", "cluster.launcher_takes_devices=false"))
    assert [len(role.devices) for role in begun.of_kind(RoleKind.LEARNER)] == [4, 2]
    plan = carried(begun, begun, {"h2"})
    assert [(role.node, len(role.devices)) for role in plan.of_kind(RoleKind.LEARNER)] == [("h2", 4)]
    with pytest.raises(InputError, match="all of the learner's hosts are lost"):
        carried(begun, begun, set())


def test_hosts_that_have_joined_stay(tmp_path: Path) -> None:
    topology = on_hosts(tmp_path, 4, 1, "learner.data_parallel=2", "cluster.spare_nodes=1")
    begun = plan_of(topology)
    grown = with_seat(begun, 0, "h9", "10.0.0.9", range(7000, 7000 + ports_of_seat(topology)))
    plan = carried(grown, begun, {""})
    assert [role.name for role in plan.roles if role.node == "h9"] == ["student-engine-1", "rollout-1"]
    assert carried(plan, begun, {"", "h1"}) == grown


@pytest.mark.parametrize(
    ("nodes", "slots", "changes", "there", "words"),
    [
        (
            4,
            1,
            ["learner.pipeline_parallel=2"],
            {""},
            "a learner takes 2 devices at least (tensor_parallel 1 x context_",
        ),
        (4, 1, ["learner.pipeline_parallel=2"], {""}, "too few that no engine has are left on the launcher's host"),
        (
            5,
            1,
            ["learner.data_parallel=3", "intake.replicas=3"],
            {"", "h1"},
            "intake-2 were on the lost host too, and nothing else does their work",
        ),
        (
            5,
            2,
            ["learner.data_parallel=4", "intake.replicas=2", "learner.tensor_parallel=2"],
            {""},
            "intake-1 were on the lost host too",
        ),
        (2, 4, ["learner.data_parallel=2", "cluster.launcher_takes_devices=false"], set(), "were on the lost host too"),
        (
            4,
            2,
            ["learner.data_parallel=3", "learner.expert_parallel=3"],
            {""},
            "room for learner.data_parallel 2 at most on the launcher's host, and no number up to that divides",
        ),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, nodes: int, slots: int, changes: list[str], there: set[str], words: str
) -> None:
    begun = plan_of(on_hosts(tmp_path, nodes, slots, *changes))
    with pytest.raises(InputError) as found:
        carried(begun, begun, there)
    assert words in str(found.value)
