"""Text prompts, text deltas, stop strings; and the engine's tie to its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import psutil
import pytest
from deadlines import patience
from engine_harness import START_SECONDS, Server, command, events, free_port, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_async.actors.engine.request import LogprobSpec, Request
from opd_async.actors.engine.sampling import SamplingParams
from opd_async.actors.engine.text import StreamCursor, TextCodec, load_codec

PARENT = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:])
print("pid", child.pid, flush=True)
child.wait()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of one token per byte."""
    folder = tmp_path_factory.mktemp("engine") / "text"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate([*alphabet, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return make_model(folder, vocab_size=len(words))


@pytest.fixture(scope="module")
def codec(folder: Path) -> TextCodec:
    loaded = load_codec(folder)
    assert loaded is not None
    return loaded


def request_with(codec: TextCodec, text: str, **params: object) -> Request:
    request = Request(
        rid="r", input_ids=[1], params=SamplingParams(max_new_tokens=500, **params), logprob=LogprobSpec()
    )  # type: ignore[arg-type]
    for token in codec.encode(text):
        request.append(token, -1.0, "v")
    return request


def test_deltas_never_split_a_character(codec: TextCodec) -> None:
    text = "naïve: 数字 ✓ done"
    request = request_with(codec, text)
    cursor = StreamCursor()
    pieces = [codec.delta(request, cursor, upto, False) for upto in range(1, len(request.output_ids))]
    request.finish({"type": "length", "length": 1}, "v")
    pieces.append(codec.delta(request, cursor, len(request.output_ids), True))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stop_strings_and_their_trimming(codec: TextCodec) -> None:
    request = request_with(codec, "one two. ", stop=("two", "three"))
    assert codec.matched_stop(request_with(codec, "one tw", stop=("two",))) is None
    assert codec.matched_stop(request_with(codec, "one two", stop=("three", "two"))) == "two"
    request.finish({"type": "stop", "matched": "two"}, "v")
    assert codec.text(request) == "one "
    kept = request_with(codec, "one two", no_stop_trim=True)
    kept.finish({"type": "stop", "matched": "two"}, "v")
    assert codec.text(kept) == "one two"
    by_id = request_with(codec, "ab")
    by_id.finish({"type": "stop", "matched": by_id.output_ids[-1]}, "v")
    assert codec.text(by_id) == "a"


def check_text_over_http(server: Server, codec: TextCodec) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 40}
    answer = server.generate(text="hello", sampling_params=greedy, return_logprob=True, return_text_in_logprobs=True)
    ids = answer["output_ids"]
    assert answer["text"] == codec.decode(ids)
    assert answer["meta_info"]["prompt_tokens"] == 5
    assert [entry[2] for entry in answer["meta_info"]["output_token_logprobs"]] == [codec.decode([i]) for i in ids]
    status, refusal = server.call("/generate", {"text": "\ud83d", "sampling_params": greedy})
    assert status == 400 and "surrogate" in str(refusal)  # no JSON that can be read
    two = server.generate(text=["a", "b"], sampling_params={"max_new_tokens": 1})
    assert len(two) == 2

    async def main() -> str:
        async with aiohttp.ClientSession() as session:
            stream = events(session, server, text="hello", sampling_params=greedy | {"stream_interval": 3})
            return "".join([event["text"] async for event in stream])

    assert asyncio.run(main()) == answer["text"]
    stop = codec.decode([next(i for i in ids if i < 128)])
    stopped = server.generate(text="hello", sampling_params=greedy | {"stop": [stop]})
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert stopped["text"] == answer["text"][: answer["text"].index(stop)]
    eos = codec.encode("<eos>")
    assert len(eos) == 1


def test_text_over_http_then_the_engine_dies_with_its_parent(folder: Path, codec: TextCodec) -> None:
    port, metrics_port = free_port(), free_port()
    engine = command(folder, port, "--metrics-port", str(metrics_port))
    environment = {key: value for key, value in os.environ.items() if key not in ("OPD_DETACHED", "OPD_PARENT_PID")}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *engine],
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert parent.stdout is not None
    with parent.stdout as lines:
        child = psutil.Process(int(lines.readline().split()[1]))
        assert lines.readline().startswith("engine ready")
        server = Server(f"http://127.0.0.1:{port}", parent)
        check_text_over_http(server, codec)
        status, text = Server(f"http://127.0.0.1:{metrics_port}", parent).call("/metrics")
        assert status == 200
        assert "opd_engine_generated_tokens_total" in text
        parent.send_signal(signal.SIGKILL)
        parent.wait(timeout=patience(START_SECONDS))
    try:
        child.wait(timeout=patience(30))
    except psutil.NoSuchProcess:
        return
    assert not child.is_running()
