"""What is installed on GPU hosts: one torch for the learner and SGLang, also where the installing host has no GPU."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from deadlines import patience

from opd_async.engines.sglang import SUPPORTED

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^torch==(\d+)\.(\d+)\.(\d+)$", re.MULTILINE)


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_supported_sglang_has_a_torch_for_the_learner(version: str) -> None:
    text = (ROOT / f"requirements/gpu-{version}.txt").read_text()
    assert f"beside SGLang {version}:" in text
    [pin] = LINE.findall(text)
    least = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert least is not None and tuple(map(int, pin)) >= tuple(map(int, least.groups()))


@pytest.mark.parametrize("version", SUPPORTED)
def test_both_sides_are_installed(version: str) -> None:
    command = ["make", "-n", "gpu", f"SGLANG_VERSION={version}", "SGLANG=.venv-nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(30), check=True)
    [others] = [line for line in done.stdout.splitlines() if line.startswith("grep ")]
    left = subprocess.run(["sh", "-c", others.partition(" >")[0]], cwd=ROOT, capture_output=True, text=True, check=True)
    both = left.stdout + (ROOT / f"requirements/gpu-{version}.txt").read_text()
    names = [line.partition("==")[0] for line in both.splitlines() if not line.startswith("#")]
    assert len(names) == len(set(names)) and {"torch", "setuptools", "megatron-core"} <= set(names)
    assert f"-r .venv/others.txt -r requirements/gpu-{version}.txt" in done.stdout
    assert f"engines/sglang/install.sh .venv-nowhere {version}" in done.stdout


def test_an_image_gets_sglangs_own_packages_without_a_gpu(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"\n')
    python.chmod(0o755)
    command = [str(ROOT / "engines/sglang/install.sh"), str(tmp_path), "0.5.23"]
    subprocess.run(command, env=os.environ | {"SGLANG_GPU": "1"}, timeout=patience(30), check=True)
    assert (tmp_path / "asked").read_text().split()[-2:] == ["install", "sglang==0.5.23"]


def test_the_image_for_cpu_hosts_is_made_as_on_any_host() -> None:
    text, gpu = ((ROOT / name).read_text() for name in ("Containerfile.cpu", "Containerfile"))
    assert "RUN make install\n" in text
    assert set(text.splitlines()[5:]) - set(gpu.splitlines()) == {"RUN make install"}


def test_the_image_is_made_by_the_same_command() -> None:
    text = (ROOT / "Containerfile").read_text()
    assert "RUN make gpu SGLANG_VERSION=${SGLANG_VERSION}" in text
    assert re.search(r"^ARG SGLANG_VERSION=(\S+)$", text, re.MULTILINE).group(1) in SUPPORTED  # type: ignore[union-attr]
