"""What the real trackers write offline, read back with their own readers: no step twice after a resume.

Their packages are in an environment of their own, which `make test` makes before (`make trackers`).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from deadlines import patience

from opd_async.telemetry.trackers import SCRIPT

PYTHON = Path(__file__).parents[2] / ".venv-trackers/bin/python"
# each prints what its tracker has, in one form
READERS = {
    "tensorboard": """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(f"{sys.argv[1]}/my-run", size_guidance={"scalars": 0, "tensors": 0}).Reload()
text = lambda tag: [one.tensor_proto.string_val[0].decode() for one in events.Tensors(tag)]
print(json.dumps({
    "rows": [[one.step, one.value] for one in events.Scalars("train/tokens")],
    "evaluation": [[one.step, one.value] for one in events.Scalars("evaluation/student/sums/reverse_kl")],
    "samples": [len(one.splitlines()) - 2 for one in text("samples")],
    "config": "5e-06" in text("config")[0], "report": '"steps": 4' in text("report")[0],
}))
""",
    "wandb": """
import glob, json, sys
from wandb.proto import wandb_internal_pb2

def records(data):
    # LevelDB's log format: blocks of 32 KiB; a record is whole (1), or has a first, middle and last part (2, 3, 4)
    assert data.startswith(b":W&B")
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""

found = {"rows": [], "evaluation": [], "samples": [], "config": False, "report": False}
runs = set()
for path in sorted(glob.glob(f"{sys.argv[1]}/wandb/offline-run-*/run-*.wandb")):
    for record in records(open(path, "rb").read()):
        if record.HasField("run"):
            runs.add((record.run.run_id, record.run.project, record.run.display_name))
            config = {one.key: json.loads(one.value_json) for one in record.run.config.update}
            found["config"] |= config["learner"]["optimizer"]["lr"] == 5e-6
        items = {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in record.history.item}
        if "train/tokens" in items:
            found["rows"].append([items["step"], items["train/tokens"]])
        if "evaluation/student/sums/reverse_kl" in items:
            found["evaluation"].append([items["step"], items["evaluation/student/sums/reverse_kl"]])
        if "samples" in items or "samples/nrows" in items:
            found["samples"].append(items.get("samples/nrows") or items["samples"]["nrows"])
        summary = [one.key or "/".join(one.nested_key) for one in record.summary.update]
        found["report"] |= any(name.startswith("report") for name in summary)
assert len(runs) == 1 and next(iter(runs))[1:] == ("sums", "my-run"), runs
print(json.dumps(found))
""",
    "mlflow": """
import json, os, pathlib, sys
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
from mlflow.tracking import MlflowClient
client = MlflowClient(tracking_uri=pathlib.Path(f"{sys.argv[1]}/mlruns").as_uri())
(run,) = client.search_runs([client.get_experiment_by_name("sums").experiment_id])
assert run.info.run_name == "my-run" and run.info.status == "FINISHED", run
history = lambda name: [[one.step, one.value] for one in client.get_metric_history(run.info.run_id, name)]
root = pathlib.Path(run.info.artifact_uri.removeprefix("file://"))
tables = [json.loads(path.read_bytes()) for path in sorted((root / "samples").iterdir())]
print(json.dumps({
    "rows": history("train/tokens"), "evaluation": history("evaluation/student/sums/reverse_kl"),
    "samples": [len(one["data"]) for one in tables], "config": run.data.params["learner.optimizer.lr"] == "5e-06",
    "report": json.loads((root / "report.json").read_bytes())["steps"] == 4,
}))
""",
    "trackio": """
import json, os, sys
os.environ["TRACKIO_DIR"] = sys.argv[1]
import trackio
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("sums")
assert name.startswith("my-run-"), name
rows = SQLiteStorage.get_logs("sums", name)
column = lambda key: [[one["step"], one[key]] for one in rows if key in one]
print(json.dumps({
    "rows": column("train/tokens"), "evaluation": column("evaluation/student/sums/reverse_kl"),
    "samples": [len(one["_value"]) for _, one in column("samples")],
    "config": "5e-06" in str(SQLiteStorage.get_run_config("sums", name)),
    "report": column("report/steps") == [[4, 4.0]],
}))
""",
}


def launch(root: Path, kind: str, steps: range, tokens: int, rewind: int | None, report: bool) -> None:
    """One launch of a run, as the launcher would tell it."""
    facts = {"project": "sums", "name": "my-run", "group": None, "offline": True, "config": CONFIG}
    lines: list[dict[str, Any]] = [
        {"kind": kind, "folder": str(root / kind), "state": str(root / "state.json"), **facts}
    ]
    if rewind is not None:
        lines.append({"rewind": rewind})
    for step in steps:
        row = {"step": step, "time": 1.7e9 + step, "tokens": tokens, "staleness_counts": [1, 2], "reward_mean": None}
        lines += [{"sample": SAMPLE | {"step": step}}, {"step": row}]
    last = steps[-1]
    facts = {"evaluation": "student", "set": "sums", "step": last, "time": 1.7e9 + last}
    lines.append({"evaluation": {**facts, "reverse_kl": 0.5}})
    if report:
        lines.append({"report": {"name": "my-run", "steps": 4, "teacher": None}})
    text = "\n".join(map(json.dumps, lines)) + "\n"
    ended = run([str(PYTHON), "-P", str(SCRIPT)], text)
    assert ended.stdout == "", f"rows were lost: {ended.stdout}\n{ended.stderr}"


def run(command: list[str], text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WANDB_SILENT": "true", **variables}
    ended = subprocess.run(
        command, input=text, text=True, capture_output=True, timeout=patience(120), env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended


CONFIG = {"name": "my-run", "learner": {"optimizer": {"lr": 5e-6}}}
SAMPLE = {
    "prompt_id": 1,
    "prompt": "1|1=",
    "response": "2\n",
    "response_tokens": 2,
    "finish": "stop",
    "reward": None,
    "student_logprobs": [-1.0, -2.0],
    "teacher_logprobs": [-1.5, -2.0],
}


@pytest.mark.parametrize("kind", sorted(READERS))
def test_a_run_that_was_resumed_is_read_back(tmp_path: Path, kind: str) -> None:
    assert PYTHON.is_file(), "make trackers installs the packages of the trackers"
    assert run([str(PYTHON), "-P", str(SCRIPT), "--check", kind, "offline"]).stdout.strip() == ""
    launch(tmp_path, kind, range(1, 4), tokens=7, rewind=None, report=False)
    launch(tmp_path, kind, range(3, 5), tokens=9, rewind=2, report=True)
    found = json.loads(run([str(PYTHON), "-c", READERS[kind], str(tmp_path / kind)]).stdout.splitlines()[-1])
    third = 9 if kind == "tensorboard" else 7  # the others cannot take back what they were told
    assert found["rows"] == [[1, 7], [2, 7], [3, third], [4, 9]]
    taken_back = kind == "tensorboard"
    assert found["evaluation"] == [[3, 0.5]] * (not taken_back) + [[4, 0.5]]
    assert sum(found["samples"]) >= 4 and found["config"] and found["report"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tensorboard", ""),
        ("wandb", "problem: wandb has no login on this machine; run `wandb login`, set WANDB_API_KEY, "),
        ("mlflow", "problem: mlflow has no server; set MLFLOW_TRACKING_URI, "),
        ("trackio", "problem: trackio has no login for the Space of TRACKIO_SPACE_ID; run `hf auth login`, "),
    ],
)
def test_who_has_no_login_is_told_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    """By the packages' own words about a user who has never used them."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    home = str(tmp_path / "home")
    places = {"HOME": home, "NETRC": f"{home}/netrc", "HF_HOME": f"{home}/hf", "WANDB_CONFIG_DIR": f"{home}/wandb"}
    told = run([str(PYTHON), "-P", str(SCRIPT), "--check", kind, "online"], **places, TRACKIO_SPACE_ID="me/space")
    assert told.stdout.strip() == (f"{words}or write tracking.offline: true" if words else "")
