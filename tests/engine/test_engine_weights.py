"""Weight updates over a gloo group while requests run; the test is the trainer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch.distributed as dist
from deadlines import patience
from engine_harness import Server, control, events, free_port, load_reference, make_model, reference_logprobs, running
from engine_trainer import Trainer, Update
from transformers import PreTrainedModel

LONG = 1500


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("engine") / "other", seed=1)


@pytest.fixture(scope="module")
def other(other_folder: Path) -> PreTrainedModel:
    return load_reference(other_folder)


@pytest.fixture
def fresh(server: Server, model_folder: Path) -> Iterator[Server]:
    """The module's server with its first weights, whatever the test before did."""
    yield server
    body = {"model_path": str(model_folder), "weight_version": "default"}
    status, answer = server.call("/update_weights_from_disk", body)
    assert status == 200, answer


def tensors(model: PreTrainedModel) -> Update:
    return [(name, param.detach().clone()) for name, param in model.named_parameters()]


def checksums(update: Update) -> dict[str, str]:
    return {n: hashlib.blake2b(t.contiguous().numpy().tobytes(), digest_size=16).hexdigest() for n, t in update}


def engine_checksums(server: Server) -> dict[str, str]:
    status, answer = server.call("/weights_checker", {"action": "checksum"})
    assert status == 200
    return answer["ranks"][0]["checksums"]


async def session_call(session: aiohttp.ClientSession, server: Server, path: str, **body: Any) -> Any:
    status, answer = await control(session, server, path, body)
    assert status == 200, answer
    return answer


async def swap(session: aiohttp.ClientSession, trainer: Trainer, update: Update, mode: str, *, flat: bool) -> Any:
    """Pause, send everything as two buckets, continue; what pause answered."""
    server = trainer.server
    paused = await session_call(session, server, "/pause_generation", mode=mode)
    await session_call(session, server, "/begin_weight_update", selector="all")
    middle = len(update) // 2
    flush = {"flush_cache": False}
    assert (await trainer.send(session, update[:middle], flat, **flush))[0] == 200
    last = {"flush_cache": mode == "retract", "weight_version": "w2"}
    status, answer = await trainer.send(session, update[middle:], flat, **last)
    assert status == 200, answer
    await session_call(session, server, "/end_weight_update")
    await session_call(session, server, "/continue_generation")
    return paused


@pytest.mark.parametrize(("mode", "flat"), [("retract", True), ("in_place", False)])
def test_an_update_in_the_middle_of_a_stream(
    fresh: Server, reference: PreTrainedModel, other: PreTrainedModel, mode: str, flat: bool
) -> None:
    async def main() -> tuple[list[dict[str, Any]], int]:
        async with aiohttp.ClientSession() as session:
            trainer = Trainer(fresh, f"g-{mode}")
            await trainer.connect(session)
            params = {"max_new_tokens": LONG, "stream_interval": 7}
            body = {"input_ids": [3, 1, 4], "rid": "r", "sampling_params": params, "return_logprob": True}
            stream = events(session, fresh, **body)
            found = [await anext(stream)]
            paused = await swap(session, trainer, tensors(other), mode, flat=flat)
            found += [event async for event in stream]
            await trainer.close(session)
            return found, paused["emitted"]["r"]

    found, cut = asyncio.run(main())
    ids = [token for event in found for token in event["output_ids"]]
    logprobs = np.array([e[0] for event in found for e in event["meta_info"]["output_token_logprobs"]], np.float32)
    versions = [event["meta_info"]["weight_version"] for event in found for _ in event["output_ids"]]
    assert len(ids) == LONG
    assert 1 <= cut < LONG
    assert versions == ["default"] * cut + ["w2"] * (LONG - cut)
    assert found[-1]["meta_info"]["weight_versions"] == [
        {"version": "default", "start": 0, "end": cut},
        {"version": "w2", "start": cut, "end": LONG},
    ]
    assert found[-1]["meta_info"]["num_retractions"] == (1 if mode == "retract" else 0)
    old = reference_logprobs(reference, [3, 1, 4, *ids])[2:-1][range(LONG), ids].numpy()
    new = reference_logprobs(other, [3, 1, 4, *ids])[2:-1][range(LONG), ids].numpy()
    np.testing.assert_allclose(logprobs[:cut], old[:cut], atol=1e-4)
    if mode == "retract":
        np.testing.assert_allclose(logprobs[cut:], new[cut:], atol=1e-4)
    else:
        # the old KV is still read, so neither model alone explains the first tokens after the update
        assert np.abs(logprobs[cut : cut + 10] - new[cut : cut + 10]).max() > 1e-3
    assert engine_checksums(fresh) == checksums(tensors(other))
    assert fresh.call("/model_info")[1]["weight_version"] == "w2"


async def test_a_flush_that_running_requests_refuse_still_updates(fresh: Server, other: PreTrainedModel) -> None:
    async with aiohttp.ClientSession() as session:
        trainer = Trainer(fresh, "g-flush")
        await trainer.connect(session)
        stream = events(session, fresh, input_ids=[1], sampling_params={"max_new_tokens": 1500})
        await anext(stream)
        await session_call(session, fresh, "/pause_generation", mode="in_place")
        await session_call(session, fresh, "/begin_weight_update")
        status, answer = await trainer.send(session, tensors(other), True, flush_cache=True)
        assert status == 400
        assert "not flushed" in answer["message"]
        await session_call(session, fresh, "/end_weight_update")
        assert (await control(session, fresh, "/flush_cache", {}))[0] == 400
        await stream.aclose()
        await session_call(session, fresh, "/continue_generation")
        await trainer.close(session)
    assert engine_checksums(fresh) == checksums(tensors(other))


async def test_what_does_not_fit_is_refused_before_anything_is_received(
    fresh: Server, reference: PreTrainedModel
) -> None:
    good = ["model.norm.weight"], ["float32"], [[32]]
    cases = [
        (["model.norm.wight"], *good[1:], "no tensor named"),
        (good[0], good[1], [[33]], "shape"),
        (good[0], ["bfloat16"], good[2], "torch.bfloat16 announced"),
        (good[0], ["float33"], good[2], "not a torch dtype"),
        (good[0] * 2, good[1] * 2, good[2] * 2, "twice"),
        (good[0], good[1], [], "equally many"),
    ]
    async with aiohttp.ClientSession() as session:
        trainer = Trainer(fresh, "g-refuse")
        await trainer.connect(session)
        path = "/update_weights_from_distributed"
        body: dict[str, Any] = {"group_name": "g-refuse", "load_format": "flattened_bucket"}
        whole = dict(zip(("names", "dtypes", "shapes"), good, strict=True))
        status, answer = await control(session, fresh, path, body | whole)
        assert status == 400
        assert "begin_weight_update" in answer["message"]
        await session_call(session, fresh, "/begin_weight_update")
        status, answer = await control(session, fresh, path, body | whole | {"group_name": "nobody"})
        assert status == 400
        assert "unknown" in answer["message"]
        for names, dtypes, shapes, message in cases:
            wrong = {"names": names, "dtypes": dtypes, "shapes": shapes}
            status, answer = await control(session, fresh, path, body | wrong)
            assert (status, answer["success"]) == (400, False)
            assert message in answer["message"]
        # nothing was consumed: the group still works
        assert (await trainer.send(session, tensors(reference), True))[0] == 200
        await session_call(session, fresh, "/end_weight_update")
        await trainer.close(session)


async def test_without_a_pause_an_update_waits_for_running_requests(fresh: Server, other_folder: Path) -> None:
    async with aiohttp.ClientSession() as session:
        params = {"max_new_tokens": 200}
        stream = events(session, fresh, input_ids=[1], sampling_params=params)
        found = [await anext(stream)]
        body = {"model_path": str(other_folder), "weight_version": "disk"}
        update = asyncio.create_task(control(session, fresh, "/update_weights_from_disk", body))
        found += [event async for event in stream]
        assert found[-1]["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": 200}]
        assert (await update)[0] == 200
    later = fresh.generate(input_ids=[1], sampling_params={"max_new_tokens": 2})
    assert later["meta_info"]["weight_version"] == "disk"


def test_a_folder_that_does_not_fit_changes_nothing(fresh: Server, reference: PreTrainedModel, tmp_path: Path) -> None:
    wrong = make_model(tmp_path / "wrong", hidden_size=48)
    status, answer = fresh.call("/update_weights_from_disk", {"model_path": str(wrong)})
    assert status == 400
    assert "shape" in answer["message"]
    assert engine_checksums(fresh) == checksums(tensors(reference))


async def test_renaming_the_weights_aborts_unless_told_not_to(fresh: Server) -> None:
    async with aiohttp.ClientSession() as session:
        for abort, kind in ((False, "length"), (True, "abort")):
            stream = events(session, fresh, input_ids=[1], sampling_params={"max_new_tokens": 1500})
            await anext(stream)
            name = {"new_version": f"n-{kind}"} | ({} if abort else {"abort_all_requests": False})
            await session_call(session, fresh, "/update_weight_version", **name)
            last = [event async for event in stream][-1]["meta_info"]
            assert last["finish_reason"]["type"] == kind
            assert fresh.call("/model_info")[1]["weight_version"] == f"n-{kind}"


def test_a_lost_trainer_and_a_missing_one_leave_the_engine_alive(
    model_folder: Path, reference: PreTrainedModel
) -> None:
    async def miss(session: aiohttp.ClientSession, server: Server) -> None:
        body = {
            "master_address": "127.0.0.1",
            "master_port": free_port(),
            "rank_offset": 1,
            "world_size": 2,
            "group_name": "missing",
            "backend": "gloo",
        }
        status, answer = await control(session, server, "/init_weights_update_group", body)
        assert status == 400
        assert "cannot join weight group missing" in answer["message"]

    async def lose(session: aiohttp.ClientSession, server: Server) -> None:
        trainer = Trainer(server, "lost")
        await trainer.connect(session)
        await session_call(session, server, "/begin_weight_update")
        body = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[32]], "group_name": "lost"}
        status, answer = await control(session, server, "/update_weights_from_distributed", body)
        assert status == 500
        assert "broadcast in weight group lost failed" in answer["message"]
        await session_call(session, server, "/end_weight_update")
        dist.destroy_process_group(trainer.group)

    async def main(server: Server) -> None:
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
            tasks.create_task(miss(session, server))
            tasks.create_task(lose(session, server))

    with running(model_folder, "--weight-timeout", str(patience(1))) as server:
        asyncio.run(main(server))
        assert engine_checksums(server) == checksums(tensors(reference))
        assert len(server.generate(input_ids=[1], sampling_params={"max_new_tokens": 3})["output_ids"]) == 3
