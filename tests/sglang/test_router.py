"""A router in front of two real servers: generation through it, weights and aborts to the servers themselves."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from harness import Launch, check_trained, make_inputs, topology, write_topology
from server_under_test import ADMIN_KEY, API_KEY, PYTHON, VERSION, running

from opd_async.plan.free_ports import free_ports

STEPS = 4
pytestmark = pytest.mark.timeout(900)


@contextmanager
def router_to(urls: list[str], log: Path) -> Iterator[str]:
    """smg, once it knows all servers; it must not send a request again by itself."""
    port, metrics = free_ports("127.0.0.1", 2)
    command = [
        *(str(PYTHON), "-m", "smg.launch_router", "--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)),
        *("--policy", "round_robin", "--disable-retries", "--api-key", API_KEY, "--worker-urls", *urls),
    ]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            give_up = time.monotonic() + 120.0
            while healthy_workers(url) < len(urls):
                assert process.poll() is None and time.monotonic() < give_up, log.read_text()[-3000:]
                time.sleep(0.3)
            yield url
        finally:
            process.kill()


def healthy_workers(url: str) -> int:
    request = urllib.request.Request(f"{url}/workers", headers={"Authorization": f"Bearer {API_KEY}"})
    try:
        with urllib.request.urlopen(request, timeout=5.0) as reply:
            return sum(bool(worker["is_healthy"]) for worker in json.load(reply)["workers"])
    except OSError:
        return 0


if VERSION is not None and VERSION >= (0, 5, 20):  # what smg 1.13 expects of a server

    def test_two_actors_generate_through_a_router(tmp_path: Path) -> None:
        inputs = make_inputs(tmp_path / "inputs")
        with ExitStack() as stack:
            logs = [tmp_path / f"server-{index}.log" for index in range(2)]
            servers = [stack.enter_context(running(inputs / "student", log)) for log in logs]
            urls = [server.url for server in servers]
            router = stack.enter_context(router_to(urls, tmp_path / "router.log"))
            values = topology(inputs, tmp_path, schedule__steps=STEPS, learner__weight_transport="tensor")
            values["engines"]["student"] |= {
                "kind": "external",
                "urls": urls,
                "router": router,
                "replicas": 2,
                "api_key": API_KEY,
                "admin_api_key": ADMIN_KEY,
            }
            values["rollout"]["replicas"] = 2
            values["supervisor"] |= {"start_deadline_s": 300.0, "heartbeat_deadline_s": 120.0}
            with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
                assert run.wait(500.0) == 0, run.text()
        check_trained(tmp_path / "run", 1, STEPS)
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        assert report["restarts"] == {} and report["cuts"] > 0
        assert all('"POST /generate HTTP/1.1" 200' in log.read_text() for log in logs)
