"""Ctrl-C: the step under way is finished and saved, every process ends, and the run can go on."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from harness import (
    ROOT,
    Launch,
    check_trained,
    command,
    environment,
    left_running,
    loud_lines,
    steps,
    topology,
    wait_for_steps,
    write_topology,
)


def check_first_steps(folder: Path, *first: int) -> None:
    """What is generated first after a start is of the student's present weights: no others, and no teacher."""
    rows = {row["step"]: row for row in steps(folder)}
    for row in (rows[step] for step in first):
        assert row["learner_staleness_max"] == 0
        assert abs(row["learner_ratio_mean"] - 1.0) < 1e-3 and row["learner_ratio_std"] < 1e-3


@pytest.mark.long
def test_a_signal_on_the_way_back_leaves_nothing_beyond_the_checkpoint(inputs: Path, tmp_path: Path) -> None:
    """The learner has died, and its last steps with it: neither rows nor the report may speak of them."""
    values = topology(inputs, tmp_path, schedule__steps=1000, checkpoint__every_steps=4)
    folder = tmp_path / "run"
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        run.wait_for_steps(folder, 6)
        run.find("learner.main").kill()
        run.wait_for_text("learner-0 ended (")
        run.interrupt(signal.SIGTERM)
        assert run.wait() == 130, run.text()
    assert left_running(tmp_path, inputs) == []
    saved = sorted((folder / "checkpoints").glob("step_*/complete.json"))[-1]
    step = int(saved.parent.name.removeprefix("step_"))
    assert step >= 4 and step % 4 == 0
    check_trained(folder, 1, step)
    assert [row["step"] for row in steps(folder)] == list(range(1, step + 1))
    assert json.loads((folder / "report.json").read_text())["steps"] == step


@pytest.mark.long
def test_a_second_signal_stops_at_once(inputs: Path, tmp_path: Path) -> None:
    file = write_topology(topology(inputs, tmp_path, schedule__steps=1000), tmp_path / "run.yaml")
    with Launch(file) as run:
        run.wait_for_steps(tmp_path / "run", 1)
        run.interrupt()
        run.interrupt()
        assert run.wait(60.0) != 0
    assert left_running(tmp_path, inputs) == []


def stopped(folder: Path) -> int:
    """The step after which the newest checkpoint was saved."""
    saved = sorted((folder / "checkpoints").glob("step_*/complete.json"))[-1]
    return int(saved.parent.name.removeprefix("step_"))


def next_commands(text: str) -> dict[str, str]:
    """The command lines that a report ends with, by what they do."""
    lines = [line.strip() for line in text.splitlines()]
    return {what.removesuffix(":"): line for what, line in pairwise(lines) if " -m opd_async." in line}


def test_sigterm_saves_and_leaves_report_curve_and_commands_that_work(inputs: Path, tmp_path: Path) -> None:
    """In the middle of a step that is filled while it runs."""
    place = tmp_path / "a folder"
    place.mkdir()
    values = topology(inputs, place, schedule__steps=1000, schedule__rule="filled")
    file = write_topology(values, tmp_path / "run.yaml")
    folder = place / "run"
    with Launch(file) as run:
        run.wait_for_steps(folder, 3)
        run.interrupt(signal.SIGTERM)
        run.wait_for_text("stopping: finishing the step under way")
        assert run.wait() == 130, run.text()
        step = stopped(folder)
        assert f"saved after step {step} of 1000; go on with --resume" in run.text()
        assert "Traceback" not in run.text()
        commands = next_commands(run.text())
    assert left_running(tmp_path, inputs) == []
    assert loud_lines(folder) == [], "an orderly stop is no fault"
    check_trained(folder, 1, step)
    assert [row["step"] for row in steps(folder)] == list(range(1, step + 1)), "the last step has its row"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["steps"] == step and (folder / "learning_curve.png").is_file()
    assert report["trained_tokens"] == sum(row["tokens"] for row in steps(folder))
    export = commands["the student as it is, in Hugging Face format"]
    subprocess.run(export, shell=True, cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert (folder / "export" / "model.safetensors").is_file()
    resume = f"{commands['the other steps']} --set schedule.steps={step + 1}"
    subprocess.run(resume, shell=True, cwd=ROOT, env=environment(), check=True, capture_output=True)
    check_trained(folder, 1, step + 1)
    check_first_steps(folder, 1, step + 1)
    assert left_running(tmp_path, inputs) == []


def test_a_signal_while_processes_start(inputs: Path, tmp_path: Path) -> None:
    file = write_topology(topology(inputs, tmp_path), tmp_path / "run.yaml")
    with Launch(file) as run:
        run.wait_for_text("starting 6 processes")
        run.interrupt()
        assert run.wait() == 130, run.text()
        said = run.text()
    assert "stopping: nothing is being trained, so every process ends now" in said
    assert "nothing was trained; start it again with --overwrite" in said
    assert "--resume" not in said and "Traceback" not in said
    assert left_running(tmp_path, inputs) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_prompts_are_read(inputs: Path, tmp_path: Path, number: int) -> None:
    values = topology(inputs, tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "t10 t20 t30"}\n' * 500_000)
    values["data"]["train"]["path"] = str(prompts)
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        while str(prompts) not in [file.path for file in psutil.Process(run.process.pid).open_files()]:
            assert run.process.poll() is None, run.text()
        run.interrupt(number)
        assert run.wait() == 130, run.text()
        assert run.text() == "stopped by a signal; nothing was started\n"
    assert not (tmp_path / "run").exists()


def test_a_signal_while_the_program_is_loaded(inputs: Path, tmp_path: Path) -> None:
    """From the moment on at which its first module runs."""
    file = write_topology(topology(inputs, tmp_path), tmp_path / "run.yaml")
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command(file), cwd=ROOT, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "stopped by a signal; nothing was started\n")


@pytest.mark.long
def test_a_lost_reader_and_under_nohup_a_lost_terminal_do_not_end_the_run(inputs: Path, tmp_path: Path) -> None:
    """`nohup python -m opd_async.launch ... | head -n 1`, in a locale without the characters of the table."""
    file = write_topology(topology(inputs, tmp_path, schedule__steps=3), tmp_path / "run.yaml")
    words = environment() | {"PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(
        ["nohup", *command(file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=words,
    ) as run:
        assert run.stdout is not None
        assert "starting 6 processes" in run.stdout.readline()
        run.stdout.close()
        wait_for_steps(run, tmp_path / "run", 1)
        run.send_signal(signal.SIGHUP)
        assert run.wait() == 0
    assert len(steps(tmp_path / "run")) == 3 and (tmp_path / "run" / "report.json").is_file()
    log = (tmp_path / "run" / "logs" / "launcher.log").read_text(encoding="utf-8")
    assert log.count("is gone (Broken pipe); the run goes on without it") == 1
    assert "run: 3 steps in" in log


@pytest.mark.long
def test_a_terminal_that_hangs_up_saves_the_run(inputs: Path, tmp_path: Path) -> None:
    file = write_topology(topology(inputs, tmp_path, schedule__steps=1000), tmp_path / "run.yaml")
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        command(file), stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment(), start_new_session=True,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)
    with child as run:
        wait_for_steps(run, tmp_path / "run", 2)
        os.close(ours)  # the kernel sends SIGHUP, and every write fails from now on
        assert run.wait() == 130
    check_trained(tmp_path / "run", 1, stopped(tmp_path / "run"))
    assert left_running(tmp_path, inputs) == []
    assert "is gone (Input/output error)" in (tmp_path / "run" / "logs" / "launcher.log").read_text(encoding="utf-8")


def take_terminal() -> None:
    """In the child: its stdin is the terminal that controls it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
