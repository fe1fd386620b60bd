"""The dense MLP with a gate (Shazeer, 2020), for Megatron's layer spec: fc2(f(gate) * up), [gate, up] = fc1(x).

F channels of this rank. Megatron's own, without its fused kernels, keeps five tensors of F channels for each token and
copies one of them; this keeps what fc1 gave, which are two, and what fc2 is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor
from torch.nn import functional

from opd_async.learner.model.again import kept_as_made, made_by, recomputes
from opd_async.learner.model.norm import NormedOutput


@dataclass(frozen=True, slots=True)
class Activation:
    """A function of each element, and its gradient from (gradient of its value, its argument), to `grad_input`."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[..., Tensor]


SILU = Activation(functional.silu, torch.ops.aten.silu_backward.grad_input)
GELU = Activation(
    partial(functional.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh")
)


class _Gate(torch.autograd.Function):
    """activation(gate) * up; the backward pass computes the activation again."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(both)
        ctx.activation = activation
        return gate(both, activation)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,), (both,) = grad_outputs, ctx.saved_tensors
        gates, ups = both.chunk(2, -1)
        grad_both = torch.empty_like(both)
        grad_gates, grad_ups = grad_both.chunk(2, -1)
        torch.mul(ctx.activation.value(gates), grad, out=grad_ups)
        ctx.activation.gradient(grad * ups, gates, grad_input=grad_gates)
        return grad_both, None


def gate(both: Tensor, activation: Activation) -> Tensor:
    """`both` [..., 2 F], gates and ups -> [..., F]."""
    gates, ups = both.chunk(2, -1)
    return activation.value(gates).mul_(ups)


def by_torch(both: Tensor, activation: Activation) -> Tensor:
    """As `gate`, with its gradient."""
    gated: Tensor = _Gate.apply(both, activation)
    return gated


class GatedMLP(MLP):
    """Drop-in for Megatron's, for dense layers without biases; Gemma's has a norm behind it."""

    def __init__(self, config: Any) -> None:
        output = NormedOutput if config.layernorm_zero_centered_gamma else RowParallelLinear
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=output),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        self.activation = SILU if config.activation_func is SILU.value else GELU
        self.again = recomputes(config)
        self.gate = config.kernels.gate

    def forward(self, hidden_states: Tensor, *_inputs: Any, **_unused: Any) -> Any:
        """As Megatron's: [tokens, 1, hidden] -> [tokens, 1, hidden], and no bias."""
        with kept_as_made(hidden_states):
            both, _bias = self.linear_fc1(hidden_states)
        gated = self.gate(both, self.activation)
        if self.again:
            made_by(gated, partial(self.gate, both.detach(), self.activation))
        with kept_as_made(gated):
            return self.linear_fc2(gated)
