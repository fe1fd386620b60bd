"""The example of docs/staleness.md, run: its table is what the assembler and the step policy do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from scored_chunks import scored

from opd_async.scheduling.assembly import Assembler
from opd_async.scheduling.step_policy import DeadlineCuts
from opd_async.transport.owed import OwedSample

PAGE = Path(__file__).parents[2] / "docs/staleness.md"
VERSIONS = range(3)


def table() -> dict[str, list[str]]:
    """First cell -> the cells of weights 0, 1 and 2."""
    text = PAGE.read_text().partition("## An example with three samples")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0].strip("*"): row[1:] for row in rows[2:]}


def test_the_table_is_what_the_state_machines_do() -> None:
    page, ends = table(), Counter[str]()
    box, policy = Assembler(), DeadlineCuts(tokens_per_step=10, max_staleness=1)
    box.start_at(0)
    for version in VERSIONS:
        for number, name in enumerate("ABC"):
            made, _, end = page[name][version].partition(", ")
            if made:
                start, ends[name] = ends[name], ends[name] + int(made)
                finish = "stop" if end == "ends" else None
                box.add(
                    scored(number, start, ends[name], context=start == 0, finish=finish, weight_version=version),
                )
        taken = []
        for sample in policy.choose(box, version):
            segment = box.take(sample)
            assert segment is not None
            ages = sorted(Counter((version - segment.versions).tolist()).items(), reverse=True)
            parts = ", ".join(f"{count} of age {age}" for age, count in ages)
            taken.append(f"{'ABC'[sample.sample_id]}: {parts}")
        assert "; ".join(sorted(taken)) == page["trained"][version]
        box.mark(version, [])


def test_a_step_that_would_leave_an_owed_token_behind_waits_for_it() -> None:
    box, policy = Assembler(), DeadlineCuts(tokens_per_step=10, max_staleness=1)
    box.start_at(0)
    box.add(scored(1, 0, 2, context=True))
    box.mark(0, [OwedSample(1, 0, 3)])
    box.add(scored(2, 0, 8, context=True, finish="stop", weight_version=1))
    assert policy.choose(box, 1) == []
    box.add(scored(1, 2, 3))
    assert [sample.sample_id for sample in policy.choose(box, 1)] == [1, 2]
