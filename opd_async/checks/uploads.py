"""Can `checkpoint.upload` be written to?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from opd_async.config.topology import Topology
from opd_async.errors import OpdError
from opd_async.run.uploads import PROBE_DEADLINE_S, store_of, transfer


def upload_problems(topology: Topology) -> Iterator[str]:
    """Write a small file where the run's copies are to go, and remove it, in a process of its own."""
    upload = topology.checkpoint.upload
    if upload is None:
        return
    url = store_of(upload, topology.name)
    try:
        asyncio.run(transfer(["probe", url], PROBE_DEADLINE_S))
    except (OpdError, OSError) as error:
        yield (
            f"checkpoint.upload: {url}: cannot be written: {error}; see to the address, to the login, and to the "
            f"package that fsspec names for it"
        )
