"""Engines forget earlier prompts when they are told to, and a deployment tells them before each run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.cache_reset import CacheReset, reset_caches
from cluster.engines.llamacpp import LlamaCppBackend
from search_spaces.outcome import FailureReason
from search_spaces.serving import Role
from tests.support.llamacpp import SMALL_MODEL, WORKLOAD, ask_in_turn, metric, pool, prompts, replica_spec, request_body
from tests.support.processes import child, wait_until_healthy


@contextmanager
def refusing(times: int) -> Iterator[tuple[str, list[tuple[str, str, str | None]]]]:
    """A server that refuses so many times, and what it was asked: method, path and authorisation."""
    asked: list[tuple[str, str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(("POST", self.path, self.headers.get("Authorization")))
            self.send_response(400 if len(asked) <= times else 200)
            self.end_headers()
            self.wfile.write(b"busy" if len(asked) <= times else b"done")

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def test_an_engine_that_is_busy_is_asked_again() -> None:
    with refusing(2) as (url, asked):
        assert reset_caches([CacheReset(url=f"{url}/flush?now=1")], "key") is None
    assert asked == [("POST", "/flush?now=1", "Bearer key")] * 3


def test_an_engine_that_never_does_it_is_a_fault_that_says_so() -> None:
    with refusing(10_000) as (url, _):
        failure = reset_caches([CacheReset(url=f"{url}/flush")], None, limit_s=0.3)
    assert failure is not None
    assert failure.reason is FailureReason.TRANSPORT
    assert "status 400: busy" in failure.detail
    gone = reset_caches([CacheReset(url=f"{url}/flush")], None, limit_s=0.1)
    assert gone is not None
    assert "Refused" in gone.detail
    assert reset_caches([], None) is None


@pytest.mark.engine
def test_llamacpp_computes_a_prompt_anew_after_a_reset(tmp_path: Path) -> None:
    backend, own = LlamaCppBackend(), pool(Role.MIXED, 2)
    model = backend.prepare(SMALL_MODEL, tmp_path)
    spec = replica_spec(model, tmp_path, own, workload=replace(WORKLOAD, shared_prefix=0.5))
    url = f"http://127.0.0.1:{spec.port}"
    resets = [CacheReset(url=url + call.path, method=call.method) for call in backend.reset_calls(own)]
    assert len(resets) == 2
    body = request_body(prompts(1, seed=3)[0], 2)
    computed: list[float] = []

    def ask() -> None:
        before = metric(url, "prompt_tokens_total")
        (answer,) = asyncio.run(ask_in_turn(url, [body]))
        assert answer.done
        deadline = time.monotonic() + 20
        while (now := metric(url, "prompt_tokens_total")) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        computed.append(now - before)

    with child(backend.replica_command(spec).argv, tmp_path / "replica.log") as process:
        wait_until_healthy(url, process)
        ask()
        ask()
        assert reset_caches(resets, None) is None
        ask()
    whole = len(body["prompt"])
    assert computed[0] == whole
    assert computed[1] < whole / 2, "without a reset the second run answers from the first one's cache"
    assert computed[2] == whole
