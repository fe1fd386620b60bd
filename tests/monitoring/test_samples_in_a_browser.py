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
EVALUATED = 12


def record(folder: Path, responses: int) -> None:
    """A record of a run: response n is of step n // 4 + 1, and its worst token has log p - log q = n / 1000.

    The last twelve are of evaluations, a third of them on the set `words`."""
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for n in range(responses):
            words = [f"w{n}-{at} " for at in range(TOKENS)]
            teacher = [-0.5] * TOKENS
            teacher[7], teacher[9] = -0.5 - n / 1000, 2.5
            row = {
                "time": 0.0,
                "step": n // 4 + 1,
                "sample": n,
                "prompt_id": n,
                "teacher": "",
                "finish": "stop",
                "reward": None,
                "prompt": f"question {n} <b>",
                "prompt_tokens": 3,
                "response": "".join(words),
                "ends": np.cumsum([len(word) for word in words]).tolist(),
                "response_tokens": TOKENS,
                "student_logprobs": [-0.5] * TOKENS,
                "teacher_logprobs": teacher,
                "made_at": 0.0,
                "chunks": [[30, n // 4, 0.0, 0.25], [TOKENS, n // 4, 1.0, 0.5]],
                "parts": [[30, n // 4 + 1], [TOKENS, n // 4 + 2]],
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
