"""Check that the weights can reach the student engines as the topology says."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from opd_async.config.topology import EngineKind, Topology
from opd_async.plan.resolve import replica_devices

HERE = ("127.0.0.1", "localhost")


def weight_problems(topology: Topology) -> Iterator[str]:
    """List every reason why the weights cannot be sent as the topology says."""
    for side, _, section in topology.engine_sides:
        if section.tensor_parallel > 1 and section.kind is not EngineKind.SGLANG:
            yield (
                f"engines.{side}.tensor_parallel: {section.tensor_parallel}, but the {section.kind} engine "
                f"{'says itself what it has' if section.urls else 'runs on one device'}; write 1, or kind: sglang"
            )
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
