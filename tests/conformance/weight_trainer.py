"""Sends models to the server under test as the learner does."""

from __future__ import annotations

import itertools

from deadlines import patience
from server_under_test import ADMIN_KEY, API_KEY, Server
from transformers import PreTrainedModel

from opd_async.learner.weights.base import SendReport
from opd_async.learner.weights.broadcast import WeightSender
from opd_async.learner.weights.engine_http import EngineAddress
from opd_async.learner.weights.group import open_store


class Trainer:
    """The learner's side of one weight group."""

    def __init__(self, server: Server) -> None:
        self.engine = EngineAddress(server.url, ADMIN_KEY, API_KEY)
        self._versions = itertools.count(1)
        self._groups = itertools.count()
        # small buckets, so that an update takes several broadcasts, of tensors and of flattened buckets
        options = {"backend": "gloo", "timeout_s": patience(60.0)}
        store = open_store("127.0.0.1", patience(60.0))
        self.sender = WeightSender([self.engine], store=store, bucket_bytes=40_000, direct_bytes=5_000, **options)
        self.connect()

    def connect(self) -> None:
        """Form a new group."""
        self.sender.connect(f"tests-{next(self._groups)}")

    def send(self, model: PreTrainedModel) -> SendReport:
        """One update; the version is new each time."""
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        return self.sender.send(tensors.items(), next(self._versions))
