"""Liger's kernels as the learner calls them, on the CPU by Triton's interpreter: `python liger_interpreted.py FOLDER`.

`TRITON_INTERPRET=1` runs a kernel's Python program by program with numpy: the formulas and their rounding are the
kernel's own, the compiler and the GPU are not seen. Needs `.venv-kernels` on the path (`make kernels`). Prints what was
compared; raises where two ways differ.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from tiny_learner import assert_close, hf_gradients, learner_config, micro_batch, step_batch, write_model
from torch import Tensor
from triton.language.extra import libdevice
from triton.runtime import interpreter

from opd_async.learner.config import ParallelConfig
from opd_async.learner.distributed import parallel
from opd_async.learner.model import decoder, gated, liger, norm
from opd_async.learner.model.kernels import Kernels
from opd_async.learner.trainer import Trainer

EPS = 1e-6
BLOCKED = 32768
"""From so many rows on, Liger takes narrow norms 16 rows at a time: those of queries and keys."""
any_interpreter: Any = interpreter
builder: Any = any_interpreter.InterpreterBuilder
Handle: Any = any_interpreter.TensorHandle
as_tensor, cast, binary = any_interpreter._implicit_cvt, builder.cast_impl, builder.binary_op


def as_compiled(argument: Any) -> Any:
    """A kernel's argument: a float is of float32, as when it is compiled, where the interpreter leaves it Python's."""
    if isinstance(argument, float):
        return tl.tensor(Handle(np.array([argument], np.float32), tl.float32), tl.float32)
    return as_tensor(argument)


def widened(bits: Any) -> Any:
    """float32 of the bits of bfloat16 numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(numbers: Any) -> Any:
    """The bits of the nearest bfloat16 numbers."""
    return torch.from_numpy(np.array(numbers, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def cast_as_compiled(self: Any, source: Any, to: Any) -> Any:
    """To bfloat16 a GPU rounds; the interpreter cuts off."""
    if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        return Handle(rounded(source.data), tl.bfloat16)
    return cast(self, source, to)


def binary_as_compiled(self: Any, left: Any, right: Any, operation: Any) -> Any:
    """Of two bfloat16 numbers, in float32 and rounded; the interpreter would take their bits for whole numbers."""
    if left.dtype.scalar == tl.bfloat16:
        return Handle(rounded(operation(widened(left.data), widened(right.data))), tl.bfloat16)
    return binary(self, left, right, operation)


any_interpreter._implicit_cvt = as_compiled
builder.cast_impl, builder.binary_op = cast_as_compiled, binary_as_compiled
any_libdevice: Any = libdevice


@triton.jit  # type: ignore[untyped-decorator]
def rsqrt(x: Any) -> Any:
    """1 / sqrt(x): that of a GPU's library, which Liger's kernels call, has no Python to interpret."""
    return 1.0 / tl.sqrt(x)


any_libdevice.rsqrt = rsqrt


def outputs(function: Any, inputs: list[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    """What a function makes of its inputs, and their gradients."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    made = function(*inputs, **options)
    before = grad.clone()
    found = [made.detach(), *torch.autograd.grad(made, inputs, grad)]
    assert torch.equal(grad, before), "another user of the gradient still needs it"
    return found


def compare(name: str, ours: list[Tensor], theirs: list[Tensor], right: list[Tensor], dtype: torch.dtype) -> None:
    """Both ways are as close to float64; shape and dtype are the same."""
    for one, other, wanted in zip(theirs, ours, right, strict=True):
        assert one.shape == other.shape and one.dtype is other.dtype is dtype, name
        errors = [float((tensor.double() - wanted).norm() / wanted.norm()) for tensor in (one, other)]
        assert errors[0] <= max(1.05 * errors[1], 1e-6), f"{name}: {errors}"
        assert errors[0] < (1e-6 if dtype is torch.float32 else 6e-3), f"{name}: {errors}"
    print(name)


def norms() -> None:
    """RMSNorm as the learner's own: rows of a layer and of heads, plain and Gemma's."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (9, 1, 200), "heads": (9, 4, 16), "many heads": (BLOCKED // 4, 4, 16)}
    for place, shape in shapes.items():
        for dtype, centred in product((torch.float32, torch.bfloat16), (False, True)):
            if place == "many heads" and (centred or dtype is torch.float32):
                continue  # thousands of programs
            hidden = torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[0])[:, None, None]
            weight = torch.randn(shape[-1], generator=generator) * 0.3 + (0.0 if centred else 1.0)
            inputs = [hidden.to(dtype), weight.to(dtype)]
            grad = torch.randn(shape, generator=generator).to(dtype)
            options = {"eps": EPS, "centred": centred}
            exact = outputs(by_the_book, [t.double() for t in inputs], grad.double(), **options)
            ours, theirs = (outputs(way, inputs, grad, **options) for way in (norm.in_parts, liger.norm))
            compare(f"norm, {place}, {dtype}, centred {centred}", ours, theirs, exact, dtype)


def by_the_book(hidden: Tensor, weight: Tensor, eps: float, *, centred: bool) -> Tensor:
    """x / sqrt(mean x^2 + eps) * w, in the dtype of its input."""
    return hidden * (hidden.square().mean(-1, keepdim=True) + eps) ** -0.5 * (weight + 1 if centred else weight)


def gates() -> None:
    """The gate as the learner's own; for GELU it is the learner's own."""
    generator = torch.Generator().manual_seed(1)
    for name, activation in (("silu", gated.SILU), ("gelu", gated.GELU)):
        for dtype in (torch.float32, torch.bfloat16):
            both = (3 * torch.randn(7, 1, 80, generator=generator)).to(dtype)
            grad = torch.randn(7, 1, 40, generator=generator).to(dtype)
            exact = outputs(gated.by_torch, [both.double()], grad.double(), activation=activation)
            ours, theirs = (outputs(way, [both], grad, activation=activation) for way in (gated.by_torch, liger.gate))
            compare(f"gate, {name}, {dtype}", ours, theirs, exact, dtype)


def models(folder: Path) -> None:
    """Gradients of a whole model; activations that are made again are made by the same kernels."""
    any_decoder: Any = decoder
    batch = step_batch(0, [micro_batch([9, 14])])
    for kind in ("qwen3-tied", "gemma3", "qwen3-moe"):
        path = write_model(folder / kind, kind)
        any_decoder.choose = lambda *_args: Kernels()
        plain = hf_gradients(Trainer(learner_config(path)), batch)
        any_decoder.choose = lambda *_args: Kernels(norm=liger.norm, gate=liger.gate)
        found = hf_gradients(Trainer(learner_config(path)), batch)
        assert_close(found, plain, 1e-5)
        again = hf_gradients(Trainer(learner_config(path, recompute="selective")), batch)
        assert_close(again, found, 1e-7)
        print(f"model, {kind}")


def main() -> None:
    """Compare everything."""
    torch.set_num_threads(1)
    norms()
    gates()
    parallel.start(ParallelConfig(), seed=0)
    models(Path(sys.argv[1]))
    parallel.stop()


if __name__ == "__main__":
    main()
