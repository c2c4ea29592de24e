"""What Schemathesis is told for `benchmarks/service_fuzz.py`: names of studies that exist, studies that nearly do."""

from __future__ import annotations

import zlib
from typing import Any

import schemathesis

STUDY = """\
name: fuzzed
workload: {isl: 64, osl: 16, concurrency: [1, 2]}
objectives: [output_tokens_per_s, ttft_p50_ms]
slos: {ttft_p99_ms: 60}
node_pools: {local: {cpus_per_node: 4, price_per_hour: 1.0}}
engines: {llamacpp: {threads: [1, 2], flash_attention: true, kv_cache_dtype: f16}}
budget: {trials: 5}
"""
PIECES = (
    "fuzzed",
    "64",
    "16",
    "[1, 2]",
    "ttft_p50_ms",
    "60",
    "local",
    "cpus_per_node",
    "1.0",
    "llamacpp",
    "true",
    "f16",
)
SHORT = 150
"""Longer texts stay as they are: they are there to be refused."""


def _drawn(value: object, sides: int) -> int:
    """A number below `sides` that hangs on `value` alone, so that a request can be made again."""
    return zlib.crc32(repr(value).encode("utf-8", "replace")) % sides


@schemathesis.hook
def map_path_parameters(_context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Half of the requests are about the study that exists."""
    if path_parameters and "name" in path_parameters and _drawn(path_parameters, 2):
        return {**path_parameters, "name": "toy"}
    return path_parameters


@schemathesis.hook
def map_body(_context: Any, body: Any) -> Any:
    """Texts of studies are a valid study with one piece changed; settings and SLOs are keys that exist with it."""
    if not isinstance(body, dict):
        return body
    found = dict(body)
    if isinstance(found.get("study"), str) and len(found["study"]) < SHORT:
        piece = PIECES[_drawn(found["study"], len(PIECES))]
        found["study"] = STUDY if not _drawn(piece, 5) else STUDY.replace(piece, found["study"], 1)
    for key, begin in (("settings", "load="), ("slos", "ttft_p99_ms=")):
        if isinstance(found.get(key), list):
            found[key] = [_with(begin, text) for text in found[key]]
    return found


def _with(begin: str, text: object) -> object:
    """Half of the texts with `begin` before them; those that are too long stay so."""
    return f"{begin}{text}" if isinstance(text, str) and len(text) < SHORT and _drawn(text, 2) else text
