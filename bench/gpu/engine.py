"""An inference engine on this device, as the run uses one: scores, generation, prefix cache, new weights, conformance.

    python -m bench.gpu.engine [--python .venv-sglang/bin/python] [--server-args "..."] [--tiny] [--json FILE]

    check         what is compared
    scores        with transformers in float32, token by token
    parts         a text scored in parts, as it grows, with the same text scored at once
    cache         tokens that the engine says it had, with those that it must have had
    generation    the logprobs of sampled tokens, with the engine's own scores of them
    new weights   after an update by files: the version, checksums where it has any, scores with the other model's
    conformance   the suite that every engine of a run must pass (`tests/conformance`)

Without `--python` it is the embedded engine. Limits are those of a run's own proof of weights, in nats per token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from opd_async.actors.client.engine_client import Endpoint, EngineClient, Sampling
from opd_async.bench.convert import make_model
from opd_async.bench.gpu.found import Findings, device, end, parse, parser
from opd_async.bench.weights import DEADLINE_S, engines
from opd_async.config.topology import EngineKind, EngineSection
from opd_async.learner.weights.engine_http import EngineAddress
from opd_async.learner.weights.local import DiskSender
from opd_async.learner.weights.proof import HALF_TOLERANCE, TOLERANCE

ROOT = Path(__file__).parents[2]
SUITE = "tests/conformance"
SUITE_S = 420.0
PARTS = 4
VERSION = 7

Ids = NDArray[np.int32]
Logprobs = NDArray[np.float32]


def settings(options: argparse.Namespace) -> EngineSection:
    """The engine as a topology would describe it."""
    sglang = options.python is not None
    return EngineSection(
        kind=EngineKind.SGLANG if sglang else EngineKind.EMBEDDED,
        python=options.python,
        args=tuple(options.server_args.split()),
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
        context_tokens=256 if options.tiny else 2048,
        kv_tokens=2048 if options.tiny else 16_384,
        max_running=16,
    )


@torch.no_grad()
def reference(folder: Path, texts: Sequence[Ids]) -> list[Logprobs]:
    """log p of every token of each text but its first, as transformers computes it in float32: nats."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device())
    found = []
    for ids in texts:
        ids_T = torch.from_numpy(ids.astype(np.int64)).to(device())
        table_TV = torch.log_softmax(model(ids_T[None]).logits[0].float(), -1)[:-1]
        found.append(table_TV.gather(1, ids_T[1:, None])[:, 0].cpu().numpy())
    return found


def compare(findings: Findings, name: str, ours: Sequence[Logprobs], theirs: Sequence[Logprobs], limit: float) -> None:
    """The mean difference of all tokens is checked, the largest one shown."""
    off = np.abs(np.concatenate(ours) - np.concatenate(theirs))
    findings.check(f"{name}: mean difference, nats", float(off.mean()), limit)
    findings.figure(f"{name}: largest difference, nats", float(off.max()))


class Asked:
    """What an engine answers, through the actors' own client."""

    def __init__(self, url: str, vocab: int) -> None:
        self._url, self._vocab = url, vocab

    def score(self, *batches: Sequence[tuple[Ids, int]]) -> list[list[tuple[Logprobs, int]]]:
        """Score batches one after another: of each request its logprobs and how many tokens came from the cache."""

        async def run() -> list[list[tuple[Logprobs, int]]]:
            async with aiohttp.ClientSession() as session:
                client = EngineClient(session, Endpoint(url=self._url), self._vocab)
                answers = [await client.score(batch) for batch in batches]
            return [[(one.logprobs, one.cached_tokens) for one in answer] for answer in answers]

        return asyncio.run(run())

    def generate(self, prompt: Ids, count: int) -> tuple[Ids, Logprobs]:
        """Sample `count` tokens behind `prompt`."""
        sampling = Sampling(
            temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=count, stop_token_ids=(), stream_interval=16
        )

        async def run() -> tuple[Ids, Logprobs]:
            async with aiohttp.ClientSession() as session:
                client = EngineClient(session, Endpoint(url=self._url), self._vocab)
                deltas = [delta async for delta in client.stream("bench", prompt, sampling, "bench")]
            tokens = np.concatenate([delta.token_ids for delta in deltas])
            return tokens, np.concatenate([delta.logprobs for delta in deltas])

        return asyncio.run(run())


def ask(findings: Findings, folder: Path, address: EngineAddress, options: argparse.Namespace, vocab: int) -> None:
    """Everything but the suite."""
    chosen = settings(options)
    limit = TOLERANCE.get(chosen.dtype, HALF_TOLERANCE)
    length = chosen.context_tokens // 2
    random, asked = np.random.default_rng(0), Asked(address.url, vocab)
    texts = [random.integers(0, vocab, count).astype(np.int32) for count in (2, length // 3, length)]
    whole = [logprobs for logprobs, _ in asked.score([(ids, 1) for ids in texts])[0]]
    compare(findings, "scores", whole, reference(folder / "model", texts), limit)
    grows(findings, asked, random.integers(0, vocab, length).astype(np.int32), limit)
    tokens, sampled = asked.generate(texts[1], length // 4)
    [[(scored, _)]] = asked.score([(np.concatenate([texts[1], tokens]), len(texts[1]))])
    compare(findings, "generation", [sampled], [scored], limit)
    compared = send(folder, address, chosen)
    findings.figure("checksums of new weights were compared", compared)
    again = [logprobs for logprobs, _ in asked.score([(ids, 1) for ids in texts])[0]]
    compare(findings, "new weights", again, reference(folder / "other", texts), limit)
    moved = float(np.abs(np.concatenate(again) - np.concatenate(whole)).mean())
    findings.check("new weights score alike the old ones: 1 over the mean difference", 1 / max(moved, 1e-9), 20)


def grows(findings: Findings, asked: Asked, ids: Ids, limit: float) -> None:
    """Score a text in parts, each with what comes before it, and then at once."""
    ends = [len(ids) * part // PARTS for part in range(1, PARTS + 1)]
    parts = asked.score(*[[(ids[:stop], start)] for start, stop in zip([1, *ends], ends, strict=False)])
    [[(at_once, _)]] = asked.score([(ids, 1)])
    compare(findings, "parts", [part[0][0] for part in parts], [at_once], limit)
    cached = [part[0][1] for part in parts[1:]]
    missing = sum(max(0, stop - 1 - count) for stop, count in zip(ends[:-1], cached, strict=True))
    findings.check("cache: tokens computed again", missing, 0)


def send(folder: Path, address: EngineAddress, chosen: EngineSection) -> bool:
    """Send the other model by files; whether the engine's checksums could be compared. Raises `WeightSyncError`."""
    dtype = getattr(torch, chosen.dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "other" / "model.safetensors").items()}
    specs = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with DiskSender(
        [address], folder=folder / "sent", source=folder / "model", specs=specs, dtype=dtype, timeout_s=DEADLINE_S
    ) as sender:
        sender.connect("bench")
        return sender.verify(address, sender.send(tensors.items(), VERSION))


def conformance(findings: Findings, folder: Path, options: argparse.Namespace) -> None:
    """Run the suite on this device and name the tests that fail. A source checkout has it, an installed package not."""
    if not (ROOT / SUITE).is_dir():
        findings.figure("conformance", f"no {SUITE} here: run it from a checkout")
        return
    environment = os.environ | {"OPD_TEST_DEVICE": str(device())}
    if options.python is not None:
        environment |= {"OPD_TEST_ENGINE": "sglang", "SGLANG_PYTHON": str(options.python)}
    file = folder / "suite.xml"
    command = [sys.executable, "-m", "pytest", SUITE, "-q", "-p", "no:cacheprovider", f"--junitxml={file}"]
    try:
        subprocess.run(command, cwd=ROOT, env=environment, timeout=SUITE_S, check=False)
    except subprocess.TimeoutExpired:
        findings.figure("conformance", f"not done in {SUITE_S:.0f} s")
    if not file.is_file():
        findings.check("conformance: suites that came to no end", 1, 0)
        return
    ran, failed = outcomes(file.read_text())
    findings.figure("conformance: tests", ran)
    findings.figure("conformance: failed", failed)
    findings.check("conformance: tests that failed", len(failed) if ran else 1, 0)


def outcomes(report: str) -> tuple[int, list[str]]:
    """How many tests a JUnit report has, and the names of those that failed or could not begin."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return len(cases), [str(case.get("name")) for case in bad]


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask one engine everything."""
    made = parser("An inference engine on this device.")
    made.add_argument("--python", type=Path, help="the Python of an environment with SGLang; left out: embedded")
    made.add_argument("--server-args", default="", help="further arguments of SGLang's server, spaces between them")
    options = parse(made, arguments)
    findings = Findings(options.json)
    layers, hidden, vocab = (2, 128, 64) if options.tiny else (4, 1024, 32_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, model in enumerate(("model", "other")):
            make_model(folder / model, layers, hidden, vocab, seed=seed, std=0.1)
        with engines(folder / "model", [str(device())], settings(options), folder / "engine.log") as [engine]:
            ask(findings, folder, engine.address, options, vocab)
        if not options.tiny:
            conformance(findings, folder, options)
    end(findings)


if __name__ == "__main__":
    main()
