"""`--plan`: figures that can be checked by hand, warnings, splits, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import topology_data, write_lines, write_topology

from opd_async.command import launch, parse_arguments
from opd_async.config.topology import LearnerSection, StepRule, Topology
from opd_async.errors import InputError
from opd_async.forecast.advice import Forecaster, Site, describe, plan_text, preferred
from opd_async.forecast.cost_model import QWEN3_8B, QWEN3_32B, SYNC_FLOOR_S
from opd_async.forecast.devices import DEVICES, H100, H200, NVLINK, device_named
from opd_async.forecast.lengths import LogNormal
from opd_async.forecast.memory import engine_memory, learner_memory
from opd_async.forecast.workload import Devices

GIGA = 1e9
SHAPE_8B = {
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
}
IN_PARALLEL: dict[str, Any] = {"data_parallel": 4, "recompute": True, "dtype": "bfloat16"}
SITE = Site(H200, NVLINK, LogNormal(500, 2000, 4096), 200)


@pytest.fixture
def topology_text(tmp_path: Path) -> dict[str, Any]:
    """A student of 8 billion weights that is its own teacher's size, on eight devices."""
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SHAPE_8B))
    return {
        "name": "plan",
        "models": {name: {"path": str(tmp_path / name)} for name in ("student", "teacher")},
        "data": {"train": {"path": "none.jsonl"}},
        "engines": {name: {"replicas": 2, "dtype": "bfloat16"} for name in ("student", "teacher")},
        "rollout": {"slots": 64},
        "schedule": {"steps": 1, "tokens_per_step": 40_000, "max_staleness": 1},
        "learner": dict(IN_PARALLEL),
    }


def forecaster(text: dict[str, Any], site: Site = SITE) -> Forecaster:
    return Forecaster(Topology.model_validate(text), site)


def test_memory_by_hand() -> None:
    engine = engine_memory("student engine", QWEN3_8B, H100, 2, 100_000)
    assert engine.weights == pytest.approx(8.19 * GIGA, rel=0.01)  # two bytes a weight on two devices
    assert engine.kv == pytest.approx(100_000 * 147_456 / 2)
    section = LearnerSection(tensor_parallel=2, micro_batch_tokens=8192, **IN_PARALLEL)
    learner = learner_memory(QWEN3_8B, H100, section, 4096)
    assert learner.optimizer == pytest.approx(8.19 * GIGA / 2 * (4 + 12 / 4), rel=0.01)
    kept = learner_memory(QWEN3_8B, H100, section.model_copy(update={"recompute": False}), 4096)
    assert kept.activations > 5 * learner.activations
    some = learner_memory(QWEN3_8B, H100, section.model_copy(update={"recompute": "selective"}), 4096)
    # what two norms and the gate give: 2 bytes of each channel, token and layer, on two devices
    assert kept.activations - some.activations == pytest.approx(2 * (2 * 4096 + 12_288) * 8192 * 36 / 2)
    assert some.activations > 3 * learner.activations
    assert learner_memory(QWEN3_8B, H100, section, 16384).activations > learner.activations


def test_memory_in_float32_by_hand() -> None:
    """Twice the bytes of weights, caches and activations; no second copy of the weights in the optimizer."""
    engine = engine_memory("student engine", QWEN3_8B, H100, 2, 100_000, "float32")
    assert engine.weights == pytest.approx(8.19 * GIGA * 2, rel=0.01)
    assert engine.kv == pytest.approx(100_000 * 147_456)
    halves, wide = (
        learner_memory(QWEN3_8B, H100, LearnerSection(data_parallel=4, micro_batch_tokens=8192, dtype=dtype), 4096)
        for dtype in ("bfloat16", "float32")
    )
    assert wide.weights == pytest.approx(2 * halves.weights)
    assert wide.optimizer == pytest.approx(8.19 * GIGA * (4 + 8 / 4), rel=0.01)
    assert halves.activations < wide.activations < 2 * halves.activations  # logits are float32 in both


def test_a_dtype_changes_the_times(topology_text: dict[str, Any]) -> None:
    halves = forecaster(topology_text).workload(Devices(2, 2, 4))
    topology_text["engines"]["student"]["dtype"] = topology_text["learner"]["dtype"] = "float32"
    wide = forecaster(topology_text).workload(Devices(2, 2, 4))
    assert wide.train.token_s == pytest.approx(halves.train.token_s * H200.flops / H200.float32_flops)
    assert wide.decode.kv_s == pytest.approx(2 * halves.decode.kv_s)
    assert wide.score == halves.score
    assert wide.sync_s - SYNC_FLOOR_S == pytest.approx(2 * (halves.sync_s - SYNC_FLOOR_S))


def test_devices_are_those_of_their_data_sheets() -> None:
    assert set(DEVICES) == {"A100", "B200", "H100", "H200", "L40S", "MI300X", "RTX4090"}
    assert DEVICES["B200"].flops > DEVICES["MI300X"].flops > H100.flops > DEVICES["L40S"].flops > DEVICES["A100"].flops
    for device in DEVICES.values():
        assert device.flops_in("float16") == device.flops > device.flops_in("float32") > 1e13
        assert device.part(4) is device


def test_this_host_is_measured_and_shared(topology_text: dict[str, Any]) -> None:
    host = device_named("cpu")
    assert host.shared and host.flops > 1e9 and host.bandwidth > 1e8 and host.memory > 1e9
    assert host.part(4).flops == pytest.approx(host.flops / 4)
    text = describe(forecaster(topology_text, Site(host, NVLINK, LogNormal(500, 2000, 4096), 200)))
    assert text.startswith("planned for 8 processes on") and "there is no split to choose" in text


def test_a_critic_has_weights_and_optimizer_of_its_own() -> None:
    section = LearnerSection(tensor_parallel=2, micro_batch_tokens=8192, **IN_PARALLEL)
    alone = learner_memory(QWEN3_8B, H100, section, 4096)
    beside = learner_memory(QWEN3_8B, H100, section, 4096, QWEN3_8B)
    critic = QWEN3_8B.weights - QWEN3_8B.vocab * QWEN3_8B.hidden  # no LM head
    assert beside.weights - alone.weights == pytest.approx(critic / 2 * 2)
    assert beside.optimizer - alone.optimizer == pytest.approx(critic / 2 * (4 + 12 / 4))
    assert beside.activations == alone.activations  # one after the other
    assert learner_memory(QWEN3_8B, H100, section, 4096, QWEN3_32B).activations > alone.activations


def test_memory_is_planned_where_steps_are_not(topology_text: dict[str, Any], tmp_path: Path) -> None:
    def learner(**advantage: Any) -> list[str]:
        text = plan_text(Topology.model_validate(samples | {"advantage": advantage}), SITE)
        assert "no forecast, which covers schedule.train_on tokens" in text and "bubble" not in text
        return next(line.split() for line in text.splitlines() if line.startswith("learner"))

    samples = topology_text | {"schedule": {"steps": 1, "train_on": "samples"}, "opd": {"use_opd": False}}
    alone, beside = learner(estimator="grpo"), learner(estimator="ppo")
    assert float(beside[1]) > 1.5 * float(alone[1]) and float(beside[2]) > 1.5 * float(alone[2])
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(SHAPE_8B | {"num_hidden_layers": 12}))
    smaller = learner(estimator="ppo", critic={"path": str(tmp_path / "teacher")})
    assert float(alone[1]) < float(smaller[1]) < float(beside[1])


def test_a_second_prompt_is_twice_the_teachers_work(topology_text: dict[str, Any]) -> None:
    once = forecaster(topology_text).workload(Devices(2, 2, 4))
    topology_text["data"]["contrast_prompt"] = "wrong"
    twice = forecaster(topology_text).workload(Devices(2, 2, 4))
    assert twice.cache_tokens == once.cache_tokens // 2
    rates = once.rates(), twice.rates()
    assert rates[1].teacher == pytest.approx(rates[0].teacher / 2)
    assert (rates[1].rollout, rates[1].learner) == (rates[0].rollout, rates[0].learner)


def test_more_devices_make_their_stage_faster(topology_text: dict[str, Any]) -> None:
    plan = forecaster(topology_text)
    few, many = plan.workload(Devices(2, 2, 4)).rates(), plan.workload(Devices(4, 4, 8)).rates()
    assert many.learner > 1.5 * few.learner
    assert many.teacher == pytest.approx(2 * few.teacher, rel=0.01)
    assert few.rollout < many.rollout < 2 * few.rollout  # the same slots on twice the engines


def test_the_best_split_is_no_worse_and_uses_the_same_devices(topology_text: dict[str, Any]) -> None:
    plan = forecaster(topology_text)
    found = plan.best_split()
    assert found is not None
    devices, best = found
    assert devices.total == plan.devices.total == 8
    assert best.tokens_per_s >= 0.999 * plan.forecast(plan.devices).tokens_per_s
    assert all(plan.fits(devices) for devices in plan.splits())


def test_the_plan_follows_the_rule_of_steps(topology_text: dict[str, Any], tmp_path: Path) -> None:
    # a learner that is behind: deadline cuts make steps larger, filled steps keep their size
    topology_text["engines"]["teacher"]["replicas"] = 1
    topology_text["learner"]["data_parallel"] = 2
    text = {rule: topology_text | {"schedule": topology_text["schedule"] | {"rule": rule}} for rule in StepRule}
    devices = Devices(2, 1, 2)
    plans = {rule: forecaster(text[rule]).forecast(devices) for rule in StepRule}
    assert plans[StepRule.FILLED].step_budgets < 1.05 < 1.4 < plans[StepRule.DEADLINE].step_budgets
    assert plans[StepRule.AUTO] == plans[StepRule.FILLED]
    assert "(1.0 x schedule.tokens_per_step)" in describe(forecaster(text[StepRule.FILLED]))


def test_of_splits_that_are_alike_the_one_with_less_recompute_is_preferred(topology_text: dict[str, Any]) -> None:
    one = forecaster(topology_text).forecast(Devices(2, 2, 4))
    speeds = ((100.0, 1.3), (99.8, 1.2), (99.0, 1.1))
    tried = [
        (Devices(count, 1, 1), dataclasses.replace(one, tokens_per_s=speed, learner_recompute=recompute))
        for count, (speed, recompute) in enumerate(speeds)
    ]
    assert preferred(tried)[0].rollout == 1


def test_the_bottleneck_is_the_stage_that_is_slowest_alone(topology_text: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(SHAPE_8B | {"num_hidden_layers": 300}))
    site = Site(H200, NVLINK, LogNormal(500, 2000, 4096), 200)
    (line,) = (line for line in describe(forecaster(topology_text, site)).splitlines() if "<- bottleneck" in line)
    assert line.startswith("teacher")


def test_a_plan_says_what_its_times_rest_on(topology_text: dict[str, Any]) -> None:
    text = describe(forecaster(topology_text, Site(H200, NVLINK, LogNormal(500, 2000, 4096), 200)))
    assert text.splitlines()[-1] == (
        "assumed of H200: decoding at 75% of 4.8 TB/s; of its peak operations scoring 50% and training 40%, which is "
        "989 TFLOP/s in bfloat16 and 67 in float32"
    )


def test_a_plan_says_how_long_tools_may_take(topology_text: dict[str, Any]) -> None:
    assert "tools" not in describe(forecaster(topology_text))
    topology_text["rollout"]["function"] = "my_hooks:episode"
    one = forecaster(topology_text)
    work = one.workload(one.devices)
    turns_s = work.mean_tokens / (work.rates().rollout / 64)  # a response has a slot for so long
    words = (
        f"4 x 64 are under way at most: slots run empty where the tools of a response take more than {3 * turns_s:.3g}"
    )
    assert words in describe(one)


def test_no_plan_is_faster_than_its_slowest_stage(topology_text: dict[str, Any]) -> None:
    # a fixed cost of a second a step is most of a small step
    topology_text["schedule"]["tokens_per_step"] = 2000
    shown = re.search(r"([\d,]+) tokens/s: (\d+)% of the slowest stage alone", describe(forecaster(topology_text)))
    assert shown is not None
    assert 50 <= int(shown[2]) <= 101
    topology_text["schedule"]["tokens_per_step"] = 200_000
    assert int(shown[1].replace(",", "")) < forecaster(topology_text).forecast(Devices(2, 2, 4)).tokens_per_s


def test_responses_are_no_longer_than_the_topology_lets_them_be(topology_text: dict[str, Any]) -> None:
    assert forecaster(topology_text).workload(Devices(2, 2, 4)).lengths.of(np.array([9.0])).tolist() == [1024]
    topology_text["rollout"]["sampling"] = {"max_response_tokens": 100}
    topology_text["engines"]["student"]["context_tokens"] = 150
    assert "longest 100 tokens (rollout.sampling.max_response_tokens; --lengths has up to 4,096); prompts: 50" in (
        describe(forecaster(topology_text))
    )


def test_engines_keep_what_the_topology_says(topology_text: dict[str, Any]) -> None:
    assert forecaster(topology_text).workload(Devices(2, 2, 4)).cache_tokens == 65536
    topology_text["engines"] = {
        "student": {"replicas": 2, "kv_tokens": 5000},
        "teacher": {"replicas": 2, "kv_tokens": 6000},
    }
    text = describe(forecaster(topology_text))
    assert "the student engines keep 10,000 of" in text and "the teacher's caches hold 12,000 of" in text
    topology_text["engines"]["teacher"] = {"kind": "external", "replicas": 2, "urls": ["http://a:1", "http://a:2"]}
    assert forecaster(topology_text).workload(Devices(2, 2, 4)).cache_tokens > 65536


def test_what_does_not_fit_is_said(topology_text: dict[str, Any]) -> None:
    topology_text["learner"] = {"data_parallel": 1}
    text = describe(forecaster(topology_text, Site(H100, NVLINK, LogNormal(500, 2000, 4096), 200)))
    assert "WARNING: a learner does not fit: needs" in text
    assert "learner.data_parallel" in text or "data_parallel" in text


def test_the_command_prints_the_plan(
    topology_text: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(topology_text))
    launch(parse_arguments(["--topology", str(file), "--plan", "--device", "H200", "--lengths", "500,2000,4096"]))
    shown = capsys.readouterr().out
    for text in ("planned for 8 x H200", "<- bottleneck", "bubble", "GiB per device", "these 8 devices"):
        assert text in shown
    assert "prompts are not read (" in shown and "prompts: 200" in shown  # there is neither tokenizer nor file


def test_the_command_reads_the_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One letter is one token, and one begins each prompt: 9 and 13 tokens."""
    data = topology_data(tmp_path)
    data["data"] = {"train": {"path": str(write_lines(tmp_path / "p.jsonl", *({"prompt": "1" * n} for n in (8, 12))))}}
    data.pop("evaluation", None)
    file = write_topology(tmp_path, data)
    words = ["--topology", str(file), "--plan", "--device", "A100", "--lengths", "20,30,32"]
    launch(parse_arguments(words))
    shown = capsys.readouterr().out
    assert "prompts: 11\n" in shown and "A100" in shown
    launch(parse_arguments([*words, "--prompt-tokens", "7"]))
    assert "prompts: 7\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schedule": {"steps": 1, "rule": "deadline", "max_staleness": 0}},
            "max_staleness 0 with schedule.rule filled only",
        ),
        ({"schedule": {"steps": 1, "train_on": "samples"}}, "train_on tokens"),
    ],
)
def test_what_the_planner_does_not_cover_is_refused(
    topology_text: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        forecaster(topology_text | change)


def test_a_model_without_sizes_is_refused(topology_text: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "teacher" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"teacher/config\.json: does not describe a decoder"):
        forecaster(topology_text)
