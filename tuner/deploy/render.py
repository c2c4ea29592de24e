"""Templates whose every value is quoted for the language that it goes into; a value that is missing is an error."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined


@dataclass(frozen=True, kw_only=True)
class OutFile:
    """A file to write below the output folder."""

    path: str
    text: str
    executable: bool = False


def render(template: str, **values: object) -> str:
    """The text of `templates/deploy/<template>`; raises `jinja2.UndefinedError` for a value that is not given.

    Filters: `sh` quotes a word for a shell and `sh_words` several, `y` writes a YAML scalar, `k8s` and `compose` do so
    for a word in which `$(...)` or `$` would be expanded, `cell` is text in a Markdown
    table, `comment` a line, and `block` a whole tree in YAML.
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tuner", "templates/deploy"),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - nothing here is HTML: each value goes through the filter of its language
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "sh": shlex.quote,
        "sh_words": _shell_words,
        "y": yaml_scalar,
        "k8s": lambda text: yaml_scalar(_without_expansion(text)),
        "compose": lambda text: yaml_scalar(str(text).replace("$", "$$")),
        "cell": _cell,
        "block": _block,
        "comment": lambda text: " ".join(str(text).split()),
    }
    return environment


def yaml_scalar(value: object) -> str:
    """`value` (text, number or switch) as a YAML scalar on one line; text is always in double quotes."""
    if isinstance(value, str):
        dumped = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf"))
        return dumped.removesuffix("\n")
    return yaml.safe_dump(value).removesuffix("\n").removesuffix("\n...")


POD_IP = "$(POD_IP)"
"""Kubernetes puts the address of the pod here: the one expansion that is meant."""


def _without_expansion(text: object) -> str:
    """Kubernetes expands `$(NAME)` in commands and variables; `$$(` stands for the characters themselves."""
    parts = str(text).split(POD_IP)
    return POD_IP.join(part.replace("$(", "$$(") for part in parts)


def _block(tree: object, indent: int) -> str:
    """`tree` as YAML blocks, indented by `indent` spaces."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10_000)
    return "\n".join(" " * indent + line for line in text.splitlines())


def _shell_words(words: Sequence[str]) -> str:
    return shlex.join(words)


def _cell(text: object) -> str:
    """Text that stays in its cell of a Markdown table and is no markup."""
    flat = " ".join(str(text).split())
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>|#$" else character for character in flat)
