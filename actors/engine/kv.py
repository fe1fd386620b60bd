"""The KV pool behind transformers' Cache interface, and the attention that reads it.

    model layer -> PagedCache.update(k, v): write the step's tokens into the pool -> pooled_attention(q, pool)

Shapes: T packed tokens of the step, H query heads, K key/value heads, D head size, P pool slots (slot 0 is padding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from opd_async.actors.engine.batch import Batch, Group

ATTENTION_NAME = "opd_pooled"


@dataclass(slots=True, kw_only=True)
class DeviceGroup:
    """A Group's index arrays on the device, with its additive masks (one per sliding window in use)."""

    group: Group
    kv_slots: torch.Tensor
    q_pos: torch.Tensor
    gather: torch.Tensor | None
    scatter: torch.Tensor | None
    masks: dict[tuple[int | None, int], torch.Tensor | None]

    def mask(self, window: int | None, heads_per_kv: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive mask [rows, 1, heads_per_kv * q_len, kv_len]; None when every key is visible."""
        key = (window, heads_per_kv)
        if key not in self.masks:
            self.masks[key] = self._build(window, heads_per_kv, dtype)
        return self.masks[key]

    def _build(self, window: int | None, heads_per_kv: int, dtype: torch.dtype) -> torch.Tensor | None:
        # A decode group of equal lengths needs no mask, which lets attention take its faster path.
        if self.group.full and window is None:
            return None
        # Keys lie at their absolute positions; padding keys come after the last query and are hidden with the future.
        kv_pos = torch.arange(self.group.kv_len, device=self.q_pos.device)
        hidden = kv_pos > self.q_pos[:, :, None]
        if window is not None:
            hidden |= kv_pos <= self.q_pos[:, :, None] - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
        return mask.repeat(1, heads_per_kv, 1).unsqueeze(1)


class PagedCache(Cache):
    """K and V pools, each [layers][P, K, D]. `begin` sets where the next forward writes and what it reads."""

    def __init__(self, layers: int, slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
        # The base class would otherwise make growing per-layer caches of its own.
        super().__init__(layers=[])
        shape = (slots, kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.groups: list[DeviceGroup] = []
        self._write_T = torch.empty(0, dtype=torch.int64)
        # Gathered keys and values are megabytes per layer and step; fresh allocations cost more than the copying.
        self._gathered = [torch.empty((0, kv_heads * head_dim), dtype=dtype, device=device) for _ in range(2)]

    def begin(self, slots_T: torch.Tensor, groups: list[DeviceGroup]) -> None:
        """Name the pool slots, int64 [T], of the tokens in the coming forward, and its attention groups."""
        self._write_T = slots_T
        self.groups = groups

    def gather(self, pool: torch.Tensor, placed: DeviceGroup, which: int) -> torch.Tensor:
        """A group's keys (`which` 0) or values (1) out of a pool [P, K, D], as [rows, K, kv_len, D].

        The memory is reused by the next call with the same `which`.
        """
        slots, kv_heads, head_dim = pool.shape
        count = len(placed.kv_slots)
        if len(self._gathered[which]) < count:
            # Half as much again, since sequences grow by one token a step.
            self._gathered[which] = pool.new_empty((count + count // 2, kv_heads * head_dim))
        out = self._gathered[which][:count]
        torch.index_select(pool.view(slots, -1), 0, placed.kv_slots, out=out)
        return out.view(placed.group.rows, placed.group.kv_len, kv_heads, head_dim).transpose(1, 2)

    def update(  # type: ignore[no-untyped-def]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, K, T, D] keys and values of one layer; returns that layer's whole pools [P, K, D]."""
        # Written before attention reads: a query attends to its own key.
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(0, self._write_T, key_states[0].transpose(0, 1))
        values.index_copy_(0, self._write_T, value_states[0].transpose(0, 1))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: positions are passed in explicitly."""
        return 0


def place_groups(batch: Batch, device: torch.device) -> list[DeviceGroup]:
    """Move the index arrays of a batch's groups to `device`."""

    def put(array: Any) -> Any:
        return None if array is None else torch.from_numpy(array).to(device)

    return [
        DeviceGroup(
            group=group,
            kv_slots=put(group.kv_slots),
            q_pos=put(group.q_pos),
            gather=put(group.gather),
            scatter=put(group.scatter),
            masks={},
        )
        for group in batch.groups
    ]


def pooled_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    pages: PagedCache,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of packed queries [1, H, T, D] over pools [P, K, D]; returns [1, T, H, D].

    The signature is that of transformers' AttentionInterface; `pages` reaches it as a keyword of the model's forward.
    """
    query_THD = query[0].transpose(0, 1)
    parts = []
    for placed in pages.groups:
        k, v = pages.gather(key, placed, 0), pages.gather(value, placed, 1)
        parts.append(_attend(placed, query_THD, k, v, scaling, sliding_window))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


def _attend(
    placed: DeviceGroup,
    query_THD: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    group = placed.group
    heads, head_dim = query_THD.shape[1:]
    kv_heads = k.shape[1]
    ratio = heads // kv_heads
    q = query_THD[group.first : group.end] if placed.gather is None else query_THD.index_select(0, placed.gather)
    # The query heads that share a key head become rows of one query block, so keys are never repeated.
    q = q.reshape(group.rows, group.q_len, kv_heads, ratio, head_dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(group.rows, kv_heads, ratio * group.q_len, head_dim)
    mask = placed.mask(window, ratio, q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    out = out.view(group.rows, kv_heads, ratio, group.q_len, head_dim).permute(0, 3, 1, 2, 4)
    out = out.reshape(group.rows * group.q_len, heads, head_dim)
    return out if placed.scatter is None else out.index_select(0, placed.scatter)


AttentionInterface.register(ATTENTION_NAME, pooled_attention)
