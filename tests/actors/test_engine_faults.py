"""Whatever goes wrong with a request becomes an error that names the engine, its message, and what kind it is."""

from __future__ import annotations

import aiohttp
import numpy as np
import pytest
from faulty_engine import FAULTS, VOCAB, FaultyEngine, continuation, scores_of

from opd_async.actors.client.engine_client import Endpoint, EngineClient, Sampling, new_connector
from opd_async.actors.client.replies import error_in, fault_of_status, parse_scores
from opd_async.errors import EngineError, EngineFault

IDS = [3, 4, 5, 6]
EXPECTED = {
    "400": (EngineFault.REFUSED, "HTTP 400: the engine reports an error: injected 400"),
    "429": (EngineFault.BUSY, "HTTP 429: the engine reports an error: injected 429"),
    "500": (EngineFault.FAILED, "HTTP 500: the engine reports an error: injected 500"),
    "503": (EngineFault.BUSY, "HTTP 503: the engine reports an error: injected 503"),
    "error": (EngineFault.FAILED, "the engine reports an error: injected error"),
    "disconnect": (EngineFault.DISCONNECTED, "the connection failed|the stream ended early"),
    "hang": (EngineFault.SILENT, r"within 0.2 s|silent for 0.2 s"),
}


async def ask(engine: FaultyEngine, stream: bool, deadline_s: float = 60.0) -> list[float]:
    """The streamed tokens, or the scores, of a short text."""
    async with aiohttp.ClientSession(connector=new_connector()) as session:
        client = EngineClient(session, Endpoint(url=engine.url, deadline_s=deadline_s), VOCAB)
        ids = np.array(IDS, np.int32)
        if not stream:
            return [float(value) for value in (await client.score([(ids, 1)]))[0].logprobs]
        sampling = Sampling(
            temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=6, stop_token_ids=(), stream_interval=8
        )
        return [float(one) async for delta in client.stream("r", ids, sampling, "0") for one in delta.token_ids]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
async def test_faults_are_told_apart(fault: str, stream: bool) -> None:
    async with FaultyEngine() as engine:
        engine.script.append(fault)
        with pytest.raises(EngineError) as caught:
            await ask(engine, stream, 0.2 if fault == "hang" else 60.0)
        assert str(caught.value).startswith(f"{engine.url}/generate: ")
        expected = continuation(IDS, 6) if stream else scores_of(IDS, 1).tolist()
        assert await ask(engine, stream) == expected
    kind, text = EXPECTED[fault]
    assert caught.value.fault is kind
    assert any(part in str(caught.value) for part in text.split("|"))


@pytest.mark.parametrize("stream", [True, False])
async def test_nobody_listens(stream: bool) -> None:
    async with FaultyEngine() as engine:
        await engine.stop()
        with pytest.raises(EngineError) as caught:
            await ask(engine, stream)
        assert caught.value.fault is EngineFault.DISCONNECTED


def test_statuses() -> None:
    kinds = {status: fault_of_status(status).value for status in (400, 401, 404, 408, 429, 500, 502, 503, 504)}
    assert kinds == {
        400: "refused",
        401: "refused",
        404: "refused",
        408: "busy",
        429: "busy",
        500: "failed",
        502: "failed",
        503: "busy",
        504: "failed",
    }


@pytest.mark.parametrize(
    ("reply", "fault", "text"),
    [
        ({"error": {"message": "too long", "code": 400}}, EngineFault.REFUSED, "too long"),
        ({"error": {"message": "full", "code": 429}}, EngineFault.BUSY, "full"),
        ({"error": {"message": "old servers give no code"}}, EngineFault.FAILED, "old servers"),
        ({"error": "unknown field `bar`"}, EngineFault.FAILED, "unknown field"),
        ({"error": ["?"]}, EngineFault.FAILED, "?"),
    ],
)
def test_errors_that_come_as_answers(reply: object, fault: EngineFault, text: str) -> None:
    error = error_in(reply)
    assert error is not None and error.fault is fault and text in str(error)
    with pytest.raises(EngineError, match="reports an error"):
        parse_scores(reply, np.array(IDS, np.int32), 1, VOCAB)


def test_a_scoring_request_that_was_aborted() -> None:
    reply = {"meta_info": {"finish_reason": {"type": "abort", "message": "Abort in waiting queue"}}}
    with pytest.raises(EngineError, match="aborted the request: Abort in waiting queue") as caught:
        parse_scores(reply, np.array(IDS, np.int32), 1, VOCAB)
    assert caught.value.fault is EngineFault.ABORTED
    assert error_in(reply) is None
