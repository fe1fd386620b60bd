"""The manifest in examples/cluster by the schemas of Kubernetes, which `make kubernetes` installs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from deadlines import patience
from harness import ROOT

MANIFEST = ROOT / "examples/cluster/kubernetes.yaml"
PYTHON = ROOT / ".venv-kubernetes/bin/python"
OLDEST, NEWEST = "1.28", "1.37"


def validate(manifest: Path, version: str) -> subprocess.CompletedProcess[str]:
    """Read a manifest by the schemas of a version, which know every key."""
    assert PYTHON.exists(), f"this test needs {PYTHON}; run `make kubernetes`"
    words = [str(PYTHON), "-m", "kubernetes_validate", "--strict", "-k", version, str(manifest)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=patience(60))


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_of_the_manifest_is_one(version: str) -> None:
    done = validate(MANIFEST, version)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    for kind in ("configmap/opd", "persistentvolumeclaim/opd", "service/opd-launcher", "statefulset/opd-agent"):
        assert f"passed for resource {kind} against version {version}" in said
    assert "passed for resource job/opd-launcher" in said


@pytest.mark.parametrize(("key", "wrong"), [("replicas: 3", "replicas: three"), ("backoffLimit", "backofLimit")])
def test_what_is_wrong_with_a_manifest_is_seen(key: str, wrong: str, tmp_path: Path) -> None:
    text = MANIFEST.read_text()
    assert key in text
    broken = tmp_path / "broken.yaml"
    broken.write_text(text.replace(key, wrong))
    assert validate(broken, NEWEST).returncode != 0
