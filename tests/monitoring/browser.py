"""A Chromium without a window, driven over its own protocol."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from deadlines import patience

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Refused(Exception):
    """The browser did not do what it was told."""


class Page:
    """One page of a browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.errors: list[str] = []
        """What scripts of the page threw."""

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol. Raises `Refused`."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(patience(120)):
            while True:
                answer = await self._socket.receive_json()
                if answer.get("method") == "Runtime.exceptionThrown":
                    self.errors.append(str(answer["params"]["exceptionDetails"]))
                if answer.get("id") == number:
                    if "error" in answer:
                        raise Refused(f"{method}: {answer['error']}")
                    return dict(answer["result"])

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression comes to; a promise is waited for."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        async with asyncio.timeout(patience(120)):
            while not await self.value(expression):  # noqa: ASYNC110  # the page has no event to wait for from here
                await asyncio.sleep(0.05)

    async def screenshot(self) -> io.BytesIO:
        """A picture of the page, as a PNG."""
        return io.BytesIO(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


@asynccontextmanager
async def open_page(file: Path, *, scripts: bool = True) -> AsyncIterator[Page]:
    """Open a file in a browser of its own; `scripts=False` is a browser without JavaScript."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert found, "this test runs Chromium: requirements/tools.sh installs it"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        window = ("--window-size=1400,900", "--hide-scrollbars", "--force-device-scale-factor=1")
        browser = await asyncio.create_subprocess_exec(
            *(found, *options, *window, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(profile) / "DevToolsActivePort", browser)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                    target = next(one for one in await reply.json(content_type=None) if one["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    await page.call("Runtime.enable")
                    await page.call("Emulation.setScriptExecutionDisabled", value=not scripts)
                    await page.call("Page.navigate", url=file.as_uri())
                    yield page
        finally:
            browser.terminate()
            await browser.wait()


async def _port(file: Path, browser: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(patience(60)):
        while True:
            assert browser.returncode is None, "Chromium ended"
            if lines := await asyncio.to_thread(_lines, file):
                return int(lines[0])
            await asyncio.sleep(0.05)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
