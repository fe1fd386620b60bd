"""The proof of an engine's weights: the learner's own logprobs, and an engine that disagrees is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from deadlines import patience
from tiny_learner import learner_config
from transformers import AutoModelForCausalLM

from opd_async.learner.distributed.parallel import Place
from opd_async.learner.errors import WeightSyncError
from opd_async.learner.trainer import Trainer
from opd_async.learner.weights.engine_http import EngineAddress
from opd_async.learner.weights.proof import Proof, check_proof, make_proof

PROOF = Proof(np.array([4, 5, 6], np.int32), np.array([-1.0, -2.0], np.float32))
FLOATS = ("float32", "float32")


@contextmanager
def engine(answer: Any) -> Iterator[EngineAddress]:
    """An engine that gives one answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield EngineAddress(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def scores(*logprobs: float | None) -> dict[str, Any]:
    return {"meta_info": {"input_token_logprobs": [[None, 4, None], *([logprob, 5, None] for logprob in logprobs)]}}


def test_the_proof_is_what_transformers_computes(alone: Place, model_path: Path) -> None:
    trainer = Trainer(learner_config(model_path))
    proof = make_proof(trainer, max_tokens=20)
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = torch.log_softmax(reference(torch.tensor(proof.token_ids[None].astype(np.int64))).logits[0], -1)
    expected = logprobs[np.arange(19), proof.token_ids[1:].astype(np.int64)].numpy()
    np.testing.assert_allclose(proof.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize(("dtypes", "off"), [(FLOATS, 1e-4), (("float32", "bfloat16"), 0.05)])
def test_rounding_passes(dtypes: tuple[str, str], off: float) -> None:
    with engine(scores(-1.0 + off, -2.0 - off)) as address:
        assert check_proof(address, PROOF, dtypes, timeout_s=patience(10.0)) == pytest.approx(off, rel=1e-3)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (scores(-1.0, -2.1), "0.05 nats per token unlike the learner"),
        (scores(-1.0, float("nan")), "nan nats per token"),
        (scores(-1.0, None), "did not score"),
        (scores(-1.0), "did not score"),
        ({"meta_info": {}}, "did not score"),
        ([], "did not score"),
    ],
)
def test_other_weights_are_found(answer: Any, reason: str) -> None:
    with engine(answer) as address, pytest.raises(WeightSyncError, match=reason):
        check_proof(address, PROOF, FLOATS, timeout_s=patience(10.0))
