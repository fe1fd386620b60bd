"""The conversion benchmark, on its tiny model: the command line converts both ways, and the figures are complete."""

from __future__ import annotations

from pathlib import Path

from opd_async.bench import convert


def test_a_round_trip_is_measured(tmp_path: Path) -> None:
    rows = convert.round_trip(tmp_path, *convert.TINY)
    assert [command for command, *_ in rows] == ["hf-to-megatron", "megatron-to-hf"]
    for _, nbytes, seconds, peak_mib in rows:
        assert 0 < nbytes < (tmp_path / "hf" / "model.safetensors").stat().st_size
        assert seconds > 0
        assert peak_mib > 1, "a process that has loaded torch"


def test_the_table_has_a_line_per_command() -> None:
    rows = [
        convert.Row(command="hf-to-megatron", model_mib=100.0, seconds=1.0, peak_mib=350.0, base_mib=250.0, copies=1.0)
    ]
    header, line = convert.table(rows).splitlines()
    assert "copies" in header
    assert line.split() == ["hf-to-megatron", "100.0", "1.0", "350", "250", "1.00"]
