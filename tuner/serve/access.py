"""Who may ask `tuner serve` for what: tokens, and the guard before every request."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from search_spaces.errors import InvalidValueError, require

READ_VARIABLE = "TUNER_READ_TOKEN"
WRITE_VARIABLE = "TUNER_WRITE_TOKEN"
SHORTEST_TOKEN = 16
BODY_LIMIT_BYTES = 256 * 1024
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class Right(IntEnum):
    """What a request may do; a right includes those below it."""

    NONE = 0
    READ = 1
    WRITE = 2


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a service, kept as digests. Without any, everyone who reaches the service may read."""

    read: str | None = field(default=None, repr=False)
    write: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for kind, token in (("read", self.read), ("write", self.write)):
            require(
                token is None or len(token) >= SHORTEST_TOKEN,
                f"the {kind} token has {len(token or '')} characters; give at least {SHORTEST_TOKEN}, "
                "such as from: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
            )
        require(self.read is None or self.read != self.write, "the read and the write token are the same; give two")

    @property
    def any(self) -> bool:
        """True where a token is asked for."""
        return self.read is not None or self.write is not None

    def right_of(self, token: str | None) -> Right:
        """What a request with `token` may do. Takes the same time whatever the token is."""
        given = _digest(token or "")
        writes = hmac.compare_digest(given, _digest(self.write or "")) and self.write is not None
        reads = hmac.compare_digest(given, _digest(self.read or "")) and self.read is not None
        if writes:
            return Right.WRITE
        return Right.READ if reads or not self.any else Right.NONE


def find_tokens(file: Path | None, environment: Mapping[str, str] = os.environ) -> Tokens:
    """The tokens of `file` (lines `read TOKEN` and `write TOKEN`), or of the two variables.

    Raises `InvalidValueError` for a file that cannot be read, that others may read, or that says something else.
    """
    if file is None:
        return Tokens(read=environment.get(READ_VARIABLE) or None, write=environment.get(WRITE_VARIABLE) or None)
    found: dict[str, str] = {}
    for number, line in enumerate(_private_text(file).splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        require(
            len(words) == 2 and words[0] in {"read", "write"} and words[0] not in found,
            f"line {number} of {file} is not 'read TOKEN' or 'write TOKEN', each once",
        )
        found[words[0]] = words[1]
    require(bool(found), f"{file} holds no token; write lines 'read TOKEN' and 'write TOKEN'")
    return Tokens(read=found.get("read"), write=found.get("write"))


def _private_text(file: Path) -> str:
    try:
        mode = file.stat().st_mode
        require(not mode & (stat.S_IRWXG | stat.S_IRWXO), f"others may read {file}; use: chmod 600 {file}")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValueError(f"token file {file} cannot be read ({error}); give a text file") from error


def is_loopback(host: str) -> bool:
    """True where only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_safe(host: str, tokens: Tokens) -> None:
    """Raise `InvalidValueError` for a service that other machines could ask without a token."""
    require(
        tokens.any or is_loopback(host),
        f"{host} is reached by other machines, and no token is set; set {READ_VARIABLE} and {WRITE_VARIABLE} "
        "(or --tokens FILE), or listen on 127.0.0.1",
    )


class Guard:
    """Refuses, before anything reads them, requests that are too large, and without tokens those for other hosts.

    A web page can make a browser send requests here under a name of its own; its Host then is that name, so that a
    service without tokens answers to the names of this machine alone.
    """

    def __init__(self, app: ASGIApp, *, local_only: bool) -> None:
        self._app = app
        self._local_only = local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Cache-Control"] = "no-store"
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
            await send(message)

        refused = self._refusal(Headers(scope=scope))
        if refused is None:
            await self._app(scope, receive, sealed)
            return
        status, text = refused
        await JSONResponse({"detail": text}, status)(scope, receive, sealed)

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        name = host[1:].split("]")[0] if host.startswith("[") else host.split(":")[0]
        if self._local_only and name not in _LOCAL_NAMES:
            return 403, f"without tokens only {', '.join(_LOCAL_NAMES)} are answered"
        if "transfer-encoding" in headers:
            return 411, "give the length of the body"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length[:12]) > BODY_LIMIT_BYTES:
            return 413, f"a body may have {BODY_LIMIT_BYTES} bytes"
        return None
