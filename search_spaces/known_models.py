"""Models whose dimensions ship with the product, by name."""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from search_spaces.errors import InvalidValueError
from search_spaces.hf_config import model_from_config
from search_spaces.model import ModelSpec

DIRECTORY = Path(__file__).parent / "catalogue" / "models"
# Words of a name that say how weights are stored or tuned, not which model it is.
_SUFFIXES = ("fp8", "nvfp4", "fp4", "mxfp4", "int4", "awq", "bf16", "base", "it", "static", "pertensor")
_PREFIXES = ("meta-",)


@cache
def known_names() -> tuple[str, ...]:
    """Names of the models that ship with the product."""
    return tuple(sorted(path.stem for path in DIRECTORY.glob("*.json")))


@cache
def known_model(name: str) -> ModelSpec:
    """The model called `name`, with or without an organisation and words on its quantisation.

    Raises `InvalidValueError` with the nearest names.
    """
    wanted = _plain(name)
    for known in known_names():
        if _plain(known) == wanted:
            raw = json.loads((DIRECTORY / f"{known}.json").read_text(encoding="utf-8"))
            return model_from_config(raw, name=name)
    near = get_close_matches(wanted, [_plain(known) for known in known_names()], n=3, cutoff=0.3)
    raise InvalidValueError(
        f"model {name!r} is not in the catalogue; give a config.json, or choose {', '.join(near or known_names())}"
    )


def _plain(name: str) -> str:
    """Lower-case name without organisation, known prefixes and words on quantisation."""
    words = name.rsplit("/", maxsplit=1)[-1].lower()
    for prefix in _PREFIXES:
        words = words.removeprefix(prefix)
    parts = [part for part in re.split(r"[-_]", words) if part not in _SUFFIXES]
    if parts[-1] == "instruct" and parts[0] == "llama":
        parts = parts[:-1]
    return "-".join(parts)
