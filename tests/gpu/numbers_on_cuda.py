"""Tensors that say they are on a GPU, hold numbers in host memory, and obey a GPU's rules; collectives go over gloo.

With `cuda_guard.so` preloaded the learner takes its CUDA path and computes, and the result can be compared with the
CPU's. Operands on two devices raise, as do reads that a GPU does not allow. Kernels, streams and NCCL are not seen.
Call `install` before `opd_async.learner` is imported, and compute inside `OnCuda()`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pretend_cuda
import torch
import torch.distributed as dist
import torch.nn.attention.varlen as varlen
from torch import Tensor
from torch._decomp.decompositions import _fused_rms_norm_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ACROSS = frozenset(("copy_", "_to_copy"))
"""Operations that move numbers between devices."""
HOST_INDICES = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))
"""CUDA takes indices that lie on the host."""
BY_HAND: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.dtype: lambda left, right, _dtype: left.float() @ right.float(),
    torch.ops.aten.addmm.dtype_out: lambda total, left, right, _dtype, *, out: out.copy_(
        total + left.float() @ right.float()
    ),
    torch.ops.aten._fused_rms_norm_backward.default: _fused_rms_norm_backward,
}
"""Operations for which the host has no kernel."""
MATH = 0
"""Of torch's attention kernels the one that is made of other operations."""
NO_NUMPY = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."


class CudaTensor(Tensor):
    """A tensor of `cuda:0` whose numbers are in `held`, a tensor of the host."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> CudaTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("cuda", 0),
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_options: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.held!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            return args[0].held.tolist()
        if func is torch.Tensor.numpy:
            raise TypeError(NO_NUMPY)
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]  # made anew each time that it is named
            args[0].held = args[1].held  # torch swaps what it knows of, and not this
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class OnCuda(TorchDispatchMode):
    """Inside, what is made on "cuda" is a `CudaTensor`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation on the numbers; raises `RuntimeError` where a GPU would, for operands on two devices."""
    name = func.name().rpartition("::")[2].partition(".")[0]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
    if name == "_fused_sdp_choice" and there:
        return MATH
    if there and name not in ACROSS | HOST_INDICES:
        strangers = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor) and tensor.dim()]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {func.name()}, "
                f"{[tuple(tensor.shape) for tensor in strangers]}"
            )
    wanted = kwargs.get("device")
    to_cuda = bool(there) if wanted is None else torch.device(wanted).type == "cuda"
    if wanted is not None and to_cuda:
        kwargs = kwargs | {"device": torch.device("cpu")} | ({"pin_memory": False} if "pin_memory" in kwargs else {})
    given, options = tree_map(_held, (args, kwargs))
    found = BY_HAND.get(func, func)(*given, **options)
    known = {id(tensor.held): tensor for tensor in there}

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, CudaTensor):
            return value
        if id(value) in known:  # in place
            return known[id(value)]
        return CudaTensor(value) if to_cuda else value

    return tree_map(placed, found)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, CudaTensor) else value


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's kernel for packs of sequences by the book, with what it asks of its arguments: [tokens, heads, E].

    The last query of a sequence sees its last key, as in flash attention since 2.1.
    """
    assert {t.dtype for t in (query, key, value)} <= {torch.float16, torch.bfloat16}, "flash takes halves only"
    assert all(t.is_cuda for t in (query, key, value, cu_seq_q, cu_seq_k)), "all on the GPU"
    assert {cu_seq_q.dtype, cu_seq_k.dtype} == {torch.int32} and window_size[1] == 0
    assert enable_gqa is (query.shape[1] != key.shape[1]), "heads that share keys must be said"
    shared = query.shape[1] // key.shape[1]
    ends_q, ends_k, outputs = cu_seq_q.tolist(), cu_seq_k.tolist(), []
    assert max(b - a for a, b in pairwise(ends_q)) == max_q
    assert max(b - a for a, b in pairwise(ends_k)) == max_k
    for n in range(len(ends_q) - 1):
        query_HLE = query[ends_q[n] : ends_q[n + 1]].transpose(0, 1).float()
        key_HKE, value_HKE = (
            t[ends_k[n] : ends_k[n + 1]].transpose(0, 1).float().repeat_interleave(shared, 0) for t in (key, value)
        )
        ahead = key_HKE.shape[1] - query_HLE.shape[1]
        seen = torch.ones(query_HLE.shape[1], key_HKE.shape[1], dtype=torch.bool, device=query.device).tril(ahead)
        if window_size[0] >= 0:
            seen = seen.triu(ahead - window_size[0])
        scores = query_HLE @ key_HKE.transpose(1, 2) * (query.shape[2] ** -0.5 if scale is None else scale)
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value_HKE).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def install() -> None:
    """Answer for `torch.cuda` in this process, and let gloo do what NCCL is asked for."""
    pretend_cuda.pretend_device()
    start, make = dist.init_process_group, dist.new_group

    def init_process_group(backend: str | None = None, **options: Any) -> None:
        assert backend == "nccl", f"the learner asked for {backend} on a GPU"
        start("gloo", **options)

    def new_group(*args: Any, **options: Any) -> Any:
        return make(*args, **options | {"backend": "gloo"})

    groups: Any = dist
    groups.init_process_group = init_process_group
    groups.new_group = groups.distributed_c10d.new_group = new_group
    made, torch_any, tensor_class, kernels = torch.tensor, torch, Tensor, varlen

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        found = made(data, **options)  # its C++ fills a tensor of the device, for which there is no kernel
        return found if device is None else found.to(device)

    any_torch: Any = torch_any
    any_torch.tensor = tensor
    any_class: Any = tensor_class
    any_class.pin_memory = lambda self, *_args: self  # page-locked or not: host memory
    any_class.record_stream = lambda self, _stream: None
    any_kernels: Any = kernels
    any_kernels.varlen_attn = varlen_attn
