"""One learner rank: obey commands in the order in which the intake sends them.

    intake (ROUTER) -> DEALER -> Train | SyncWeights | SaveCheckpoint | ExportModel | AskTeacher | Stop
                                   rank 0 -> LearnerReply -> dispatcher

    python -m learner.main --plan runs/<name>/plan.json      the only rank; of several, each by torchrun

Every rank gets every command, so that collectives meet; only rank 0 answers. A rank that fails ends the process, and
torchrun ends the others: the run goes back to the last checkpoint.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import zmq

from opd_async.errors import DeadlineError, StorageError, WireError
from opd_async.freed_memory import GivesBack
from opd_async.keys import incarnation
from opd_async.learner import resume
from opd_async.learner.beats import Beats
from opd_async.learner.distributed import parallel
from opd_async.learner.errors import WeightSyncError
from opd_async.learner.from_topology import learner_config
from opd_async.learner.hf.io import hf_weights, save_hf
from opd_async.learner.opinion import opinion
from opd_async.learner.progress import PROGRESS
from opd_async.learner.trainer import Trainer
from opd_async.learner.weights.base import WeightTransport
from opd_async.learner.weights.make import Transports
from opd_async.learner.weights.proof import Proof, check_proof, make_proof
from opd_async.plan.plan import Plan, RoleKind, counters_file
from opd_async.process import configure_logging, die_with_parent, report_failure
from opd_async.role import role_arguments
from opd_async.run.checkpoints import SHARDS, chosen, shards
from opd_async.scheduling.packing import from_message
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.telemetry.features import features_of
from opd_async.telemetry.trace import OFF, Trace
from opd_async.transport import messages as m
from opd_async.transport.bounds import receive
from opd_async.transport.door import Passport
from opd_async.transport.wire import encode

log = logging.getLogger(__name__)

LINGER_MS = 2000


def _introduce(socket: zmq.Socket[Any], name: str) -> None:
    """Give a socket its name; with the keys of the run where there is a launcher."""
    passport = Passport.of_environment(name)
    socket.routing_id = name.encode() if passport is None else passport.routing_id
    if passport is not None:
        passport.show(socket)


class Link:
    """This rank's sockets: commands in, answers (of rank 0) out. Blocking, because a rank does one thing at a time."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._commands = self._context.socket(zmq.DEALER)
        _introduce(self._commands, f"rank-{rank}")
        self._commands.connect(plan.batches[plan.intake_of_rank(rank)])
        self._replies = None
        self._name = plan.role(RoleKind.LEARNER, 0).name
        self._deadline_s = plan.topology.supervisor.step_deadline_s
        if rank == 0:
            self._replies = self._context.socket(zmq.DEALER)
            _introduce(self._replies, self._name)
            self._replies.connect(plan.control)
        self._rank = rank

    def hello(self) -> None:
        """The model is loaded: commands may come."""
        hello = m.Hello(self._name, incarnation())
        self._commands.send_multipart(encode(hello))
        if self._replies is not None:
            self._replies.send_multipart(encode(hello))

    def reply(self, command: str, version: int, error: str | None, stats: dict[str, float], **rows: Any) -> None:
        """Answer a command; only rank 0 has anybody to answer to. `rows` are what a teacher was asked for."""
        if self._replies is not None:
            self._replies.send_multipart(encode(m.LearnerReply(command, version, error, stats, **rows)))

    def part_done(self, version: int, part: int) -> None:
        """Tell the intake that the learner is ready for the next part of a step."""
        if self._rank == 0:
            self._commands.send_multipart(encode(m.PartDone(version, part)))

    def command(self) -> m.Message:
        """The next command. `DeadlineError` when the intake stays silent for longer than a step may take."""
        give_up = time.monotonic() + 2 * self._deadline_s
        while True:
            left_ms = int(1000 * (give_up - time.monotonic()))
            if left_ms <= 0 or not self._commands.poll(left_ms):
                raise DeadlineError(f"rank {self._rank}: no command of the intake in {2 * self._deadline_s:.0f} s")
            try:
                return receive(self._commands.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:  # announced too early: `opd_async.transport.arriving`
                continue
            except WireError as error:
                log.warning("dropped a malformed command: %s", error)

    def close(self) -> None:
        """Deliver what is queued and close."""
        self._context.destroy(linger=LINGER_MS)


class Rank:
    """The trainer of this rank and what it is told to do."""

    def __init__(
        self,
        plan: Plan,
        trainer: Trainer,
        link: Link,
        rank: int,
        metrics: RoleMetrics,
        beats: Beats,
        trace: Trace = OFF,
    ) -> None:
        self._plan = plan
        self._trainer = trainer
        self._link = link
        self._rank = rank
        self._metrics = metrics
        self._beats = beats
        self._trace = trace
        self._give_back = GivesBack()
        self._transports = Transports(plan, trainer.model)
        self._sender: WeightTransport | None = None
        self._group = ""
        self._waited_s = 0.0
        self._idle_s = 0.0
        """Waited for parts of the step under way."""

    def obey(self) -> None:
        """Commands until Stop."""
        while True:
            asked = time.monotonic()
            command = self._link.command()
            self._waited_s = time.monotonic() - asked
            if isinstance(command, m.Stop):
                return
            with self._beats.at(type(command).__name__), self._trace.during("commands", _name(command)):
                self._carry_out(command)
                self._give_back()

    def _carry_out(self, command: m.Message) -> None:
        match command:
            case m.Train():
                self._train(command)
            case m.SyncWeights():
                self._sync(command)
            case m.SaveCheckpoint():
                folder = Path(command.folder) / SHARDS
                self._store("SaveCheckpoint", lambda: resume.save(self._trainer, folder).stats())
            case m.ExportModel():
                source = self._plan.topology.models.student.path
                self._store("ExportModel", partial(self._export, Path(command.folder), source))
            case m.AskTeacher():
                self._ask_teacher(command)
            case _:
                log.warning("ignored a %s", type(command).__name__)

    def _ask_teacher(self, command: m.AskTeacher) -> None:
        found = opinion(self._trainer, command, self._plan.topology.learner.micro_batch_tokens)
        ids, logprobs = found.topk or (None, None)
        answer = {"teacher_logprobs": found.logprobs, "topk_ids": ids, "topk_logprobs": logprobs}
        self._link.reply("AskTeacher", self._trainer.version, None, {}, **answer)

    def _export(self, folder: Path, source: Path) -> dict[str, float]:
        save_hf(self._trainer.model, folder, source)
        return {}

    def _store(self, command: str, write: Callable[[], dict[str, float]]) -> None:
        """Write files and say so, with what `write` says of them. A full disk is an answer, not an end: what can be
        saved elsewhere still is."""
        problem, stats = None, dict[str, float]()
        try:
            stats = write()
        except StorageError as error:
            log.error("%s", error)
            problem = str(error)
        self._link.reply(command, self._trainer.version, problem, stats)

    def _train(self, command: m.Train) -> None:
        self._idle_s += self._waited_s
        if not command.last:
            self._trainer.accumulate(from_message(command))
            self._link.part_done(command.version, command.part)
            return
        idle_s, self._idle_s = self._idle_s, 0.0
        result = self._trainer.step(from_message(command))
        stats = result.known()
        self._metrics["opd_learner_steps_total"].inc()
        self._metrics["opd_learner_tokens_total"].inc(result.tokens)
        self._metrics["opd_learner_step_seconds"].observe(result.seconds)
        self._metrics["opd_learner_idle_seconds_total"].inc(idle_s)
        for gauge in ("loss", "grad_norm", "learning_rate", "reverse_kl", "ratio_std", "clipped_share"):
            self._metrics[f"opd_learner_{gauge}"].set(stats.get(gauge))
        self._link.reply("Train", result.version, None, stats | {"idle_s": idle_s})

    def _sync(self, command: m.SyncWeights) -> None:
        """All ranks gather, rank 0 sends. A refusal is an answer, not an end: the dispatcher tries again."""
        engines = self._plan.topology.engines.student
        proof = make_proof(self._trainer, engines.context_tokens) if command.verify else None
        dtype = getattr(torch, engines.dtype)
        weights = PROGRESS.over(hf_weights(self._trainer.model, dtype))
        if self._rank != 0:
            for _ in weights:
                pass
            return
        try:
            report = self._send(command, weights, proof)
        except WeightSyncError as error:
            for _ in weights:  # the other ranks are gathering
                pass
            self._link.reply("SyncWeights", self._trainer.version, str(error), {})
            return
        self._metrics["opd_learner_weight_sync_seconds"].observe(report["seconds"])
        self._link.reply("SyncWeights", self._trainer.version, None, report)

    def _send(self, command: m.SyncWeights, weights: Any, proof: Proof | None) -> dict[str, float]:
        """Send; with a `proof` to check, every engine must show that it holds what was sent."""
        sender, topology = self._sender_for(command), self._plan.topology
        report = sender.send(weights, self._trainer.version, checksums=proof is not None)
        for engine in sender.addresses:
            if proof is not None and not sender.verify(engine, report):
                dtypes = (topology.learner.dtype, topology.engines.student.dtype)
                check_proof(engine, proof, dtypes, topology.supervisor.heartbeat_deadline_s)
        return {"seconds": report.seconds, "bytes": float(report.bytes)}

    def _sender_for(self, command: m.SyncWeights) -> WeightTransport:
        """The sender to these engines; a new group name makes a new process group."""
        if self._sender is not None and command.group == self._group and self._sender.connected:
            return self._sender
        if self._sender is not None:
            self._sender.close()
        self._sender = self._transports.to(command.engines)
        self._group = command.group
        self._sender.connect(command.group)
        return self._sender

    def close(self) -> None:
        """Leave the weight group."""
        if self._sender is not None:
            self._sender.close()


def _name(command: m.Message) -> str:
    """What a command is called in a timeline."""
    if isinstance(command, m.Train):
        return f"train step {command.version + 1}, part {command.part}"
    return type(command).__name__


def run(plan: Plan) -> None:
    """Train until told to stop; raises what ends the rank."""
    torch.set_num_threads(plan.topology.learner.threads)
    config = learner_config(plan.topology, plan.vocab_size)
    place = parallel.start(config.parallel, config.seed)
    link = Link(plan, place.rank)
    try:
        with Beats(plan.control, place.rank) as beats:
            trainer = Trainer(config)
            if place.rank == 0:
                log.info("kernels (learner.kernels: %s): %s", config.kernels, trainer.model.config.kernels.said)
            _restore(plan, trainer)
            mine = plan.role_of_rank(place.rank)
            kept = counters_file(plan.run_folder, mine.name) if place.rank == 0 else None
            metrics = RoleMetrics("learner", features_of(plan.topology), kept)
            port = mine.ports["metrics"] if place.rank == 0 else 0
            with (
                Trace.of(plan, f"learner-{place.rank}") as trace,
                metrics.serve(mine.host, port),
            ):
                rank = Rank(
                    plan=plan,
                    trainer=trainer,
                    link=link,
                    rank=place.rank,
                    metrics=metrics,
                    beats=beats,
                    trace=trace,
                )
                link.hello()
                try:
                    rank.obey()
                finally:
                    rank.close()
    finally:
        link.close()
        parallel.stop()


def _restore(plan: Plan, trainer: Trainer) -> None:
    """Take over the checkpoint that the launcher chose, or the weights that the topology names."""
    if (folder := chosen(plan.run_folder / "checkpoints")) is not None:
        resume.load(trainer, folder / SHARDS)
        log.info("resumed from %s", folder)
    elif (folder := plan.topology.learner.load) is not None:
        resume.load_weights(trainer, shards(folder))
        log.info("began with the weights of %s", folder)


def main() -> None:
    """Entry point of a rank."""
    plan, _ = role_arguments("One learner rank.")
    configure_logging(f"learner-{os.environ.get('RANK', '0')}")
    try:
        die_with_parent()
        run(plan)
    except Exception as error:  # the edge of the process: every error becomes an exit code and a line
        sys.exit(report_failure(error))


if __name__ == "__main__":
    main()
