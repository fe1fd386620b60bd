"""Buckets hold every byte of every tensor, aligned, in order."""

from __future__ import annotations

import hashlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.learner.weights.buckets import buckets, checksum

DTYPES = [torch.float32, torch.bfloat16, torch.uint8]
tensors = st.lists(st.tuples(st.integers(1, 40), st.sampled_from(DTYPES)), max_size=12)


@settings(deadline=None, max_examples=50)
@given(kinds=tensors, bucket_bytes=st.integers(1, 200), direct_bytes=st.integers(1, 200))
def test_large_tensors_go_for_themselves(
    kinds: list[tuple[int, torch.dtype]], bucket_bytes: int, direct_bytes: int
) -> None:
    sent = {f"t{i}": torch.arange(n).to(dtype) for i, (n, dtype) in enumerate(kinds)}
    filled = list(buckets(sent.items(), bucket_bytes, direct_bytes))
    for bucket in filled:
        assert bucket.nbytes <= bucket_bytes or len(bucket.tensors) == 1
        assert all((tensor.nbytes >= direct_bytes) == bucket.direct for tensor in bucket.tensors)
    assert [bucket.last for bucket in filled] == [False] * (len(filled) - 1) + [True] * bool(filled)
    assert sorted(name for bucket in filled for name in bucket.names) == sorted(sent)
    assert all(sent[name] is tensor for b in filled for name, tensor in zip(b.names, b.tensors, strict=True))


@settings(deadline=None, max_examples=50)
@given(kinds=tensors, bucket_bytes=st.integers(1, 200))
def test_a_reader_that_knows_names_dtypes_and_shapes_gets_the_tensors_back(
    kinds: list[tuple[int, torch.dtype]], bucket_bytes: int
) -> None:
    sent = {f"t{i}": torch.arange(n).to(dtype).reshape(1, n) for i, (n, dtype) in enumerate(kinds)}
    read: dict[str, torch.Tensor] = {}
    filled = list(buckets(sent.items(), bucket_bytes))
    for bucket in filled:
        assert bucket.nbytes <= bucket_bytes or len(bucket.tensors) == 1
        payload, at = bucket.flatten(torch.empty(0, dtype=torch.uint8)), 0
        for name, dtype_name, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
            dtype = getattr(torch, dtype_name)
            at = -(-at // dtype.itemsize) * dtype.itemsize
            size = dtype.itemsize * torch.Size(shape).numel()
            read[name] = payload[at : at + size].view(dtype).reshape(shape)
            at += size
        assert at == len(payload)
    assert [bucket.last for bucket in filled] == [False] * (len(filled) - 1) + [True] * bool(filled)
    assert list(read) == list(sent)
    assert all(torch.equal(read[name], sent[name]) for name in sent)


def test_a_checksum_is_of_the_row_major_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    expected = hashlib.blake2b(tensor.numpy().tobytes(), digest_size=16).hexdigest()
    assert checksum(tensor) == expected
    assert checksum(tensor.T.contiguous().T) == expected
    assert checksum(tensor.T) != expected
