"""The manifest for Kubernetes says one thing of a run in all its places; its schemas are looked at in tests/cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_async.agent import parse_arguments
from opd_async.checks.cluster import cluster_problems
from opd_async.cluster.secret import SECRET_ENV
from opd_async.config.clustering import Backend
from opd_async.config.topology import Topology

MANIFEST = Path(__file__).parents[2] / "examples/cluster/kubernetes.yaml"
Objects = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def objects() -> Objects:
    """Everything in the manifest by its kind and name."""
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.fixture(scope="module")
def topology(objects: Objects) -> Topology:
    """The run that it starts."""
    return Topology.model_validate(yaml.safe_load(objects["ConfigMap", "opd"]["data"]["run.yaml"]))


def pod(objects: Objects, kind: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The template of the pods, and their one container."""
    template = objects[kind, name]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    return template, container


def test_the_run_has_as_many_hosts_and_gpus_as_there_are_pods(objects: Objects, topology: Topology) -> None:
    agents = objects["StatefulSet", "opd-agent"]["spec"]
    _, agent = pod(objects, "StatefulSet", "opd-agent")
    assert topology.cluster.backend is Backend.AGENTS and topology.cluster.nodes == agents["replicas"] + 1
    assert topology.cluster.gpus_per_node == agent["resources"]["limits"]["nvidia.com/gpu"]
    assert not topology.cluster.launcher_takes_devices
    assert list(cluster_problems(topology)) == []


def test_agents_join_where_the_launcher_is(objects: Objects, topology: Topology) -> None:
    template, launcher = pod(objects, "Job", "opd-launcher")
    _, agent = pod(objects, "StatefulSet", "opd-agent")
    service = objects["Service", "opd-launcher"]["spec"]
    python, dash, module, *words = agent["command"]
    assert (python, dash, module) == ("python", "-m", "opd_async.agent")
    assert parse_arguments(words).join == f"opd-launcher:{topology.cluster.port}"
    assert service["selector"] == template["metadata"]["labels"]
    assert [port["targetPort"] for port in service["ports"]] == [topology.cluster.port]
    assert launcher["command"] == ["opd", "run", "/etc/opd/run.yaml"]
    headless = objects["Service", objects["StatefulSet", "opd-agent"]["spec"]["serviceName"]]["spec"]
    assert headless["clusterIP"] == "None"


@pytest.mark.parametrize("name", ["opd-agent", "opd-launcher"])
def test_every_pod_has_the_secret_and_the_shared_folder(name: str, objects: Objects, topology: Topology) -> None:
    kind = "StatefulSet" if name == "opd-agent" else "Job"
    template, container = pod(objects, kind, name)
    (secret,) = [each for each in container["env"] if each["name"] == SECRET_ENV]
    assert secret["valueFrom"]["secretKeyRef"] == {"name": "opd", "key": "secret"}
    volumes = {each["name"]: each for each in template["spec"]["volumes"]}
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    claim = objects["PersistentVolumeClaim", volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"]]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert topology.run_dir.is_relative_to("/shared") and container["workingDir"] == "/shared"
    labels = template["metadata"]["labels"]
    if kind == "StatefulSet":
        assert objects[kind, name]["spec"]["selector"]["matchLabels"] == labels
    else:
        assert volumes[mounts["/etc/opd"]]["configMap"] == {"name": "opd"}
