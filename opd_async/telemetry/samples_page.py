"""Make one self-contained HTML page of a run's responses, which `opd samples` opens and each run writes at its end.

samples.jsonl -> index: a short row for each response, which the page's filters look at
              -> blocks of rows, packed: a browser unpacks the one that is looked at
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

from opd_async.errors import InputError
from opd_async.telemetry.samples import SAMPLES_FILE, count_samples, read_samples

PAGE_FILE = "samples.html"
MOST = 10_000
"""Responses in a page; of more, every second, third, ... is taken."""
BLOCK = 50
PACKING = 4
"""gzip's level: beyond it the page gets little smaller and takes much longer to write."""
EXCERPT = 90
TRAINING = "training"
COLUMNS = (
    *("who", "set", "step", "sample", "reward", "right", "tokens", "kl", "worst", "age", "parts", "wait"),
    *("excerpt", "block", "place"),
)
_MARK = "<!--DATA-->"


def write_page(folder: Path, out: Path, most: int = MOST) -> int:
    """Write the page of the run in `folder`, whole or not at all; returns the number of responses in it.

    Raises `InputError` without a `samples.jsonl`, or with one that holds no response, and `OSError`.
    """
    record = folder / SAMPLES_FILE
    rows = count_samples(record)
    if not rows:
        raise InputError(f"{record}: holds no response; a run writes some with its first step")
    every = -(-rows // most)
    template = resources.files(__package__).joinpath("samples_page.html").read_text(encoding="utf-8")
    before, after = template.split(_MARK)
    fresh = out.with_name(f"{out.name}.new")
    fresh.touch(0o600)  # it quotes prompts
    with fresh.open("w", encoding="utf-8") as page:
        page.write(before)
        shown = _write_data(page, folder.resolve().name, read_samples(record), every)
        page.write(after)
    fresh.replace(out)
    return shown


def _write_data(page: TextIO, name: str, rows: Iterator[tuple[bytes, dict[str, Any]]], every: int) -> int:
    index: list[list[Any]] = []
    block: list[bytes] = []
    left_out = 0
    for at, (line, row) in enumerate(rows):
        if at % every:
            left_out += 1
            continue
        index.append(_index_row(row, *divmod(len(index), BLOCK)))
        block.append(line)
        if len(block) == BLOCK:
            _write_block(page, len(index) // BLOCK - 1, block)
            block = []
    if block:
        _write_block(page, len(index) // BLOCK, block)
    _write_json(page, "head", {"name": name, "columns": COLUMNS, "left_out": left_out})
    _write_json(page, "index", index)
    return len(index)


def _write_block(page: TextIO, number: int, block: Sequence[bytes]) -> None:
    packed = gzip.compress(b"[" + b",".join(block) + b"]", PACKING, mtime=0)
    page.write(f'<script type="text/plain" id="block-{number}">{base64.b64encode(packed).decode()}</script>\n')


def _write_json(page: TextIO, name: str, value: Any) -> None:
    # no text of a response can end the element that it stands in
    text = _compact(value).replace("<", "\\u003c")
    page.write(f'<script type="application/json" id="{name}">{text}</script>\n')


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _index_row(row: dict[str, Any], block: int, place: int) -> list[Any]:
    """One row of the index, in the order of `COLUMNS`; `kl` and `worst` are log p - log q of sampled ones, nats."""
    given = {at for start, end in row.get("given") or () for at in range(start, end)}
    pairs = zip(row.get("student_logprobs") or (), row.get("teacher_logprobs") or (), strict=False)
    differences = [p - q for at, (p, q) in enumerate(pairs) if p is not None and q is not None and at not in given]
    chunks, parts = row.get("chunks") or [], row.get("parts") or []
    facts = {
        "who": row.get("evaluation", TRAINING),
        "set": row.get("set"),
        "step": row["step"],
        "sample": row.get("sample"),
        "reward": row.get("reward"),
        "right": row.get("right"),
        "tokens": row["response_tokens"],
        "kl": round(sum(differences) / len(differences), 4) if differences else None,
        "worst": round(max(differences), 4) if differences else None,
        "age": _oldest(chunks, parts),
        "parts": len(parts),
        "wait": max((chunk[3] for chunk in chunks), default=None),
        "excerpt": row["response"][:EXCERPT],
        "block": block,
        "place": place,
    }
    return [facts[name] for name in COLUMNS]


def _oldest(chunks: Sequence[Sequence[float]], parts: Sequence[Sequence[int]]) -> int | None:
    """The largest age of a token, in steps: the step that trained it started from weights `step - 1`."""
    ages = []
    for end, version, *_ in chunks:
        step = next((step for part_end, step in parts if end <= part_end), None)
        if step is not None:
            ages.append(int(step - 1 - version))
    return max(ages, default=None)
