"""Every error that reaches a user. Each message says what was found, where, and what to do."""

from __future__ import annotations


class OpdError(Exception):
    """Base of all errors that opd_async raises on purpose; `exit_code` is what a process ends with."""

    exit_code = 1


class InputError(OpdError):
    """What the user gave cannot be used: a topology, a file, an option. Nothing has been started."""

    exit_code = 2


class WireError(OpdError):
    """A frame that does not decode to the schema. It is counted and dropped, never fatal by itself."""


class EngineError(OpdError):
    """An engine answered with an error, or with a reply that breaks the contract."""


class DeadlineError(OpdError):
    """A wait ran past its deadline; the message names who was waited for."""


class RoleError(OpdError):
    """A role cannot go on, or died beyond its restart budget."""


class StateError(OpdError):
    """An invariant of the scheduling state machines was broken: a defect of this program, never of its input."""
