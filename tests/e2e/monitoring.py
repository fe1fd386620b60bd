"""Debian's Prometheus over a run: started before it, asked after it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import yaml
from claimed_ports import claimed_port
from deadlines import patience
from harness import ROOT

DASHBOARD = json.loads((ROOT / "dashboards" / "opd_async.json").read_text())
RULES = yaml.safe_load((ROOT / "dashboards" / "alerts.yaml").read_text())["groups"][0]["rules"]
SCRAPE_S = 0.5


class Prometheus:
    """Scrapes what `targets` names, twice a second, and has the alert rules."""

    def __init__(self, folder: Path, targets: Path) -> None:
        """`targets` need not be there yet."""
        assert shutil.which("prometheus"), "this test runs Prometheus: requirements/tools.sh installs it"
        folder.mkdir()
        self._claims = ExitStack()
        self._address = f"127.0.0.1:{self._claims.enter_context(claimed_port())}"
        discovery = {"files": [str(targets)], "refresh_interval": "1s"}
        interval = f"{round(1000 * SCRAPE_S)}ms"
        config = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": "1s"},
            "rule_files": [str(ROOT / "dashboards" / "alerts.yaml")],
            "scrape_configs": [{"job_name": "opd_async", "file_sd_configs": [discovery]}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self._log = folder / "prometheus.log"
        self._began = time.time()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self._address}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Prometheus:
        give_up = time.monotonic() + patience(60)
        while True:
            assert self._process.poll() is None, self._log.read_text()
            try:
                urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=patience(10)).close()
            except OSError:
                assert time.monotonic() < give_up, f"Prometheus does not come up:\n{self._log.read_text()}"
                time.sleep(0.1)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        with self._claims:
            self._process.terminate()
            self._process.wait(patience(30))

    def samples(self, expression: str) -> list[tuple[dict[str, str], list[float]]]:
        """The series of an expression over the time since the start, without values that are no numbers."""
        query = {"query": expression, "start": self._began, "end": time.time(), "step": 0.5}
        url = f"http://{self._address}/api/v1/query_range?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=patience(30)) as reply:
                result = json.loads(reply.read())["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from None
        numbers = [(one["metric"], [float(value) for _, value in one["values"]]) for one in result]
        return [(labels, found) for labels, values in numbers if (found := [v for v in values if not math.isnan(v)])]

    def empty_panels(self, run: str, absent_rows: tuple[str, ...]) -> list[str]:
        """`panel: expression` of everything in the dashboard that shows nothing; rows of other runs left out."""
        empty = []
        for row, panel, expression in _panels(run):
            found = self.samples(expression)
            if row.startswith(absent_rows):
                assert not found, f"{row} is no row of this run, and {expression} finds {found}"
            elif not found:
                empty.append(f"{panel}: {expression}")
        return empty

    def empty_in(self, run: str, row: str) -> list[str]:
        """The same for the panels of one row alone, which has some."""
        panels = [(panel, expression) for title, panel, expression in _panels(run) if title.startswith(row)]
        assert panels, f"the dashboard has no row {row}"
        return [f"{panel}: {expression}" for panel, expression in panels if not self.samples(expression)]

    def check_rules(self) -> None:
        """Every rule asks for series that are there, and none of them has fired."""
        for rule in RULES:
            for name in re.findall(r"\b(?:opd_\w+|up)\b", rule["expr"]):
                assert self.samples(f'{name}{{run!=""}}'), f"{rule['alert']} asks for {name}, which has no series"
        fired = self.samples('ALERTS{alertstate="firing"}')
        assert not fired, fired


def _panels(run: str) -> Iterator[tuple[str, str, str]]:
    """Row, panel and expression of everything that the dashboard asks for."""
    row = ""
    for panel in DASHBOARD["panels"]:
        row = panel["title"] if panel["type"] == "row" else row
        for target in panel.get("targets", ()):
            yield row, panel["title"], target["expr"].replace("$run", run).replace("$__rate_interval", "10s")
