"""How long responses are: distributions that the forecast integrates over and the simulator draws from.

A distribution is its quantile function of a standard normal `z`, so that samples of one prompt can be correlated: two
of them share the part sqrt(correlation) of their `z`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from opd_async.errors import InputError

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_Z99 = NormalDist().inv_cdf(0.99)
_GRID = 4096
_BLOCK = 4096


class Lengths(Protocol):
    """A distribution of response lengths in tokens, each at least 1."""

    def of(self, z: Float64) -> Int64:
        """int64[n]: the lengths at the standard normal deviates `z` float64[n]; non-decreasing in `z`."""

    def __hash__(self) -> int:
        """Distributions are values."""


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp(log median + sigma z), cut at `cap` tokens; `p99` is the 99th percentile before the cut."""

    median: int
    p99: int
    cap: int

    def of(self, z: Float64) -> Int64:
        """int64[n]: lengths in tokens at the deviates `z`, as `Lengths.of` says."""
        sigma = math.log(self.p99 / self.median) / _Z99
        return np.clip(np.exp(math.log(self.median) + sigma * z), 1, self.cap).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Zipf:
    """P(length >= n) = (shortest / n) ** exponent between `shortest` and `cap` tokens: a tail without a scale."""

    shortest: int
    exponent: float
    cap: int

    def of(self, z: Float64) -> Int64:
        """int64[n]: lengths in tokens at the deviates `z`, as `Lengths.of` says."""
        survival = np.maximum(_survival(z), 1e-300)
        return np.clip(self.shortest * survival ** (-1 / self.exponent), 1, self.cap).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Replay:
    """Lengths that were measured, in ascending order."""

    measured: tuple[int, ...]

    @classmethod
    def read(cls, file: Path) -> Replay:
        """One length a line. Raises `InputError` with the line that is not a whole number above zero."""
        try:
            lines = file.read_text(encoding="utf-8").split()
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from None
        for number, line in enumerate(lines, 1):
            if not line.isdecimal() or int(line) == 0:
                raise InputError(f"{file}:{number}: {line!r} is not a length; write one whole number above zero a line")
        if not lines:
            raise InputError(f"{file}: has no lengths; write one whole number above zero a line")
        return cls(tuple(sorted(map(int, lines))))

    def of(self, z: Float64) -> Int64:
        """int64[n]: lengths in tokens at the deviates `z`, as `Lengths.of` says."""
        measured = np.array(self.measured, np.int64)
        return measured[np.minimum((1 - _survival(z)) * len(measured), len(measured) - 1).astype(np.int64)]


@dataclass(frozen=True, slots=True)
class Capped:
    """Another distribution, cut at `cap` tokens."""

    lengths: Lengths
    cap: int

    def of(self, z: Float64) -> Int64:
        """int64[n]: lengths in tokens at the deviates `z`, as `Lengths.of` says."""
        return np.minimum(self.lengths.of(z), self.cap)


def _survival(z: Float64) -> Float64:
    return np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in z])


@lru_cache(maxsize=16)
def typical(lengths: Lengths) -> Int64:
    """int64[4096], not to be written to: lengths at evenly spaced quantiles, whose averages are the distribution's."""
    inverse = NormalDist().inv_cdf
    return lengths.of(np.array([inverse((i + 0.5) / _GRID) for i in range(_GRID)]))


class LengthStream:
    """The length of every sample; two streams with one seed have the same lengths."""

    def __init__(self, lengths: Lengths, seed: int, group_size: int = 1, correlation: float = 0.0) -> None:
        self._lengths = lengths
        self._seed = seed
        self._group_size = group_size
        self._correlation = correlation
        self._blocks: dict[int, Int64] = {}

    def __getitem__(self, sample_id: int) -> int:
        """Response tokens of a sample, the same at every call."""
        block, at = divmod(sample_id, _BLOCK * self._group_size)
        if block not in self._blocks:
            self._blocks[block] = self._draw(block)
        return int(self._blocks[block][at])

    def _draw(self, block: int) -> Int64:
        rng = np.random.default_rng((self._seed, block))
        shared = np.repeat(rng.standard_normal(_BLOCK), self._group_size)
        own = rng.standard_normal(len(shared))
        return self._lengths.of(math.sqrt(self._correlation) * shared + math.sqrt(1 - self._correlation) * own)


def parse_lengths(text: str) -> Lengths:
    """`MEDIAN,P99,CAP` for a log-normal distribution, `zipf:SHORTEST,EXPONENT,CAP`, or the path of a lengths file.

    Raises `InputError` if it is none of them.
    """
    kind, _, rest = text.rpartition(":")
    parts = rest.split(",")
    try:
        if kind == "zipf" and len(parts) == 3:
            zipf = Zipf(int(parts[0]), float(parts[1]), int(parts[2]))
            if zipf.shortest > 0 and zipf.exponent > 0 and zipf.cap >= zipf.shortest:
                return zipf
        elif not kind and len(parts) == 3:
            normal = LogNormal(*map(int, parts))
            if 0 < normal.median < normal.p99 and normal.cap > 0:
                return normal
    except ValueError:
        pass
    if "," not in text:
        return Replay.read(Path(text))
    raise InputError(
        f"lengths {text!r}: write MEDIAN,P99,CAP (as in 2000,8000,16384), zipf:SHORTEST,EXPONENT,CAP or a file"
    )
