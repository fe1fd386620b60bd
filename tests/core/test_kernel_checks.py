"""Kernels that cannot be had are refused before a start: by name, each with what to write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_runs import make_model, small_topology

from opd_async.checks.kernels import import_problem, kernel_problems
from opd_async.checks.validation import validate
from opd_async.config.resuming import Change, may_change
from opd_async.data.decoder import read_shape
from opd_async.data.kernel_limits import PARTS, kernel_problem

CUDA = "learner.devices=['cuda:0']"
HALF = "learner.dtype=bfloat16"


def install(root: Path, monkeypatch: pytest.MonkeyPatch, package: str, *, without: str = "") -> None:
    """Put modules with the names that the learner takes on the path of every Python that is started."""
    for module, name in PARTS[package].items():
        file = root.joinpath("packages", *module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in file.relative_to(root / "packages").parents:
            (root / "packages" / folder / "__init__.py").touch()
        file.write_text("" if name == without else f"{name} = None\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root / "packages"), os.environ.get("PYTHONPATH", "")]))


def test_torchs_kernels_need_nothing(tmp_path: Path) -> None:
    for kernels in ("auto", "torch"):
        assert list(kernel_problems(small_topology(tmp_path, f"learner.kernels={kernels}"))) == []
    assert may_change("learner.kernels") is Change.YES


@pytest.mark.parametrize("kernels", ["te", "liger"])
def test_kernels_for_cuda_are_refused_on_the_cpu(tmp_path: Path, kernels: str) -> None:
    found = [line for line in validate(small_topology(tmp_path, f"learner.kernels={kernels}")) if "kernels" in line]
    assert found == [
        f"learner.kernels: {kernels}, whose kernels run on CUDA only, but learner.devices has cpu; write auto"
    ]


def test_packages_that_are_missing_or_too_old_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = small_topology(tmp_path, "learner.kernels=liger", CUDA)
    (found,) = kernel_problems(topology)
    assert found.startswith("learner.kernels: liger, which cannot be imported (ModuleNotFoundError: No module named ")
    assert found.endswith("); install liger-kernel, or write auto")
    install(tmp_path, monkeypatch, "liger", without="LigerFusedGateUpSiLUMulFunction")
    assert "cannot import name 'LigerFusedGateUpSiLUMulFunction'" in str(import_problem("liger"))
    install(tmp_path, monkeypatch, "liger")
    assert list(kernel_problems(topology)) == []


def test_transformer_engines_attention_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "te")
    make_model(tmp_path / "heads", head_dim=8)
    fits = ("learner.kernels=te", CUDA, HALF, f"models.student.path={tmp_path / 'heads'}")
    assert list(kernel_problems(small_topology(tmp_path, *fits))) == []
    (found,) = kernel_problems(small_topology(tmp_path, *fits, "learner.dtype=float32"))
    assert found == "learner.kernels: te, whose attention takes no float32; write learner.dtype: bfloat16, or auto"
    (found,) = kernel_problems(small_topology(tmp_path, *fits, "learner.context_parallel=2"))
    assert found.startswith("learner.kernels: te, but learner.context_parallel 2 has an attention of its own")
    (found,) = kernel_problems(small_topology(tmp_path, *fits[:3]))
    assert found.startswith("learner.kernels: te, whose attention takes heads of at most 256 channels, a multiple of 8")


def test_ligers_rows_have_a_limit(tmp_path: Path) -> None:
    wide = read_shape(make_model(tmp_path / "wide", intermediate_size=65544))
    assert kernel_problem("liger", wide, 2) is None and kernel_problem("auto", wide, 1) is None
    assert str(kernel_problem("liger", wide, 1)).startswith(
        "liger, whose kernels take rows of at most 65,536 channels, and this model has 65,544 MLP channels on a rank"
    )
