"""What llama.cpp's server answers, as far as the router reads it."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError


class Timings(BaseModel, frozen=True):
    """The engine's own account of a request: prompt tokens taken from the cache and computed, and its times."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float


class Usage(BaseModel, frozen=True):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int


class Completion(BaseModel, frozen=True):
    """A whole completion, or the last chunk of a streamed one."""

    usage: Usage | None = None
    timings: Timings


class SaveTimings(BaseModel, frozen=True):
    """Time that the engine took to write a slot."""

    save_ms: float


class Saved(BaseModel, frozen=True):
    """Answer to `action=save`: tokens and bytes written."""

    n_saved: int
    n_written: int
    timings: SaveTimings


class RestoreTimings(BaseModel, frozen=True):
    """Time that the engine took to read a slot."""

    restore_ms: float


class Restored(BaseModel, frozen=True):
    """Answer to `action=restore`: tokens and bytes read."""

    n_restored: int
    n_read: int
    timings: RestoreTimings


def last_timings(tail: bytes) -> Timings | None:
    """The engine's timings in the last bytes of an answer, streamed or whole; None where it broke off before them."""
    for line in reversed(tail.splitlines()):
        text = line.removeprefix(b"data: ")
        if b'"timings"' in text:
            try:
                return Completion.model_validate_json(text).timings
            except ValidationError:  # cut off at the start: too long for the bytes kept
                return None
    return None
