"""Webhooks of campaigns, sent to a real HTTP server on this machine that fails first."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from studies.campaign_store import create_campaign
from studies.storage import open_storage
from tuner.campaigns.herald import Herald
from tuner.campaigns.record import Record
from tuner.campaigns.schema import WebhookSection
from tuner.campaigns.webhooks import Message, Post, name_of, send, url_of

SECRET = "T0/B0/very-secret"  # noqa: S105 - not one
MESSAGE = Message(
    key="best:a:3",
    event="best",
    text="new best of a: <12> & more",
    campaign="autumn",
    at_s=1_800_000_000.0,
    study="a",
    details={"model": "llama"},
)


@dataclass
class Server:
    """Answers with `statuses` in turn, then with the last of them; keeps what it was sent."""

    port: int
    statuses: list[int]
    headers: dict[str, str] = field(default_factory=dict)
    bodies: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/services/{SECRET}"


@contextmanager
def serving(*statuses: int, **headers: str) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == f"/services/{SECRET}"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.bodies.append(body)
            status = state.statuses[min(len(state.bodies), len(state.statuses)) - 1]
            self.send_response(status)
            for name, value in state.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(port=server.server_address[1], statuses=list(statuses), headers=headers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)


@pytest.fixture
def hook(tmp_path: Path) -> WebhookSection:
    return WebhookSection(url_file=str(tmp_path / "hook"))


def point(hook: WebhookSection, url: str) -> None:
    Path(str(hook.url_file)).write_text(f"{url}\n")


def test_a_message_arrives_though_the_server_fails_twice(hook: WebhookSection) -> None:
    with serving(503, 429, 200) as server:
        point(hook, server.url)
        assert send(hook, MESSAGE, backoff_s=0.01) is None
    assert len(server.bodies) == 3
    assert server.bodies[-1] == {
        "campaign": "autumn",
        "event": "best",
        "text": "new best of a: <12> & more",
        "study": "a",
        "at": "2027-01-15T08:00:00+00:00",
        "details": {"model": "llama"},
    }


def test_slack_gets_a_text_with_its_control_characters_escaped(tmp_path: Path) -> None:
    hook = WebhookSection(url_file=str(tmp_path / "hook"), format="slack")
    with serving(200) as server:
        point(hook, server.url)
        assert send(hook, MESSAGE) is None
    assert server.bodies == [{"text": "autumn: new best of a: &lt;12&gt; &amp; more"}]


def test_what_goes_wrong_for_good_is_told_without_the_url(
    hook: WebhookSection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(404) as server:
        point(hook, server.url)
        refused = send(hook, MESSAGE, backoff_s=0.01)
        assert len(server.bodies) == 1, "a 404 does not get better"
        server.statuses = [500]
        failed = send(hook, MESSAGE, tries=3, backoff_s=0.01)
        assert len(server.bodies) == 4
        server.statuses = [302]
        server.headers = {"Location": f"http://127.0.0.1:{server.port}/elsewhere"}
        moved = send(hook, MESSAGE, backoff_s=0.01)
    nobody = send(hook, MESSAGE, tries=2, backoff_s=0.01)
    point(hook, f"not-a-url-{SECRET}")
    unusable = send(hook, MESSAGE)
    Path(str(hook.url_file)).unlink()
    missing = send(hook, MESSAGE)
    texts = [refused, failed, moved, nobody, unusable]
    assert ["404" in str(refused), "500" in str(failed), "302" in str(moved)] == [True] * 3
    assert "was not reached" in str(nobody)
    assert "no http or https URL" in str(unusable)
    assert "cannot be read (FileNotFoundError); write the URL, as text, to a file" in str(missing)
    for text in (*texts, caplog.text):
        assert "very-secret" not in str(text)


def test_the_url_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = WebhookSection(url_env="MY_HOOK")
    monkeypatch.setenv("MY_HOOK", " https://example.org/x ")
    assert url_of(hook) == "https://example.org/x"
    assert name_of(hook) == "$MY_HOOK"


def herald(folder: Path, hooks: list[WebhookSection], notes: list[str]) -> Herald:
    record = Record(create_campaign(open_storage(f"sqlite:///{folder}/studies.db"), "autumn"))
    return Herald(record=record, post=Post(hooks, backoff_s=0.01), note=notes.append, close_limit_s=120.0)


def test_each_thing_is_told_once_and_what_has_not_left_waits_in_the_storage(
    hook: WebhookSection, tmp_path: Path
) -> None:
    notes: list[str] = []
    with serving(200) as server:
        point(hook, server.url)
        first = herald(tmp_path, [hook], notes)
        first.tell(MESSAGE)
        first.tell(MESSAGE)
        first.close()
        assert len(server.bodies) == 1
        assert first.record.memory().outbox == ()
        again = herald(tmp_path, [hook], notes)
        again.tell(MESSAGE)
        again.close()
        assert len(server.bodies) == 1, "another runner does not repeat it"
        killed = herald(tmp_path, [], notes)  # dies before anything has left
        killed.record.note_outbox(tuple(Post([hook]).parcels(MESSAGE)))
        follower = herald(tmp_path, [hook], notes)
        follower.close()
        assert len(server.bodies) == 2
        assert follower.record.memory().outbox == ()
    stored = (tmp_path / "studies.db").read_bytes() + b"".join(f.read_bytes() for f in tmp_path.glob("studies.db-wal"))
    assert b"very-secret" not in stored
    assert notes == []


def test_what_is_given_up_is_noted(hook: WebhookSection, tmp_path: Path) -> None:
    notes: list[str] = []
    with serving(410) as server:
        point(hook, server.url)
        told = herald(tmp_path, [hook], notes)
        told.tell(MESSAGE)
        told.close()
    assert len(notes) == 1
    assert "answered 410" in notes[0]
    assert "best was not told" in notes[0]
