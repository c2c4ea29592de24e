"""Engines forget earlier prompts before each run, so that no run answers from the caches of the one before."""

from __future__ import annotations

import http.client
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from search_spaces.outcome import Failure, FailureReason

RESET_LIMIT_S = 15.0
"""An engine may still be ending the requests of the run before; until then it may refuse."""
_PAUSE_S = 0.1
_ANSWER_LIMIT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class CacheReset:
    """One HTTP request to a replica (see `cluster.engines.base.ResetsCaches`), at a whole URL."""

    url: str
    method: str = "POST"


def reset_caches(resets: Sequence[CacheReset], api_key: str | None, limit_s: float = RESET_LIMIT_S) -> Failure | None:
    """Carry out `resets`, each again until it is answered with 2xx; the Failure of the one that is not in `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    for reset in resets:
        while (refused := _refusal(reset, api_key)) is not None:
            if time.monotonic() > deadline_s:
                return Failure(
                    reason=FailureReason.TRANSPORT,
                    detail=f"caches were not reset within {limit_s:g} s: {reset.method} {reset.url}: {refused}",
                )
            time.sleep(_PAUSE_S)
    return None


def _refusal(reset: CacheReset, api_key: str | None) -> str | None:
    """What the replica answered instead of 2xx, None where it did as asked."""
    parts = urlsplit(reset.url)
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    headers = {"Content-Length": "0"} | ({} if api_key is None else {"Authorization": f"Bearer {api_key}"})
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_ANSWER_LIMIT_S)
    try:
        connection.request(reset.method, path, headers=headers)
        response = connection.getresponse()
        body = response.read(500)
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    is_done = 200 <= response.status < 300
    return None if is_done else f"status {response.status}: {body.decode(errors='replace')}"
