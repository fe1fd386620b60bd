"""The wire benchmark: every codec gives back what it got, and the figures have the promised shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_async.bench.wire import __main__ as wire


@pytest.mark.parametrize("codec", wire.CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("chunk_tokens", [40, 7])
def test_codecs_give_back_what_they_got(codec: wire.Codec, chunk_tokens: int) -> None:
    sample = wire.make_sample(40, chunk_tokens)
    with wire.loopback() as (push, pull):
        assert wire.is_equal(sample, wire.transfer(codec, sample, push, pull))


def test_a_change_is_noticed() -> None:
    assert not wire.is_equal(wire.make_sample(40, 7), wire.make_sample(40, 8))
    left, right = wire.make_sample(40, 40), wire.make_sample(40, 40)
    right[0].teacher_logprobs[3] = -99.0
    assert not wire.is_equal(left, right)


def test_the_report_has_a_row_per_layout_and_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wire.json"
    wire.main(["--only", "codec", "--tokens", "600", "--runs", "2", "--samples", "1", "--json", str(path)])
    report = json.loads(path.read_text())
    assert (report["tokens"], report["runs"], report["samples"]) == (600, 2, 1)
    names = [codec.name for codec in wire.CODECS]
    assert [(row["layout"], row["codec"]) for row in report["rows"]] == [
        (layout, name) for layout in ("1 x 600", "2 x 512") for name in names
    ]
    for row in report["rows"]:
        assert set(row) == {"layout", "codec", "bytes", "us_median", "us_min", "us_max", "ratio"}
        assert 0 < row["us_min"] <= row["us_median"] <= row["us_max"]
        assert row["bytes"] > 12 * 600, "three arrays of four bytes a token"
    ours = [row for row in report["rows"] if row["codec"] == "frames"]
    assert [row["ratio"] for row in ours] == [1.0, 1.0]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(report["rows"])
    assert all(name in "\n".join(lines) for name in names)
