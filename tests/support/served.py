"""The service on a storage of toy studies, in this process and behind a port."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from studies.storage import open_storage
from tests.support.toy_study import study_text, toy_storage
from tuner.places import existing_place
from tuner.serve.access import Tokens
from tuner.serve.app import make_app
from tuner.serve.context import Service
from tuner.serve.runs import Runs

__all__ = ["READ", "TOKENS", "WRITE", "client", "listening", "service", "study_text", "toy_storage"]
READ, WRITE = "r" * 32, "w" * 32
TOKENS = Tokens(read=READ, write=WRITE)
MEMORY_CLI = (sys.executable, str(Path(__file__).with_name("memory_cli.py")))


def service(
    url: str, tokens: Tokens = TOKENS, command: Sequence[str] = MEMORY_CLI, address: str | None = None
) -> Service:
    """A service whose runs are processes of `command`."""
    place = existing_place(url)
    runs = Runs(place=place, address=address, command=command)
    return Service(place=place, storage=open_storage(place.url), tokens=tokens, runs=runs)


def client(served: Service, token: str | None = None) -> TestClient:
    """What asks `served` with `token`."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return TestClient(make_app(served), base_url="http://127.0.0.1", headers=headers, raise_server_exceptions=False)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Base URL of `app`, which answers inside the block from a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline, "the service did not start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
