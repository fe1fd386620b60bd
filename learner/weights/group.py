"""The process group that holds learner rank 0 and every engine rank, beside the learner's own groups."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore
from torch.distributed import Backend, ProcessGroup, destroy_process_group
from torch.distributed import distributed_c10d as c10d


def open_store(host: str, world_size: int, timeout_s: float) -> tuple[TCPStore, int]:
    """The meeting point of the group, listening on `host` only, and its port (a free one).

    It does not wait for anybody: a refusal by one engine must be seen before all have come.
    """
    listener = socket.create_server((host, 0), backlog=world_size + 1)
    port = int(listener.getsockname()[1])
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    return store, port


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
