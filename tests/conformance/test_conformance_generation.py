"""Streams of a real server: every token once, logprobs as transformers computes them, and a drain that knows all."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import numpy as np
import pytest
import torch
from deadlines import patience
from server_under_test import ADMIN_KEY, API_KEY, CONTEXT, VERSION, VOCAB, Server, prompt, reference_logprobs, sampling
from streams import Crowd, Stream
from transformers import PreTrainedModel

from opd_async.actors.client.engine_client import Endpoint, EngineClient
from opd_async.errors import EngineError
from opd_async.transport.messages import Finish

EXACT = 1e-4


def collect(server: Server, *requests: tuple[int, int, int, float]) -> list[Stream]:
    """Run requests (prompt tokens, new tokens, stream interval, reader's pause in s) at once, to their ends."""

    async def run() -> list[Stream]:
        async with server.client() as client:
            crowd = Crowd(client)
            for seed, (length, new, interval, pause_s) in enumerate(requests):
                crowd.start(Stream(client, prompt(length, seed), new, interval=interval, pause_s=pause_s))
            await crowd.finish()
            return crowd.streams

    return asyncio.run(run())


def check_logprobs(stream: Stream, model: PreTrainedModel, limit: float = EXACT) -> None:
    """The behaviour logprobs are those of the model."""
    expected = reference_logprobs(model, stream.ids, len(stream.prompt))
    assert np.abs(stream.logprobs - expected).max() < limit


def test_streams_have_every_token_once_and_the_models_logprobs(server: Server, first: PreTrainedModel) -> None:
    shapes = [(5 + 7 * i, 20 + 11 * i, interval, 0.0) for i, interval in enumerate((1, 3, 8, 16, 16, 16, 64, 100))]
    for stream in collect(server, *shapes):
        assert len(stream.tokens) == stream.max_new_tokens
        assert [delta.finish for delta in stream.deltas[:-1]] == [None] * (len(stream.deltas) - 1)
        assert stream.deltas[-1].finish is Finish.LENGTH
        check_logprobs(stream, first)


def test_a_slow_reader_loses_nothing(server: Server, first: PreTrainedModel) -> None:
    slow, *rest = collect(server, (10, 200, 1, 0.02), *[(10, 100, 4, 0.0)] * 7)
    assert len(slow.tokens) == 200 and all(len(stream.tokens) == 100 for stream in rest)
    check_logprobs(slow, first)


async def test_a_drained_server_has_sent_every_token(server: Server, first: PreTrainedModel) -> None:
    async def run() -> tuple[list[Stream], list[int]]:
        async with server.client() as client:
            crowd = Crowd(client)
            crowd.start(*(Stream(client, prompt(20, i), 400, key=f"drain {i}") for i in range(16)))
            await crowd.until_each_has(20)
            await crowd.drain()
            await crowd.finish()
            assert all(stream.deltas[-1].aborted for stream in crowd.streams)
            # what the server computed is in its cache: one token is computed again
            cached = []
            for stream in crowd.streams:
                body = {
                    "input_ids": stream.ids.tolist(),
                    "extra_key": stream.key,
                    "sampling_params": {"max_new_tokens": 1},
                }
                reply = await asyncio.to_thread(server.post, "/generate", body, admin=False)
                cached.append(len(stream.ids) - reply["meta_info"]["cached_tokens"])
            return crowd.streams, cached

    streams, computed = await run()
    for stream in streams:
        assert 20 <= len(stream.tokens) < 400
        check_logprobs(stream, first)
    assert max(computed) <= 2


async def test_a_request_that_comes_during_a_drain_is_drained_too(server: Server) -> None:
    async with server.client() as client:
        crowd = Crowd(client)
        crowd.start(*(Stream(client, prompt(20, i), 400) for i in range(4)))
        await crowd.until_each_has(1)
        drained = asyncio.create_task(crowd.drain())
        crowd.start(*(Stream(client, prompt(300, i), 200) for i in range(4, 8)))
        await drained
        assert not any(stream.open for stream in crowd.streams)
        await crowd.finish()


async def test_both_keys_are_asked_for_and_neither_opens_the_others_doors(server: Server) -> None:
    async def refused(api_key: str | None, admin_key: str | None, control: bool) -> bool:
        async with aiohttp.ClientSession() as session:
            endpoint = Endpoint(url=server.url, api_key=api_key, admin_api_key=admin_key)
            client = EngineClient(session, endpoint, VOCAB)
            try:
                await (client.resume() if control else client.score([(prompt(4, 0), 1)]))
            except EngineError as error:
                assert "HTTP 401" in str(error)
                return True
            return False

    async def run() -> list[bool]:
        pairs = [(API_KEY, ADMIN_KEY), (ADMIN_KEY, API_KEY), (None, None)]
        return [await refused(*pair, control) for pair in pairs for control in (False, True)]

    assert await run() == [False, False, True, True, True, True]


async def test_ids_beyond_the_shared_ones_are_never_sampled(server: Server, first: PreTrainedModel) -> None:
    """A student with more ids than its teacher: it generates within the teacher's, and says so with its logprobs."""
    shared = VOCAB // 4
    async with server.client() as whole, aiohttp.ClientSession() as session:
        endpoint = Endpoint(url=server.url, api_key=API_KEY, admin_api_key=ADMIN_KEY)
        crowd, own = Crowd(EngineClient(session, endpoint, shared, rows=VOCAB)), Crowd(whole)
        texts = [prompt(10, seed) % shared for seed in range(6)]
        crowd.start(*(Stream(crowd.client, text, 40, key="shared") for text in texts))
        own.start(*(Stream(own.client, text, 40, key="own") for text in texts))  # in the same batches
        await crowd.finish()
        await own.finish()
    assert max(max(stream.tokens) for stream in own.streams) >= shared
    for stream in own.streams:
        check_logprobs(stream, first)
    for stream in crowd.streams:
        assert len(stream.tokens) == 40 and max(stream.tokens) < shared
        with torch.no_grad():
            logits = first(torch.from_numpy(stream.ids.astype("int64"))[None]).logits[0, len(stream.prompt) - 1 : -1]
        chosen = torch.tensor(stream.tokens)[:, None]
        expected = logits[:, :shared].double().log_softmax(-1).gather(1, chosen)[:, 0].numpy()
        assert np.abs(stream.logprobs - expected).max() < EXACT


async def test_a_stream_that_cannot_be_is_an_error_with_the_reason(server: Server) -> None:
    async def run() -> None:
        async with server.client() as client:
            async for _ in client.stream("0" * 32, prompt(CONTEXT, 0), sampling(100), "0"):
                raise AssertionError("tokens beyond the context")

    with pytest.raises(EngineError, match="context"):
        await run()


if VERSION is None or VERSION >= (0, 5, 20):  # the older one cannot tell its load on a CPU

    async def test_a_stream_that_nobody_reads_any_more_ends(server: Server) -> None:
        async with server.client() as client:
            crowd = Crowd(client)
            crowd.start(*(Stream(client, prompt(20, i), 470) for i in range(4)))
            await crowd.until_each_has(1)
            await crowd.abandon()
        give_up = time.monotonic() + patience(30.0)
        while server.running():
            assert time.monotonic() < give_up, "the requests go on"
            await asyncio.sleep(0.05)
