"""What a step of real shapes costs, from tensors without values: bytes, FLOPs, host waits, memory, and an estimate.

    python tests/gpu/step_costs.py [--shapes 0.6B,8B] [--ways no,yes] after.json      count, and write
    python tests/gpu/step_costs.py before.json after.json                             print what was written

A step has two micro-batches of two sequences of 16,384 tokens for each data-parallel rank, in bfloat16; costs are those
of rank 0. Layers are alike, so costs are taken with two and with three of them, and go on in a line from there. The
estimate is arithmetic, no measurement: matrix products at 700 TFLOP/s, attention at 350 forward and 280 backward with
FlashAttention 2, at 620 and 450 with 3, bytes of all other operations at 2.5 TB/s, one after the other; communication
between GPUs is left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from cuda_rank import Case, Found
from test_cuda_paths import DENSE, guard, run

TERA, GIB = 1e12, float(1 << 30)
MATRIX, BANDWIDTH = 700 * TERA, 2.5 * TERA
ATTENTION = {"FlashAttention 2": (350 * TERA, 280 * TERA), "FlashAttention 3": (620 * TERA, 450 * TERA)}
"""FLOP/s of attention forward and backward, which is 2.5 times the work."""
PEAK = 989 * TERA
"""Of an H100 by its data sheet, bfloat16."""
ELSEWHERE = ("mm", "attn", "attention", "allgather", "reduce_scatter", "allreduce", "broadcast")
"""Parts of names of operations whose bytes are not what takes their time."""
LENGTH, SEQUENCES, MICRO_BATCHES, VOCAB, HEAD_DIM = 16_384, 2, 2, 151_936, 128
WAYS: dict[str, bool | str] = {"no": False, "selective": "selective", "yes": True}


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder like Qwen3's, and over how many GPUs it is spread."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    tied: bool
    tensor: int = 1
    data: int = 1

    def config(self, layers: int) -> dict[str, object]:
        """Its `config.json` with so many layers."""
        return DENSE | {
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": HEAD_DIM,
            "vocab_size": VOCAB,
            "max_position_embeddings": 40_960,
            "tie_word_embeddings": self.tied,
        }

    @property
    def body(self) -> int:
        """Weights of the layers' matrices."""
        attention = 2 * self.hidden * HEAD_DIM * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)


SHAPES = {
    "0.6B": Shape(28, 1024, 3072, 16, 8, tied=True),
    "1.7B": Shape(28, 2048, 6144, 16, 8, tied=True),
    "8B": Shape(36, 4096, 12_288, 32, 8, tied=False, tensor=2, data=2),
    "32B": Shape(64, 5120, 25_600, 64, 8, tied=False, tensor=8, data=2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A step on one GPU."""

    shape: str
    recompute: str
    bytes: float
    flops: float
    """Of matrix products, attention's not among them."""
    waits: float
    """Of the host for the device."""
    peak: float
    rest_s: float
    """Estimated seconds of everything but attention."""
    attention: float
    """FLOPs of one way forward through all layers' attention, which is causal."""
    useful: float
    """FLOPs of forward and backward with nothing computed twice."""

    def speed(self, kernel: str) -> float:
        """Useful FLOP/s with such a kernel for attention."""
        forward, backward = ATTENTION[kernel]
        forwards = 2 if self.recompute == "yes" else 1
        return self.useful / (self.rest_s + self.attention * (forwards / forward + 2.5 / backward))


def measure(names: list[str]) -> list[Row]:
    """All ways of recomputing, for each shape."""
    rows = []
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for name in names:
            shape = SHAPES[name]
            models = {str(layers): shape.config(layers) for layers in (2, 3)}
            cases = [
                Case(
                    name=f"{way} {layers}",
                    model=layers,
                    world=shape.tensor * shape.data,
                    parallel={"tensor": shape.tensor},
                    recompute=recompute,
                    micro_batches=MICRO_BATCHES,
                    sequences=SEQUENCES,
                    length=LENGTH,
                )
                for way, recompute in WAYS.items()
                for layers in models
            ]
            found = run(cases, folder, guard(folder), models)
            for way in WAYS:
                two, three = (found[f"{way} {layers}"] for layers in (2, 3))
                assert not two.error and not three.error, two.error or three.error
                rows.append(row_of(name, way, two, three))
    return rows


def row_of(name: str, way: str, two: Found, three: Found) -> Row:
    """The costs with all layers from those with two and three."""
    shape = SHAPES[name]

    def whole(of_two: float, of_three: float) -> float:
        return of_two + (shape.layers - 2) * (of_three - of_two)

    flops = whole(*(one.flops - one.attention_flops for one in (two, three)))
    moved = whole(*(sum(n for op, n in one.bytes_by.items() if not is_elsewhere(op)) for one in (two, three)))
    tokens = MICRO_BATCHES * SEQUENCES * LENGTH
    pairs = tokens * LENGTH / 2
    attention = 4 * shape.heads * HEAD_DIM * pairs * shape.layers / shape.tensor
    head = tokens * 7 / 8 * VOCAB * shape.hidden
    return Row(
        shape=name,
        recompute=way,
        bytes=whole(two.operation_bytes, three.operation_bytes),
        flops=flops,
        waits=whole(sum(two.syncs.values()), sum(three.syncs.values())),
        peak=whole(two.peak_bytes, three.peak_bytes),
        rest_s=flops / MATRIX + moved / BANDWIDTH,
        attention=attention,
        useful=6 * (shape.body * tokens + head) / shape.tensor + 3 * attention,
    )


def is_elsewhere(operation: str) -> bool:
    """Whether an operation's time is that of its FLOPs, or of the links between GPUs."""
    return any(part in operation for part in ELSEWHERE)


def table(before: list[Row], after: list[Row]) -> str:
    """Markdown: a row for each shape and way, with `before, after` in each cell; `after` alone where it is new."""
    head = "| model | on | recompute | TB through operations | PFLOP of products | host waits | peak GiB |"
    lines = [f"{head} {' | '.join(ATTENTION)} |", "|---|---|---|---:|---:|---:|---:|---:|---:|"]
    old = {(row.shape, row.recompute): row for row in before}
    for row in after:
        shape = SHAPES[row.shape]
        pair = [one for one in (old.get((row.shape, row.recompute)), row) if one is not None]
        cells = [
            ", ".join(f"{one.bytes / TERA:.1f}" for one in pair),
            ", ".join(f"{one.flops / TERA / 1e3:.2f}" for one in pair),
            ", ".join(f"{one.waits:.0f}" for one in pair),
            ", ".join(f"{one.peak / GIB:.0f}" for one in pair),
            *(", ".join(f"{one.speed(kernel) / PEAK:.0%}".replace("%", " %") for one in pair) for kernel in ATTENTION),
        ]
        place = f"TP {shape.tensor} x DP {shape.data}" if shape.tensor * shape.data > 1 else "one GPU"
        lines.append(f"| {row.shape} | {place} | {row.recompute} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read(file: Path) -> list[Row]:
    """What `--out` wrote."""
    return [Row(**row) for row in json.loads(file.read_text())]


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    if len(options.files) > 1:
        print(table(*map(read, options.files)))
        return
    for way in set(WAYS) - set(options.ways.split(",")):
        del WAYS[way]
    rows = measure(options.shapes.split(","))
    options.files[0].write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(table([], rows))


if __name__ == "__main__":
    main()
