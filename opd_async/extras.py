"""Packages that not every run needs: imported on first use, named with the extra that installs them when missing."""

from __future__ import annotations

import importlib
from typing import Any

from opd_async.errors import InputError


def need(module: str, extra: str, purpose: str) -> Any:
    """Import and return `module`.

    Raises `InputError` if it cannot be imported: `purpose` says what needs it, `extra` is the extra of this package
    that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{purpose} needs {module} ({error}); run: pip install 'opd_async[{extra}]'") from None
