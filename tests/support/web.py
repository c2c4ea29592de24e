"""Servers inside the test's own event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web


def replica_runner(app: web.Application) -> web.AppRunner:
    """What serves a stand-in for a replica; its handlers are cancelled when the client goes away."""
    return web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)


@asynccontextmanager
async def listening(runner: web.AppRunner) -> AsyncIterator[str]:
    """Base URL of `runner`, which serves inside the block."""
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Return when `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for does not happen"
        await asyncio.sleep(0.005)
