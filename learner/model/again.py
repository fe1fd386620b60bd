"""Activations that are computed again in the backward pass, each from what it was made of.

    hidden --- norm ---> normed --- matrix product --->
     kept                 |
                          would be kept for the gradient of the product's weight; kept is how to make it of `hidden`

torch asks what to keep of every tensor that an operation saves. No matrix product and no attention runs twice, and the
backward pass sees the same numbers: what is made again is made by the same operations of the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

Make = Callable[[], Tensor]
MADE_BY = "made_by"
"""Attribute of a tensor: what makes it again."""


def recomputes(config: Any) -> bool:
    """Whether a Megatron config asks for this."""
    return bool(config.recompute_granularity == "selective")


def made_by(output: Tensor, make: Make) -> Tensor:
    """`output`, of which is noted that `make` computes it again; nothing is noted where nobody wants a gradient."""
    if torch.is_grad_enabled():
        setattr(output, MADE_BY, make)
    return output


@contextmanager
def kept_as_made(tensor: Tensor) -> Iterator[None]:
    """Have operations inside keep, in place of `tensor`, what makes it again, if that was noted."""
    make: Make | None = getattr(tensor, MADE_BY, None)
    if make is None or not torch.is_grad_enabled():
        yield
        return
    # not the tensor itself: what is kept outlives this block, and the tensor should not
    storage, numbers = tensor.untyped_storage()._cdata, tensor.numel()

    def keep(saved: Tensor) -> Tensor | Make:
        whole = saved.numel() == numbers and saved.is_contiguous() and saved.untyped_storage()._cdata == storage
        return partial(_made, make, saved.shape) if whole else saved

    with torch.autograd.graph.saved_tensors_hooks(keep, _given_back):
        yield


def _made(make: Make, shape: torch.Size) -> Tensor:
    with torch.no_grad():
        return make().view(shape)


def _given_back(kept: Tensor | Make) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()


class QueryKeyValue(ColumnParallelLinear):
    """The projection behind a layer's first norm."""

    def forward(self, input_: Tensor, *inputs: Any, **options: Any) -> Any:
        """As Megatron's: [tokens, 1, hidden] -> [tokens, 1, channels of this rank], and no bias."""
        with kept_as_made(input_):
            return super().forward(input_, *inputs, **options)
