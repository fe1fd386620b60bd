"""What a GPU will be asked, tiny and on the CPU: every script runs, and their frame keeps what it has to keep."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from deadlines import patience

from opd_async.bench.gpu import all as everything
from opd_async.bench.gpu import engine, faults, found, machine, pipeline, step, varlen
from opd_async.bench.gpu.all import PARTS, Part
from opd_async.bench.gpu.speed import useful_flops
from opd_async.bench.memory import batch_of
from opd_async.forecast.cost_model import Decoder

SCRIPTS = Path(machine.__file__).parent


def read(file: Path) -> tuple[dict[str, float], dict[str, object]]:
    """Checks by name, all of which passed, and figures."""
    kept = json.loads(file.read_text())
    assert [check for check in kept["checks"] if not check["passed"]] == []
    return {check["name"]: check["value"] for check in kept["checks"]}, kept["figures"]


def test_attention_is_the_textbooks(tmp_path: Path) -> None:
    varlen.main(["--tiny", "--json", str(tmp_path / "found.json")])
    checks, figures = read(tmp_path / "found.json")
    assert len(checks) == 4 * 2 * 4 and "TFLOP/s of 2 x 64 tokens" in figures
    assert 0.0 < checks["context, float32: key"] < 1e-5


def test_attention_of_another_scale_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, right = varlen.cases(tiny=True)[0], varlen.attention

    def wrong(case: varlen.Case, kernel: varlen.PackKernel) -> varlen.PackedAttention:
        module = right(case, kernel)
        module.scale *= 1.1
        return module

    monkeypatch.setattr(varlen, "attention", wrong)
    assert max(varlen.errors(case, torch.float32, [7, 12]).values()) > varlen.LIMITS[torch.bfloat16]


def test_ways_with_kernels_of_others_are_taken_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(devices: int, *installed: str) -> set[str]:
        monkeypatch.setattr(step, "find_spec", lambda name: name if name in installed else None)
        return {name for name, way in step.WAYS.items() if way.fits(devices)}

    alone = {"cpu", "float32", "recompute", "selective", "bfloat16"}
    assert taken(1) == alone and taken(2) == alone | {"tensor", "data"}
    assert taken(0, "liger_kernel", "transformer_engine") == alone | {"tensor", "data"}
    assert taken(1, "liger_kernel") == alone | {"liger"}
    assert taken(1, "transformer_engine") == alone | {"te"}


def test_an_engine_is_asked_everything(tmp_path: Path) -> None:
    engine.main(["--tiny", "--json", str(tmp_path / "found.json")])
    checks, figures = read(tmp_path / "found.json")
    assert checks["cache: tokens computed again"] == 0 and figures["checksums of new weights were compared"] is True
    assert {name.partition(":")[0] for name in checks} >= {"scores", "parts", "generation", "new weights"}


@pytest.mark.long
def test_faults_are_survived(tmp_path: Path) -> None:
    faults.main(["--tiny", "--json", str(tmp_path / "found.json")])
    checks, figures = read(tmp_path / "found.json")
    assert checks["killed: updates that do not name the engine"] == 0
    assert figures["killed: checksums of the new engine were compared"] is True


@pytest.mark.long
def test_a_run_goes_to_its_end(tmp_path: Path) -> None:
    deadline = ["--deadline-s", str(patience(120))]
    pipeline.main(["--tiny", "--ways", "disk", *deadline, "--json", str(tmp_path / "found.json")])
    checks, figures = read(tmp_path / "found.json")
    assert checks["disk: exit code"] == 0 and figures["disk: trained tokens"]


def test_the_whole_keeps_what_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = next(part for part in PARTS if part.name == "speed")
    broken = Part(name="broken", module="gpu.nowhere", minutes=patience(10))
    monkeypatch.setattr(everything, "PARTS", (broken, Part(**{**_fields(speed), "minutes": patience(2)})))
    command = ["--tiny", "--out", str(tmp_path), "--minutes", str(patience(10))]
    with pytest.raises(SystemExit):
        everything.main(command)
    first = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert first["broken"]["state"] == "failed" and "nowhere" in first["broken"]["tail"]
    figures = first["speed"]["found"]["figures"]
    assert first["speed"]["state"] == "passed" and figures["share of the peak"] > 0.0
    assert figures["profile"] and math.isclose(
        figures["tokens/s"] * figures["seconds of a step"], figures["tokens in a step"]
    )
    with pytest.raises(SystemExit):
        everything.main(command)  # goes on: what has passed is as it was
    assert json.loads((tmp_path / "report.json").read_text())["parts"]["speed"] == first["speed"]


def _fields(part: Part) -> dict[str, object]:
    return {name: getattr(part, name) for name in Part.__slots__}


def test_a_part_ends_with_its_children_at_its_deadline(tmp_path: Path) -> None:
    sleeper = f"[sys.executable, '-c', 'import time; time.sleep(900)', {str(tmp_path)!r}]"
    child = f"import subprocess, sys; subprocess.run({sleeper})"
    state, seconds = everything.run([sys.executable, "-c", child], tmp_path / "log", 1.0)
    assert state == "out of time" and seconds >= 1.0
    give_up = time.monotonic() + patience(10)
    while left(tmp_path) and time.monotonic() < give_up:  # a killed process is there for another moment
        time.sleep(0.05)
    assert left(tmp_path) == []


def left(folder: Path) -> list[list[str]]:
    """The command lines that name a folder."""
    lines = [one.info["cmdline"] or [] for one in psutil.process_iter(["cmdline"])]
    return [words for words in lines if any(str(folder) in word for word in words)]


def test_findings_are_kept_from_the_first_on(tmp_path: Path) -> None:
    findings = found.Findings(tmp_path / "found.json")
    findings.check("small enough", 1.0, 2.0)
    assert json.loads((tmp_path / "found.json").read_text())["checks"][0]["passed"] is True
    findings.check("too large", 3.0, 2.0)
    findings.check("no number", math.nan, 2.0)
    findings.figure("seen", [1, 2])
    assert [check.name for check in findings.failed] == ["too large", "no number"]
    with pytest.raises(SystemExit, match="2 of 3 checks failed"):
        found.end(findings)


def test_without_a_gpu_only_tiny_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        machine.main([])
    assert "torch sees no CUDA device here; --tiny tries the script on the CPU" in capsys.readouterr().err


def test_what_machines_and_options_allow() -> None:
    def names(gpus: int, python: Path | None = None, only: str = "", tiny: bool = False) -> list[str]:
        return [p.name for p in everything.wanted(argparse.Namespace(only=only, python=python, tiny=tiny), gpus)]

    one, two = names(1), names(2, Path("python"))
    assert one[:3] == ["machine", "varlen", "step"] and "weights" not in one and "engine sglang" not in one
    assert two == [part.name for part in PARTS]
    assert names(0, tiny=True) == ["machine", "varlen", "step", "speed", "faults", "engine", "pipeline"]
    assert names(2, only="step,machine") == ["machine", "step"]
    with pytest.raises(SystemExit, match="--only nothing: parts are machine, "):
        names(1, only="nothing")
    assert {part.module for part in PARTS if part.module.startswith("gpu.")} == {
        f"gpu.{file.stem}" for file in SCRIPTS.glob("[a-z]*.py") if file.stem not in ("all", "found")
    }


def test_useful_work_is_counted_from_shapes() -> None:
    model = Decoder(layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=16, vocab=32)
    batch = batch_of(128, 32)
    body = 2 * (8 * 4 * (2 * 2 + 2 * 1) + 3 * 8 * 16)
    pairs = 3 * 4 * 2 * 2 * 4 * 128 * 128 / 2
    assert useful_flops(model, batch) == 6 * body * 128 + 6 * 32 * 8 * len(batch.rows) + pairs


def test_outcomes_of_a_suite() -> None:
    cases = '<testcase name="good"/><testcase name="bad"><failure/></testcase><testcase name="none"><error/></testcase>'
    assert engine.outcomes(f"<testsuites><testsuite>{cases}</testsuite></testsuites>") == (3, ["bad", "none"])
