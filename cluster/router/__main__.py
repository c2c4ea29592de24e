"""Starts the router: python -m cluster.router --spec JSON|FILE."""

from __future__ import annotations

import asyncio
import logging
import signal

from aiohttp import web

from cluster.engines.child_process import Exit, die_with_owner, fail, read_spec
from cluster.router.app import make_runner
from cluster.router.options import RouterOptions


def main() -> None:
    """Route until SIGTERM, or until the process that started the router is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the caller ends the router
    logging.basicConfig(level=logging.WARNING)
    options = read_spec(RouterOptions, "Routes requests to the replicas of a deployment.")
    die_with_owner()
    asyncio.run(_serve(options))


async def _serve(options: RouterOptions) -> None:
    runner = make_runner(options)
    await runner.setup()
    try:
        await web.TCPSite(runner, options.host, options.port).start()
    except OSError as error:
        fail(Exit.PORT_IN_USE, f"port {options.port} of {options.host} cannot be bound ({error}); choose another")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(f"routing to {', '.join(options.urls)} on http://{options.host}:{options.port}", flush=True)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    main()
