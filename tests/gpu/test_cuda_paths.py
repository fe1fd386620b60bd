"""The learner's CUDA and NCCL paths, run on tensors without values: devices, dtypes, host waits, memory and work.

What a step costs is compared with `accepted.json`, so that a change that adds a wait or doubles the memory is seen.
`python tests/gpu/test_cuda_paths.py` writes that file anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from cuda_rank import Case, Found

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ACCEPTED = HERE / "accepted.json"
DEADLINE_S = 1800.0
"""Of a hang alone: an idle machine takes a minute, and a busy one may take ten times as long."""
ROOM = 0.1
"""A cost may move by this share, as it does with versions of torch; host waits may not move."""
DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
}
EXPERTS = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MODELS = {"dense": DENSE, "experts": EXPERTS}
ALONE = [
    Case(name="bfloat16", model="dense", weights=True, state=True),
    Case(name="float32", model="dense", dtype="float32", state=True),
    Case(name="torch 2.11's attention", model="dense", old_varlen=True),
    Case(name="recompute", model="dense", recompute=True),
    Case(name="selective", model="dense", recompute="selective"),
    Case(name="FlashAttention 3", model="dense", packages=("flash3",), like="bfloat16"),
    Case(name="torch alone", model="dense", kernels="torch", packages=("flash3",), like="bfloat16"),
    Case(name="Transformer Engine", model="dense", kernels="te", packages=("te",), like="bfloat16"),
    Case(name="Liger", model="dense", kernels="liger", packages=("liger",), like="bfloat16"),
    Case(name="given responses", model="dense", loss={"given": True}),
    Case(name="entropy bonus", model="dense", loss={"entropy_coef": 0.1}),
    Case(name="reference model", model="dense", loss={"reference_kl_coef": 0.1}, reference="dense"),
    Case(name="critic", model="dense", critic="dense", state=True),
    Case(name="teacher inside", model="dense", teacher="dense"),
    Case(name="experts", model="experts"),
    *(Case(name=loss, model="dense", loss={"loss": loss}) for loss in ("reverse_kl_behaviour", "sft")),
    *(
        Case(name=loss, model="dense", loss={"loss": loss}, topk=8)
        for loss in ("forward_kl_topk", "reverse_kl_topk", "jsd_topk")
    ),
    *(
        Case(name=loss, model="dense", loss={"loss": loss}, teacher="dense", offload=loss == "jsd_full")
        for loss in ("forward_kl_full", "reverse_kl_full", "jsd_full")
    ),
]
FLASH2 = "attention by torch's FlashAttention 2"
KERNELS = {
    "bfloat16": f"{FLASH2} (FlashAttention 3 is not installed), norms and gates by torch",
    "float32": "attention by torch, norms and gates by torch",
    "FlashAttention 3": "attention by FlashAttention 3, norms and gates by torch",
    "torch alone": f"{FLASH2} (learner.kernels: torch), norms and gates by torch",
    "Transformer Engine": "attention by Transformer Engine, norms and gates by torch",
    "Liger": f"{FLASH2} (FlashAttention 3 is not installed), norms by Liger, gates by Liger",
}
"""Whose they are, by case."""
SPREAD = {"tensor": 2, "pipeline": 2}
PROCESSES: dict[str, list[Case]] = {
    "alone": ALONE,
    "first stage": [Case(name="first stage", model="dense", parallel=SPREAD, rank=0, world=8, weights=True)],
    "middle rank": [Case(name="middle rank", model="dense", parallel=SPREAD, rank=3, world=8, recompute=True)],
    "last stage": [Case(name="last stage", model="dense", parallel=SPREAD, rank=7, world=8, state=True)],
    "context": [Case(name="context", model="dense", parallel={"context": 2}, rank=1, world=2, weights=True)],
    "expert": [Case(name="expert", model="experts", parallel={"expert": 2}, rank=1, world=2, weights=True)],
}


def guard(folder: Path) -> Path:
    """The library that gives torch a CUDA device without kernels, compiled against the installed torch."""
    import torch

    home = Path(torch.__file__).parent
    library = folder / f"cuda_guard-{torch.__version__}.so"
    if not library.exists():
        assert shutil.which("g++"), "these tests compile a small library: apt-get install g++"
        made = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", str(HERE / "cuda_guard.cpp")]
        libraries = [f"-L{home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home}/lib", "-o", str(made)]
        subprocess.run([*command, *libraries], check=True, timeout=DEADLINE_S)
        made.rename(library)
    return library


def run(
    cases: list[Case], folder: Path, library: Path, models: Mapping[str, dict[str, object]] = MODELS
) -> dict[str, Found]:
    """What one process found of its cases, by name; `models` are the configs that they name."""
    for name, config in models.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))

    def placed(name: str | None) -> str | None:
        return None if name is None else str(folder / name)

    there = [
        replace(
            case,
            model=str(folder / case.model),
            teacher=placed(case.teacher),
            reference=placed(case.reference),
            critic=placed(case.critic),
        )
        for case in cases
    ]
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in there]))
    command = [sys.executable, str(HERE / "cuda_rank.py"), str(folder / "cases.json"), str(folder / "found.json")]
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {one["name"]: Found(**one) for one in json.loads((folder / "found.json").read_text())}


COSTS = ("operations", "operation_bytes", "flops", "built_bytes", "live_bytes", "peak_bytes")


def costs(found: Found) -> dict[str, object]:
    """What is compared with the accepted values."""
    return {name: getattr(found, name) for name in COSTS} | {"syncs": found.syncs}


@pytest.mark.parametrize("process", PROCESSES)
def test_two_steps_on_a_gpu_without_one(process: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    cache = getattr(request.config, "cache", None)  # pytest may run without one
    kept = tmp_path if cache is None else Path(cache.mkdir("cuda_guard"))
    everything = run(PROCESSES[process], tmp_path, guard(kept))
    accepted = json.loads(ACCEPTED.read_text())
    assert {name: found.error for name, found in everything.items() if found.error} == {}
    for case in PROCESSES[process]:
        found = everything[case.name]
        assert {line.split()[1] for line in found.devices} <= {"cuda"}, found.devices
        assert {line.split()[2] for line in found.devices} <= {"float64"}, "sums over rows are made in float64"
        assert found.wrong == [], "tensors of float64 where none are needed"
        assert (found.tensors > 0) is ((case.weights and case.rank == 0) or (case.weights and case.world == 1))
        assert (found.state > 0) is case.state
        assert found.kernels == KERNELS.get(case.name, found.kernels)
        wanted = accepted[case.like or case.name]
        assert found.syncs == wanted["syncs"], case.name
        for cost in COSTS:
            assert getattr(found, cost) == pytest.approx(wanted[cost], rel=ROOM), (case.name, cost)


def test_selective_recomputation_is_between_the_others() -> None:
    """Of the accepted costs: no matrix product twice, and memory in between."""
    none, some, whole = (json.loads(ACCEPTED.read_text())[name] for name in ("bfloat16", "selective", "recompute"))
    assert none["flops"] == some["flops"] < whole["flops"]
    assert whole["peak_bytes"] < some["peak_bytes"] < none["peak_bytes"]


def main() -> None:
    """Accept what is found now."""
    accepted = {}
    alike = {case.name for cases in PROCESSES.values() for case in cases if case.like}
    with tempfile.TemporaryDirectory() as folder:
        for cases in PROCESSES.values():
            for name, found in run(cases, Path(folder), guard(Path(folder))).items():
                assert not found.error, f"{name}: {found.error}"
                if name not in alike:
                    accepted[name] = costs(found)
    ACCEPTED.write_text(json.dumps(accepted, indent=1) + "\n")


if __name__ == "__main__":
    main()
