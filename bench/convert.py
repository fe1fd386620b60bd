"""What a conversion costs: time and peak memory against the size of the model.

    python -m bench.convert [--layers 12] [--hidden 1024] [--vocab 32000] [--json FILE]

    random Qwen3 folder -> hf-to-megatron -> checkpoint -> megatron-to-hf -> folder, equal to the first bit by bit

Every conversion is a process of its own, which reports its peak resident memory (`VmHWM`, file mappings included) at
its end. The same conversion of a model of two tiny layers tells what interpreter and libraries take; the rest is the
model's, and `copies` says how often the model fits into it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_async.data.weight_files import SINGLE_NAME
from opd_async.files import write_atomically
from opd_async.learner import convert
from opd_async.learner.hf.files import Reader, write_folder
from opd_async.learner.hf.mapping import slots
from opd_async.learner.model.architecture import read_shape

HEAD_DIM = 64
MIB = 1 << 20
DEADLINE_S = 600
TINY = (2, 128, 64)
"""Layers, hidden channels and vocabulary of the model that shows what everything else takes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One conversion: bytes of the weights, seconds, peak memory of the process, and copies of the model in it."""

    command: str
    model_mib: float
    seconds: float
    peak_mib: float
    base_mib: float
    copies: float


def make_model(
    folder: Path, layers: int, hidden: int, vocab: int, *, seed: int = 0, std: float = 0.02, **changes: Any
) -> int:
    """Write a random Qwen3 in bfloat16, with `changes` to its config; returns the bytes of its weights."""
    source = folder.with_name(f"{folder.name}-config")
    source.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM // 2,
        "head_dim": HEAD_DIM,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    } | changes
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    specs = [spec for slot in slots(read_shape(source), 1) for spec in zip(slot.hf_names, slot.hf_shapes, strict=True)]
    generator = torch.Generator().manual_seed(seed)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, shape in specs:
            yield name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=std, generator=generator)

    write_folder(folder, source, specs, torch.bfloat16, weights())
    return sum(torch.Size(shape).numel() * torch.bfloat16.itemsize for _, shape in specs)


def convert_apart(arguments: Sequence[str]) -> tuple[float, float]:
    """Convert in a process of its own: (seconds, peak MiB). Raises `CalledProcessError` if it fails."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "opd_async.bench.convert", "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    return time.perf_counter() - began, int(done.stdout.split()[-1]) / 1024


def round_trip(folder: Path, layers: int, hidden: int, vocab: int) -> list[tuple[str, int, float, float]]:
    """(command, bytes of the model, seconds, peak MiB) of both ways; raises `AssertionError` if a bit has changed."""
    hf, middle, back = folder / "hf", folder / "megatron", folder / "back"
    nbytes = make_model(hf, layers, hidden, vocab)
    rows = []
    for command in (
        ["hf-to-megatron", "--hf", str(hf), "--out", str(middle)],
        ["megatron-to-hf", "--checkpoint", str(middle), "--source", str(hf), "--out", str(back)],
    ):
        rows.append((command[0], nbytes, *convert_apart(command)))
    first, second = Reader(hf), Reader(back)
    for slot in slots(read_shape(hf), 1):
        for name in slot.hf_names:
            assert torch.equal(first.tensor(name), second.tensor(name)), f"{name} has changed"
    assert (hf / SINGLE_NAME).stat().st_size == (back / SINGLE_NAME).stat().st_size
    return rows


def measure(layers: int, hidden: int, vocab: int) -> list[Row]:
    """Both conversions of a model, against those of a tiny one."""
    with tempfile.TemporaryDirectory() as name:
        tiny = round_trip(Path(name) / "tiny", *TINY)
        rows = round_trip(Path(name) / "model", layers, hidden, vocab)
    return [
        Row(
            command=command,
            model_mib=nbytes / MIB,
            seconds=seconds,
            peak_mib=peak,
            base_mib=base,
            copies=(peak - base) * MIB / nbytes,
        )
        for (command, nbytes, seconds, peak), (_, _, _, base) in zip(rows, tiny, strict=True)
    ]


def table(rows: Sequence[Row]) -> str:
    """The figures as text."""
    lines = [f"{'command':<16} {'model MiB':>10} {'seconds':>8} {'peak MiB':>9} {'base MiB':>9} {'copies':>7}"]
    for row in rows:
        figures = f"{row.model_mib:>10.1f} {row.seconds:>8.1f} {row.peak_mib:>9.0f} {row.base_mib:>9.0f}"
        lines.append(f"{row.command:<16} {figures} {row.copies:>7.2f}")
    return "\n".join(lines)


def _child(arguments: Sequence[str]) -> None:
    convert.main(arguments)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the figures where `--json` says."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--child"]:
        _child(given[1:])
        return
    parser = argparse.ArgumentParser(description="Time and memory of conversions.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024, help=f"channels; a multiple of {2 * HEAD_DIM}")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(given)
    rows = measure(options.layers, options.hidden, options.vocab)
    print(table(rows))
    if options.json is not None:
        settings: dict[str, Any] = {"layers": options.layers, "hidden": options.hidden, "vocab": options.vocab}
        report = {**settings, "rows": [dataclasses.asdict(row) for row in rows]}
        write_atomically(options.json, json.dumps(report, indent=2).encode())


if __name__ == "__main__":
    main()
