"""One rank of the learner on a GPU that is not there, with numbers: `python numbers_rank.py WAY FOLDER SECONDS`.

`cuda_guard.so` must be preloaded. WAY is one of `opd_async.bench.gpu.step`, whose steps are taken and whose files are
written, each within SECONDS; with several ranks the environment says which one this is, as torchrun does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numbers_on_cuda
import torch

numbers_on_cuda.install()

import stand_in_kernels  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402

from opd_async.bench.gpu import step, varlen  # noqa: E402
from opd_async.learner.losses import products  # noqa: E402
from opd_async.learner.model import packs  # noqa: E402
from opd_async.learner.model.norm import in_one_kernel, in_parts  # noqa: E402

any_random: Any = megatron_random
any_random._get_cuda_rng_state = lambda *_args, **_options: torch.zeros(16, dtype=torch.uint8)
any_random._set_cuda_rng_state = lambda *_args, **_options: None


def raises(work: Any, kind: type[Exception], text: str) -> None:
    """Fail unless `work` raises this."""
    try:
        work()
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}: {text}")


def rules() -> None:
    """What a GPU refuses is refused, and what it computes is computed, in place and through views."""
    left = torch.arange(6.0, device="cuda").reshape(2, 3)
    assert left.is_cuda and left.device == torch.device("cuda", 0) and left.sum().item() == 15.0
    raises(lambda: left + torch.ones(2, 3), RuntimeError, "cuda:0 and cpu")
    raises(lambda: torch.where(torch.ones(2, 3, dtype=torch.bool), left, left), RuntimeError, "cuda:0 and cpu")
    raises(left.numpy, TypeError, "Use Tensor.cpu()")
    assert (left * torch.tensor(2.0)).cpu().tolist() == [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]  # of no dimension: allowed
    view = left[1]
    view.mul_(10.0)
    assert left.tolist()[1] == [30.0, 40.0, 50.0] and not view.cpu().is_cuda
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    (left @ weight).sum().backward()
    assert weight.grad is not None and weight.grad.is_cuda and weight.grad.tolist() == [30.0, 41.0, 52.0]
    weight.data = left[0]
    left.zero_()
    assert weight.tolist() == [0.0, 0.0, 0.0]


def attention() -> None:
    """The learner's attention in bfloat16, by torch's kernel for packs on a GPU, and as it calls those of others."""
    with stand_in_kernels.installed("flash3", "te"):
        for case in varlen.cases(tiny=True):
            for kernel in (packs.by_torch, packs.by_flash3, packs.by_transformer_engine):
                if case.context and kernel is packs.by_transformer_engine:
                    continue  # the learner refuses both together
                for name, error in varlen.errors(case, torch.bfloat16, [1, 7, 33, 12], kernel).items():
                    assert error < varlen.LIMITS[torch.bfloat16], f"{case.name}, {kernel}: {name} is off by {error}"


def kernels() -> None:
    """Norms and the head's products in bfloat16, by the operations that a GPU has: closer to float64 than by those of
    the CPU, and with the same gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, grad = (torch.randn(n, 96, generator=generator).bfloat16() for n in (24, 40, 24))
    assert products.has_wide_product("cuda", torch.bfloat16) and products.has_wide_sum("cuda", torch.bfloat16)
    right = hidden.double() @ weight.double().T
    plain = (hidden @ weight.T).float()
    assert apart(products.logits(hidden.cuda(), weight.cuda()), right) < 1e-6 < apart(plain, right)
    right = 0.5 + weight.double().T @ weight.double()
    total, plain = torch.full((96, 96), 0.5, device="cuda"), 0.5 + (weight.T @ weight).float()
    products.add_product(total, weight.cuda(), weight.cuda())
    assert apart(total, right) < 1e-6 < apart(plain, right)
    for centred in (False, True):
        found, plain, right = (
            normed(norm, hidden.to(device, dtype), weight[0].to(device, dtype), grad.to(device, dtype), centred)
            for norm, device, dtype in (
                (in_one_kernel, "cuda", torch.bfloat16),
                (in_parts, "cpu", torch.bfloat16),
                (in_parts, "cpu", torch.float32),
            )
        )
        for one, parts, wanted in zip(found, plain, right, strict=True):
            assert one.is_cuda and apart(one, wanted) <= apart(parts, wanted) * 1.01


def apart(found: torch.Tensor, right: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((found.cpu().double() - right.double()).norm() / right.double().norm())


def normed(norm: Any, hidden: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, centred: bool) -> Any:
    """A norm of `hidden`, and the gradients of both."""
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    output = norm(hidden, weight, 1e-6, centred=centred)
    return output.detach(), *torch.autograd.grad(output, (hidden, weight), grad)


def main() -> None:
    """Try the rules, then take the steps."""
    torch.set_num_threads(1)
    with torch.autograd.set_multithreading_enabled(False), numbers_on_cuda.OnCuda():
        rules()
        if sys.argv[1] == "float32":
            attention()
            kernels()
        step.take(sys.argv[1], Path(sys.argv[2]), tiny=True, deadline_s=float(sys.argv[3]))


if __name__ == "__main__":
    main()
