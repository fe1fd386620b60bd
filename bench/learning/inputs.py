"""What the runs read: prompts, models and the teacher's responses, made with the addition example's own scripts.

    Regime -> FOLDER/data-<digits>, FOLDER/models/<recipe>, FOLDER/megatron-<teacher>
           -> FOLDER/given-<teacher>-<digits>-<prompts>.jsonl

Everything is made once and found again by its name; a folder appears only when it is complete.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from opd_async.bench.learning.cells import GROUP, SAMPLES_PER_STEP, Regime
from opd_async.files import write_atomically

ADDITION = Path(__file__).resolve().parents[2] / "examples" / "addition"
SELF_ADDITION = ADDITION.with_name("self_addition")
DEADLINE_S = 1200.0

RECIPES = {
    "teacher_6": ("teacher", ("--digits", "6", "--steps", "600")),
    "student_6": ("student", ("--digits", "6")),
    "teacher_ways": ("teacher", ("--other-way", "0.5", "--steps", "700")),
    "student_small": ("student", ("--hidden", "16", "--fresh", "--steps", "2000")),
}
"""Name: the model of the example that it is a variant of, and how."""
SHOWN_STUDENT = "student_shown"
"""The student of the self-distillation example, which comes with rows of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Paths of one regime."""

    train: Path
    held_out: Path
    student: Path
    teacher: Path
    given: Path
    teacher_checkpoint: Path


def make_inputs(regime: Regime, folder: Path, *, given: bool, inside: bool) -> Inputs:
    """Make what is missing; `given`: the teacher's responses too; `inside`: the teacher's Megatron checkpoint too.

    Raises `subprocess.CalledProcessError`, after the script has said why.
    """
    if regime.student == SHOWN_STUDENT:
        return shown_inputs(folder, regime, inside=inside)
    data = once(folder / f"data-{regime.digits}", lambda path: make_data(path, regime))
    found = Inputs(
        train=once(
            folder / f"train-{regime.digits}-{regime.prompts}.jsonl", lambda path: first_lines(path, data, regime)
        ),
        held_out=data / "held_out.jsonl",
        student=model(regime.student, folder),
        teacher=model(regime.teacher, folder),
        given=folder / f"given-{regime.teacher}-{regime.digits}-{regime.prompts}.jsonl",
        teacher_checkpoint=folder / f"megatron-{regime.teacher}",
    )
    if given:
        once(found.given, lambda path: sample(path, found, regime))
    if inside:
        convert(found)
    return found


def shown_inputs(folder: Path, regime: Regime, *, inside: bool) -> Inputs:
    """The student and the rows of the self-distillation example; the responses that are given are its solutions."""
    made = once(folder / SHOWN_STUDENT, lambda path: python(str(SELF_ADDITION / "make_model.py"), "--out", str(path)))
    found = Inputs(
        train=made / "train.jsonl",
        held_out=made / "held_out.jsonl",
        student=made / "student",
        teacher=model(regime.teacher, folder),
        given=made / "train.jsonl",
        teacher_checkpoint=folder / f"megatron-{regime.teacher}",
    )
    if inside:
        convert(found)
    return found


def convert(inputs: Inputs) -> None:
    """The teacher's checkpoint for the learner."""
    command = ("-m", "opd_async.learner.convert", "hf-to-megatron", "--hf", str(inputs.teacher), "--out")
    once(inputs.teacher_checkpoint, lambda path: python(*command, str(path)))


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made under another name first where it is not there yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")
        make(fresh)
        try:
            fresh.replace(path)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(fresh)  # another command has made the same folder meanwhile
    return path


def make_data(path: Path, regime: Regime) -> None:
    """Training and held-out prompts."""
    python(str(ADDITION / "make_data.py"), "--out", str(path), "--digits", str(regime.digits))


def first_lines(path: Path, data: Path, regime: Regime) -> None:
    """As many training prompts as the regime has."""
    with (data / "train.jsonl").open() as lines:
        write_atomically(path, "".join(islice(lines, regime.prompts)).encode())


def model(name: str, folder: Path) -> Path:
    """The folder of a recipe's model, trained now if need be, or of the example's own."""
    if name not in RECIPES:
        return ADDITION / "models" / name
    base, options = RECIPES[name]
    made = once(folder / "models" / name, lambda path: train(path, base, options))
    return made / base


def train(path: Path, base: str, options: tuple[str, ...]) -> None:
    """Train a variant of one of the example's models."""
    python(str(ADDITION / "make_models.py"), "--only", base, "--out", str(path), *options)


def sample(path: Path, inputs: Inputs, regime: Regime) -> None:
    """The teacher's responses to as many prompts as the runs on the student's own see."""
    prompts = min(regime.prompts, regime.steps * SAMPLES_PER_STEP)
    where = ("--prompts", str(inputs.train), "--out", str(path))
    how = ("--count", str(prompts), "--per-prompt", str(min(GROUP, regime.steps * SAMPLES_PER_STEP // prompts)))
    python(str(ADDITION / "sample.py"), str(inputs.teacher), *where, *how)


def python(*arguments: str) -> None:
    """Run a script of the project, its output to stderr, and wait for it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *arguments], check=True, timeout=DEADLINE_S, stdout=sys.stderr.fileno(), env=environment
    )
