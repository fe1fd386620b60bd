"""The process group that holds learner rank 0 and every engine rank, beside the learner's own groups."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore
from torch.distributed import Backend, ProcessGroup, destroy_process_group
from torch.distributed import distributed_c10d as c10d

from opd_async.learner.errors import WeightSyncError

BACKLOG = 1024


def open_store(host: str, timeout_s: float, port: int = 0) -> TCPStore:
    """The meeting point of a process's groups, listening on `host` only, at `port` or at a free one.

    It does not wait for anybody: a refusal by one engine must be seen before all have come. Raises `WeightSyncError`
    where it cannot listen.
    """
    try:
        listener = socket.create_server((host, port), backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno or 0)  # what Python says has the address once more
        raise WeightSyncError(
            f"{host}:{port}: the weight group cannot meet there ({reason}); end the process that holds the "
            "port, or choose another network.base_port"
        ) from None
    return TCPStore(
        host,
        int(listener.getsockname()[1]),
        None,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )


def connection(store: TCPStore, timeout_s: float) -> TCPStore:
    """Another connection to the same store: who waits holds up everybody else on his, so each group has its own."""
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(store.host, store.port, None, is_master=False, wait_for_workers=False, timeout=timeout)


def join(store: c10d.Store, name: str, rank: int, world_size: int, backend: str, timeout_s: float) -> ProcessGroup:
    """Join the group called `name`; returns when all `world_size` ranks have come, raises RuntimeError at the deadline.

    The group is built as SGLang's engines build theirs, outside the default group, so that engines which share no
    default group with the learner can be members: a prefix of the store, then torch's own helper.
    """
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]  # a NewType over str
        timeout=timedelta(seconds=timeout_s),
    )
    c10d._world.pg_group_ranks[group] = {index: index for index in range(world_size)}
    return group


def leave(group: ProcessGroup) -> None:
    """Give up the group; peers that still wait on it get an error."""
    group.abort()
    destroy_process_group(group)
