"""The learner's attention on packs of sequences, against the textbook's in float64, forward and backward.

    python -m bench.gpu.varlen [--tiny] [--json FILE]

    case       what is special
    shared     several query heads share a key head
    own        every query head has a key head of its own
    window     a token sees the last few tokens only
    context    a rank of a context group: queries of two runs, keys of all ranks

Errors are the largest difference over the largest number of the reference: in bfloat16 a few of its roundings (2^-8).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_async.bench.gpu.found import Findings, device, end, parse, parser, wait_for_device
from opd_async.learner.model.attention import PackedAttention, has_varlen
from opd_async.learner.model.kernels import Kernels
from opd_async.learner.model.layout import lay_out
from opd_async.learner.model.packs import PackKernel, by_flash3, by_torch, by_transformer_engine, problem
from opd_async.transport.step_batch import MicroBatch

LIMITS = {torch.bfloat16: 0.02, torch.float32: 1e-4}
RANKS = 2
"""Of the context group."""
TERA = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Heads and width of an attention, and what it sees."""

    name: str
    heads: int
    kv_heads: int
    channels: int
    window: int | None = None
    context: bool = False


def cases(tiny: bool) -> list[Case]:
    """Everything that is tried."""
    heads, channels, window = (4, 16, 5) if tiny else (16, 128, 200)
    return [
        Case(name="shared", heads=heads, kv_heads=heads // 2, channels=channels),
        Case(name="own", heads=heads, kv_heads=heads, channels=channels),
        Case(name="window", heads=heads, kv_heads=heads // 2, channels=channels, window=window),
        Case(name="context", heads=heads, kv_heads=heads // 2, channels=channels, context=True),
    ]


def pack(lengths: Sequence[int]) -> MicroBatch:
    """Sequences whose token ids say where a token stands: 1, 2, 3, ... (0 is padding)."""
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = np.concatenate([np.arange(a, b - 1) for a, b in pairwise(bounds)]).astype(np.int32)
    zeros = np.zeros(len(rows), np.float32)
    return MicroBatch(
        token_ids=np.arange(1, bounds[-1] + 1, dtype=np.int32),
        cu_seqlens=bounds,
        rows=rows,
        behaviour_logprobs=zeros,
        teacher_logprobs=zeros,
        advantages=zeros,
        staleness=zeros.astype(np.int32),
    )


def attention(case: Case, kernel: PackKernel) -> PackedAttention:
    """The learner's module, with a kernel for packs."""
    scale = case.channels**-0.5
    windowed = (0,) if case.window is not None else ()
    shape: Any = SimpleNamespace(score_scale=lambda _layer: scale, window=case.window, windowed=windowed)
    return PackedAttention(SimpleNamespace(kernels=Kernels(attention=kernel)), 1, None, "self", shape)


def textbook(case: Case, inputs: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """[T, H, E]: softmax(Q K^T / sqrt(E)) V of each sequence, causal, in the dtype of its inputs Q, K and V."""
    shared, outputs, start = case.heads // case.kv_heads, [], 0
    for length in lengths:
        query, key, value = (t[start : start + length].transpose(0, 1) for t in inputs)
        key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if case.window is not None:
            seen = seen.triu(1 - case.window)
        scores = (query @ key.transpose(1, 2)) * case.channels**-0.5
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1))
        start += length
    return torch.cat(outputs)


def learners(case: Case, inputs: Sequence[Tensor], lengths: Sequence[int], kernel: PackKernel) -> Tensor:
    """The same [T, H, E] by way of the learner's layout and kernel; rank by rank where there is a context group."""
    module, where, dtype = attention(case, kernel), inputs[0].device, inputs[0].dtype
    slack = 0.0 if has_varlen(where, dtype) else 0.125
    ranks = RANKS if case.context else 1
    parts = [
        lay_out(pack(lengths), multiple=1, slack=slack, device=where, context=(rank, ranks)) for rank in range(ranks)
    ]
    padded = [torch.cat([torch.zeros_like(t[:1]), t]) for t in inputs]
    everything_T = torch.cat([part.token_ids_P[0] for part in parts])
    attend = module._varlen if has_varlen(where, dtype) else module._grouped
    output_THE = torch.zeros_like(padded[0])
    for part in parts:
        query_PHE = padded[0][part.token_ids_P[0]]
        keys, values = (t[everything_T if case.context else part.token_ids_P[0]] for t in padded[1:])
        outputs = [
            attend(query_PHE, *((keys, values) if one.keys is None else (keys[one.keys], values[one.keys])), one)
            for one in part.packing.pieces
        ]
        output_THE = output_THE.index_put((part.token_ids_P[0],), torch.cat(outputs))
    return output_THE[1:]


def errors(case: Case, dtype: torch.dtype, lengths: Sequence[int], kernel: PackKernel = by_torch) -> dict[str, float]:
    """Largest relative difference to the textbook of the output, and of the gradients of query, key and value."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    drawn = [torch.randn(tokens, count, case.channels, generator=generator).to(dtype) for count in heads]
    *inputs, upstream = [t.to(device()) for t in drawn]
    own = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    outputs = learners(case, own, lengths, kernel), textbook(case, exact, lengths)
    outputs[0].backward(upstream)
    outputs[1].backward(upstream.double())
    pairs = {"output": outputs} | {
        name: (_gradient(one), _gradient(other))
        for name, one, other in zip(("query", "key", "value"), own, exact, strict=True)
    }
    with torch.no_grad():
        return {
            name: float((one.double() - other).abs().max() / other.abs().max()) for name, (one, other) in pairs.items()
        }


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def speed(case: Case, lengths: Sequence[int], tries: int, kernel: PackKernel) -> tuple[float, float]:
    """TFLOP/s of forward and of backward, the shortest of `tries`: four operations a pair and channel, and ten."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.heads, case.kv_heads, case.kv_heads)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    made = [
        torch.randn(sum(lengths), count, case.channels, generator=generator, dtype=torch.float32) for count in heads
    ]
    inputs = [t.to(device(), dtype).requires_grad_() for t in made]
    seconds: list[tuple[float, float]] = []
    for _ in range(tries):
        marks = [_now()]
        output = learners(case, inputs, lengths, kernel)
        marks.append(_now())
        output.backward(torch.ones_like(output))
        marks.append(_now())
        seconds.append((marks[1] - marks[0], marks[2] - marks[1]))
    pairs = sum(length * length / 2 for length in lengths) * case.heads * case.channels / TERA
    return 4 * pairs / min(one for one, _ in seconds), 10 * pairs / min(two for _, two in seconds)


def _now() -> float:
    wait_for_device()
    return time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare every case in both dtypes, then measure."""
    options = parse(parser("Attention against a reference in float64."), arguments)
    findings = Findings(options.json)
    lengths = [1, 7, 33, 12] if options.tiny else [1, 7, 128, 1000, 2048, 129]
    findings.figure("kernel", "varlen_attn" if has_varlen(device(), torch.bfloat16) else "scaled_dot_product_attention")
    others = others_here(cases(options.tiny)[0], findings)
    for case in cases(options.tiny):
        for dtype in LIMITS:
            for name, error in errors(case, dtype, lengths).items():
                findings.check(f"{case.name}, {str(dtype).removeprefix('torch.')}: {name}", error, LIMITS[dtype])
        for other, kernel in others.items():
            if case.context and kernel is by_transformer_engine:
                continue  # the learner refuses both together
            for name, error in errors(case, torch.bfloat16, lengths, kernel).items():
                findings.check(f"{case.name}, {other}: {name}", error, LIMITS[torch.bfloat16])
    long = [64, 64] if options.tiny else [16_384, 16_384]
    for other, kernel in {"": by_torch, **others}.items():
        forward, backward = speed(cases(options.tiny)[0], long, 2 if options.tiny else 5, kernel)
        by = f", {other}" if other else ""
        findings.figure(f"TFLOP/s of {len(long)} x {long[0]} tokens{by}", {"forward": forward, "backward": backward})
    end(findings)


def others_here(case: Case, findings: Findings) -> dict[str, PackKernel]:
    """The attention of other packages that works here, by name; of the rest, why it does not."""
    if not has_varlen(device(), torch.bfloat16):
        return {}
    found: dict[str, PackKernel] = {}
    for name, kernel in (("FlashAttention 3", by_flash3), ("Transformer Engine", by_transformer_engine)):
        if (reason := problem(kernel, case.heads, case.kv_heads, case.channels, None)) is None:
            found[name] = kernel
        else:
            findings.figure(name, reason)
    return found


if __name__ == "__main__":
    main()
