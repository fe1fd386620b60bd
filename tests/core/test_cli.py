"""The command `opd`: help without torch, one topology found by itself, one message for everything that is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from deadlines import patience
from small_runs import topology_data, write_lines, write_topology

from opd_async import __version__
from opd_async.cli.commands import topology_file
from opd_async.cli.examples import names, write_example
from opd_async.cli.main import COMMANDS, make_parser
from opd_async.config.topology import Topology
from opd_async.errors import InputError

ROOT = Path(__file__).parents[2]
PATIENCE_S = patience(20.0)


def opd(
    *words: str | Path, cwd: Path = ROOT, stdout: int | IO[str] = subprocess.PIPE, **environment: str
) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "opd_async.cli", *map(str, words)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        timeout=PATIENCE_S,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_help_and_version_load_next_to_nothing() -> None:
    code = """
import sys
from opd_async.cli.main import main
for words in (["--help"], ["--version"]):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0
found = {"torch", "numpy", "pydantic", "aiohttp", "zmq"} & set(sys.modules)
assert not found, found
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert set(COMMANDS) <= set(re.findall(r"^    (\w+)", ended.stdout, re.MULTILINE))
    assert f"opd {__version__}\n" in ended.stdout


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"convert"}))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        make_parser(command).parse_args([command, "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert COMMANDS[command][0] in said


def test_the_topology_that_is_here_is_found(tmp_path: Path) -> None:
    def file(*words: str) -> Path:
        return topology_file(make_parser("check").parse_args(["check", *words]), tmp_path)

    with pytest.raises(InputError, match=r"no topology was named, and .* no .yaml file; name one"):
        file()
    (tmp_path / "one.yaml").touch()
    assert file() == tmp_path / "one.yaml"
    (tmp_path / "two.yaml").touch()
    with pytest.raises(InputError, match=r"one\.yaml, two\.yaml; name one"):
        file()
    (tmp_path / "topology.yaml").touch()
    assert file() == tmp_path / "topology.yaml"
    assert file("x.yaml") == file("--topology", "x.yaml") == Path("x.yaml")
    with pytest.raises(InputError, match=r"two topologies, x\.yaml and y\.yaml; name one"):
        file("x.yaml", "--topology", "y.yaml")


def test_check_prints_the_plan_or_everything_that_is_wrong(tmp_path: Path) -> None:
    write_topology(tmp_path, topology_data(tmp_path))
    code, out, _ = opd("check", cwd=tmp_path)
    assert code == 0 and "learner-0" in out and not (tmp_path / "runs").exists()
    write_lines(tmp_path / "train.jsonl", "{", "{", {"prompt": "ab"})
    code, out, errors = opd("check", "--set", "schedule.stepps=1", "--set", "rollout.slots=99", cwd=tmp_path)
    assert code == 2 and "learner-0" not in out
    lines = errors.splitlines()
    assert lines[0] == "error: topology.yaml: 3 problems"
    assert sum("unknown key; did you mean steps?" in line for line in lines) == 1
    assert sum("rollout.slots: 99, but" in line for line in lines) == 1
    assert sum(line.startswith("  line ") and "data.train.path: " in line for line in lines) == 1
    assert sum("(and 1 more rows)" in line for line in lines) == 1


def test_examples_are_written_once_and_pass_their_check(tmp_path: Path) -> None:
    assert "quickstart" in names()
    code, out, _ = opd("example")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == names()
    code, out, _ = opd("example", "quickstart", cwd=tmp_path)
    assert code == 0 and out.splitlines()[-1] == "next: opd run quickstart.yaml"
    topology = Topology.load(tmp_path / "quickstart.yaml")
    assert topology == Topology.load(
        ROOT / "examples/quickstart.yaml",
        {
            **{f"models.{side}.path": f"addition/models/{side}" for side in ("student", "teacher")},
            **{f"data.{part}.path": f"addition/data/{part}.jsonl" for part in ("train", "held_out")},
        },
    )
    assert opd("check", cwd=tmp_path)[0] == 0
    code, _, errors = opd("example", "quickstart", cwd=tmp_path)
    assert code == 2 and "quickstart.yaml exists already; remove it, or give another folder with --to" in errors


def test_a_topology_is_made_for_two_models_and_prompts(tmp_path: Path) -> None:
    topology_data(tmp_path)
    words = ("init", "student", "teacher", "train.jsonl", "--response", "20", "--steps", "7", "--name", "mine")
    code, out, errors = opd(*words, "--held-out", "train.jsonl", cwd=tmp_path)
    assert code == 0, errors
    assert out.splitlines()[-1] == "next: opd run"
    assert "engines.student.context_tokens: 24 " in out  # <bos>abc and 20
    topology = Topology.load(tmp_path / "topology.yaml")
    assert (topology.name, topology.schedule.steps, topology.rollout.sampling.max_response_tokens) == ("mine", 7, 20)
    assert topology.data.held_out is not None
    assert opd("check", cwd=tmp_path)[0] == 0
    code, _, errors = opd(*words, cwd=tmp_path)
    assert code == 2 and "topology.yaml exists already; remove it, or give another name with --output" in errors
    code, _, errors = opd("init", "student", "no-such", "train.jsonl", "--output", "other.yaml", cwd=tmp_path)
    assert code == 2 and "models.teacher.path: no folder no-such" in errors
    assert not (tmp_path / "other.yaml").exists()


def test_a_topology_is_made_for_rows_with_other_keys_and_for_held_out_prompts_without_labels(tmp_path: Path) -> None:
    topology_data(tmp_path)
    write_lines(tmp_path / "train.jsonl", {"question": "abc"})
    write_lines(tmp_path / "held_out.jsonl", {"question": "ab"})
    words = ("init", "student", "teacher", "train.jsonl", "--held-out", "held_out.jsonl", "--response", "20")
    code, _, errors = opd(*words, cwd=tmp_path)
    assert code == 2 and "no key 'prompt'; the keys there are question; set prompt_key" in errors
    assert errors.splitlines()[-1].startswith("no topology was written; --response, --prompt-key, --label-key")
    assert list(tmp_path.glob("*.yaml")) == []
    code, _, errors = opd(*words, "--prompt-key", "question", cwd=tmp_path)
    assert code == 2 and "set label_key, or remove these prompts, or write judge: teacher, which needs none" in errors
    code, out, errors = opd(*words, "--prompt-key", "question", "--judge", "teacher", cwd=tmp_path)
    assert code == 0, errors
    assert "data.held_out: held_out.jsonl: 1 prompts" in out and "judge teacher" in out
    topology = Topology.load(tmp_path / "topology.yaml")
    assert topology.data.held_out is not None and topology.data.train is not None
    assert topology.data.held_out.prompt_key == topology.data.train.prompt_key == "question"
    assert topology.evaluation.judge == "teacher"


@pytest.mark.parametrize("name", names())
def test_every_example_is_written_whole(name: str, tmp_path: Path) -> None:
    written = write_example(name, tmp_path / "new" / "folder")
    assert all(path.exists() for path in written)
    assert "examples/" not in written[0].read_text()


def test_the_schema_is_that_of_the_topology() -> None:
    code, out, _ = opd("schema")
    assert code == 0 and out == (ROOT / "examples/topology.schema.json").read_text()
    assert set(json.loads(out)["properties"]) == set(Topology.model_fields)


@pytest.mark.parametrize("command", ["schema", "example"])
def test_a_full_disk_is_one_message_and_a_reader_who_has_enough_is_none(command: str) -> None:
    with Path("/dev/full").open("w") as full:
        code, _, errors = opd(command, stdout=full)
    words = "error: stdout: No space left on device; what was asked for could not be written there\n"
    assert (code, errors) == (1, words)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        code, _, errors = opd(command, stdout=closed)
    assert (code, errors) == (0, "")


def test_a_terminal_without_a_report_s_characters() -> None:
    code = "from opd_async.telemetry.terminal import show; print('first'); show('━━ naïve')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=PATIENCE_S)
    assert (out.returncode, out.stdout) == (0, b"first\n== na\\xefve\n")


def test_completion_knows_every_command_and_option() -> None:
    code, out, _ = opd("completion", "bash")
    assert code == 0 and all(name in out for name in COMMANDS) and "--overwrite" in out


def test_a_report_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, _, errors = opd("report", tmp_path)
    words = "report.json: No such file or directory; a run writes it at its end, into its own folder\n"
    assert (code, errors) == (2, f"error: {tmp_path}/{words}")
    (tmp_path / "report.json").write_text("{}")
    code, _, errors = opd("report", tmp_path)
    assert code == 2 and "is no report of this version" in errors


def test_convert_has_its_own_help() -> None:
    code, out, _ = opd("convert", "hf-to-megatron", "--help")
    assert code == 0 and out.startswith("usage: opd convert hf-to-megatron") and "--hf" in out


def test_a_conversion_s_help_and_its_bad_options_load_no_torch(tmp_path: Path) -> None:
    """torch and megatron-core take seconds to load, which nobody waits for to be told of an option."""
    for words, code in ((["--help"], 0), (["hf-to-megatron", "--hf", "x", "--out", str(tmp_path)], 2)):
        script = f"""
import sys
from opd_async.cli.main import main
try:
    main(["convert", *{words!r}])
except SystemExit as end:
    assert end.code == {code}, end.code
assert not {{"torch", "megatron", "pydantic"}} & set(sys.modules)
"""
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
    assert "exists already" in ended.stderr
