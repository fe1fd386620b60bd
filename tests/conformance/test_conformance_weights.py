"""New weights in the middle of responses: drained and continued as rollout actors do it, and by SGLang's own pause."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deadlines import patience
from server_under_test import CONTEXT, KIND, VERSION, Server, prompt, reference_logprobs
from streams import Crowd, Stream
from transformers import PreTrainedModel
from weight_trainer import Trainer

from opd_async.config.topology import EngineKind
from opd_async.learner.errors import WeightSyncError
from opd_async.learner.weights.base import SendReport, WeightTransport
from opd_async.learner.weights.local import DiskSender, TensorSender

EXACT = 1e-3
RESPONSE = 300


def answered(server: Server, ids: np.ndarray) -> np.ndarray:
    """The server's own logprobs of a text, nothing from its cache: float32[N - 1]."""
    body = {
        "input_ids": ids.tolist(),
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    entries = server.post("/generate", body, admin=False)["meta_info"]["input_token_logprobs"]
    return np.array([entry[0] for entry in entries[1:]])


def test_an_update_arrives_whole(server: Server, trainer: Trainer, second: PreTrainedModel) -> None:
    report = trainer.send(second)
    # SGLang hashes fused tensors in its own way: a version is proven, the rest is the re-score's business
    assert trainer.sender.verify(trainer.engine, report) is (KIND is EngineKind.EMBEDDED)
    ids = prompt(200, 3)
    assert np.abs(answered(server, ids) - reference_logprobs(second, ids, 1)).max() < EXACT


def test_another_version_is_noticed(server: Server, trainer: Trainer, second: PreTrainedModel) -> None:
    report = trainer.send(second)
    server.post("/update_weight_version", {"new_version": "17", "abort_all_requests": False})
    with pytest.raises(WeightSyncError, match="weight version 17"):
        trainer.sender.verify(trainer.engine, report)


def test_from_disk(server: Server, trainer: Trainer, folder: Path, second: PreTrainedModel) -> None:
    body = {"model_path": str(folder / "second"), "weight_version": "7"}
    server.post("/update_weights_from_disk", body)
    ids = prompt(120, 4)
    assert np.abs(answered(server, ids) - reference_logprobs(second, ids, 1)).max() < EXACT


if VERSION is None or VERSION >= (0, 5, 21):  # older ones have no update sessions

    def test_a_refused_begin_ends_the_update_at_once(server: Server, trainer: Trainer, second: PreTrainedModel) -> None:
        server.post("/begin_weight_update", {"selector": "all"})  # somebody else's update is under way
        with pytest.raises(WeightSyncError, match=rf"{server.url}.*begin"):
            trainer.send(second)
        # the failed update has cleaned up behind itself
        trainer.connect()
        trainer.sender.verify(trainer.engine, trainer.send(second))
        ids = prompt(50, 5)
        assert np.abs(answered(server, ids) - reference_logprobs(second, ids, 1)).max() < EXACT


@pytest.mark.parametrize("keep", [True, False], ids=["in_place", "retract"])
async def test_drained_responses_go_on(
    server: Server, trainer: Trainer, first: PreTrainedModel, second: PreTrainedModel, keep: bool
) -> None:
    """With the cache key of the first request (in_place) the old keys and values are used, with a new one none are."""
    old = trainer.send(first).version

    async def run() -> tuple[list[Stream], list[Stream], int]:
        async with server.client() as client:
            before, after = Crowd(client), Crowd(client)
            before.start(*(Stream(client, prompt(30, i), RESPONSE, key=f"{keep} {old}") for i in range(8)))
            await before.until_each_has(40)
            await before.drain()
            await before.finish()
            new = (await asyncio.to_thread(trainer.send, second)).version
            for stream in before.streams:
                left = RESPONSE - len(stream.tokens)
                after.start(Stream(client, stream.ids, left, key=stream.key if keep else f"{keep} {new}"))
            await after.finish()
            return before.streams, after.streams, new

    before, after, new = await run()
    worst = 0.0
    for began, went_on in zip(before, after, strict=True):
        assert {delta.weight_version for delta in began.deltas} == {str(old)}
        assert {delta.weight_version for delta in went_on.deltas} == {str(new)}
        expected = reference_logprobs(first, began.ids, len(began.prompt))
        assert np.abs(began.logprobs - expected).max() < EXACT
        again = reference_logprobs(second, went_on.ids, len(went_on.prompt))
        worst = max(worst, float(np.abs(went_on.logprobs - again).max()))
    assert worst > 0.1 if keep else worst < EXACT


if VERSION is None or VERSION >= (0, 5, 22):  # older ones do not flush their cache while retracted requests wait

    def test_the_servers_own_retract_is_exact_after_the_update(
        server: Server, trainer: Trainer, first: PreTrainedModel, second: PreTrainedModel
    ) -> None:
        old = trainer.send(first).version
        replies: list[dict[str, Any]] = []
        bodies = [
            {
                "input_ids": prompt(30, i).tolist(),
                "sampling_params": {"max_new_tokens": CONTEXT - 40, "temperature": 1.0},
                "return_logprob": True,
                "extra_key": "retract",
            }
            for i in range(6)
        ]

        def ask(body: dict[str, Any]) -> None:
            replies.append(body | server.post("/generate", body, admin=False))

        threads = [threading.Thread(target=ask, args=(body,)) for body in bodies]
        for thread in threads:
            thread.start()
        give_up = time.monotonic() + patience(60.0)
        while server.running() < len(bodies):
            assert time.monotonic() < give_up, "the requests do not run"
            time.sleep(0.01)
        server.post("/pause_generation", {"mode": "retract"})
        new = trainer.send(second).version
        server.post(
            "/flush_cache", {}
        )  # the retracted keys and values are in the prefix cache, and would be used again
        server.post("/continue_generation", {})
        for thread in threads:
            thread.join()
        for reply in replies:
            meta, start = reply["meta_info"], len(reply["input_ids"])
            spans = [(span["version"], span["end"]) for span in meta["weight_versions"]]
            assert [version for version, _ in spans] == [str(old), str(new)]
            ids = np.array(reply["input_ids"] + reply["output_ids"], np.int32)
            logprobs = np.array([entry[0] for entry in meta["output_token_logprobs"]])
            change = spans[0][1]
            for model, part in ((first, slice(0, change)), (second, slice(change, None))):
                assert np.abs(logprobs[part] - reference_logprobs(model, ids, start)[part]).max() < EXACT


def sent_and_scored(
    server: Server, sender: WeightTransport, model: PreTrainedModel, version: int
) -> tuple[SendReport, float]:
    """Send `model`; how far the server's logprobs of a text are from its."""
    with sender:
        sender.connect(f"local-{version}")
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        report = sender.send(tensors.items(), version)
        assert sender.connected
        sender.verify(sender.addresses[0], report)
    ids = prompt(120, version)
    return report, float(np.abs(answered(server, ids) - reference_logprobs(model, ids, 1)).max())


def test_weights_by_way_of_files(
    server: Server, trainer: Trainer, folder: Path, second: PreTrainedModel, tmp_path: Path
) -> None:
    specs = [(name, tuple(tensor.shape)) for name, tensor in second.state_dict().items() if name != "lm_head.weight"]
    for version in (101, 102):
        sender = DiskSender(
            [trainer.engine],
            folder=tmp_path / "weights",
            source=folder / "first",
            specs=specs,
            dtype=torch.float32,
            timeout_s=patience(60.0),
        )
        report, difference = sent_and_scored(server, sender, second, version)
        assert difference < EXACT and report.bytes == sum(4 * np.prod(shape) for _, shape in specs)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version_102"]


if KIND is EngineKind.SGLANG:  # handles are pickled, which the embedded engine does not read

    def test_weights_by_way_of_the_learners_memory(server: Server, trainer: Trainer, second: PreTrainedModel) -> None:
        sender = TensorSender([trainer.engine], bucket_bytes=40_000, timeout_s=patience(60.0))
        assert sent_and_scored(server, sender, second, 103)[1] < EXACT
