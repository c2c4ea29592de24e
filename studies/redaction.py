"""Secrets taken out of text: passwords in URLs, and values of keys that name a secret."""

from __future__ import annotations

import re

HIDDEN = "***"
_IN_URL = re.compile(r"(?P<before>[a-zA-Z][\w+.-]*://[^\s:/@]*):[^\s@]*@")
_IN_QUERY = re.compile(r"(?P<key>\b\w*(?:password|passwd|pwd|secret|token|api_?key)=)[^&\s;'\"]*", re.IGNORECASE)


def redacted(text: str) -> str:
    """`text` with `user:password@` of URLs and `password=...` parameters hidden."""
    return _IN_QUERY.sub(rf"\g<key>{HIDDEN}", _IN_URL.sub(rf"\g<before>:{HIDDEN}@", text))
