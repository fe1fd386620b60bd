"""Functions of the user's own, named in a topology as `module:name`: found, loaded, and blamed by name.

The working directory is searched after everything that is installed, so that a folder there never replaces a package
that a process needs.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import opd_async
from opd_async.errors import InputError, OpdError

NAME_PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""`module:name`, the module with its packages."""


class HookError(OpdError):
    """A hook raised, or returned what it may not: the message names the hook, what it was given, and what to do.

    A role that ends with it is not restarted: the function would do the same again.
    """

    exit_code = InputError.exit_code


def load_hook(key: str, path: str) -> Any:
    """Import `module:name` and return what is there; `key` is the topology key that names it.

    Raises `InputError` if the module cannot be imported, whatever it raises, or has no such name.
    """
    module_name, _, name = path.partition(":")
    with search_here():
        try:
            return getattr(importlib.import_module(module_name), name)
        except (Exception, SystemExit) as error:  # whatever the user's module raises while it is loaded
            raise InputError(f"{key}: {path} cannot be loaded ({type(error).__name__}: {error})") from None


@contextmanager
def search_here() -> Iterator[None]:
    """Search the working directory too while the block runs: modules there are the last to be found."""
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def away_from_here() -> dict[str, str]:
    """Variables of a process that must not look for modules in the working directory before anywhere else.

    Empty where this package itself is found there, and only there: in a checkout that is not installed.
    """
    return {} if Path(opd_async.__file__ or "").parents[1] == Path.cwd() else {"PYTHONSAFEPATH": "1"}


def add_working_directory() -> None:
    """Search the working directory for as long as the process lives: hooks may import what lies beside them."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def blame(key: str, path: str, given: str, error: BaseException, then: str = "go on with --resume") -> HookError:
    """The error to raise where a hook raised `error`; `given` says what it was called with, such as `sample 12`.

    `then` is what to do once the function is mended.
    """
    return HookError(f"{key}: {path} raised {type(error).__name__}: {error} for {given}; mend the function, and {then}")


AWAITED = frozenset({"rollout.function"})
"""Keys of functions that are awaited."""
ANY = "*"
"""In the place of arguments: a function of any."""


def check_call(key: str, path: str, given: tuple[str, ...]) -> None:
    """Load a hook; raises `InputError` if it cannot be called with the arguments `given`, named for the message."""
    hook = load_hook(key, path)
    if not callable(hook):
        raise InputError(
            f"{key}: {path} is {type(hook).__name__}, not a function; write one that takes ({', '.join(given)})"
        )
    if given == (ANY,):
        return
    try:
        signature = inspect.signature(hook)
    except ValueError:  # a function without Python source says nothing of its arguments
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        raise InputError(f"{key}: {path} takes {signature}, but is called with ({', '.join(given)}): {error}") from None
    if key in AWAITED and not inspect.iscoroutinefunction(hook):
        raise InputError(f"{key}: {path} is awaited, but is no coroutine function; write `async def`")


def main(words: list[str]) -> int:
    """Check (key, path, arguments) triples; prints a line for each problem, and returns whether there was one."""
    add_working_directory()
    found = 0
    for key, path, given in zip(words[::3], words[1::3], words[2::3], strict=True):
        try:
            check_call(key, path, tuple(given.split(",")) if given else ())
        except InputError as problem:
            found = 1
            print(f"problem: {problem}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
