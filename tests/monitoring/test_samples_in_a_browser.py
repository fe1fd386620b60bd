"""The page of responses in a real browser: ten thousand of them, filtered, opened, coloured."""

from __future__ import annotations

import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from browser import Page, Refused, open_page
from deadlines import patience

from opd_async.telemetry.samples_page import write_page

RESPONSES, TOKENS = 10_000, 60
SHORT = 40
"""Tokens of every hundredth response."""
EVALUATED = 12


def record(folder: Path, responses: int) -> None:
    """A record of a run: response n is of step n // 4 + 1, and its worst token has log p - log q = n / 1000. Every
    tenth has a reward, n / 10000.

    The last twelve are of evaluations, a third of them on the set `words`."""
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for n in range(responses):
            tokens = SHORT if n % 100 == 0 else TOKENS
            words = [f"w{n}-{at} " for at in range(tokens)]
            teacher = [-0.5] * tokens
            teacher[7], teacher[9] = -0.5 - n / 1000, 2.5
            row = {
                "time": 0.0,
                "step": n // 4 + 1,
                "sample": n,
                "prompt_id": n,
                "teacher": "",
                "finish": "stop",
                "reward": n / 10_000 if n % 10 == 0 else None,
                "prompt": f"question {n} <b>",
                "prompt_tokens": 3,
                "response": "".join(words),
                "ends": np.cumsum([len(word) for word in words]).tolist(),
                "response_tokens": tokens,
                "student_logprobs": [-0.5] * tokens,
                "teacher_logprobs": teacher,
                "made_at": 0.0,
                "chunks": [[30, n // 4, 0.0, 0.25], [tokens, n // 4, 1.0, 0.5]],
                "parts": [[30, n // 4 + 1], [tokens, n // 4 + 2]],
            }
            if n >= responses - EVALUATED:
                row |= {"evaluation": "student", "set": "sums" if n % 3 else "words"}
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    record(folder, RESPONSES)
    assert write_page(folder, folder / "samples.html") == RESPONSES
    return folder / "samples.html"


async def test_ten_thousand_responses_stay_usable(page_file: Path) -> None:
    async with open_page(page_file) as page:
        await page.until("!!document.getElementById('response')?.childElementCount")
        assert await page.value("document.getElementById('count').textContent") == "10,000 of 10,000 responses"
        assert await page.value("document.querySelectorAll('.row').length") < 60, "only the rows in sight exist"
        assert await page.value("document.getElementById('prompt').textContent") == "question 0 <b>"
        # a bound on the worst token, the worst first
        await page.value(
            "(() => { for (const [id, text] of [['worst-low', '9.99'], ['order', 'worst']]) {"
            "const one = document.getElementById(id); one.value = text;"
            "one.dispatchEvent(new Event('input', {bubbles: true})); } })()"
        )
        await page.until("document.getElementById('prompt').textContent === 'question 9999 <b>'")
        assert (await page.value("document.getElementById('count').textContent")).startswith("10 of 10,000 ")
        assert await page.value("document.querySelectorAll('#response span').length") == TOKENS
        assert await page.value("document.querySelectorAll('#response .cut').length") == 1
        colours = "[...document.querySelectorAll('#response span')].map(one => one.style.background)"
        painted = await page.value(colours)
        assert "203, 24, 29" in painted[7] and "33, 113, 181" in painted[9] and painted[7] != painted[8]
        picture = plt.imread(await page.screenshot())[..., :3]
        red, blue = np.array([203, 24, 29]) / 255, np.array([33, 113, 181]) / 255
        for colour in (red, blue):  # three quarters of it on white
            near = np.abs(picture - (0.75 * colour + 0.25)).max(axis=-1) < 0.02
            assert near.sum() > 200, "the token is there to see"
        # one evaluation set, then all of them again
        for name, left in (("words", 4), ("", 10)):
            await page.value(
                f"(() => {{ const one = document.getElementById('set'); one.value = '{name}'; "
                f"document.getElementById('worst-low').value = '{'' if name else 9.99}'; "
                "one.dispatchEvent(new Event('input', {bubbles: true})); })()"
            )
            assert (await page.value("document.getElementById('count').textContent")).startswith(f"{left} of ")
            title = await page.value("document.querySelector('.row b').textContent")
            assert title.startswith(f"student, {name or 'words'}, step ")
        # by the keyboard to the next one, and the other colourings
        await page.value(
            "document.getElementById('list').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown'}))"
        )
        await page.until("document.getElementById('prompt').textContent === 'question 9998 <b>'")
        for way in ("age", "version", "wait"):
            await page.value(
                f"(() => {{ const one = document.getElementById('colour'); one.value = '{way}'; "
                "one.dispatchEvent(new Event('change')); })()"
            )
            assert len(set(await page.value(colours))) >= (2 if way in ("age", "wait") else 1), way
        assert page.errors == []


async def bounded(page: Page, **bounds: str) -> str:
    """Write these bounds into the filters, and empty all others; returns how many responses are left, as it says."""
    values = json.dumps({name.replace("_", "-"): value for name, value in bounds.items()})
    await page.value(
        "(() => { for (const one of document.querySelectorAll('#filters input')) one.value = '';"
        f"for (const [id, text] of Object.entries({values})) document.getElementById(id).value = text;"
        "document.getElementById('filters').dispatchEvent(new Event('input')); })()"
    )
    return str(await page.value("document.getElementById('count').textContent")).split(" of ")[0]


async def test_every_filter_leaves_what_is_within_its_bounds(page_file: Path) -> None:
    async with open_page(page_file) as page:
        await page.until("!!document.getElementById('response')?.childElementCount")
        assert await bounded(page, step_low="3", step_high="4") == "8"
        assert await bounded(page, tokens_high=str(SHORT)) == "100"
        assert await bounded(page, tokens_low=str(SHORT + 1)) == "9,900"
        assert await bounded(page, reward_low="0.9") == "100", "what has no reward is not within its bounds"
        assert await bounded(page, reward_low="0.9", tokens_high=str(SHORT), worst_low="9.5") == "5"
        assert await bounded(page, step_low="9999") == "0"
        await page.until("document.getElementById('message').textContent === 'No response is within these bounds.'")
        assert await page.value("document.getElementById('detail').hidden")
        assert await bounded(page) == "10,000"
        assert page.errors == []


async def test_a_response_has_the_waits_of_its_chunks_and_the_figures_of_its_tokens(page_file: Path) -> None:
    """The first chunk is there from 0 to 0.25 s, the second from 1 to 1.5 s."""
    async with open_page(page_file) as page:
        await page.until("!!document.getElementById('response')?.childElementCount")
        await bounded(page, step_low="2", step_high="2")
        await page.until("document.getElementById('prompt').textContent === 'question 4 <b>'")
        painted = await page.value(
            "(() => { const one = document.getElementById('timeline'), pen = one.getContext('2d');"
            "const at = (share, y) => pen.getImageData(share * one.width, y, 1, 1).data[3] > 0;"
            "return [6, 20].map(y => [0.08, 0.4, 0.8].map(share => at(share, y))); })()"
        )
        assert painted == [[True, False, False], [False, False, True]]
        await page.value(
            "document.querySelectorAll('#response span')[35]"
            ".dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))"
        )
        said = await page.value("document.getElementById('token').textContent")
        figures = ["log p -0.50", "log q -0.50", "log q - log p 0.00", "weights 1", "age 1", "waited 0.50 s"]
        assert said.split("  ·  ") == ['token 35: "w4-35 "', *figures]
        assert page.errors == []


async def test_tokens_that_were_given_are_told_from_sampled_ones(tmp_path: Path) -> None:
    """They have no scores: zeros that are no agreement with the teacher."""
    record(tmp_path, 1)
    row = json.loads((tmp_path / "samples.jsonl").read_text()) | {"given": [[10, 20]]}
    for side in ("student_logprobs", "teacher_logprobs"):
        row[side] = [*row[side][:10], *[0.0] * 10, *row[side][20:]]
    (tmp_path / "samples.jsonl").write_text(f"{json.dumps(row)}\n")
    write_page(tmp_path, tmp_path / "samples.html")
    async with open_page(tmp_path / "samples.html") as page:
        await page.until("!!document.getElementById('response')?.childElementCount")
        found = await page.value(
            "[...document.querySelectorAll('#response span')].flatMap((one, at) => one.matches('.given') ? [at] : [])"
        )
        assert found == list(range(10, 20))
        assert "slanted: given" in await page.value("document.getElementById('legend').textContent")
        await page.value(
            "document.querySelectorAll('#response span')[12]"
            ".dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))"
        )
        said = await page.value("document.getElementById('token').textContent")
        assert said.split("  ·  ")[1:] == ["given, not sampled"]
        assert page.errors == []


async def outer_html(page: Page, selector: str) -> str:
    """The first element's; empty while there is none, or the document has changed between question and answer."""
    try:
        document = await page.call("DOM.getDocument", depth=1)
        found = await page.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector)
        return str((await page.call("DOM.getOuterHTML", nodeId=found["nodeId"]))["outerHTML"])
    except Refused:
        return ""


async def test_a_browser_without_scripts_says_what_to_do(page_file: Path) -> None:
    async with open_page(page_file, scripts=False) as page:
        await page.call("DOM.enable")
        text, give_up = "", time.monotonic() + patience(30)
        while not text and time.monotonic() < give_up:
            text = await outer_html(page, "noscript p")
        assert "This page needs JavaScript" in text and "samples.jsonl has the same as text" in text
        picture = plt.imread(await page.screenshot())[..., :3]
        assert (picture.min(axis=-1) < 0.8).sum() > 200, "there are letters to see"
