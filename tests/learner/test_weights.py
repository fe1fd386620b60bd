"""Weights reach two engines, proven by version and checksum, and every failure names its engine and can be undone."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Timer

import pytest
import torch
from claimed_ports import claimed_port
from deadlines import patience
from tiny_learner import VOCAB, learner_config, micro_batch, step_batch, write_model
from torch import Tensor
from torch.distributed import PrefixStore

from opd_async.learner.distributed.parallel import Place
from opd_async.learner.errors import WeightSyncError
from opd_async.learner.hf.io import hf_weights
from opd_async.learner.trainer import Trainer
from opd_async.learner.weights import broadcast
from opd_async.learner.weights.base import SendReport
from opd_async.learner.weights.broadcast import FIRST_SLOWER, WeightSender
from opd_async.learner.weights.engine_http import EngineAddress, call
from opd_async.learner.weights.engines import Engines
from opd_async.learner.weights.group import connection, join, leave, open_store

START_SECONDS = patience(90.0)
TIMEOUT_S = patience(20.0)
groups = (f"group-{number}" for number in itertools.count())


class Engine:
    """One engine process."""

    def __init__(self, model: Path) -> None:
        self._claims = ExitStack()
        port = self._claims.enter_context(claimed_port())
        self.address = EngineAddress(f"http://127.0.0.1:{port}", "admin", "user")
        options = {
            "model-path": model,
            "port": port,
            "api-key": "user",
            "admin-api-key": "admin",
            "weight-timeout": round(TIMEOUT_S),
        }
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opd_async.actors.engine.server", *flags],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        deadline = Timer(START_SECONDS, self.process.kill)
        deadline.start()
        assert "ready" in self.process.stdout.readline()
        deadline.cancel()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self._claims.close()
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def engines_of(model: Path, count: int) -> Iterator[list[Engine]]:
    """Engines that start side by side."""
    with ExitStack() as stack:
        started = [Engine(model) for _ in range(count)]
        for engine in started:
            stack.callback(engine.close)
        for engine in started:
            engine.wait_until_ready()
        yield started


@pytest.fixture(scope="module")
def trainer(alone: Place, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(learner_config(write_model(tmp_path_factory.mktemp("student"), "qwen3-tied")))


@pytest.fixture(scope="module")
def pair(trainer: Trainer) -> Iterator[list[EngineAddress]]:
    """Two engines that outlive what their tests do to them."""
    with engines_of(trainer.config.model_path, 2) as engines:
        yield [engine.address for engine in engines]


def sender_to(engines: list[EngineAddress]) -> WeightSender:
    """Buckets so small that an update has several of both kinds."""
    options = {"backend": "gloo", "timeout_s": TIMEOUT_S, "bucket_bytes": 20_000, "direct_bytes": 5_000}
    return WeightSender(engines, store=open_store("127.0.0.1", TIMEOUT_S), **options)


def test_an_update_is_loaded_by_every_engine(trainer: Trainer, pair: list[EngineAddress]) -> None:
    with sender_to(pair) as sender:
        sender.connect(next(groups))
        first = sender.send(hf_weights(trainer.model), 1)
        assert first.version == 1
        assert first.bytes == sum(parameter.nbytes for parameter in trainer.model.parameters())
        with torch.no_grad():
            trainer.model.decoder.final_layernorm.weight.add_(0.5)
        for engine in pair:
            sender.verify(engine, first)
        second = sender.send(hf_weights(trainer.model), 2)
        for engine in pair:
            sender.verify(engine, second)
        changed = {name for name in first.checksums if first.checksums[name] != second.checksums[name]}
        assert changed == {"model.norm.weight"}
        with pytest.raises(WeightSyncError, match=f"{pair[1].url} says weight version 2 after 1 was sent"):
            sender.verify(pair[1], first)
        with pytest.raises(WeightSyncError, match=r"holds model.norm.weight with checksum"):
            sender.verify(pair[0], replace(first, version=2))


def test_a_family_with_windows_and_two_ropes_is_loaded(alone: Place, tmp_path: Path) -> None:
    trainer = Trainer(learner_config(write_model(tmp_path / "gemma", "gemma3")))
    with engines_of(trainer.config.model_path, 1) as engines, sender_to([one.address for one in engines]) as sender:
        sender.connect(next(groups))
        trainer.step(step_batch(0, [micro_batch([9, 17])]))
        report = sender.send(hf_weights(trainer.model), 1)
        assert {name.split(".")[-2] for name in report.checksums} >= {"post_feedforward_layernorm", "q_norm"}
        sender.verify(engines[0].address, report)


def test_a_report_without_checksums_proves_the_version_only(trainer: Trainer, pair: list[EngineAddress]) -> None:
    with sender_to(pair) as sender:
        sender.connect(next(groups))
        report = sender.send(hf_weights(trainer.model), 3, checksums=False)
        assert report.checksums == {}
        sender.verify(pair[0], report)


def test_sending_without_a_group_says_what_to_do(trainer: Trainer, pair: list[EngineAddress]) -> None:
    with sender_to(pair) as sender, pytest.raises(WeightSyncError, match=r"call connect\(\)"):
        sender.send(hf_weights(trainer.model), 4)


def assert_recovers(sender: WeightSender, trainer: Trainer, version: int) -> SendReport:
    """After a failure, a new group and a new update go through."""
    assert not sender.connected
    sender.connect(next(groups))
    report = sender.send(hf_weights(trainer.model), version)
    for engine in sender.addresses:
        sender.verify(engine, report)
    return report


def test_a_refused_session_stops_the_update_before_anything_is_sent(
    trainer: Trainer, pair: list[EngineAddress]
) -> None:
    with sender_to(pair) as sender:
        sender.connect(next(groups))
        call(pair[1], "POST", "/begin_weight_update", {}, timeout_s=TIMEOUT_S)  # somebody else's
        weights = hf_weights(trainer.model)
        with pytest.raises(WeightSyncError, match=f"{pair[1].url} refused POST /begin_weight_update"):
            sender.send(weights, 5)
        assert next(weights, None) is None  # run to the end: other ranks take part in it
        assert_recovers(sender, trainer, 6)


def test_a_tensor_that_an_engine_refuses_ends_the_update(trainer: Trainer, pair: list[EngineAddress]) -> None:
    def weights() -> Iterator[tuple[str, Tensor]]:
        yield from hf_weights(trainer.model)
        yield "model.no_such.weight", torch.zeros(VOCAB)

    with sender_to(pair) as sender:
        sender.connect(next(groups))
        with pytest.raises(WeightSyncError, match=r"refused POST /update_weights_from_distributed: .*no_such"):
            sender.send(weights(), 7)
        assert_recovers(sender, trainer, 8)


def test_dead_engines_are_named_and_their_successors_join(trainer: Trainer) -> None:
    with engines_of(trainer.config.model_path, 3) as engines:
        first, second, successor = engines
        with sender_to([first.address, second.address]) as sender:
            sender.connect(next(groups))

            def dies_midway() -> Iterator[tuple[str, Tensor]]:
                for index, item in enumerate(hf_weights(trainer.model)):
                    if index == 6:
                        first.kill()
                    yield item

            with pytest.raises(WeightSyncError, match=f"{first.address.url} did not answer"):
                sender.send(dies_midway(), 1)
            assert not sender.connected
            with pytest.raises(WeightSyncError, match=f"{first.address.url} did not answer GET /server_info"):
                sender.connect(next(groups))
        with sender_to([successor.address, second.address]) as sender:
            assert_recovers(sender, trainer, 2)


def test_an_engine_that_does_not_join_is_named(trainer: Trainer, pair: list[EngineAddress]) -> None:
    """A wrong admin key is refused at once, while the other engine waits for the group to fill up."""
    stranger, store = replace(pair[1], admin_key="wrong"), open_store("127.0.0.1", TIMEOUT_S)
    with WeightSender(
        [pair[0], stranger], backend="gloo", store=store, bucket_bytes=1, timeout_s=patience(0.6)
    ) as sender:
        with pytest.raises(
            WeightSyncError, match=f"{stranger.url} refused POST /init_weights_update_group: status 401"
        ):
            sender.connect(next(groups))
        assert not sender.connected


@pytest.mark.parametrize(("backend", "patience_of_a_group"), [("gloo", 1), ("nccl", FIRST_SLOWER)])
def test_joining_a_group_has_the_deadline_of_its_backend(
    monkeypatch: pytest.MonkeyPatch, backend: str, patience_of_a_group: int
) -> None:
    """NCCL is loaded then, on every engine: to answer late is no reason to give the group up."""
    deadlines = {}

    def join(_store: object, name: str, _rank: int, _size: int, joined: str, timeout_s: float) -> None:
        assert (name, joined) == ("slow", backend)
        deadlines["join"] = timeout_s

    def together(_self: Engines, path: str, _bodies: object, joining: Future[None], *, timeout_s: float) -> None:
        joining.result()
        deadlines[path] = timeout_s

    monkeypatch.setattr(broadcast, "join", join)
    monkeypatch.setattr(Engines, "together", together)
    store = open_store("127.0.0.1", TIMEOUT_S)
    with WeightSender([], backend=backend, store=store, bucket_bytes=1, timeout_s=TIMEOUT_S) as sender:
        sender.connect("slow")
    assert deadlines == dict.fromkeys(("join", "/init_weights_update_group"), TIMEOUT_S * patience_of_a_group)


def test_groups_meet_at_the_port_of_the_plan_one_after_the_other() -> None:
    """Also while somebody still waits in the group before, which was given up."""
    with claimed_port() as port, ThreadPoolExecutor(1) as threads:
        store = open_store("127.0.0.1", TIMEOUT_S, port)
        assert store.port == port
        given_up = connection(store, TIMEOUT_S)
        waiting = threads.submit(PrefixStore("first", given_up).get, "nobody")
        try:
            group = join(connection(store, TIMEOUT_S), "second", 0, 1, "gloo", TIMEOUT_S)
            leave(group)
            assert not waiting.done()
        finally:
            store.set("first/nobody", "too late")
        assert waiting.result() == b"too late"


def test_a_port_that_another_program_has_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = rf"127.0.0.1:{port}: the weight group cannot meet there \(Address already in use\); end the process"
        with pytest.raises(WeightSyncError, match=words):
            open_store("127.0.0.1", TIMEOUT_S, port)
