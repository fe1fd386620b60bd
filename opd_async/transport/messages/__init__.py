"""Every message that crosses a process border; one module for each pair that talks.

`samples`: the data path. `roles`: every role and the dispatcher. `generation`: dispatcher and actors. `steps`:
dispatcher and intake. `intakes`: the first intake and the others. `learner`: commands to the learner. `agents`: the
launcher and the agents of its hosts. Receivers import this package as `m` and match on the class.

Ids: `sample_id` counts samples over the whole run; `attempt` grows each time a sample is leased again; positions count
response tokens from 0. Logprobs are natural logarithms. Versions count optimizer steps. Times are `time.time()`.
"""

from typing import Any

from opd_async.transport.kinds import Finish, LeaseKind
from opd_async.transport.messages.agents import (
    AgentBeat,
    Answer,
    EndSeen,
    Farewell,
    FindPorts,
    Join,
    KillProcess,
    Leave,
    Lines,
    LookAt,
    ProcessEnded,
    StartProcess,
    StopProcess,
    Welcome,
)
from opd_async.transport.messages.generation import (
    EngineChanged,
    EngineDown,
    EnginePace,
    EngineSlow,
    EvalDone,
    FurtherLease,
    FurtherUnused,
    FurtherWanted,
    Lease,
    LeaseAway,
    LeaseDone,
    Pause,
    Paused,
    Reset,
    ResetDone,
    Resume,
    SuspectScores,
    TeacherRestarted,
)
from opd_async.transport.messages.intakes import EndAttempts, Held, Prefixes, ShowTrained, TakeShare
from opd_async.transport.messages.learner import (
    AskTeacher,
    ExportModel,
    LearnerReply,
    PartDone,
    SaveCheckpoint,
    SyncWeights,
)
from opd_async.transport.messages.roles import Failure, Heartbeat, Hello, RankBeat, Stop
from opd_async.transport.messages.samples import Chunk, ScoredChunk, Train, TrainedSample
from opd_async.transport.messages.steps import (
    Acks,
    Drained,
    DrainRequest,
    Frontier,
    NotSaved,
    PartStarted,
    Quiesce,
    Quiesced,
    Reclaim,
    Reclaimed,
    StepStarted,
    Version,
)

Message = Any
"""Any registered message."""

__all__ = [
    "Acks",
    "AgentBeat",
    "Answer",
    "AskTeacher",
    "Chunk",
    "DrainRequest",
    "Drained",
    "EndAttempts",
    "EndSeen",
    "EngineChanged",
    "EngineDown",
    "EnginePace",
    "EngineSlow",
    "EvalDone",
    "ExportModel",
    "Failure",
    "Farewell",
    "FindPorts",
    "Finish",
    "Frontier",
    "FurtherLease",
    "FurtherUnused",
    "FurtherWanted",
    "Heartbeat",
    "Held",
    "Hello",
    "Join",
    "KillProcess",
    "LearnerReply",
    "Lease",
    "LeaseAway",
    "LeaseDone",
    "LeaseKind",
    "Leave",
    "Lines",
    "LookAt",
    "Message",
    "NotSaved",
    "PartDone",
    "PartStarted",
    "Pause",
    "Paused",
    "Prefixes",
    "ProcessEnded",
    "Quiesce",
    "Quiesced",
    "RankBeat",
    "Reclaim",
    "Reclaimed",
    "Reset",
    "ResetDone",
    "Resume",
    "SaveCheckpoint",
    "ScoredChunk",
    "ShowTrained",
    "StartProcess",
    "StepStarted",
    "Stop",
    "StopProcess",
    "SuspectScores",
    "SyncWeights",
    "TakeShare",
    "TeacherRestarted",
    "Train",
    "TrainedSample",
    "Version",
    "Welcome",
]
