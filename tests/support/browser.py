"""A real Chromium without a window, driven by its own DevTools protocol; ended with the test that started it."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import aiohttp
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


def find_browser() -> str:
    """The path of a Chromium; skips the test where there is none."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed, so that no page can be looked at")
    return found


class Browser:
    """One page. `requested` holds the URL of every request it made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self.requested: list[str] = []
        self.faults: list[str] = []

    async def __aenter__(self) -> Self:
        profile = self._folder / "profile"
        command = [find_browser(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with (self._folder / "browser.log").open("wb") as log:
            self._process = _start(command, log)
        self._session = aiohttp.ClientSession()
        try:
            port = (await _until((profile / "DevToolsActivePort").is_file, profile)).splitlines()[0]
            async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                (target,) = [each for each in await answer.json() if each["type"] == "page"]
            self._socket = await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
            self._reader = asyncio.create_task(self._read())
            for domain in ("Page", "Runtime", "Network", "Log"):
                await self.send(f"{domain}.enable")
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        if hasattr(self, "_reader"):
            self._reader.cancel()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        shutil.rmtree(self._folder / "profile", ignore_errors=True)

    async def _read(self) -> None:
        async for message in self._socket:
            told = message.json()
            if "id" in told:
                self._replies.pop(told["id"]).set_result(told)
            elif told["method"] == "Network.requestWillBeSent":
                self.requested.append(told["params"]["request"]["url"])
            elif told["method"] == "Runtime.exceptionThrown":
                self.faults.append(str(told["params"]["exceptionDetails"]))

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        self._replies[self._number] = reply = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        told = await asyncio.wait_for(reply, 120)
        assert "error" not in told, told["error"]
        return dict(told["result"])

    async def view(self, width: int, *, dark: bool, height: int = 900) -> None:
        """Size in CSS pixels, and the scheme of colours that the user prefers."""
        mobile = width < 600
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def open(self, url: str, ready: str) -> None:
        """Go to `url` and wait until the JavaScript expression `ready` is true."""
        await self.send("Page.navigate", url=url)
        await self.until(f"document.readyState === 'complete' && ({ready})")

    async def until(self, expression: str, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while not await self.run(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"{expression} did not come true within {timeout_s:g} s: {self.faults}"
            await asyncio.sleep(0.2)

    async def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        told = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def screenshot(self, path: Path) -> Path:
        """The whole page as PNG."""
        told = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        return _write(path, base64.b64decode(told["data"]))


def _start(command: list[str], log: BinaryIO) -> subprocess.Popen[bytes]:
    """In a process group of its own: a browser is many processes, and all of them end together."""
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


async def _until(there: Callable[[], bool], profile: Path, timeout_s: float = 90) -> str:
    deadline = time.monotonic() + timeout_s
    while not there() or not (text := (profile / "DevToolsActivePort").read_text()).strip():
        assert time.monotonic() < deadline, f"the browser did not start within {timeout_s:g} s"
        await asyncio.sleep(0.1)
    return text
