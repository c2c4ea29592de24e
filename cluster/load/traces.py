"""Recorded requests: reading them, and what there is to know of a window of them.

Mooncake's traces (https://github.com/kvcache-ai/Mooncake, FAST25-release/traces) are JSON lines with `timestamp` in
milliseconds, `input_length` and `output_length` in tokens, and `hash_ids`: one number for each block of 512 prompt
tokens, equal where all of the prompt up to the end of the block is. Azure's (https://github.com/Azure/
AzurePublicDataset) are CSV files with the columns TIMESTAMP, ContextTokens and GeneratedTokens.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from search_spaces.errors import InvalidValueError
from search_spaces.workload import Arrival, Trace, TraceFormat, Workload, around

BLOCK_TOKENS = 512
"""Prompt tokens for which a `hash_id` of Mooncake stands."""
FEWEST_OUTPUT_TOKENS = 2
"""Shorter answers are asked for as long as this: a TPOT needs two tokens."""
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One recorded request: seconds from the start of the window, tokens in and out, and its blocks where known."""

    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def traced_workload(
    file: str, kind: TraceFormat, *, start_s: float = 0.0, window_s: float | None = None, longest: int | None = None
) -> Workload:
    """The workload that a window of a trace is; raises `InvalidValueError` for a file that cannot be replayed."""
    wanted = Trace(
        file=file,
        format=kind,
        start_s=start_s,
        window_s=window_s,
        longest=longest,
        requests=2,
        request_rate=1.0,
        longest_context=1,
    )
    requests = traced_requests(wanted)
    if len(requests) < 2 or requests[-1].at_s <= 0:
        raise InvalidValueError(
            f"{file} has {len(requests)} requests from {start_s:g} s on"
            f"{f' within {window_s:g} s' if window_s else ''}{f' of at most {longest} tokens' if longest else ''}, and "
            "no time between them; choose another window"
        )
    inputs = [request.input_tokens for request in requests]
    outputs = [request.output_tokens for request in requests]
    return Workload(
        isl=around(sum(inputs) / len(inputs), min(inputs)),
        osl=around(sum(outputs) / len(outputs), min(outputs)),
        arrival=Arrival.TRACE,
        shared_prefix=held_share(requests),
        trace=replace(
            wanted,
            requests=len(requests),
            request_rate=(len(requests) - 1) / requests[-1].at_s,
            longest_context=max(request.input_tokens + request.output_tokens for request in requests),
        ),
    )


def traced_requests(trace: Trace) -> tuple[TracedRequest, ...]:
    """The requests of the window of `trace`, by time; the first is at 0 s. Raises `InvalidValueError`."""
    path = Path(trace.file)
    try:
        changed = path.stat().st_mtime_ns
        everything = _read(path, trace.format, changed)
    except OSError as error:
        raise InvalidValueError(f"trace {path} cannot be read ({error.strerror}); give the path of a trace") from error
    end_s = float("inf") if trace.window_s is None else trace.start_s + trace.window_s
    kept = [
        request
        for request in everything
        if trace.start_s <= request.at_s < end_s
        and (trace.longest is None or request.input_tokens + request.output_tokens <= trace.longest)
    ]
    first_s = kept[0].at_s if kept else 0.0
    return tuple(replace(request, at_s=request.at_s - first_s) for request in kept)


@lru_cache(maxsize=4)
def _read(path: Path, kind: TraceFormat, _changed_ns: int) -> tuple[TracedRequest, ...]:
    """All requests of a file, by time from its first one."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        found = sorted({TraceFormat.MOONCAKE: _mooncake, TraceFormat.AZURE: _azure}[kind](file, path), key=_time)
    first_s = found[0].at_s if found else 0.0
    return tuple(replace(request, at_s=request.at_s - first_s) for request in found)


def _time(request: TracedRequest) -> float:
    return request.at_s


def _mooncake(lines: Iterable[str], path: Path) -> Iterator[TracedRequest]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield _request(
                at_s=float(row["timestamp"]) / 1000.0,
                input_tokens=int(row["input_length"]),
                output_tokens=int(row["output_length"]),
                blocks=tuple(int(block) for block in row.get("hash_ids", ())),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _bad_line(path, number, "timestamp, input_length and output_length", error) from error


def _azure(lines: Iterable[str], path: Path) -> Iterator[TracedRequest]:
    rows = csv.DictReader(lines)
    if not set(_AZURE_COLUMNS) <= set(rows.fieldnames or ()):
        raise InvalidValueError(f"{path} has the columns {rows.fieldnames}, and no {', '.join(_AZURE_COLUMNS)}")
    for row in rows:
        try:
            yield _request(
                at_s=_seconds(row["TIMESTAMP"]),
                input_tokens=int(row["ContextTokens"]),
                output_tokens=int(row["GeneratedTokens"]),
            )
        except (ValueError, TypeError) as error:
            raise _bad_line(path, rows.line_num, ", ".join(_AZURE_COLUMNS), error) from error


def _seconds(text: str) -> float:
    """Seconds of a time such as 2023-11-16 18:15:46.6805900: Azure writes seven digits, or a zone after six."""
    whole, point, rest = text.strip().partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    moment = datetime.fromisoformat(whole + rest[len(digits) :])
    if moment.tzinfo is None:  # a local zone would shift them where its clocks change
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() + (float(f"0.{digits}") if point and digits else 0.0)


def _request(*, at_s: float, input_tokens: int, output_tokens: int, blocks: tuple[int, ...] = ()) -> TracedRequest:
    if input_tokens < 1 or output_tokens < 0:
        raise ValueError(f"{input_tokens} input and {output_tokens} output tokens")
    return TracedRequest(at_s, input_tokens, max(FEWEST_OUTPUT_TOKENS, output_tokens), blocks)


def _bad_line(path: Path, number: int, wanted: str, error: Exception) -> InvalidValueError:
    return InvalidValueError(
        f"{path}, line {number}: no request with {wanted} ({type(error).__name__}: {error}); correct or leave it out"
    )


def held_share(requests: Sequence[TracedRequest]) -> float:
    """Share of all input tokens whose block a request before had; 0 where blocks are not recorded."""
    seen: set[int] = set()
    held = total = 0
    for request in requests:
        total += request.input_tokens
        for position, block in enumerate(request.blocks):
            tokens = min(BLOCK_TOKENS, request.input_tokens - position * BLOCK_TOKENS)
            held += max(0, tokens) if block in seen else 0
        seen.update(request.blocks)
    return held / total if total else 0.0
