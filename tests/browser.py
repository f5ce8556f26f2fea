"""A real browser without a window: Chromium, spoken to by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_MEASURE = """JSON.stringify({
  width: document.documentElement.scrollWidth, inner: innerWidth, height: document.documentElement.scrollHeight,
  broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).length,
  images: document.images.length, scripts: document.scripts.length, text: document.body.innerText,
  marked: window.marked === true, smallest: Math.min(...[...document.images].map(image => image.clientWidth)),
})"""


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Seen:
    """What a browser made of a page."""

    measured: dict[str, Any]
    complaints: list[str] = field(default_factory=list)
    """Console messages, exceptions and what the log says of failed requests."""
    requested: list[str] = field(default_factory=list)
    """Every address that it asked for, without data: URLs."""
    screenshot: bytes = b""


async def look_at(page: Path, width: int, height: int = 844, *, is_phone: bool = False) -> Seen:
    """Open a page in a window of that size."""
    async with _browser() as call:
        seen = Seen({}, call.complaints, call.requested)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await call(f"{domain}.enable")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        await call("Emulation.setDeviceMetricsOverride", **metrics)
        await call("Page.navigate", url=page.as_uri())
        await call.wait_for("Page.loadEventFired")
        expression = f"new Promise(done => setTimeout(() => done({_MEASURE}), 200))"  # what a script would do by then
        result = await call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        seen.measured = json.loads(result["result"]["value"])
        clip = {"x": 0, "y": 0, "width": width, "height": min(seen.measured["height"], 12_000), "scale": 1}
        shot = await call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        seen.screenshot = base64.b64decode(shot["data"])
        return seen


class _Calls:
    """Calls of one tab, and what it reported meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, session_id: str) -> None:
        self.complaints: list[str] = []
        self.requested: list[str] = []
        self._socket, self._session_id, self._ids = socket, session_id, itertools.count(100)
        self._events: list[str] = []

    async def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        await self._socket.send_json({"id": number, "sessionId": self._session_id, "method": method, "params": params})
        while True:
            message = await self._next()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def wait_for(self, event: str) -> None:
        while event not in self._events:
            await self._next()

    async def _next(self) -> dict[str, Any]:
        message = await self._socket.receive_json(timeout=60)
        method, params = message.get("method", ""), message.get("params", {})
        self._events.append(method)
        if method == "Runtime.consoleAPICalled":
            self.complaints.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requested.append(params["request"]["url"])
        return message


@contextlib.asynccontextmanager
async def _browser() -> AsyncIterator[_Calls]:
    program = find_browser()
    assert program is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, "--headless", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        command += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium refuses root otherwise
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            address = await asyncio.wait_for(_address(process), 60)
            async with aiohttp.ClientSession() as http, http.ws_connect(address, max_msg_size=0) as socket:
                await socket.send_json({"id": 1, "method": "Target.getTargets"})
                targets = (await _answer(socket, 1))["targetInfos"]
                tab = next(target["targetId"] for target in targets if target["type"] == "page")
                params = {"targetId": tab, "flatten": True}
                await socket.send_json({"id": 2, "method": "Target.attachToTarget", "params": params})
                yield _Calls(socket, (await _answer(socket, 2))["sessionId"])
        finally:
            with contextlib.suppress(ProcessLookupError):  # it may have ended
                os.killpg(process.pid, signal.SIGKILL)  # its children outlive it, and hold the pipe that wait() awaits
            await process.wait()


async def _address(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    said = ""
    while line := (await process.stderr.readline()).decode():
        said += line
        if line.startswith("DevTools listening on "):
            return line.split()[-1]
    raise AssertionError(f"the browser does not start: {said}")


async def _answer(socket: aiohttp.ClientWebSocketResponse, number: int) -> dict[str, Any]:
    while (message := await socket.receive_json(timeout=60)).get("id") != number:
        pass
    return message["result"]
