"""Every error that reaches a user. Each message says what was found, where, and what to do."""

from __future__ import annotations

from enum import StrEnum


class OpdError(Exception):
    """Base of all errors that opd_async raises on purpose; `exit_code` is what a process ends with."""

    exit_code = 1


class InputError(OpdError):
    """What the user gave cannot be used: a topology, a file, an option. Nothing has been started."""

    exit_code = 2


class WireError(OpdError):
    """A frame that does not decode to the schema. It is counted and dropped, never fatal by itself."""


class EngineFault(StrEnum):
    """What is wrong when a request to an engine fails: decides whether asking again can help."""

    REFUSED = "refused"
    """The engine does not want this request (HTTP 4xx): the same one will be refused again."""
    BUSY = "busy"
    """Not now (HTTP 408, 429, 503)."""
    FAILED = "failed"
    """The engine tried and could not (any other HTTP 5xx)."""
    DISCONNECTED = "disconnected"
    """No connection, or one that broke."""
    SILENT = "silent"
    """No sign of life within the deadline: a hang."""
    ABORTED = "aborted"
    """The engine ended the request before it was done, as it does with all of them when generation is to stop."""
    FOREIGN = "foreign"
    """Tokens of other weights than the run has sent: the launcher sees it too, and sends them again."""
    MALFORMED = "malformed"
    """An answer that breaks the contract."""


class EngineError(OpdError):
    """An engine answered with an error, or with a reply that breaks the contract, or not at all."""

    def __init__(self, text: str, fault: EngineFault = EngineFault.MALFORMED) -> None:
        super().__init__(text)
        self.fault = fault


class DeadlineError(OpdError):
    """A wait ran past its deadline; the message names who was waited for."""


class RoleError(OpdError):
    """A role cannot go on, or died beyond its restart budget."""


class StorageError(OpdError):
    """What must be kept cannot be written: a full disk, a folder that became read-only, a limit on files."""


class StateError(OpdError):
    """An invariant of the scheduling state machines was broken: a defect of this program, never of its input."""
