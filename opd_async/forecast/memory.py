"""What a device of each role has to hold, in bytes, from shapes alone.

Learner, for each weight of a rank's share: 2 bytes of bfloat16 and 4 of gradients; 12 of optimizer state (float32
weights and two moments), spread over data-parallel ranks. In float32: 4, 4, and 8, since the weights themselves are
those that the optimizer moves. Activations: 34 bytes * hidden for each token and layer
without recomputation (Korthikanti et al., 2022, less the attention matrix, which flash attention does not keep), with
it the layers' inputs and one layer in full. Selective recomputation keeps all but what two norms and the gate give.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_async.config.topology import LearnerSection
from opd_async.forecast.cost_model import BF16, BFLOAT16, RESERVED_SHARE, WIDTHS, Decoder
from opd_async.forecast.devices import Device

GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"bfloat16": 12, "float16": 12, "float32": 8}
LAYER_BYTES = 34
LOGIT_COPIES = 3
"""Float32 logits, their gradient and one temporary, of `logprob_chunk_rows` rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes that a role takes on one of its devices."""

    role: str
    device: Device
    weights: float
    optimizer: float = 0.0
    """Optimizer state and gradients."""
    kv: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of everything, with the share of the device that CUDA and fragments take."""
        return self.weights + self.optimizer + self.kv + self.activations + self.device.memory * RESERVED_SHARE

    @property
    def fits(self) -> bool:
        """Whether the device has `total` bytes."""
        return self.total <= self.device.memory


def engine_memory(
    role: str, model: Decoder, device: Device, tensor_parallel: int, kv_tokens: float, dtype: str = BFLOAT16
) -> Memory:
    """One device of an engine that keeps `kv_tokens` tokens."""
    width = WIDTHS[dtype]
    return Memory(
        role=role,
        device=device,
        weights=model.weights * width / tensor_parallel,
        kv=model.kv_bytes / BF16 * width * kv_tokens / tensor_parallel,
    )


def learner_memory(
    model: Decoder, device: Device, section: LearnerSection, longest: int, critic: Decoder | None = None
) -> Memory:
    """One device of the learner; `longest` is the longest sequence, prompt included, which no micro-batch splits.

    A `critic` is trained beside the student: weights and optimizer of its own, without an LM head, and activations at
    another time than the student's.
    """
    shard = section.tensor_parallel * section.pipeline_parallel
    weights = (model.weights + (critic.headless if critic is not None else 0)) / shard
    logits = LOGIT_COPIES * 4 * section.logprob_chunk_rows * model.vocab / section.tensor_parallel
    states = GRADIENT_BYTES + OPTIMIZER_BYTES[section.dtype] / (section.data_parallel * section.context_parallel)
    width = WIDTHS[section.dtype]
    activations = width / BF16 * _activations(model, section, longest) + logits
    if critic is not None:
        activations = max(activations, width / BF16 * _activations(critic, section, longest))
    return Memory(
        role="learner", device=device, weights=weights * width, optimizer=weights * states, activations=activations
    )


def _activations(model: Decoder, section: LearnerSection, longest: int) -> float:
    """What the layers keep for the backward pass of the largest micro-batch."""
    return activation_bytes(model, section, max(section.micro_batch_tokens, longest))


def activation_bytes(model: Decoder, section: LearnerSection, micro_batch_tokens: int) -> float:
    """Bytes that the layers of one rank keep for the backward pass of a micro-batch, in bfloat16."""
    tokens = micro_batch_tokens / section.context_parallel
    per_layer = LAYER_BYTES * model.hidden * tokens / section.tensor_parallel
    layers = model.layers / section.pipeline_parallel
    if section.recompute == "selective":
        return (per_layer - BF16 * _made_again(model) * tokens / section.tensor_parallel) * layers
    return BF16 * model.hidden * tokens * layers + per_layer if section.recompute else per_layer * layers


def _made_again(model: Decoder) -> int:
    """Channels of a token that a layer computes again: two norms and the gate; with experts the first norm alone."""
    return model.hidden if model.experts else 2 * model.hidden + model.ffn
