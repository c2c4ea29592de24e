"""The HTTP face of the router."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import asdict

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from cluster.engines.child_process import API_KEY_VARIABLE
from cluster.router.aggregated import AggregatedRoute
from cluster.router.disaggregated import DisaggregatedRoute
from cluster.router.metrics_text import read_figures
from cluster.router.options import Protocol, RouterOptions
from cluster.router.paired import PairedRoute
from cluster.router.records import Ending, Record, Records, summary
from cluster.router.requests import BadRequestError, parse_request
from cluster.router.upstream import BrokenStreamError, UpstreamError, open_session

log = logging.getLogger(__name__)

LARGEST_REQUEST_BYTES = 64 * 2**20
HEALTH_TIMEOUT_S = 5.0
SHOWN_RECORDS = 100
STOP_TIMEOUT_S = 0.5
"""How long requests in flight may go on once the router is told to stop."""
CLIENT_CLOSED_REQUEST = 499  # as nginx has it
_GONE = "the client went away"

Route = AggregatedRoute | DisaggregatedRoute | PairedRoute


class Router:
    """Answers clients through `route` and keeps the records."""

    def __init__(self, options: RouterOptions, session: aiohttp.ClientSession) -> None:
        self._urls = options.urls
        self._mode = "disaggregated" if options.is_disaggregated else "aggregated"
        self._session = session
        self._metrics = options.metrics
        self._route = _route(session, options)
        self._records = Records()
        self._in_flight = 0

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions: an answer, streamed or whole; 4xx and 5xx carry the cause as OpenAI's error object."""
        record = Record(started_ns=time.time_ns())
        arrived = time.perf_counter()
        self._in_flight += 1
        try:
            response = await self._route.complete(request, parse_request(await request.read()), record)
        except BadRequestError as error:
            self._records.add(record, Ending.FAILED, str(error))
            return _error(400, str(error))
        except BrokenStreamError as error:
            self._records.add(record, Ending.FAILED, str(error))
            return error.response
        except UpstreamError as error:
            self._records.add(record, Ending.FAILED, str(error))
            return _error(error.status, str(error))
        except ConnectionResetError:  # found out while writing; the answer that follows reaches nobody
            self._records.add(record, Ending.CANCELLED, _GONE)
            return _error(CLIENT_CLOSED_REQUEST, _GONE)
        except asyncio.CancelledError:
            self._records.add(record, Ending.CANCELLED, _GONE)
            raise
        finally:
            self._in_flight -= 1
        record.total_ms = (time.perf_counter() - arrived) * 1e3
        self._records.add(record, Ending.COMPLETED)
        return response

    async def health(self) -> web.Response:
        """GET /health: 200 where every replica is healthy, else 503 with those that are not."""
        faults = [fault for fault in await asyncio.gather(*map(self._fault, self._urls)) if fault]
        return web.json_response(
            {"status": "unhealthy" if faults else "ok", "faults": faults}, status=503 if faults else 200
        )

    async def _fault(self, url: str) -> str | None:
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self._session.get(f"{url}/health", timeout=timeout) as response:
                return None if response.status == 200 else f"{url}: status {response.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"{url}: {type(error).__name__}: {error}"

    async def stats(self, request: web.Request) -> web.Response:
        """GET /router/stats?since_ns=T&last=N: state, figures over requests completed since T, the last N records."""
        try:
            since_ns = int(request.query.get("since_ns", "0"))
            last = int(request.query.get("last", str(SHOWN_RECORDS)))
        except ValueError as error:
            return _error(400, f"since_ns and last are whole numbers: {error}")
        records = self._records.since(since_ns)
        metrics = await asyncio.gather(*(self._figures(url) for url in self._urls)) if self._metrics else ()
        return web.json_response(
            {
                "mode": self._mode,
                "in_flight": self._in_flight,
                "endings": {str(ending): self._records.endings[ending] for ending in Ending},
                **self._route.state(),
                "engine_metrics": dict(zip(self._urls, metrics, strict=False)),
                "summary": summary(records),
                "records": [asdict(record) for record in records[max(0, len(records) - last) :]],
            }
        )

    async def _figures(self, url: str) -> dict[str, float]:
        """Figures of a replica's `/metrics` by our names; those that it does not tell of are left out."""
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self._session.get(f"{url}/metrics", timeout=timeout) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("no metrics from %s: %s: %s", url, type(error).__name__, error)
            return {}
        return read_figures(text, self._metrics)


def _route(session: aiohttp.ClientSession, options: RouterOptions) -> Route:
    if not options.is_disaggregated:
        return AggregatedRoute(session, options.mixed_urls)
    if options.protocol is Protocol.SLOTS:
        return DisaggregatedRoute(session, options)
    return PairedRoute(session, options)


ROUTER = web.AppKey("router", Router)


def make_runner(options: RouterOptions) -> web.AppRunner:
    """What serves the router: a client that goes away ends its request at once, wherever that is.

    Where TUNER_API_KEY is set in the environment, all but /health ask for it as a bearer token.
    """
    return web.AppRunner(
        _make_app(options), handler_cancellation=True, access_log=None, shutdown_timeout=STOP_TIMEOUT_S
    )


def _make_app(options: RouterOptions) -> web.Application:
    app = web.Application(client_max_size=LARGEST_REQUEST_BYTES, middlewares=[_guard(os.environ.get(API_KEY_VARIABLE))])

    async def routes(app: web.Application) -> AsyncIterator[None]:
        async with open_session() as session:
            app[ROUTER] = Router(options, session)
            yield

    app.cleanup_ctx.append(routes)
    app.router.add_post("/v1/completions", _completions)
    app.router.add_get("/health", _health)
    app.router.add_get("/router/stats", _stats)
    return app


async def _completions(request: web.Request) -> web.StreamResponse:
    return await request.app[ROUTER].completions(request)


async def _health(request: web.Request) -> web.Response:
    return await request.app[ROUTER].health()


async def _stats(request: web.Request) -> web.Response:
    return await request.app[ROUTER].stats(request)


def _guard(key: str | None) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key is None or request.path == "/health" or hmac.compare_digest(given.encode(), key.encode()):
            return await handler(request)
        return _error(401, f"the bearer token is missing or is not the value of {API_KEY_VARIABLE}")

    return check


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"code": status, "message": message}}, status=status)
