"""A decoder of one of the supported families as a Megatron GPTModel that returns hidden states.

The LM head is not run here: `learner.logprobs` runs it on the trained rows only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from opd_async.data.decoder import GELU
from opd_async.learner.config import LearnerConfig, Recompute
from opd_async.learner.distributed.cpu import quiet
from opd_async.learner.errors import ModelError
from opd_async.learner.model import gated
from opd_async.learner.model.again import QueryKeyValue
from opd_async.learner.model.architecture import ModelShape
from opd_async.learner.model.attention import LayerRopeAttention, PackedAttention
from opd_async.learner.model.kernels import Kernels, choose
from opd_async.learner.model.layout import PackedBatch
from opd_async.learner.model.norm import NormedOutput, RMSNorm
from opd_async.learner.model.rotary import angles, inverse_frequencies

Model = TypeVar("Model", bound="DecoderModel")


@dataclass
class DecoderConfig(TransformerConfig):
    """Megatron's, and whose kernels compute."""

    kernels: Kernels = field(default_factory=Kernels)


class DecoderModel(GPTModel):
    """GPTModel without rotary module and LM head call: both need the layout of the packed batch."""

    own_parameters: frozenset[str] = frozenset()
    """Names of parameters that no Hugging Face folder has."""

    def __init__(self, config: Any, shape: ModelShape, padded_vocab: int) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=_block_spec(config, shape),
            vocab_size=padded_vocab,
            max_sequence_length=shape.max_positions,
            position_embedding_type="none",
            share_embeddings_and_output_weights=shape.tied,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        self.shape = shape
        frequencies = inverse_frequencies(shape.rope, shape.head_dim)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)
        self.window_frequencies: Tensor | None
        windowed = None if shape.window_rope is None else inverse_frequencies(shape.window_rope, shape.head_dim)
        self.register_buffer("window_frequencies", windowed, persistent=False)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Hidden states of this pipeline stage: [P, 1, hidden], gathered over tokens on the last stage.

        On the last stage they are normed and ready for the LM head.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=batch.token_ids_P, position_ids=None)
            if self.shape.gemma:
                hidden = hidden * torch.tensor(self.shape.hidden**0.5, dtype=hidden.dtype)  # rounded first, as Gemma's
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self._angles(batch.positions_P),
            packed_seq_params=batch.packing,
        )
        if self.post_process and self.config.sequence_parallel:
            # every tensor-parallel rank computes the whole gradient of the gathered rows: split it, do not sum it
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden

    def _angles(self, positions_P: Tensor) -> Tensor:
        """float32[P, 1, 1, E], or [2, P, 1, 1, E] where windowed layers have angles of their own."""
        full = angles(self.inverse_frequencies, positions_P)
        if self.window_frequencies is None:
            return full
        return torch.stack([full, angles(self.window_frequencies, positions_P)])

    def head_weight(self) -> Tensor:
        """This rank's rows of the LM head [padded vocab / tensor size, hidden]; last pipeline stage only."""
        weight: Tensor = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return weight


def padded_vocab(shape: ModelShape, tensor_size: int) -> int:
    """The vocabulary rounded up so that every tensor-parallel rank holds the same number of rows."""
    return -(-shape.vocab // tensor_size) * tensor_size


def build_model(shape: ModelShape, config: LearnerConfig) -> DecoderModel:
    """The part of the model that this rank holds, with uninitialised weights: `learner.hf_io` fills them.

    Raises `ModelError` if the sizes do not divide by the parallel sizes, or the kernels that are asked for cannot be
    had.
    """
    return build(DecoderModel, shape, config)


def build(kind: type[Model], shape: ModelShape, config: LearnerConfig) -> Model:
    """As `build_model`, for a kind of decoder."""
    _check_divisible(shape, config)
    dtype = getattr(torch, config.dtype)
    with quiet():
        transformer_config = _transformer_config(shape, config, dtype)
        return kind(transformer_config, shape, padded_vocab(shape, config.parallel.tensor))


def _check_divisible(shape: ModelShape, config: LearnerConfig) -> None:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    mlp = shape.ffn if shape.experts is None else shape.experts.ffn * tensor // config.parallel.expert_tensor
    for name, size in (("attention heads", shape.heads), ("KV heads", shape.kv_heads), ("MLP channels", mlp)):
        if size % tensor:
            raise ModelError(f"{size} {name} do not divide by learner.tensor_parallel {tensor}")
    if shape.vocab < tensor * tensor:
        raise ModelError(f"a vocabulary of {shape.vocab} is too small for learner.tensor_parallel {tensor}")
    if shape.experts is not None and shape.experts.count % config.parallel.expert:
        raise ModelError(
            f"{shape.experts.count} experts do not divide by learner.expert_parallel {config.parallel.expert}"
        )
    if shape.layers % pipeline:
        raise ModelError(f"{shape.layers} layers do not divide by learner.pipeline_parallel {pipeline}")


def _transformer_config(shape: ModelShape, config: LearnerConfig, dtype: torch.dtype) -> Any:
    parallel = config.parallel
    return DecoderConfig(
        kernels=choose(config, shape),
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        layernorm_zero_centered_gamma=shape.gemma,
        activation_func=(gated.GELU if shape.activation == GELU else gated.SILU).value,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert if shape.experts is not None else 1,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.tensor > 1,
        # Micro-batches differ in length; Megatron ties the option to this dispatcher even for dense models.
        variable_seq_lengths=parallel.pipeline > 1,
        moe_token_dispatcher_type="alltoall",
        **_expert_options(shape),
        # The loss is divided by the global token count before the backward pass: DDP must sum, not average.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        **_recompute_options(config.recompute),
    )


def _recompute_options(recompute: Recompute) -> dict[str, Any]:
    """Whole layers are Megatron's to compute again; of what it can select, nothing: `learner.model.again` selects."""
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": []}
    if recompute:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {}


def _expert_options(shape: ModelShape) -> dict[str, Any]:
    """Mixture of experts: no token is dropped, and no auxiliary loss pulls the routing towards balance.

    Weights of chosen experts are a softmax over their own logits (`normalised`) or over all experts' logits.
    """
    if shape.experts is None:
        return {}
    return {
        "num_moe_experts": shape.experts.count,
        "moe_router_topk": shape.experts.per_token,
        "moe_ffn_hidden_size": shape.experts.ffn,
        "moe_router_pre_softmax": not shape.experts.normalised,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _block_spec(config: Any, shape: ModelShape) -> Any:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    # Without this, Megatron files norms under the names of its fused layers, which this model does not have.
    layer.submodules.sharded_state_dict_keys_map = {}
    attention = layer.submodules.self_attention.submodules
    attention.linear_qkv = QueryKeyValue
    if config.num_moe_experts is None:
        layer.submodules.mlp = gated.GatedMLP
    attention.core_attention = ModuleSpec(module=PackedAttention, params={"shape": shape})
    if shape.window_rope is not None:
        layer.submodules.self_attention.module = LayerRopeAttention
        layer.submodules.self_attention.params["shape"] = shape
    if shape.gemma:
        attention.linear_proj = NormedOutput
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
