"""On which hosts a learner that goes back to a checkpoint starts again.

    a host of the learner is lost    the run waits for it, for `cluster.node_back_s`
    it stays away                    a smaller learner on those that are left (`opd_async.plan.fewer`), or the end
    it comes back after that         it stands idle until the learner next goes back to a checkpoint, and takes it again

The intakes start with the learner, so that they read the new plan; nobody else needs to know how many ranks it has.
"""

from __future__ import annotations

from collections.abc import Callable

from opd_async.cluster.hosts import Hosts
from opd_async.cluster.nodes import HostLostError
from opd_async.errors import InputError
from opd_async.plan.fewer import carried, hosts_of
from opd_async.plan.plan import Plan, RoleKind
from opd_async.run.dispatcher import Dispatcher
from opd_async.run.leaving import GOING
from opd_async.run.run_folder import change_plan


class LearnerHosts:
    """Shrinks the learner of one run on several hosts, and lets it grow to what it was, while it is down."""

    def __init__(
        self, dispatcher: Dispatcher, hosts: Hosts, node_back_s: float, on_plan: Callable[[Plan], None]
    ) -> None:
        """`on_plan` is told of each plan that has another learner than the one before."""
        self._dispatcher = dispatcher
        self._hosts = hosts
        self._node_back_s = node_back_s
        self._on_plan = on_plan
        self._begun = dispatcher.plan

    def take_back(self) -> None:
        """Have the learner take those of its hosts that the run went on without and that are there again.

        Raises `StorageError`.
        """
        there, mine = self._there(), self._mine()
        if not there - mine:
            return
        if self._take(there | mine):  # those of its own that are lost now are waited for
            self._dispatcher.fleet.say(f"{self._named(there - mine)} is there again: {self._size()}")

    async def go_on_without(self, error: HostLostError) -> None:
        """Have the learner, which is down, do without its hosts that are lost, where those that are left can carry it.

        A host that is back by now is no loss. Raises `HostLostError` that says what is missing, `StorageError`. On
        cancel: the plan may have a smaller learner.
        """
        there = self._there()
        if not (lost := self._mine() - there):
            return
        try:
            self._take(there)
        except InputError as problem:
            raise HostLostError(f"{error}. No smaller learner can go on without it: {problem}") from None
        names = self._named(lost)
        self._dispatcher.fleet.say(
            f"going on without {names}, not back in {self._node_back_s:.0f} s (cluster.node_back_s): {self._size()}"
        )
        await self._leave_behind(lost)

    def _there(self) -> set[str]:
        """The names of the learner's hosts at the launch that are there, the empty one for the launcher's."""
        hosts = {role.node for role in self._begun.of_kind(RoleKind.LEARNER)}
        return {host for host in hosts if not host or self._hosts.agents.nodes[host].there.is_set()}

    def _mine(self) -> set[str]:
        """The hosts that the learner has now."""
        return {role.node for role in self._dispatcher.plan.of_kind(RoleKind.LEARNER)}

    def _take(self, there: set[str]) -> bool:
        """Plan the learner on these hosts; whether that is another than it was."""
        dispatcher, before = self._dispatcher, self._dispatcher.plan.of_kind(RoleKind.LEARNER)
        if carried(dispatcher.plan, self._begun, there).of_kind(RoleKind.LEARNER) == before:
            return False
        plan = change_plan(dispatcher.plan, lambda plan: carried(plan, self._begun, there))
        dispatcher.grow(plan)
        for role in plan.of_kind(RoleKind.LEARNER):
            self._hosts.place(role.name, role.node)
        dispatcher.metrics["opd_launcher_learner_ranks"].set(plan.topology.learner.ranks)
        self._on_plan(plan)
        return True

    async def _leave_behind(self, lost: set[str]) -> None:
        """Go on without the engines and actors of these hosts too, until they are back."""
        dispatcher, fleet = self._dispatcher, self._dispatcher.fleet
        names = [role.name for role in dispatcher.plan.roles if role.node in lost and role.kind in GOING]
        fleet.away.update(names)
        fleet.left.update(names)
        for name in names:
            await dispatcher.deaths.keep_down(name)

    def _named(self, hosts: set[str]) -> str:
        return hosts_of([role for role in self._begun.of_kind(RoleKind.LEARNER) if role.node in hosts])

    def _size(self) -> str:
        plan, ranks = self._dispatcher.plan, self._begun.topology.learner.ranks
        return (
            f"the learner has {plan.topology.learner.ranks} of {ranks} ranks, on "
            f"{hosts_of(plan.of_kind(RoleKind.LEARNER))}"
        )
