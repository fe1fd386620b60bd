"""Nothing that SGLang refuses of the weight routes is taken by the engine under test, by rules that were read there."""

from __future__ import annotations

import base64
import os
import pickle
import urllib.error
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from server_under_test import KIND, Server
from sglang_rules import VERSIONS, Opened, Refused, Rules, SchedulerEnded, unpickled
from torch.multiprocessing import reductions
from weight_trainer import Trainer

from opd_async.config.topology import EngineKind
from opd_async.learner.weights import local

NEWEST = VERSIONS[-1]
GROUP = "the trainer's"
NORM = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[64]], "flush_cache": False}
MIXED = {
    "names": ["model.norm.weight", "model.layers.0.input_layernorm.weight"],
    "dtypes": ["bfloat16", "float32"],
    "shapes": [[63], [64]],
    "load_format": "flattened_bucket",
    "flush_cache": False,
}
BEGIN, END = ("/begin_weight_update", {"selector": "all"}), ("/end_weight_update", {})
UPDATE = "/update_weights_from_distributed"
REFUSED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "an end without a begin": [END],
    "two begins": [BEGIN, BEGIN],
    "an update without a begin": [(UPDATE, NORM | {"group_name": GROUP})],
    "an unknown group": [BEGIN, (UPDATE, NORM | {"group_name": "nobody's"})],
    "no such type": [BEGIN, (UPDATE, NORM | {"group_name": GROUP, "dtypes": ["float33"]})],
    "a bucket that is not aligned": [BEGIN, (UPDATE, MIXED | {"group_name": GROUP})],
    "an empty bucket": [
        BEGIN,
        (UPDATE, MIXED | {"names": [], "dtypes": [], "shapes": [], "group_name": GROUP}),
    ],
    "shapes left out": [BEGIN, (UPDATE, {"names": ["a"], "dtypes": ["float32"], "group_name": GROUP})],
    "a version that is a number": [BEGIN, (UPDATE, NORM | {"group_name": GROUP, "weight_version": 7})],
    "to leave a group of nobody": [("/destroy_weights_update_group", {"group_name": "nobody's"})],
    "a rank outside the group": [
        (
            "/init_weights_update_group",
            {
                "master_address": "127.0.0.1",
                "master_port": 1,
                "rank_offset": 2,
                "world_size": 2,
                "group_name": "outside",
                "backend": "gloo",
            },
        )
    ],
    "an unknown way to pause": [("/pause_generation", {"mode": "sleep"})],
    "a new name that is a number": [("/update_weight_version", {"new_version": 3, "abort_all_requests": False})],
}


def rules(version: str = NEWEST) -> Rules:
    made = Rules(version)
    made.groups[GROUP] = (1,)
    return made


@pytest.mark.parametrize("case", REFUSED)
def test_what_sglang_refuses_is_refused_by_its_rules(case: str) -> None:
    *before, (route, body) = REFUSED[case]
    server = rules()
    for step in before:
        server.post(*step)
    with pytest.raises(Refused):
        server.post(route, body)


def status(server: Server, route: str, body: dict[str, Any]) -> int:
    """How the server answers."""
    try:
        server.post(route, body)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    return 200


@pytest.fixture
def clean(server: Server, weight_group: Trainer) -> Iterator[Server]:
    """The server in its group, without a session before and after, and generating."""
    yield server
    for route in ("/end_weight_update", "/continue_generation"):
        status(server, route, {})


if KIND is EngineKind.EMBEDDED:  # the rules were read, not tried: some of these requests may end a real scheduler

    @pytest.mark.parametrize("case", REFUSED)
    def test_what_sglang_refuses_the_embedded_engine_refuses(clean: Server, weight_group: Trainer, case: str) -> None:
        *before, (route, body) = REFUSED[case]
        for path, sent in before:
            clean.post(path, sent)
        if body.get("group_name") == GROUP:
            body = body | {"group_name": weight_group.sender._group_name}  # type: ignore[attr-defined]
        assert 400 <= status(clean, route, body) < 500


def test_an_unknown_group_ends_the_scheduler_of_old_versions() -> None:
    for version in VERSIONS[:2]:
        with pytest.raises(SchedulerEnded, match="nobody's"):
            rules(version).post(UPDATE, NORM | {"group_name": "nobody's"})


def test_defaults_of_sglang_are_its_own() -> None:
    server = rules()
    server.running = 1
    server.post(*BEGIN)
    with pytest.raises(Refused, match="not flushed"):
        server.post(UPDATE, {key: value for key, value in NORM.items() if key != "flush_cache"} | {"group_name": GROUP})
    assert rules().ranks_of({"rank_offset": 3}) == (3,)
    assert Rules(NEWEST, tensor_parallel=2).ranks_of({"rank_offset": 3}) == (3, 4)


# --- handles ----------------------------------------------------------------------------------------------------------


def cuda_handle(device: int) -> tuple[Any, tuple[Any, ...]]:
    """What torch makes of a CUDA tensor: the arguments of `rebuild_cuda_tensor`, as one was printed."""
    shape, stride = torch.Size([4, 2]), (2, 1)
    storage = (torch.storage.TypedStorage, torch.bfloat16, device, b"handle", 2097152, 512, False)
    return reductions.rebuild_cuda_tensor, (torch.Tensor, shape, stride, 0, *storage, b"counter", 0, b"event", True)


@pytest.mark.parametrize("version", VERSIONS)
def test_handles_of_a_gpu_are_allowed_and_name_it_by_uuid(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions, "reduce_tensor", lambda _tensor: cuda_handle(1))
    seen: list[int] = []

    def properties(device: int) -> Any:
        seen.append(device)
        return SimpleNamespace(uuid="GPU-of-the-learner")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    payload = local._handles([("model.norm.weight", torch.zeros(4, 2))])
    [(name, opened)] = unpickled(payload, version)
    assert name == "model.norm.weight" and isinstance(opened, Opened)
    assert opened.arguments[6] == "GPU-of-the-learner" and seen == [1]
    kept = cuda_handle(1)[1]
    assert (*opened.arguments[:6], *opened.arguments[7:]) == (*kept[:6], *kept[7:])


@pytest.mark.parametrize("version", VERSIONS)
def test_handles_of_host_memory_are_allowed_and_arrive(version: str) -> None:
    torch.multiprocessing.set_sharing_strategy("file_system")
    sent = torch.arange(6.0).reshape(2, 3)
    [(name, tensor)] = unpickled(local._handles([("a", sent)]), version)
    assert name == "a" and torch.equal(tensor, sent)


@pytest.mark.parametrize("version", VERSIONS)
def test_other_globals_are_not_allowed(version: str) -> None:
    for function in (os.getcwd, pickle.loads):
        payload = base64.b64encode(bytes(ForkingPickler.dumps(function))).decode()
        with pytest.raises(SchedulerEnded, match="Blocked"):
            unpickled(payload, version)


def test_too_few_handles_end_the_scheduler() -> None:
    server = Rules(NEWEST, tensor_parallel=2)
    server.post(*BEGIN)
    kept = torch.zeros(1)  # the memory is the sender's, and must not go before it was read
    one, other = (local._handles([("a", kept)]) for _ in range(2))
    with pytest.raises(SchedulerEnded, match="index"):
        server.post("/update_weights_from_tensor", {"serialized_named_tensors": [one], "flush_cache": False})
    server.post("/update_weights_from_tensor", {"serialized_named_tensors": [one, other], "flush_cache": False})
