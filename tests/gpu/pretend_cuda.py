"""Make torch believe in CUDA and NCCL where there is neither: for tensors without values, and groups without peers.

With `cuda_guard.so` preloaded and under FakeTensorMode, every Python line of a step runs with `device.type == "cuda"`.
Devices, dtypes and shapes are then as on a GPU; numbers, kernels, streams and NCCL itself are not seen. Call `install`
before `opd_async.learner` is imported, which otherwise stands in for CUDA itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._tools import fake_collectives  # noqa: F401  # teaches fake tensors the shapes of collectives
from torch.testing._internal.distributed.fake_pg import FakeStore

SYNCS: Counter[str] = Counter()
"""How often the host waited for the device, by what made it wait and where."""
MIB = 1 << 20
COALESCED = ("reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_", "allreduce_coalesced_")
OWN_CODE = ("/learner/", "/megatron/core/")
KERNELS = ("_fused_rms_norm", "_fused_rms_norm_backward")
"""Operations that only a build with CUDA has whole: elsewhere they fall into parts before autograd sees them."""
_library: Any = None
_kernels: Any = None


def here() -> str:
    """The innermost function of the learner or of Megatron that is running, and its file."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        for part in OWN_CODE:
            if part in code.co_filename:
                return f"{code.co_filename.rpartition(part)[2]}:{code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def count_sync(what: str) -> None:
    """Count a wait of the host for the device."""
    SYNCS[f"{what} {here()}"] += 1


class Stream:
    """A CUDA stream that has nothing to do."""

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def synchronize(self) -> None:
        count_sync("Stream.synchronize")

    def wait_stream(self, _other: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def record_event(self, *_args: Any) -> Event:
        return Event()


class Event:
    """A CUDA event that has happened."""

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def record(self, *_args: Any) -> None: ...

    def wait(self, *_args: Any) -> None: ...

    def synchronize(self) -> None:
        count_sync("Event.synchronize")


def install(rank: int, world_size: int) -> None:
    """Answer for `torch.cuda`, NCCL and host reads in this process, which is one rank of `world_size`."""
    pretend_device()
    _pretend_groups(rank, world_size)
    _pretend_host_reads()


def pretend_device() -> None:
    """Answer for `torch.cuda`: there is one, it is idle, and nothing has to be waited for."""
    global _kernels  # the registration lasts as long as the object
    _kernels = torch.library.Library("aten", "IMPL")
    for name in KERNELS:
        _kernels.impl(name, _never, "CUDA")
    cuda: Any = torch.cuda
    properties = SimpleNamespace(
        name="a GPU that is not there", major=9, minor=0, multi_processor_count=132, total_memory=81920 * MIB
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 8,
        "current_device": 0,
        "set_device": None,
        "_lazy_init": None,
        "is_initialized": True,
        "set_rng_state": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "empty_cache": None,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_args, _answer=answer, **_options: _answer)
    cuda.synchronize = lambda *_args, **_options: count_sync("torch.cuda.synchronize")
    cuda.get_rng_state = lambda *_args, **_options: torch.zeros(16, dtype=torch.uint8)
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda *_args, **_options: Stream()
    cuda.stream = lambda _stream: contextlib.nullcontext()


def _never(*_args: Any, **_options: Any) -> Any:
    raise AssertionError("a kernel of a device that is not there")


def _pretend_groups(rank: int, world_size: int) -> None:
    """torch's own fake backend in place of NCCL, which must be what is asked for."""
    global _library  # the registration lasts as long as the object
    _library = torch.library.Library("c10d", "IMPL")
    for name in COALESCED:
        _library.impl(name, lambda *_args, **_options: FakeWork().boxed(), "Meta")
    start, make = dist.init_process_group, dist.new_group

    def init_process_group(backend: str | None = None, **_options: Any) -> None:
        assert backend == "nccl", f"the learner asked for {backend} on a GPU"
        start("fake", rank=rank, world_size=world_size, store=FakeStore())

    def new_group(*args: Any, **options: Any) -> Any:
        return make(*args, **options | {"backend": "fake"})

    def all_gather_object(out: list[Any], value: Any, group: Any = None) -> None:
        out[:] = [value] * len(out)

    module: Any = dist
    module.init_process_group = init_process_group
    module.new_group = module.distributed_c10d.new_group = new_group
    module.all_gather_object = all_gather_object
    module.barrier = lambda *_args, **_options: None


def _pretend_host_reads() -> None:
    """A read of a fake tensor gives 1, and is counted where the tensor is on the device."""
    tensor_class: Any = torch.Tensor
    real_list, real_numpy, real_tensor = torch.Tensor.tolist, torch.Tensor.numpy, torch.tensor

    def item(self: torch.Tensor, *_args: Any) -> float | int:
        if self.device.type == "cuda":
            count_sync("item")
        return 1.0 if self.dtype.is_floating_point else 1

    def tolist(self: torch.Tensor) -> Any:
        if self.device.type == "cuda":
            count_sync("tolist")
        elif not isinstance(self, FakeTensor):
            return real_list(self)
        return read(self).tolist()

    def numpy(self: torch.Tensor, **_options: Any) -> Any:
        return read(self) if isinstance(self, FakeTensor) else real_numpy(self)

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        found = real_tensor(data, **options)  # its C++ fills a real tensor, for which "cuda" has no kernel
        if device is None or torch.device(f"cuda:{device}" if isinstance(device, int) else device).type == "cpu":
            return found
        count_sync("torch.tensor to the device")
        return torch.zeros(found.shape, dtype=found.dtype, device="cuda")

    tensor_class.item = item
    tensor_class.tolist = FakeTensor.tolist = tolist
    tensor_class.numpy = numpy
    tensor_class.record_stream = lambda self, _stream: None
    tensor_class.__float__ = lambda self: float(item(self))
    tensor_class.__int__ = lambda self: int(item(self))
    tensor_class.__bool__ = lambda self: bool(item(self))
    torch.tensor = tensor

    def masked_select(self: torch.Tensor, _mask: torch.Tensor) -> torch.Tensor:
        count_sync("masked_select")  # how many it selects is known on the device alone
        return self.new_empty(READS["selected", ()])

    tensor_class.masked_select = masked_select
    tensor_class.pin_memory = lambda self, *_args: self  # page-locked or not: host memory
    torch.nn.Module.to = _module_to  # type: ignore[assignment,method-assign]


READS: dict[tuple[str, tuple[int, ...]], list[int]] = {}
"""What a read of whole numbers gives, by device and shape, where a value decides a shape: what a pipeline stage hears
of the one before it, how many tokens an expert gets. All others read 1."""


def read(tensor: torch.Tensor) -> Any:
    """The values of a fake tensor, as an array."""
    kind = np.float64 if tensor.dtype.is_floating_point else np.bool_ if tensor.dtype is torch.bool else np.int64
    known = None if kind is np.float64 else READS.get((tensor.device.type, tuple(tensor.shape)))
    return np.ones(tuple(tensor.shape), kind) if known is None else np.array(known, kind)


def _module_to(self: torch.nn.Module, device: Any) -> torch.nn.Module:
    """Move what was made on the host. torch would swap a parameter's data, which fake ones do not let it."""
    for module in self.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "cuda":
                moved = torch.nn.Parameter(parameter.data.to(device), parameter.requires_grad)
                moved.__dict__.update(parameter.__dict__ | moved.__dict__)  # Megatron's marks, not the old device
                module._parameters[name] = moved
    return self
