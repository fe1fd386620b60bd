"""A run with two teachers: the student itself, and another model. The reverse KL tells who has scored.

It has rewards too, and Prometheus watches it: the run that has the most to show in the dashboard.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import Launch, check_trained, steps, topology, write_topology
from monitoring import Prometheus

from opd_async.run.trained import read_trained

STEPS, BUDGET, LONGEST = 12, 128, 32
SAME = 30
"""The first so many prompts belong to the teacher that is the student: more than the first step can have, of which two
budgets may be there and what is in flight, and fewer than all steps take."""


@pytest.mark.long
def test_each_sample_is_scored_by_its_teacher(inputs: Path, tmp_path: Path) -> None:
    owners = ["same" if n < SAME else "other" for n in range(400)]
    prompts = [
        {"prompt": f"t{10 + n % 90} t{100 + n % 90}", "metadata": {"who": who}, "label": "t1"}
        for n, who in enumerate(owners)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    judged = prompts[SAME - 2 : SAME + 3]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    # the student must stay what it is
    values = topology(inputs, tmp_path, schedule__steps=STEPS, learner__optimizer__lr=1e-12)
    values["models"] = {
        "student": {"path": str(inputs / "student")},
        "teachers": {"same": {"path": str(inputs / "student")}, "other": {"path": str(inputs / "teacher")}},
    }
    engine = values["engines"].pop("teacher")
    values["engines"]["teachers"] = {"same": engine | {"replicas": 2}, "other": engine}
    values["data"] = {
        "train": {"path": str(tmp_path / "prompts.jsonl")},
        "held_out": {"path": str(tmp_path / "held_out.jsonl")},
        "teacher_key": "who",
        "shuffle": False,
    }
    values["rollout"]["sampling"]["max_response_tokens"] = LONGEST
    values["schedule"]["tokens_per_step"] = BUDGET
    values["reward"] = {"kind": "exact_match"}
    values["telemetry"] = {"planned_tokens_per_s": 1000.0}
    folder = tmp_path / "run"
    with Prometheus(tmp_path / "prometheus", folder / "targets.json") as watcher:
        with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
            assert run.wait() == 0, run.text()
        assert watcher.empty_panels("run", ("SGLang", "Distance to the teacher", "GPUs")) == []
        watcher.check_rules()
    assert json.loads((folder / "targets.json").read_text()) == [], "nobody is missed once the run is over"
    check_trained(folder, 1, STEPS)
    log = list(read_trained(folder))
    shares = []
    for row in log:
        tokens = {"same": 0, "other": 0}
        for (sample, start, end, *_), teacher in zip(row.ranges.tolist(), row.teachers, strict=True):
            assert teacher == owners[sample]
            tokens[teacher] += end - start
        shares.append(tokens["other"] / sum(tokens.values()))
    assert shares[0] == 0.0 and shares[-1] == 1.0
    for share, row in zip(shares, steps(folder), strict=True):
        assert share > 0.0 or abs(row["learner_reverse_kl"]) < 1e-4, "scored by the student itself"
        assert share < 1.0 or abs(row["learner_reverse_kl"]) > 1e-3, "scored by another model"
    others = [row for share, row in zip(shares, steps(folder), strict=True) if share == 1.0]
    assert sum(row["learner_reverse_kl"] * row["tokens"] for row in others) > 0.1 * sum(row["tokens"] for row in others)
    assert all(row["planned_share"] > 0.0 for row in steps(folder) if "tokens_per_device_s" in row)
    report = json.loads((folder / "report.json").read_text())
    assert report["teacher"] is None
    assert {name: of["prompts"] for name, of in report["teachers"].items()} == {"teacher same": 2, "teacher other": 3}
    assert "teacher other " in run.text()
