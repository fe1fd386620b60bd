"""The keys of a run: drawn by the launcher at each start, handed to roles in their environment and nowhere else.

    RunKeys.draw -> launcher -> environment of each role -> RunKeys.of_environment

They stand in no file, command line, log or error. Whoever can read another process's environment (the same user, root)
has them; nobody else has.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields

PREFIX = "OPD_KEY_"
API_KEY_ENV = "OPD_API_KEY"
"""What an embedded engine takes for `--api-key`."""
ADMIN_API_KEY_ENV = "OPD_ADMIN_API_KEY"
"""The same for `--admin-api-key`."""
INCARNATION_ENV = "OPD_INCARNATION"
_BYTES = 32


@dataclass(frozen=True, slots=True, repr=False)
class RunKeys:
    """`run`: what roles know each other by. `api` and `admin`: of the engines that the run starts, where the topology
    gives none."""

    run: str
    api: str
    admin: str

    def __repr__(self) -> str:
        """Without the keys."""
        return "RunKeys(...)"

    @classmethod
    def draw(cls) -> RunKeys:
        """New random ones."""
        return cls(**{field.name: secrets.token_urlsafe(_BYTES) for field in fields(cls)})

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> RunKeys | None:
        """Those that this process was started with; None without a launcher (a measurement, a test)."""
        given = {field.name: environment.get(PREFIX + field.name.upper()) for field in fields(cls)}
        found = {name: text for name, text in given.items() if text}
        return cls(**found) if len(found) == len(given) else None

    def secret(self, name: str) -> bytes:
        """A secret of 32 bytes for one purpose or role of the run."""
        return hashlib.blake2b(name.encode(), key=self.run.encode(), digest_size=_BYTES).digest()

    def environment(self) -> dict[str, str]:
        """The variables that `of_environment` reads."""
        return {PREFIX + field.name.upper(): getattr(self, field.name) for field in fields(self)}


def new_incarnation() -> str:
    """A random name for one start of a role."""
    return secrets.token_hex(8)


def incarnation() -> str:
    """Which start of its role this process is; a new name without a launcher."""
    return os.environ.get(INCARNATION_ENV) or new_incarnation()


def is_key(variable: str) -> bool:
    """Whether an environment variable holds a key: not to be handed to code that is not ours."""
    return variable.startswith(PREFIX) or variable in (API_KEY_ENV, ADMIN_API_KEY_ENV)


def engine_environment(api_key: str | None, admin_api_key: str | None) -> dict[str, str]:
    """An embedded engine's keys as environment variables."""
    given = {API_KEY_ENV: api_key, ADMIN_API_KEY_ENV: admin_api_key}
    return {name: text for name, text in given.items() if text is not None}
