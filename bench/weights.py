"""What the weight path costs: the student's weights into running engines, against a plain broadcast of as many bytes.

    python -m bench.weights [--layers 8] [--hidden 1024] [--vocab 32000] [--engines 1] [--bucket-mib 64] [--json FILE]

    path       Megatron model -> Hugging Face tensors -> buckets -> HTTP + broadcast -> loaded by the engines
    broadcast  buffers of the same bytes and sizes -> broadcast -> received, and nothing else

Both run over the same kind of process group with as many receivers, in turns; the median of each counts. The group is
gloo's on the CPU. Where there are GPUs it is NCCL's: learner on the first, each engine and receiver on one of the next.
`share` is what is left of the plain broadcast's rate when everything else is done too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from opd_async.bench.convert import make_model
from opd_async.config.topology import EngineSection
from opd_async.engines.command import engine_command, engine_environment
from opd_async.errors import InputError
from opd_async.files import write_atomically
from opd_async.learner.config import LearnerConfig, ParallelConfig
from opd_async.learner.distributed import parallel
from opd_async.learner.hf.io import hf_weights
from opd_async.learner.trainer import Trainer
from opd_async.learner.weights.broadcast import WeightSender
from opd_async.learner.weights.engine_http import EngineAddress
from opd_async.learner.weights.group import join, leave, open_store
from opd_async.plan.free_ports import free_ports

HOST = "127.0.0.1"
DEADLINE_S = 180.0
MIB = 1 << 20
SETTINGS = EngineSection(context_tokens=512, kv_tokens=1024, max_running=4)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Bytes of one update, median seconds of each way, bytes per second, and the share of the plain rate."""

    bytes: int
    engines: int
    path_s: float
    broadcast_s: float
    path_bytes_per_s: float
    broadcast_bytes_per_s: float
    share: float


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
    """An engine that was started, and its process, which leads a session of its own."""

    address: EngineAddress
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End the engine and its children at once; nothing happens where it has ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def launch(model: Path, settings: EngineSection, device: str, log: Path | None = None, seed: int = 0) -> Started:
    """Start an engine as a run does; `wait_for` says when it answers. Its output goes to `log`, or nowhere."""
    http, spare = free_ports(HOST, 2)
    command = engine_command(settings, model, (device,), HOST, {"http": http, "metrics": spare}, seed)
    environment = one_thread() | engine_environment(settings, (device,), spare)
    with (log or Path(os.devnull)).open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return Started(EngineAddress(f"http://{HOST}:{http}"), process)


@contextmanager
def engines(
    model: Path, devices: Sequence[str], settings: EngineSection = SETTINGS, log: Path | None = None
) -> Iterator[list[Started]]:
    """An engine on each of `devices` that holds `model`, all of them ready."""
    with ExitStack() as stack:
        started = []
        for seed, device in enumerate(devices):
            file = None if log is None else log.with_name(f"{log.name}-{seed}")
            started.append(launch(model, settings, device, file, seed))
            stack.callback(started[-1].kill)
        for one in started:
            wait_for(one.address.url, one.process)
        yield started


def one_thread() -> dict[str, str]:
    """The environment of a child: arithmetic on one thread, as in a run on small machines."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return once the engine answers; `TimeoutError` names one that does not, or has ended."""
    give_up = time.monotonic() + DEADLINE_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/model_info", timeout=5.0):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"the engine at {url} did not start in {DEADLINE_S:.0f} s")


@contextmanager
def receivers(count: int, rounds: int, sizes: Sequence[int], backend: str) -> Iterator[dist.ProcessGroup]:
    """A group of this process and `count` others that receive `rounds` times buffers of `sizes` bytes.

    With NCCL each has a GPU of its own, behind the first."""
    store = open_store(HOST, DEADLINE_S)
    with ExitStack() as stack:
        for rank in range(1, count + 1):
            words = [backend, str(store.port), str(rank), str(count + 1), str(rounds), *map(str, sizes)]
            command = [sys.executable, "-m", "opd_async.bench.weights", "--receive", *words]
            process = stack.enter_context(subprocess.Popen(command, env=one_thread()))
            stack.callback(process.kill)
        group = join(store, "plain", 0, count + 1, backend, DEADLINE_S)
        yield group
        leave(group)


def receive(backend: str, port: int, rank: int, world_size: int, rounds: int, sizes: Sequence[int]) -> None:
    """What a receiver does."""
    device = "cpu" if backend == "gloo" else f"cuda:{rank}"
    if device != "cpu":
        torch.cuda.set_device(device)
    store = TCPStore(HOST, port, world_size, is_master=False)
    group = join(store, "plain", rank, world_size, backend, DEADLINE_S)
    buffers = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
    for _ in range(rounds):
        broadcast(buffers, group)
    leave(group)


def broadcast(buffers: Sequence[Tensor], group: dist.ProcessGroup) -> float:
    """Seconds for all of `buffers` from rank 0 to every other."""
    began = time.perf_counter()
    for buffer in buffers:
        dist.broadcast(buffer, src=0, group=group)
    float(_arrived(buffers[0].device, group))  # the last one has, everywhere
    return time.perf_counter() - began


def _arrived(device: torch.device, group: dist.ProcessGroup) -> Tensor:
    everywhere = torch.ones(1, device=device)
    dist.all_reduce(everywhere, group=group)
    return everywhere


def bucket_sizes(total: int, bucket_bytes: int) -> list[int]:
    """Bytes of each buffer."""
    return [min(bucket_bytes, total - start) for start in range(0, total, bucket_bytes)]


def measure(layers: int, hidden: int, vocab: int, count: int, bucket_mib: int, rounds: int) -> Figures:
    """Both ways in turns, after one round that does not count. Raises `InputError` where there are too few GPUs."""
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.device_count() <= count:
        raise InputError(
            f"{count} engines and a learner need {count + 1} GPUs, and torch sees {torch.cuda.device_count()}; lower "
            "--engines, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    bucket_bytes = bucket_mib * MIB
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name) / "model"
        make_model(folder, layers, hidden, vocab)
        backend, device = ("nccl", "cuda:0") if cuda else ("gloo", "cpu")
        places = [f"cuda:{index}" for index in range(1, count + 1)] if cuda else ["cpu"] * count
        addresses = [one.address for one in stack.enter_context(engines(folder, places))]
        parallel.start(ParallelConfig(), seed=0)
        stack.callback(parallel.stop)
        model = Trainer(LearnerConfig(model_path=folder)).model
        total = sum(parameter.numel() for parameter in model.parameters()) * torch.float32.itemsize
        sizes = bucket_sizes(total, bucket_bytes)
        sender = WeightSender(
            addresses,
            backend=backend,
            store=open_store(HOST, DEADLINE_S),
            bucket_bytes=bucket_bytes,
            timeout_s=DEADLINE_S,
            device=torch.device(device),
        )
        stack.callback(sender.close)
        sender.connect("bench")
        group = stack.enter_context(receivers(count, rounds + 1, sizes, backend))
        buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]
        path, plain = [], []
        for version in range(rounds + 1):
            path.append(sender.send(hf_weights(model, torch.float32), version, checksums=False).seconds)
            plain.append(broadcast(buffers, group))
    path_s, plain_s = statistics.median(path[1:]), statistics.median(plain[1:])
    return Figures(
        bytes=total,
        engines=count,
        path_s=path_s,
        broadcast_s=plain_s,
        path_bytes_per_s=total / path_s,
        broadcast_bytes_per_s=total / plain_s,
        share=plain_s / path_s,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the figures, and write them where `--json` says."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--receive"]:
        port, rank, world_size, rounds, *sizes = map(int, given[2:])
        receive(given[1], port, rank, world_size, rounds, sizes)
        return
    parser = argparse.ArgumentParser(description="The weight path against a plain broadcast.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    figures = measure(
        options.layers, options.hidden, options.vocab, options.engines, options.bucket_mib, options.rounds
    )
    print(f"{figures.bytes / MIB:,.0f} MiB to {figures.engines} engines, median of {options.rounds}")
    print(f"path       {figures.path_s:7.3f} s  {figures.path_bytes_per_s / MIB:8,.0f} MiB/s")
    print(f"broadcast  {figures.broadcast_s:7.3f} s  {figures.broadcast_bytes_per_s / MIB:8,.0f} MiB/s")
    print(f"share      {figures.share:7.2f}")
    if options.json is not None:
        write_atomically(options.json, json.dumps(dataclasses.asdict(figures), indent=2).encode())


if __name__ == "__main__":
    main()
