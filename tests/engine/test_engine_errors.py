"""What is refused, with which status and body; keys; information routes."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from deadlines import patience
from engine_harness import ADMIN_KEY, API_KEY, Server, free_port

from opd_async.actors.engine.app import MAX_BODY_BYTES

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "Either text or input_ids"),
    ({"input_ids": [1], "text": "x"}, "Either text or input_ids"),
    ({"input_ids": []}, "non-empty"),
    ({"input_ids": [[1], []]}, "non-empty"),
    ({"input_ids": [1, 96]}, "token id 96"),
    ({"input_ids": [1, -1]}, "token id -1"),
    ({"input_ids": [1.5]}, "integer token ids"),
    ({"input_ids": [[1], [[2]]]}, "integer token ids"),
    ({"text": "x"}, "no tokenizer"),
    ({"input_ids": [1] * 2048}, "longer than the model's context"),
    ({"input_ids": [1] * 2049, "sampling_params": {"max_new_tokens": 0}}, "longer than the model's context"),
    ({"input_ids": [1] * 1930}, "maximum context length"),
    ({"input_ids": [1], "sampling_params": {"max_new_tokens": 2048}}, "maximum context length"),
    ({"input_ids": [1], "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
    ({"input_ids": [1], "sampling_params": {"temperature": -0.1}}, "temperature"),
    ({"input_ids": [1], "sampling_params": {"top_p": 0}}, "top_p"),
    ({"input_ids": [1], "sampling_params": {"top_k": 0}}, "top_k"),
    ({"input_ids": [1], "sampling_params": {"min_p": 2}}, "min_p"),
    ({"input_ids": [1], "sampling_params": {"n": 2}}, "n > 1"),
    ({"input_ids": [1], "sampling_params": {"min_new_tokens": 9, "max_new_tokens": 8}}, "min_new_tokens"),
    ({"input_ids": [1], "sampling_params": {"regex": "a"}}, "regex is not supported"),
    ({"input_ids": [1], "sampling_params": {"logit_bias": [1]}}, "logit_bias must map"),
    ({"input_ids": [1], "sampling_params": {"logit_bias": {"a": 1}}}, "logit_bias must map token"),
    ({"input_ids": [1], "sampling_params": {"logit_bias": {"1": "a"}}}, "logit_bias, got 'a'"),
    ({"input_ids": [1], "sampling_params": {"logit_bias": {"96": 1.0}}}, "logit_bias holds token id 96"),
    ({"input_ids": [1], "sampling_params": {"stop": "x"}}, "need a tokenizer"),
    ({"input_ids": [1], "sampling_params": {"stop_token_ids": 3}}, "stop_token_ids"),
    ({"input_ids": [1], "sampling_params": {"stream_interval": 0}}, "stream_interval"),
    ({"input_ids": [1], "sampling_params": [{}]}, "sampling_params is a list"),
    ({"input_ids": [1], "sampling_params": 3}, "sampling_params must be an object"),
    ({"input_ids": [1], "return_logprob": True, "logprob_start_len": 2}, "higher than the number of input tokens"),
    ({"input_ids": [1], "return_logprob": True, "token_ids_logprob": [96]}, "token_ids_logprob"),
    ({"input_ids": [1], "return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
    ({"input_ids": [1], "return_logprob": "yes"}, "return_logprob"),
    ({"input_ids": [1], "return_sampling_mask": True}, "return_sampling_mask is not supported"),
    ({"input_ids": [1], "return_flat_raw_top_logprobs_b64": True}, "needs return_flat_raw_top_logprobs"),
    ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "Duplicate request IDs"),
    ({"input_ids": [[1], [2]], "rid": ["a"]}, "rid must be"),
    ({"input_ids": [[1], [2]], "logprob_start_len": [0], "return_logprob": True}, "logprob_start_len is a list"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_requests(server: Server, body: dict[str, Any], message: str) -> None:
    status, answer = server.call("/generate", body)
    assert status == 400
    assert message in answer["error"]["message"]


def test_unknown_sampling_keys_are_refused_and_unknown_top_level_keys_ignored(server: Server) -> None:
    status, answer = server.call("/generate", {"input_ids": [1], "sampling_params": {"bar": 1}})
    assert status == 400
    assert answer["error"].startswith("unknown field `bar`, expected one of max_new_tokens")
    server.generate(input_ids=[1], whatever=3, priority=0, sampling_params={"max_new_tokens": 1, "regex": None})


def test_a_body_that_is_not_json(server: Server) -> None:
    request = urllib.request.Request(server.url + "/generate", b"{", {"Authorization": f"Bearer {API_KEY}"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=patience(30))
    with caught.value as error:
        assert error.code == 400
        assert "not JSON" in json.loads(error.read())["error"]["message"]


def test_a_refused_stream_is_an_error_event(server: Server) -> None:
    status, answer = server.call("/generate", {"input_ids": [96], "stream": True})
    assert status == 200
    first, last = answer.strip().split("\n\n")
    error = json.loads(first.removeprefix("data: "))["error"]
    assert (error["code"], error["type"], error["retryable"]) == (400, "invalid_request_error", False)
    assert last == "data: [DONE]"


def post_raw(server: Server, raw: bytes, key: str = API_KEY) -> tuple[int, str]:
    """Status and text of a POST /generate with exactly these bytes."""
    request = urllib.request.Request(server.url + "/generate", raw, {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=patience(60)) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 100_000,
        b'{"input_ids": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        b'{"input_ids": [1], "return_logprob": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"input_ids": [1], "sampling_params": ' + b'{"a": ' * 900 + b"1" + b"}" * 901,
        b'{"input_ids": [1e999]}',
        b'{"input_ids": [' + b"9" * 5000 + b"]}",
        b'{"input_ids": [NaN]}',
        b'{"input_ids": ["\xff"]}',
        b'{"input_ids": [' + b"[1]," * 200_000 + b"[1]]}",
        b'{"input_ids": [' + b"1," * 3_000_000 + b"1]}",
        b'{"text": ["' + b'a", "' * 200_000 + b'a"]}',
    ],
    ids=["open", "deep ids", "deep flag", "deep sampling", "infinite", "long", "nan", "utf8", "many", "ids", "texts"],
)
def test_absurd_bodies_are_refused_in_few_words(server: Server, raw: bytes) -> None:
    status, text = post_raw(server, raw)
    assert (status, "error" in json.loads(text)) == (400, True)
    assert len(text) < 2000
    assert server.call("/ping")[0] == 200


def test_a_body_beyond_the_limit_is_refused(server: Server) -> None:
    status, text = post_raw(server, b" " * (MAX_BODY_BYTES + 1))
    assert (status, json.loads(text)["error"]["code"]) == (413, 413)
    assert post_raw(server, b"[" * 10, key="guessed")[0] == 401


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/begin_weight_update", {}, 200),
        ("/begin_weight_update", {}, 400),
        ("/end_weight_update", {}, 200),
        ("/end_weight_update", {}, 400),
        ("/update_weights_from_distributed", {"names": [], "dtypes": [], "shapes": [], "group_name": "g"}, 400),
        ("/update_weights_from_distributed", {"names": "x", "dtypes": [], "shapes": []}, 400),
        ("/update_weights_from_distributed", {"load_format": "odd"}, 400),
        ("/destroy_weights_update_group", {"group_name": "g"}, 400),
        ("/init_weights_update_group", {"master_address": "127.0.0.1"}, 400),
        ("/update_weights_from_disk", {"model_path": "/nowhere"}, 400),
        ("/update_weight_version", {}, 400),
        ("/weights_checker", {"action": "snapshot"}, 400),
        ("/pause_generation", {"mode": "slowly"}, 400),
        ("/pause_generation", [], 400),
        ("/abort_request", {"rid": "unknown"}, 200),
    ],
)
def test_control_routes(server: Server, path: str, body: Any, status: int) -> None:
    found, answer = server.call(path, body)
    assert found == status, answer


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/health", "none", 200),
        ("/ready", "none", 200),
        ("/metrics", "none", 200),
        ("/ping", API_KEY, 200),
        ("/model_info", API_KEY, 200),
        ("/model_info", ADMIN_KEY, 401),
        ("/model_info", "none", 401),
        ("/v1/loads", API_KEY, 200),
        ("/flush_cache", ADMIN_KEY, 200),
        ("/flush_cache", API_KEY, 401),
        ("/nothing", API_KEY, 404),
    ],
)
def test_keys(server: Server, path: str, key: str, status: int) -> None:
    found, answer = server.call(path, key=key)
    assert found == status
    if status == 401:
        assert answer == {"error": "Unauthorized"}


def test_information(server: Server) -> None:
    _, model = server.call("/model_info")
    assert (model["weight_version"], model["is_generation"], model["model_type"]) == ("default", True, "qwen3")
    assert model["architectures"] == ["Qwen3ForCausalLM"]
    _, info = server.call("/server_info")
    assert (info["kind"], info["max_total_num_tokens"], info["context_length"]) == ("embedded", 20000, 2048)
    assert info["vocab_size"] == 96
    assert API_KEY not in json.dumps(info)
    assert ADMIN_KEY not in json.dumps(info)
    server.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 2})
    _, loads = server.call("/v1/loads")
    assert loads["loads"][0]["num_running_reqs"] == 0
    _, text = server.call("/metrics")
    for name in ("generated_tokens_total", "prompt_tokens_total", "cached_tokens_total", "busy_seconds_total"):
        assert f"opd_engine_{name}" in text


def test_a_pending_rendezvous_does_not_hold_up_the_end(server: Server) -> None:
    """The last test of the module: its server then has to stop within seconds although nobody answers the join."""
    body = {
        "master_address": "127.0.0.1",
        "master_port": free_port(),
        "rank_offset": 1,
        "world_size": 2,
        "group_name": "nobody",
        "backend": "gloo",
    }
    with pytest.raises(TimeoutError):
        server.call("/init_weights_update_group", body, timeout=0.5)
    assert server.call("/ready")[0] == 200
