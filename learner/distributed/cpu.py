"""Let megatron-core 0.16.1 run where there is no CUDA. Everything here does nothing where CUDA is available.

megatron-core assumes CUDA in three ways; each is answered in the narrowest way that works:

    torch.cuda.current_device() and friends    replaced: without CUDA they could only raise
    literal device="cuda", Tensor.cuda()       a TorchFunctionMode, active only inside `on_this_device()`
    checks for "torch.cuda.FloatTensor"        the same mode answers `Tensor.type()`
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrite requests for the device "cuda" to the CPU, and CPU type names to CUDA's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            # pin_memory comes with device="cuda" in megatron's rope helpers and is refused for CPU tensors
            kwargs = (
                {**kwargs, "device": _CPU, "pin_memory": False}
                if "pin_memory" in kwargs
                else {
                    **kwargs,
                    "device": _CPU,
                }
            )
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str) and not result.startswith("torch.cuda."):
            # the optimizers sort parameters by type name and know only CUDA's
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def on_this_device() -> contextlib.AbstractContextManager[Any]:
    """Run megatron code that names CUDA literally: a no-op with CUDA, else "cuda" means the CPU inside the block."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings inside the block: megatron-core warns about its own defaults and missing extras."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Make `torch.compile` the identity inside the block where there is no CUDA.

    megatron-core decorates its fused functions with it at import, which loads the whole compiler: a second of every
    start, for functions that the learner does not use.
    """
    compiler = torch.compile
    if not torch.cuda.is_available():
        torch.compile = lambda function, *args, **kwargs: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def this_device() -> torch.device:
    """The device of this rank: the current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


def import_megatron() -> None:
    """Import the parts of megatron-core that the learner uses, and stand in for CUDA where there is none.

    Idempotent. The import warns about Transformer Engine and Apex, which the learner does not use.
    """
    with quiet(), _without_compiler():
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")  # brings all that the learner uses with it
        megatron_random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
        moe: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        dispatchers: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    if not hasattr(moe, "te_general_gemm"):
        moe.te_general_gemm = None  # the router looks the name up, which only Transformer Engine defines
    # megatron-core 0.16.1 calls functions that torch 2.13 deprecates: nothing that a user could act on
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    if torch.cuda.is_available():
        return
    # Buffers, mappings and pipeline communication ask for the current device; a torch.device is as good as an index.
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    # Pipeline communication and checkpoints wait for the device; the CPU has nothing outstanding.
    torch.cuda.synchronize = lambda *args, **kwargs: None
    # The random-state tracker (sequence parallelism, recompute) forks the device generator: here the CPU's.
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _without_streams(dispatchers.MoEAlltoAllTokenDispatcher)


def _without_streams(dispatcher: Any) -> None:
    """Mixture of experts: counts of tokens are on the host already, no side stream has to bring them there."""
    dispatcher.cuda_dtoh_stream = _CPU  # anything but None: a stream would be made in its place

    def counts_to_numpy(self: Any, _point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            if isinstance(value := getattr(self, name), torch.Tensor):
                setattr(self, name, value.numpy())
        return tokens_per_expert

    dispatcher._maybe_dtoh_and_synchronize = counts_to_numpy
