"""The trainer's side of a weight group, played by a test."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import aiohttp
import torch
import torch.distributed as dist
from deadlines import patience
from engine_harness import Server, control, free_port
from torch.distributed import distributed_c10d as c10d

Update = list[tuple[str, torch.Tensor]]


class Trainer:
    """Rank 0 of a weight group with one engine."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        self.port = free_port()
        self.group: Any = None

    async def connect(self, session: aiohttp.ClientSession) -> None:
        """Form the group; the engine joins as rank 1."""
        body = {
            "master_address": "127.0.0.1",
            "master_port": self.port,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": self.name,
            "backend": "gloo",
        }
        joined = asyncio.create_task(control(session, self.server, "/init_weights_update_group", body))
        await asyncio.to_thread(self._join)
        status, answer = await joined
        assert status == 200, answer

    def _join(self) -> None:
        timeout = timedelta(seconds=patience(30))
        store = dist.TCPStore("127.0.0.1", self.port, 2, is_master=True, wait_for_workers=False, timeout=timeout)
        prefix = c10d.PrefixStore(self.name, store)
        self.group, _ = c10d._new_process_group_helper(
            2, 0, [], dist.Backend("gloo"), prefix, group_name=self.name, timeout=timeout
        )
        c10d._world.pg_group_ranks[self.group] = {0: 0, 1: 1}

    async def send(self, session: aiohttp.ClientSession, update: Update, flat: bool, **more: Any) -> tuple[int, Any]:
        """Announce and broadcast tensors; the engine's answer."""
        body = {
            "names": [name for name, _ in update],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in update],
            "shapes": [list(tensor.shape) for _, tensor in update],
            "group_name": self.name,
            "load_format": "flattened_bucket" if flat else None,
        }
        path = "/update_weights_from_distributed"
        answer = asyncio.create_task(control(session, self.server, path, body | more))
        payload = [tensor for _, tensor in update]
        if flat:
            payload = [torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in payload])]
        for tensor in payload:
            await asyncio.to_thread(dist.broadcast, tensor.contiguous(), 0, self.group)
        return await answer

    async def close(self, session: aiohttp.ClientSession) -> None:
        """Both sides leave the group."""
        status, _ = await control(session, self.server, "/destroy_weights_update_group", {"group_name": self.name})
        assert status == 200
        dist.destroy_process_group(self.group)
