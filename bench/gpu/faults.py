"""What is not told anywhere: groups that are given up again and again, and an engine that dies in mid-update.

    python -m bench.gpu.faults [--groups 20] [--tiny] [--json FILE]

    check      what happens
    groups     a process group of one rank is made, used and given up, many times in one process
    killed     an engine is killed while it is being sent weights: the update must fail in time and name it; a new
               engine gets them, and proves it

With two GPUs or more the weights of the second go by broadcast over NCCL to an engine on the second GPU; with one,
by files to an engine on it, because NCCL takes no GPU twice. On the CPU they go by broadcast over gloo.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from opd_async.bench.convert import make_model
from opd_async.bench.gpu.found import Findings, device, end, parse, parser, wait_for_device
from opd_async.bench.weights import HOST, Started, engines
from opd_async.learner.errors import WeightSyncError
from opd_async.learner.weights.base import WeightTransport
from opd_async.learner.weights.broadcast import FIRST_SLOWER, WeightSender
from opd_async.learner.weights.group import join, leave, open_store
from opd_async.learner.weights.local import DiskSender

TIMEOUT_S = 30.0
GRACE_S = 15.0
"""Beside the deadline: cleaning up at engines that do not answer."""
MIB = 1 << 20
GROWTH_MIB = 64
"""Of GPU memory over all groups but the first."""


def groups(findings: Findings, count: int) -> None:
    """Make, use and give up groups of one rank."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    seconds, held = [], []
    for number in range(count):
        began = time.perf_counter()
        store = open_store(HOST, TIMEOUT_S)
        group = join(store, f"group-{number}", 0, 1, backend, TIMEOUT_S)
        value = torch.full((MIB,), float(number), device=device())
        dist.broadcast(value, src=0, group=group)
        wait_for_device()
        assert float(value.sum()) == number * MIB
        leave(group)
        seconds.append(time.perf_counter() - began)
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            held.append((total - free) / MIB)
    findings.figure("groups: seconds of the first, and of the slowest of all", [seconds[0], max(seconds)])
    if held:
        findings.check("groups: MiB of the device that they leave behind", held[-1] - held[0], GROWTH_MIB)


def sender_to(engine: Started, folder: Path, tensors: Mapping[str, Tensor]) -> WeightTransport:
    """The way of weights that the machine has."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        specs = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
        return DiskSender(
            [engine.address],
            folder=folder / "sent",
            source=folder / "model",
            specs=specs,
            dtype=torch.float32,
            timeout_s=TIMEOUT_S,
        )
    return WeightSender(
        [engine.address],
        backend="nccl" if torch.cuda.is_available() else "gloo",
        store=open_store(HOST, TIMEOUT_S),
        bucket_bytes=MIB,
        timeout_s=TIMEOUT_S,
        device=device(),
    )


def killed(findings: Findings, folder: Path, sizes: tuple[int, int, int]) -> None:
    """Kill an engine half-way through an update; send the weights to one that is started in its place."""
    make_model(folder / "model", *sizes)
    make_model(folder / "other", *sizes, seed=1)
    stored = load_file(folder / "other" / "model.safetensors")
    tensors = {name: tensor.float().to(device()) for name, tensor in stored.items()}
    place = f"cuda:{min(1, torch.cuda.device_count() - 1)}" if torch.cuda.is_available() else "cpu"
    with engines(folder / "model", [place]) as [victim], sender_to(victim, folder, tensors) as sender:
        sender.connect("first")
        began = time.perf_counter()
        try:
            sender.send(until_half(tensors, victim), 1)
        except WeightSyncError as error:
            findings.figure("killed: the update said", str(error))
            findings.check("killed: updates that do not name the engine", victim.address.url not in str(error), 0)
        else:
            findings.check("killed: updates that failed to fail", 1, 0)
        allowed = TIMEOUT_S * FIRST_SLOWER + GRACE_S
        findings.check("killed: seconds until the update failed", time.perf_counter() - began, allowed)
    with engines(folder / "model", [place]) as [fresh], sender_to(fresh, folder, tensors) as sender:
        sender.connect("second")
        report = sender.send(tensors.items(), 2)
        findings.figure("killed: checksums of the new engine were compared", sender.verify(fresh.address, report))


def until_half(tensors: Mapping[str, Tensor], victim: Started) -> Iterator[tuple[str, Tensor]]:
    """All tensors; the engine is killed before the second half of them."""
    for index, pair in enumerate(tensors.items()):
        if index == len(tensors) // 2:
            victim.kill()
        yield pair


def main(arguments: Sequence[str] | None = None) -> None:
    """Both faults."""
    made = parser("Groups that are given up, and an engine that dies in mid-update.")
    made.add_argument("--groups", type=int, default=20, help="how many, one after another")
    options = parse(made, arguments)
    findings = Findings(options.json)
    groups(findings, 3 if options.tiny else options.groups)
    with tempfile.TemporaryDirectory() as folder:
        killed(findings, Path(folder), (2, 128, 64) if options.tiny else (8, 1024, 32_000))
    end(findings)


if __name__ == "__main__":
    main()
