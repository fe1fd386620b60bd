"""The file of trained ranges: what a step writes is what a reader finds, and going back cuts it where it should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd_async.errors import InputError
from opd_async.run.trained import FILE_NAME, SIZE_FILE, Ranges, TrainedRecord, main, read_trained

RANGES = np.array([[12, 0, 57, 3, 4], [7, 57, 90, 4, 4], [9_000_000_000, 4096, 8192, 2, 4]], np.int64)


def write(
    folder: Path, versions: range, checkpoint: Path | None = None, save_at: dict[int, Path] | None = None
) -> None:
    """Go on at the first version; note the file's size in the folders of `save_at` before the steps that it names."""
    said: list[str] = []
    record = TrainedRecord(folder, said.append, versions[0], checkpoint)
    for version in versions:
        if save_at and version in save_at:
            save_at[version].mkdir()
            record.save(save_at[version])
        assert record.write(version, RANGES + np.array([version, 0, 0, version - 4, version - 4]))
    record.close()


numbers = st.integers(0, 2**40)
row = st.tuples(numbers, st.integers(0, 2**20), st.integers(1, 2**20), st.integers(0, 3), st.integers(0, 3))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(6, 10**6), st.lists(row, max_size=6))
def test_every_range_comes_back(tmp_path: Path, version: int, rows: list[tuple[int, ...]]) -> None:
    ranges = [(s, start, start + n, version - age - spread, version - age) for s, start, n, age, spread in rows]
    table: Ranges = np.array(ranges, np.int64).reshape(-1, 5)
    record = TrainedRecord(tmp_path, print, 0, None)
    record.write(version, table, ["same"] * len(rows))
    record.close()
    (step,) = read_trained(tmp_path)
    assert step.version == version and step.ranges.tolist() == table.tolist()
    assert step.teachers == ("same",) * len(rows)


def test_it_takes_less_than_half_of_the_numbers_as_text(tmp_path: Path) -> None:
    record = TrainedRecord(tmp_path, print, 0, None)
    text = 0
    for version in range(100):
        samples = 32 * version + np.arange(32)
        ends = 300 + 7 * (samples % 100)
        newest = np.full(32, version)
        ranges = np.stack((samples, 0 * samples, ends, np.maximum(newest - 1, 0), newest), axis=1)
        record.write(version, ranges)
        text += len(json.dumps({"version": version, "ranges": ranges.tolist()})) + 1
    record.close()
    assert (tmp_path / FILE_NAME).stat().st_size < text / 2


def test_a_checkpoint_says_where_to_cut_and_nothing_before_it_is_read(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_5"
    write(tmp_path, range(9), save_at={5: checkpoint})
    path = tmp_path / FILE_NAME
    size, content = json.loads((checkpoint / SIZE_FILE).read_text())["bytes"], path.read_bytes()
    path.write_bytes(b"x" * (size - 1) + content[size - 1 :])  # whoever reads the rows before finds no JSON
    write(tmp_path, range(5, 7), checkpoint)
    path.write_bytes(content[:size] + path.read_bytes()[size:])
    assert [step.version for step in read_trained(tmp_path)] == list(range(7))


def test_without_a_size_the_place_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    write(tmp_path, range(9))
    write(tmp_path, range(4, 6), tmp_path / "old")
    assert [step.version for step in read_trained(tmp_path)] == list(range(6))


def test_a_file_that_was_edited_is_searched_too(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_5"
    write(tmp_path, range(9), save_at={5: checkpoint})
    path = tmp_path / FILE_NAME
    path.write_text(path.read_text().replace('"version": 0,', '"version":      0,'))
    write(tmp_path, range(5, 7), checkpoint)
    assert [step.version for step in read_trained(tmp_path)] == list(range(7))


def test_a_run_that_begins_again_begins_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, range(9))
    write(tmp_path, range(2))
    assert [step.version for step in read_trained(tmp_path)] == [0, 1]


def test_a_run_that_trained_nothing_has_no_steps(tmp_path: Path) -> None:
    assert list(read_trained(tmp_path)) == []


@pytest.mark.parametrize("ranges", [None, "AA", "kwECAw=="])
def test_a_line_that_is_no_step_is_named(tmp_path: Path, ranges: str | None) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps({"version": 3, "ranges": ranges}) + "\n")
    with pytest.raises(InputError, match=r"trained.jsonl:1: not the ranges of a step"):
        list(read_trained(tmp_path))


def test_a_person_can_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, range(4, 5))
    monkeypatch.setattr("sys.argv", ["trained", str(tmp_path)])
    main()
    first, *_ = json.loads(capsys.readouterr().out)["ranges"]
    assert first == [16, 0, 57, 3, 4]
