"""Telling webhooks: messages leave from a thread of their own, are tried again, and wait in the storage until then.

A webhook's URL is a secret. It is read when a message leaves, from the environment or from a file, and appears nowhere:
webhooks are named by where their URL stands, and what urllib3 would log while one is sent is dropped.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import urllib3

from search_spaces.errors import InvalidValueError
from studies.codec import Json, to_json
from tuner.campaigns.schema import WebhookSection

TRIES = 5
BACKOFF_S = 1.0
"""Seconds before the second try; twice as many before each later one, unless the server says how long (Retry-After)."""
WAIT_S = 10.0
"""How long a connection, and an answer, is waited for."""
LONGEST_WAIT_S = 300
AGAIN_ON = (408, 425, 429, 500, 502, 503, 504)
_sending = threading.local()


@dataclass(frozen=True, kw_only=True)
class Message:
    """Something to tell; `key` is the same for the same thing, so that it is told once."""

    key: str
    event: str
    text: str
    campaign: str
    at_s: float
    study: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A message for one webhook."""

    hook: str
    message: Message


class _Silence(logging.Filter):
    """Drops what is logged while a message is sent: it would hold the URL."""

    def filter(self, _record: logging.LogRecord) -> bool:
        return not getattr(_sending, "now", False)


for _name in ("urllib3.connectionpool", "urllib3.util.retry"):
    logging.getLogger(_name).addFilter(_Silence())


def name_of(hook: WebhookSection) -> str:
    """Where the URL of `hook` stands: what it is called."""
    return f"${hook.url_env}" if hook.url_env is not None else str(hook.url_file)


def url_of(hook: WebhookSection) -> str:
    """The URL of `hook`; raises `InvalidValueError`, which does not hold it, where there is none."""
    if hook.url_env is not None:
        url = os.environ.get(hook.url_env, "").strip()
    else:
        try:
            url = Path(str(hook.url_file)).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidValueError(
                f"webhook {name_of(hook)} cannot be read ({type(error).__name__}); write the URL, as text, to a file "
                "of the runner's machine that it may read"
            ) from error
    if not url.startswith(("http://", "https://")):
        raise InvalidValueError(f"webhook {name_of(hook)} holds no http or https URL; put the whole URL there")
    return url


def body_of(hook: WebhookSection, message: Message) -> bytes:
    """What `hook` is sent."""
    if hook.format == "slack":
        text = f"{message.campaign}: {message.text}"
        for char, word in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):  # as Slack wants its control characters
            text = text.replace(char, word)
        return json.dumps({"text": text}).encode()
    tree: dict[str, Json] = {
        "campaign": message.campaign,
        "event": message.event,
        "text": message.text,
        "study": message.study,
        "at": datetime.fromtimestamp(message.at_s, UTC).isoformat(),
        "details": to_json(message.details),
    }
    return json.dumps(tree, ensure_ascii=False).encode()


def send(hook: WebhookSection, message: Message, *, tries: int = TRIES, backoff_s: float = BACKOFF_S) -> str | None:
    """Send `message` to `hook`, again where it may help; what went wrong at last, without secrets, None where it left.

    Redirections are not followed: the message would go where nobody said that it should.
    """
    try:
        url = url_of(hook)
    except InvalidValueError as error:
        return str(error)
    again = urllib3.Retry(
        total=tries - 1,
        redirect=0,
        allowed_methods=None,
        status_forcelist=AGAIN_ON,
        backoff_factor=backoff_s / 2,
        backoff_jitter=backoff_s / 4,
        raise_on_status=False,
        raise_on_redirect=False,
        retry_after_max=LONGEST_WAIT_S,
    )
    _sending.now = True
    try:
        with urllib3.PoolManager(timeout=urllib3.Timeout(connect=WAIT_S, read=WAIT_S)) as pool:
            headers = {"Content-Type": "application/json"}
            answer = pool.request("POST", url, body=body_of(hook, message), headers=headers, retries=again)
    except (urllib3.exceptions.HTTPError, ValueError) as error:  # their texts hold the URL
        cause = getattr(error, "reason", None)
        return f"webhook {name_of(hook)} was not reached ({type(cause or error).__name__})"
    finally:
        _sending.now = False
    return None if 200 <= answer.status < 300 else f"webhook {name_of(hook)} answered {answer.status}"


class Post:
    """Sends parcels in a thread of its own. `backoff_s` as of `send`."""

    def __init__(self, hooks: Sequence[WebhookSection], *, backoff_s: float = BACKOFF_S) -> None:
        self._hooks = {name_of(hook): hook for hook in hooks}
        self._backoff_s = backoff_s
        self._waiting: queue.Queue[Parcel | None] = queue.Queue()
        self._done: queue.Queue[tuple[Parcel, str | None]] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="webhooks")
        self._thread.start()

    def parcels(self, message: Message) -> list[Parcel]:
        """`message` for every webhook that wants it."""
        return [
            Parcel(hook=name, message=message) for name, hook in self._hooks.items() if message.event in hook.events
        ]

    def put(self, parcel: Parcel) -> None:
        """Send it soon; one for a webhook that is not there any more counts as sent."""
        if parcel.hook in self._hooks:
            self._waiting.put(parcel)
        else:
            self._done.put((parcel, f"webhook {parcel.hook} is not in the campaign's file any more"))

    def done(self) -> list[tuple[Parcel, str | None]]:
        """What has left since the last call, or was given up: what went wrong then."""
        found = []
        while True:
            try:
                found.append(self._done.get_nowait())
            except queue.Empty:
                return found

    def close(self, limit_s: float) -> None:
        """Wait until everything has left, but not longer than `limit_s`."""
        self._waiting.put(None)
        self._thread.join(limit_s)

    def _work(self) -> None:
        while (parcel := self._waiting.get()) is not None:
            self._done.put((parcel, send(self._hooks[parcel.hook], parcel.message, backoff_s=self._backoff_s)))
