"""The learner benchmark, tiny: how often tokens are forwarded, and a figure for everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from deadlines import patience

from opd_async.bench import learner

TINY = ["--layers", "2", "--hidden", "128", "--vocab", "64", "--tokens", "96", "--longest", "32", "--steps", "1"]


def test_a_teacher_inside_costs_four_forwards(tmp_path: Path) -> None:
    """Counted by hooks: one of the teacher, one of the student, and a backward pass, which counts as two."""
    options = learner._parser().parse_args(TINY)
    for side in ("student", "teacher"):
        learner.make_model(tmp_path / side, options.layers, options.hidden, options.vocab)
    # a process of its own, as in the benchmark: this one may hold process groups of other tests
    command = [
        sys.executable,
        "-m",
        "opd_async.bench.learner",
        *TINY,
        "--form",
        "teacher, exact",
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(120), check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    row = learner.row_of(done.stdout)
    padding = row.student_forward - 1.0
    assert 0.0 <= padding < 0.2
    assert row.student_forward == row.student_backward == row.teacher_forward
    assert row.equivalents == 4 * row.student_forward
    assert min(row.tokens_per_s, row.step_ms) > 0 and row.peak_mib >= 0
    assert row.form in learner.table([row])


def test_sequences_have_a_tail_and_rows_of_their_responses() -> None:
    batch = learner.sequences(learner._parser().parse_args([]))
    lengths = batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]
    assert 2048 <= len(batch.token_ids) < 2048 + 512 and lengths.max() > 2 * lengths.mean()
    assert 0.8 < len(batch.rows) / len(batch.token_ids) < 0.9
    first = learner._first(batch)
    assert first.cu_seqlens.tolist() == [0, len(first.token_ids)] and first.rows.max() < len(first.token_ids)
