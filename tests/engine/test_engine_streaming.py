"""Server-sent events, abort, disconnect, concurrency."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import pytest
from deadlines import patience
from engine_harness import Server, control, events, reference_logprobs
from transformers import PreTrainedModel

from opd_async.actors.engine import routes_generate
from opd_async.actors.engine.app import ENGINE

LONG = 1900
"""Tokens that take an engine longer than a test needs to reach into their making."""


def joined(found: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    ids = [token for event in found for token in event["output_ids"]]
    entries = [entry for event in found for entry in event["meta_info"]["output_token_logprobs"]]
    assert [entry[1] for entry in entries] == ids
    return ids, [entry[0] for entry in entries]


async def collect(session: aiohttp.ClientSession, server: Server, **body: Any) -> list[dict[str, Any]]:
    return [event async for event in events(session, server, return_logprob=True, **body)]


async def wait_load(server: Server, field: str, value: int) -> None:
    """Poll the engine until it reports `value`; it has no other way to tell that a request arrived or left."""
    async with asyncio.timeout(patience(30)):
        while True:
            load = await asyncio.to_thread(server.call, "/v1/loads")
            if load[1]["loads"][0][field] == value:
                return
            await asyncio.sleep(0.01)


async def test_events_are_deltas_of_the_interval(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        params = {"max_new_tokens": 10, "stream_interval": 4}
        found = await collect(session, server, input_ids=[1, 2, 3], rid="delta", sampling_params=params)
    assert [len(event["output_ids"]) for event in found] == [1, 4, 4, 1]
    assert [event["meta_info"]["completion_tokens"] for event in found] == [1, 5, 9, 10]
    assert [event["meta_info"]["finish_reason"] for event in found] == [None] * 3 + [{"type": "length", "length": 10}]
    assert {event["meta_info"]["id"] for event in found} == {"delta"}
    assert all(event["meta_info"]["weight_version"] == "default" for event in found)
    assert "weight_versions" not in found[0]["meta_info"]
    assert found[-1]["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": 10}]
    assert found[-1]["meta_info"]["output_token_logprobs_length"] == 10


def test_many_streams_lose_nothing(server: Server, reference: PreTrainedModel) -> None:
    prompts = [np.random.default_rng(i).integers(0, 96, 3 + i % 9).tolist() for i in range(64)]

    async def main() -> list[list[dict[str, Any]]]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as tasks:
            streams = [
                tasks.create_task(
                    collect(
                        session,
                        server,
                        input_ids=prompt,
                        sampling_params={"max_new_tokens": 5 + i % 40, "stream_interval": 1 + i % 5},
                    )
                )
                for i, prompt in enumerate(prompts)
            ]
        return [stream.result() for stream in streams]

    for i, (prompt, found) in enumerate(zip(prompts, asyncio.run(main()), strict=True)):
        ids, logprobs = joined(found)
        assert len(ids) == 5 + i % 40
        want = reference_logprobs(reference, prompt + ids)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(logprobs, want[range(len(ids)), ids], atol=1e-4)


def test_a_streamed_batch_interleaves_with_index(server: Server) -> None:
    async def main() -> list[dict[str, Any]]:
        async with aiohttp.ClientSession() as session:
            body = {"input_ids": [[1], [2, 3]], "rid": "b", "sampling_params": [{"max_new_tokens": n} for n in (3, 5)]}
            return await collect(session, server, **body)

    found = asyncio.run(main())
    for index, count in ((0, 3), (1, 5)):
        own = [event for event in found if event["index"] == index]
        assert len(joined(own)[0]) == count
        assert {event["meta_info"]["id"] for event in own} == {f"b_{index}"}
        assert own[-1]["meta_info"]["finish_reason"]["type"] == "length"


async def test_abort_matches_by_prefix_and_returns_what_there_is(server: Server) -> None:
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        params = {"max_new_tokens": LONG}
        whole = asyncio.to_thread(
            server.generate, input_ids=[4], rid="run-1", sampling_params=params, return_logprob=True
        )
        answer = tasks.create_task(whole)
        await wait_load(server, "num_total_reqs", 1)
        stream = events(session, server, input_ids=[5], rid="run-22", sampling_params=params, return_logprob=True)
        found = [await anext(stream)]
        await control(session, server, "/abort_request", {"rid": "run-"})
        found += [event async for event in stream]
        assert found[-1]["meta_info"]["finish_reason"] == {
            "type": "abort",
            "message": "Aborted",
            "status_code": None,
            "err_type": None,
        }
        assert 1 <= len(joined(found)[0]) < LONG
        meta = (await answer)["meta_info"]
        assert meta["finish_reason"]["type"] == "abort"
        assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]
        await wait_load(server, "num_total_reqs", 0)


async def test_a_rid_in_use_is_refused_and_free_again_later(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        stream = events(session, server, input_ids=[5], rid="same", sampling_params={"max_new_tokens": LONG})
        await anext(stream)
        status, answer = await asyncio.to_thread(server.call, "/generate", {"input_ids": [1], "rid": "same"})
        assert status == 400
        assert "Duplicate request ID" in answer["error"]["message"]
        await stream.aclose()
        await wait_load(server, "num_total_reqs", 0)
        await asyncio.to_thread(server.generate, input_ids=[1], rid="same", sampling_params={"max_new_tokens": 1})


async def test_a_client_that_leaves_aborts_its_requests(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        stream = events(session, server, input_ids=[5], sampling_params={"max_new_tokens": LONG})
        await anext(stream)
        await stream.aclose()
        with_timeout = aiohttp.ClientTimeout(total=0.2)
        before = (await asyncio.to_thread(server.call, "/v1/loads"))[1]["loads"][0]["generated_tokens"]
        headers = {"Authorization": "Bearer key-for-generation"}
        body = {"input_ids": [[7]] * 200, "sampling_params": {"max_new_tokens": LONG}}
        try:
            async with session.post(server.url + "/generate", json=body, headers=headers, timeout=with_timeout):
                pass
        except TimeoutError:
            pass
        await wait_load(server, "num_total_reqs", 0)
        after = (await asyncio.to_thread(server.call, "/v1/loads"))[1]["loads"][0]["generated_tokens"]
        assert after - before < 200 * LONG


def test_a_client_that_leaves_between_two_events_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection closes while a write is under way: aiohttp would log what the handler raises as an error."""
    forgotten: list[str] = []
    core = SimpleNamespace(submit=lambda request: None, forget=forgotten.append)
    call = SimpleNamespace(requests=["one", "two"], stream=True)

    async def read_json(http: Any) -> dict[str, Any]:
        return {}

    async def stream(*_: Any) -> None:
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    changes = {"read_json": read_json, "_stream": stream, "parse_generate": lambda *_: call, "_Mailbox": lambda _: None}
    for name, change in changes.items():
        monkeypatch.setattr(routes_generate, name, change)
    http: Any = SimpleNamespace(app={ENGINE: SimpleNamespace(core=core, limits=None)}, content_length=2)
    asyncio.run(routes_generate.generate(http))
    assert forgotten == ["one", "two"]


async def test_pause_reports_what_each_stream_was_given(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        params = {"max_new_tokens": LONG, "stream_interval": 100}
        streams = {
            rid: events(session, server, input_ids=[5], rid=rid, sampling_params=params, return_logprob=True)
            for rid in ("p-1", "p-2")
        }
        found = {rid: [await anext(stream)] for rid, stream in streams.items()}
        status, answer = await control(session, server, "/pause_generation", {"mode": "in_place"})
        assert (status, answer["status"]) == (200, "ok")
        health = await asyncio.to_thread(server.call, "/health")
        assert health[0] == 503
        assert set(answer["emitted"]) == {"p-1", "p-2"}
        for rid, stream in streams.items():
            while len(joined(found[rid])[0]) < answer["emitted"][rid]:
                found[rid].append(await anext(stream))
            assert len(joined(found[rid])[0]) == answer["emitted"][rid]
        waiting = asyncio.create_task(
            asyncio.to_thread(server.generate, input_ids=[9], sampling_params={"max_new_tokens": 2})
        )
        _, queued = await asyncio.to_thread(server.call, "/generate", {"input_ids": [96]})
        assert "error" in queued
        await control(session, server, "/continue_generation", {})
        for rid, stream in streams.items():
            found[rid] += [event async for event in stream]
            assert len(joined(found[rid])[0]) == LONG
        assert len((await waiting)["output_ids"]) == 2


async def test_pause_abort_ends_what_runs_and_holds_what_comes(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        stream = events(session, server, input_ids=[5], sampling_params={"max_new_tokens": LONG})
        await anext(stream)
        await control(session, server, "/pause_generation", {})
        assert [event async for event in stream][-1]["meta_info"]["finish_reason"]["type"] == "abort"
        late = asyncio.create_task(
            collect(session, server, input_ids=[5], rid="late", sampling_params={"max_new_tokens": 2})
        )
        queued = asyncio.create_task(
            collect(session, server, input_ids=[5], rid="queued", sampling_params={"max_new_tokens": 2})
        )
        await wait_load(server, "num_waiting_reqs", 2)
        await control(session, server, "/abort_request", {"rid": "queued"})
        meta = (await queued)[-1]["meta_info"]
        assert meta["finish_reason"] == {"type": "abort", "message": "Abort in waiting queue"}
        assert "prompt_tokens" not in meta
        assert not late.done()
        await control(session, server, "/continue_generation", {})
        assert len(joined(await late)[0]) == 2
