"""The page for browsers: one file with its style and script inside, and the policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

_FOLDER = "templates/serve"


@cache
def the_page() -> tuple[str, str]:
    """The page, and its Content-Security-Policy: its own script and style by their digests, and this service alone."""
    parts = {name: _text(f"page.{ending}") for name, ending in (("style", "css"), ("script", "js"))}
    environment = Environment(loader=PackageLoader("tuner", _FOLDER), autoescape=True)
    page = environment.get_template("page.html.j2").render(**parts)
    policy = (
        f"default-src 'none'; script-src {_digest(parts['script'])}; style-src {_digest(parts['style'])}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _text(name: str) -> Markup:
    return Markup((files("tuner") / _FOLDER / name).read_text(encoding="utf-8"))  # noqa: S704 - our own files


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
