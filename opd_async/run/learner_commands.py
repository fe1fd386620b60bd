"""Commands to the learner beside its steps, each with the answer that belongs to it."""

from __future__ import annotations

from collections import Counter

from opd_async.errors import StorageError
from opd_async.run.dispatcher import Dispatcher
from opd_async.transport import messages as m

Command = m.SyncWeights | m.SaveCheckpoint | m.ExportModel | m.AskTeacher


class LearnerCommands:
    """Asks the learner, through the intake, and waits for its answer."""

    def __init__(self, dispatcher: Dispatcher, deadline_s: float) -> None:
        """`deadline_s`: a command queues behind a step that the learner may be taking."""
        self._dispatcher = dispatcher
        self._deadline_s = deadline_s
        self._unanswered: Counter[str] = Counter()
        """Commands by name whose answer is still to come; those whose wait was cancelled among them."""

    async def ask(self, command: Command) -> m.LearnerReply:
        """Send `command` and return its answer, which may be an error. Raises `DeadlineError` for a silent learner.

        An answer to an earlier command of the same kind is waited for first and dropped: taken for this one's, a
        checkpoint would be sealed while the learner replaces it. On cancel: the learner carries the command out all
        the same, and the next `ask` drops its answer.
        """
        name = type(command).__name__
        while self._unanswered[name]:
            await self._reply(name)
        with self._dispatcher.trace.during("learner's commands", name):
            await self._dispatcher.to_intake(command)
            self._unanswered[name] += 1
            return await self._reply(name)

    async def do(self, command: Command) -> m.LearnerReply:
        """Send `command`, which writes files, and wait until it is done. Raises `StorageError` where there is no room
        for them. On cancel: as `ask`."""
        reply = await self.ask(command)
        if reply.error is not None:
            raise StorageError(reply.error)
        return reply

    async def _reply(self, name: str) -> m.LearnerReply:
        who = f"the learner's answer to {name}"
        reply = await self._dispatcher.mailbox.expect(("reply", name), self._deadline_s, who, at_work=True)
        self._unanswered[name] -= 1
        assert isinstance(reply, m.LearnerReply)
        return reply
