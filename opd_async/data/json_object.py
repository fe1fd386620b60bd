"""Files that hold one JSON object: configs and indices of model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd_async.errors import InputError


def read_object(file: Path) -> dict[str, Any]:
    """The object in `file`; `InputError` says why there is none: no such file, no UTF-8, no JSON, no object."""
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds no JSON object; copy it again")
    return value
