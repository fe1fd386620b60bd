"""The alert rules, by the program that Prometheus has for testing them, and against the catalogue."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import yaml
from deadlines import patience

from opd_async.telemetry.metrics import CATALOGUE, MetricKind

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
RULES = yaml.safe_load((DASHBOARDS / "alerts.yaml").read_text())["groups"][0]["rules"]


def promtool(*words: str) -> str:
    """What promtool prints; its verdict is its exit code."""
    assert shutil.which("promtool"), "this test runs promtool: requirements/tools.sh installs it"
    done = subprocess.run(
        ["promtool", *words], cwd=DASHBOARDS, capture_output=True, text=True, timeout=patience(60), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rules_are_valid_and_do_what_their_tests_say() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", "alerts.yaml")
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yaml")


def test_every_rule_has_a_test_in_which_it_fires() -> None:
    fired = set()
    for case in yaml.safe_load((DASHBOARDS / "alerts_test.yaml").read_text())["tests"]:
        fired |= {one["alertname"] for one in case.get("alert_rule_test", ()) if one["exp_alerts"]}
        for one in case.get("promql_expr_test", ()):
            if one["exp_samples"]:
                fired |= set(re.findall(r'alertname="(\w+)"', one["expr"] + str(one["exp_samples"])))
    assert fired == {rule["alert"] for rule in RULES}


def test_rules_name_only_metrics_of_the_catalogue() -> None:
    series = {metric.name: metric for metric in CATALOGUE}
    for rule in RULES:
        for name in re.findall(r"\bopd_\w+", rule["expr"]):
            metric = series.get(name) or series[name.removesuffix("_bucket")]
            assert (metric.kind is MetricKind.HISTOGRAM) == (name != metric.name), name
