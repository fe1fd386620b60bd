"""Keep a process's counters beyond its end: what was scraped once is where the next process of this name goes on.

    scrape -> text of counters -> <run>/counters/<process>.json -> the next process of that name

Written when Prometheus asks, and at the end: a number that nobody has seen need not be kept, and no timer is needed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from prometheus_client import Metric as Family

Values = Mapping[str, float]
"""By series: name and labels as `series_key` writes them."""

log = logging.getLogger(__name__)


def series_key(name: str, labels: Mapping[str, str]) -> str:
    """One series as a key of a JSON object."""
    return json.dumps([name, *sorted(labels.items())])


def read_counters(path: Path) -> Values:
    """What an earlier process has left; nothing, with a line in the log, where the file cannot be understood."""
    try:
        found = json.loads(path.read_bytes())
        return {series_key(*_series(key)): _count(value) for key, value in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): counters begin at 0", path, error)
        return {}


def _series(key: str) -> tuple[str, dict[str, str]]:
    name, *labels = json.loads(key)
    return str(name), {str(label): str(value) for label, value in labels}


def _count(value: object) -> float:
    if not isinstance(value, int | float) or not 0.0 <= value < math.inf:
        raise ValueError(f"{value!r:.40} is no count")
    return float(value)


def write_counters(path: Path, families: Iterable[Family]) -> None:
    """Write the counters and histograms among `families`, whole or not at all; where no disk takes them, do nothing.

    Without a flush to the disk: after a power cut counters may begin anew, which Prometheus understands.
    """
    kept = {
        series_key(sample.name, sample.labels): sample.value
        for family in families
        if family.type in ("counter", "histogram")
        and family.name.startswith("opd_")  # `process_*` are the process's own
        for sample in family.samples
    }
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(kept))
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def bucket_counts(values: Values, name: str, bounds: Iterable[str]) -> list[float] | None:
    """The counts of a histogram's buckets, not cumulative; None where `values` has not exactly these buckets."""
    cumulative = [values.get(series_key(f"{name}_bucket", {"le": bound})) for bound in bounds]
    known = [value for value in cumulative if value is not None]
    ours = sum(key.startswith(f'["{name}_bucket"') for key in values)
    if len(known) != len(cumulative) or ours != len(known):
        return None
    return [value - before for value, before in zip(known, [0.0, *known], strict=False)]


def series_of(values: Values, name: str) -> Iterator[tuple[dict[str, str], float]]:
    """The labels and the value of each series of a metric."""
    for key, value in values.items():
        found, *labels = json.loads(key)
        if found == name:
            yield dict(labels), value
