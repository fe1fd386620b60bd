"""The secret that the launcher and the agents of its hosts share: in the environment, or in a file of its owner alone.

    OPD_CLUSTER_SECRET        the secret itself, such as a Kubernetes Secret puts there
    OPD_CLUSTER_SECRET_FILE   a file that holds it, with mode 0600

It opens the line between launcher and agents and nothing else: the keys of the roles are drawn anew at each start and
travel on that line. It is taken out of the environment, so that no process of a run inherits it.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import MutableMapping
from pathlib import Path

from opd_async.errors import InputError
from opd_async.keys import RunKeys

SECRET_ENV = "OPD_CLUSTER_SECRET"
SECRET_FILE_ENV = "OPD_CLUSTER_SECRET_FILE"
LEAST_CHARACTERS = 16
_HOW = (
    f"write one of {LEAST_CHARACTERS} or more characters into a file of mode 0600 that every host can read, as in "
    f"`(umask 077; openssl rand -hex 32 > secret)`, and set {SECRET_FILE_ENV} to it on every host"
)


def take_secret(environment: MutableMapping[str, str] = os.environ) -> RunKeys:
    """Return the keys of the line between launcher and agents, and take the secret out of the environment.

    Raises `InputError` where there is none, where it is short, and where its file can be read by others.
    """
    text, path = environment.pop(SECRET_ENV, None), environment.pop(SECRET_FILE_ENV, None)
    if text is None and path is None:
        raise InputError(f"{SECRET_ENV} and {SECRET_FILE_ENV}: neither is set, so no agent can be trusted; {_HOW}")
    secret = (_content(Path(path)) if text is None and path is not None else text or "").strip()
    where = SECRET_ENV if text is not None else f"{SECRET_FILE_ENV} {path}"
    if len(secret) < LEAST_CHARACTERS:
        raise InputError(f"{where}: {len(secret)} characters, which can be guessed; {_HOW}")
    return RunKeys(run=secret, api=secret, admin=secret)


def given_or_drawn(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Take the variables that say the secret out of the environment, or draw one where there are none.

    For a launcher that starts the agents itself, with these variables in their environment.
    """
    given = {name: environment.pop(name) for name in (SECRET_ENV, SECRET_FILE_ENV) if name in environment}
    return given or {SECRET_ENV: secrets.token_hex(32)}


def _content(path: Path) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(f"{SECRET_FILE_ENV} {path}: cannot be read ({reason}); {_HOW}") from None
    if mode & 0o077:
        raise InputError(f"{SECRET_FILE_ENV} {path}: mode {mode:04o}, so others can read it; run `chmod 600 {path}`")
    return text
