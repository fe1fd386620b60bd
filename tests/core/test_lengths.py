"""Length distributions: their quantiles, correlation, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opd_async.errors import InputError
from opd_async.forecast.lengths import Lengths, LengthStream, LogNormal, Replay, Zipf, parse_lengths, typical


def test_a_log_normal_has_its_median_and_99th_percentile() -> None:
    lengths = typical(LogNormal(2000, 8000, 16384))
    assert np.median(lengths) == pytest.approx(2000, rel=0.01)
    assert np.quantile(lengths, 0.99) == pytest.approx(8000, rel=0.01)
    assert lengths.max() <= 16384


def test_a_zipf_tail_falls_with_its_exponent() -> None:
    lengths = typical(Zipf(100, 1.0, 100_000))
    assert lengths.min() == 100
    assert (lengths >= 1000).mean() == pytest.approx(0.1, rel=0.02)


def test_a_replay_gives_back_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text("7\n3\n5\n")
    replay = Replay.read(file)
    assert set(typical(replay)) == {3, 5, 7}
    assert parse_lengths(str(file)) == replay


@pytest.mark.parametrize("lengths", [LogNormal(50, 400, 500), Zipf(20, 1.5, 500), Replay((1, 2, 9))])
def test_a_stream_depends_on_seed_and_sample_alone(lengths: Lengths) -> None:
    stream, again = LengthStream(lengths, 3), LengthStream(lengths, 3)
    ids = [0, 9000, 5, 4096, 4095]
    assert [stream[i] for i in ids] == [again[i] for i in reversed(ids)][::-1]
    assert [stream[i] for i in range(50)] != [LengthStream(lengths, 4)[i] for i in range(50)]


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_samples_of_one_prompt_are_correlated(correlation: float) -> None:
    stream = LengthStream(LogNormal(1000, 5000, 1 << 20), 0, group_size=2, correlation=correlation)
    logs = np.log([stream[i] for i in range(8000)]).reshape(-1, 2)
    assert np.corrcoef(logs.T)[0, 1] == pytest.approx(correlation, abs=0.05)


@pytest.mark.parametrize("text", ["2000,1000,16384", "0,10,20", "a,b,c", "zipf:10,0,20", "zipf:10,1", "1,2"])
def test_what_is_no_distribution_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write MEDIAN,P99,CAP"):
        parse_lengths(text)


def test_a_broken_lengths_file_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text("7\n-3\n")
    with pytest.raises(InputError, match=r"lengths\.txt:2: '-3' is not a length"):
        Replay.read(file)
    file.write_text("")
    with pytest.raises(InputError, match="has no lengths"):
        Replay.read(file)
    with pytest.raises(InputError, match="cannot be read"):
        Replay.read(tmp_path / "absent")
