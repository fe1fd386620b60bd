"""Check that the weights can reach the student engines as the topology says."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from opd_async.config.topology import EngineKind, Topology
from opd_async.engines.nccl import nccl_difference
from opd_async.plan.resolve import replica_devices

HERE = ("127.0.0.1", "localhost")
STAGES = ("--pp-size", "--pipeline-parallel-size")


def weight_problems(topology: Topology) -> Iterator[str]:
    """List every reason why the weights cannot be sent as the topology says."""
    for side, _, section in topology.engine_sides:
        if section.tensor_parallel > 1 and section.kind is not EngineKind.SGLANG:
            yield (
                f"engines.{side}.tensor_parallel: {section.tensor_parallel}, but the {section.kind} engine "
                f"{'says itself what it has' if section.urls else 'runs on one device'}; write 1, or kind: sglang"
            )
    if topology.learner.weight_transport == "broadcast":
        yield from _broadcast_problems(topology)
    if topology.learner.weight_transport != "tensor":
        return
    student, device = topology.engines.student, topology.learner.devices[0]
    if student.kind is EngineKind.EMBEDDED:
        yield "learner.weight_transport: tensor, which the embedded engine has not; write broadcast, or kind: sglang"
    if student.started and {device} != {each for one in replica_devices(student) for each in one}:
        yield (
            f"learner.weight_transport: tensor, but the student engines are not all on {device}, the device of learner "
            "rank 0, whose memory they would read; write broadcast"
        )
    far = [url for url in student.urls if urlsplit(url).hostname not in HERE]
    if far:
        yield f"learner.weight_transport: tensor, but {far[0]} is another machine; write broadcast"


def _broadcast_problems(topology: Topology) -> Iterator[str]:
    """Devices between which nothing can be broadcast: of two kinds, or the same one twice (NCCL refuses that).

    Of engines that the launcher does not start nobody knows the devices.
    """
    learner, student = topology.learner.devices[0], topology.engines.student
    if not student.started:
        return
    devices = [device for replica in replica_devices(student) for device in replica]
    other = [device for device in devices if (device == "cpu") != (learner == "cpu")]
    if other:
        yield (
            f"learner.weight_transport: broadcast, but learner rank 0 is on {learner} and a student engine on "
            f"{other[0]}, between which there is no broadcast; write disk, or devices of one kind"
        )
    used = [learner, *devices]  # a device that may not be shared at all is found elsewhere
    twice = sorted(device for device in {*used} & {*topology.shared_devices} if used.count(device) > 1)
    if twice and not other:
        owners = "learner rank 0 and a student engine" if learner in twice else "two student engines"
        remedy = "write tensor" if set(devices) == {learner} else "write devices of their own, or disk"
        yield (
            f"learner.weight_transport: broadcast, but {twice[0]} belongs to {owners}, and NCCL takes one member of a "
            f"group from each device; {remedy}"
        )
    theirs = None if learner == "cpu" or other else student.python
    if theirs is not None and (difference := nccl_difference(Path(sys.executable), theirs)):
        yield (
            f"learner.weight_transport: broadcast, but there is {difference}, and ranks of one group must have the "
            "same; install the same torch on both sides, or write disk"
        )
    stages = _option(student.args, STAGES)
    if stages not in (None, "1"):
        yield (
            f"engines.student.args: {stages} pipeline stages, whose processes SGLang numbers alike in a weight group; "
            "write tensor_parallel instead, or learner.weight_transport: disk"
        )


def _option(arguments: Sequence[str], names: Collection[str]) -> str | None:
    """The value of the last of these options on a command line, as `--option value` or `--option=value`."""
    value = None
    for index, argument in enumerate(arguments):
        name, equals, given = argument.partition("=")
        if name in names:
            value = given if equals else next(iter(arguments[index + 1 : index + 2]), None)
    return value
