"""A few steps of the quickstart, and the pipeline with several learner ranks, engines and actors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from deadlines import patience
from harness import ROOT, Launch, check_trained, topology, write_topology
from trace_format import read_checked

from opd_async.telemetry.samples import read_samples


@pytest.mark.parametrize("max_staleness", [1, pytest.param(0, marks=pytest.mark.long)])
def test_quickstart_in_small(tmp_path: Path, max_staleness: int) -> None:
    make_data = [sys.executable, "examples/addition/make_data.py", "--out", str(tmp_path), "--train", "2000"]
    subprocess.run([*make_data, "--held-out", "100"], cwd=ROOT, check=True, timeout=patience(60))
    changes = {
        "run_dir": tmp_path,
        "data.train.path": tmp_path / "train.jsonl",
        "data.held_out.path": tmp_path / "held_out.jsonl",
        "schedule.steps": 4,
        "schedule.max_staleness": max_staleness,
        "schedule.tokens_per_step": 2048,
        "rollout.slots": 64,
        "learner.optimizer.warmup_steps": 1,
        "evaluation.every_steps": 2,
        "checkpoint.export_hf_every_steps": 1,
        "evaluation.prompts": 100,
        "evaluation.during_prompts": 32,
        "telemetry.trace": True,
    }
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    file = tmp_path / "quickstart.yaml"
    file.write_text((ROOT / "examples" / "quickstart.yaml").read_text())
    with Launch(file, *options) as run:
        assert run.wait() == 0, run.text()
    folder = tmp_path / "quickstart"
    report = json.loads((folder / "report.json").read_text())
    assert report["teacher"]["pass_at_1"] >= 0.95 and report["teacher"]["pass_at_1_greedy"] >= 0.97
    assert 0.4 <= report["student_before"]["pass_at_1"] <= 0.8
    assert report["student_after"]["prompts"] == 100
    assert report["staleness"]["max"] <= max_staleness
    assert report["score_latency"]["p99_s"] >= report["score_latency"]["p50_s"] > 0
    assert report["weight_sync"]["blocked_s"] > 0 and 0 < report["prefix_hit_share"] < 1
    for stage in ("rollout", "teacher", "learner"):
        assert report["stages"][stage]["tokens_per_s"] > 0 and 0 <= report["stages"][stage]["idle_share"] <= 1
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "export" / "model.safetensors").is_file() and (folder / "export" / "tokenizer.json").is_file()
    steps = sorted(path.name for path in (folder / "export").iterdir() if path.is_dir())
    assert steps == ["step_00000002", "step_00000003"]
    assert all((folder / "export" / step / "model.safetensors").is_file() for step in steps)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows].count(2) == 2
    page = (ROOT / "docs/running.md").read_text()
    assert [column for row in rows for column in row if f"\n| `{column}` |" not in page] == []
    check_trained(folder, max_staleness, 4)
    check_samples(folder, max_staleness)
    check_timeline(folder)


def check_timeline(folder: Path) -> None:
    """Every process did what its kind does, and samples are followed through all of them to their steps."""
    events = read_checked(folder / "trace.json.gz")
    processes = {one["pid"]: one["args"]["name"] for one in events if one["name"] == "process_name"}
    lanes = {(processes[one["pid"]], one.get("cat")) for one in events if one["ph"] in "Xi"}
    assert lanes >= {
        *(("launcher", lane) for lane in ("events", "evaluations", "generation", "learner's commands", "checkpoints")),
        *(("rollout-0", lane) for lane in ("generate", "evaluate", "stopped")),
        ("teacher-0", "from token to score"),
        *(("intake-0", lane) for lane in ("steps", "parts", "trained")),
        ("learner-0", "commands"),
        *(("samples", lane) for lane in ("generate", "from token to score", "trained")),
    }
    steps = [one["name"] for one in events if one.get("cat") == "steps"]
    assert steps == ["step 1", "step 2", "step 3", "step 4"]
    trained = sum(one["args"]["tokens"] for one in events if one.get("cat") == "steps")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert trained == sum(row["tokens"] for row in rows if "evaluation" not in row)


def check_samples(folder: Path, max_staleness: int) -> None:
    """Four responses of each step and evaluation, each with a text, ages and logprobs of every token."""
    rows = [row for _, row in read_samples(folder / "samples.jsonl")]
    per = Counter((row.get("evaluation"), row["step"]) for row in rows)
    whose = [(None, 1), (None, 2), (None, 3), (None, 4), ("teacher", 0), ("student", 0), ("student", 2), ("student", 4)]
    assert set(per) <= set(whose) and set(whose[4:]) <= set(per) and max(per.values()) == 4
    trained = [row for row in rows if "sample" in row]
    assert len(trained) >= 8
    for row in trained:
        sizes = {len(row[name]) for name in ("ends", "student_logprobs", "teacher_logprobs")}
        assert sizes == {row["response_tokens"]} and row["ends"][-1] == len(row["response"])
        assert row["prompt"].endswith("=") and row["response"].endswith("<eos>" if row["finish"] == "stop" else "")
        assert row["chunks"][-1][0] == row["parts"][-1][0] == row["response_tokens"]
        assert row["parts"][-1][1] == row["step"] and min(wait for *_, wait in row["chunks"]) >= 0
        first = row["parts"][0][1] - 1
        assert 0 <= first - row["chunks"][0][1] <= max_staleness
    for row in rows:
        if "evaluation" in row:
            assert row["right"] == row["response"].endswith(f":{row['label']}<eos>")
    assert (folder / "samples.html").stat().st_size > 10_000


@pytest.mark.parametrize("train_on", ["tokens", pytest.param("samples", marks=pytest.mark.long)])
def test_several_of_everything(inputs: Path, tmp_path: Path, train_on: str) -> None:
    values = topology(inputs, tmp_path, schedule__steps=4)
    transport = "broadcast" if train_on == "tokens" else "disk"
    values["learner"] |= {
        "data_parallel": 2,
        "tensor_parallel": 2 if train_on == "tokens" else 1,
        "weight_transport": transport,
    }
    values["schedule"] |= {"train_on": train_on, "samples_per_step": 4}
    for side in ("student", "teacher"):
        values["engines"][side]["replicas"] = 2
    values["rollout"] |= {"replicas": 2, "group_size": 2}
    values["teacher"] |= {"replicas": 2}
    if train_on == "tokens":
        values["learner"]["load"] = str(tmp_path / "megatron")
        words = ["hf-to-megatron", "--hf", str(inputs / "student"), "--out", values["learner"]["load"]]
        subprocess.run(
            [sys.executable, "-m", "opd_async.learner.convert", *words], cwd=ROOT, check=True, timeout=patience(60)
        )
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        assert run.wait() == 0, run.text()
    ranges = check_trained(tmp_path / "run", 1, 4)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["restarts"] == {}
    logs = "".join(path.read_text() for path in (tmp_path / "run" / "logs").glob("learner*"))
    assert ("began with the weights of" in logs) == (train_on == "tokens")
    if train_on == "samples":
        assert sorted(ranges) == list(range(16)) and report["cuts"] == 0
