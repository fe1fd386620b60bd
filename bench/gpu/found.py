"""What a script has found: checks, which have a limit, and figures; kept in a file from the first one on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd_async.files import write_atomically


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A number that must be at most `limit`."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """True where the value is a number within its limit."""
        return math.isfinite(self.value) and self.value <= self.limit


class Findings:
    """Checks and figures in the order in which they were found.

    `file` is written anew at each of them: what was found before a crash or a deadline stays known.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self.checks: list[Check] = []
        self.figures: dict[str, Any] = {}

    @property
    def failed(self) -> list[Check]:
        """Checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    def check(self, name: str, value: float, limit: float) -> None:
        """Record a number that must be at most `limit`."""
        self.checks.append(found := Check(name=name, value=float(value), limit=limit))
        print(f"{'ok  ' if found.passed else 'FAIL'} {name}: {found.value:.4g} (at most {limit:g})", flush=True)
        self._write()

    def figure(self, name: str, value: Any) -> None:
        """Record something that nobody can be right or wrong about: a number, a text, or lists and mappings of them."""
        self.figures[name] = value
        print(f"     {name}: {value}", flush=True)
        self._write()

    def _write(self) -> None:
        if self._file is not None:
            checks = [dataclasses.asdict(check) | {"passed": check.passed} for check in self.checks]
            write_atomically(self._file, json.dumps({"checks": checks, "figures": self.figures}, indent=1).encode())


def parser(description: str) -> argparse.ArgumentParser:
    """Options that all scripts have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--tiny", action="store_true", help="sizes of which a CPU makes seconds; needs no GPU")
    made.add_argument("--json", type=Path, help="keep checks and figures in this file, from the first on")
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Ends with a message where no GPU is there and `--tiny` was not said."""
    options = made.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        made.error("torch sees no CUDA device here; --tiny tries the script on the CPU")
    return options


def device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def wait_for_device() -> None:
    """Return once the GPU has done what it was asked; at once on the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def end(findings: Findings) -> None:
    """Leave the script: exit code 1 where a check failed."""
    if findings.failed:
        raise SystemExit(f"{len(findings.failed)} of {len(findings.checks)} checks failed")
