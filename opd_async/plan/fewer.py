"""Which learner the hosts that are left can carry when one of its hosts stays away: pure, from plan to plan.

    the learner's hosts of the launch -> those that are there -> their devices that no engine has
    -> the most data-parallel groups that fit and divide -> the plan that the run goes on with

Tensor, context and pipeline parallelism stay as they are, and so does every other process: none moves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from opd_async.config.topology import LearnerSection
from opd_async.errors import InputError
from opd_async.plan.placement import CPU, Room, Spot, learner_spots
from opd_async.plan.plan import Plan, RoleKind, RolePlan
from opd_async.plan.resolve import with_learner

ENGINES = (RoleKind.STUDENT_ENGINE, RoleKind.TEACHER_ENGINE)
FIXED = (RoleKind.INTAKE, RoleKind.TEACHER, RoleKind.TEACHER_ENGINE)
"""What no other process does the work of: samples and prompts are dealt to all of them by a fixed rule."""
LAUNCHERS = "the launcher's host"


def carried(plan: Plan, begun: Plan, there: Collection[str]) -> Plan:
    """`plan` with the largest learner, never larger than that of `begun`, on those of its hosts that are `there`.

    `there` has the names of hosts, the empty one for the launcher's. Raises `InputError` that says what is missing.
    """
    learner = begun.of_kind(RoleKind.LEARNER)
    if problem := _goes_missing(plan, {role.node for role in learner if role.node not in there}):
        raise InputError(problem)
    homes, fits = [role for role in learner if role.node in there], 0
    for groups in range(begun.topology.learner.data_parallel, 0, -1):
        spots = _spots(plan, groups, homes)
        fits = fits or (groups if spots else 0)
        if spots and _divides(plan, groups):
            return with_learner(plan, groups, homes, spots)
    raise InputError(_too_small(plan, homes, fits))


def hosts_of(roles: Sequence[RolePlan]) -> str:
    """The hosts of these processes for a message, in order."""
    return ", ".join(dict.fromkeys(role.node or LAUNCHERS for role in roles))


def _goes_missing(plan: Plan, lost: Collection[str]) -> str | None:
    """Say what the run cannot be without on these hosts; None if there is nothing but the learner's ranks."""
    if fixed := [role.name for role in plan.roles if role.node in lost and role.kind in FIXED]:
        return f"{', '.join(fixed)} were on the lost host too, and nothing else does their work"
    for kind in (RoleKind.STUDENT_ENGINE, RoleKind.ROLLOUT):
        every = plan.of_kind(kind)
        if every and all(role.node in lost for role in every):
            names = ", ".join(role.name for role in every)
            return f"{names} were on the lost host too, and nobody else generates"
    return None


def _sized(learner: LearnerSection, groups: int) -> LearnerSection:
    return learner.model_copy(update={"data_parallel": groups})


def _spots(plan: Plan, groups: int, homes: Sequence[RolePlan]) -> list[Spot] | None:
    """The spots of a learner of so many data-parallel groups on these hosts; None if they have no room for it."""
    topology = plan.topology.model_copy(update={"learner": _sized(plan.topology.learner, groups)})
    try:
        return learner_spots(topology, [_room(plan, home.node) for home in homes])
    except InputError:
        return None


def _room(plan: Plan, node: str) -> Room:
    """The devices of a host that no engine has."""
    cluster = plan.topology.cluster
    taken = [device for role in plan.roles if role.node == node and role.kind in ENGINES for device in role.devices]
    gpus = [number for number in range(cluster.gpus_per_node) if f"cuda:{number}" not in taken]
    return Room(gpus, cluster.slots_per_node - taken.count(CPU))


def _divides(plan: Plan, groups: int) -> bool:
    """Whether intakes can share so many groups out, and experts can be spread over them."""
    learner = _sized(plan.topology.learner, groups)
    sharing = learner.ranks // learner.pipeline_parallel
    return groups % plan.intakes == 0 and sharing % learner.expert_parallel == 0


def _too_small(plan: Plan, homes: Sequence[RolePlan], fits: int) -> str:
    """Say why no learner can go on on these hosts, which have room for `fits` data-parallel groups."""
    if not homes:
        return "all of the learner's hosts are lost"
    learner, names = plan.topology.learner, hosts_of(homes)
    if fits:
        return (
            f"there is room for learner.data_parallel {fits} at most on {names}, and no number up to that divides by "
            f"intake.replicas {plan.intakes} and has ranks that expert_parallel {learner.expert_parallel} divides"
        )
    least = _sized(learner, 1).ranks
    return (
        f"a learner takes {least} devices at least (tensor_parallel {learner.tensor_parallel} x context_parallel "
        f"{learner.context_parallel} x pipeline_parallel {learner.pipeline_parallel}, those of one "
        f"tensor-parallel group on one host), and too few that no engine has are left on {names}"
    )
