"""What engines' servers answer, as far as the router reads it; timings and slots are llama.cpp's."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError


class Timings(BaseModel, frozen=True):
    """The engine's own account of a request: prompt tokens taken from the cache and computed, and its times."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float


class PromptTokensDetails(BaseModel, frozen=True):
    """Prompt tokens that were found in a cache, one that another replica filled included."""

    cached_tokens: int | None = None


class Usage(BaseModel, frozen=True):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


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


class Chunk(BaseModel, frozen=True):
    """A whole completion, or the last chunk of a streamed one, as every OpenAI-compatible engine has it."""

    usage: Usage | None = None


class PrefillChoice(BaseModel, frozen=True):
    """What TensorRT-LLM's context server says of a request, for its generation server."""

    disaggregated_params: dict[str, object] | None = None


class PrefillAnswer(BaseModel, frozen=True):
    """What a prefill replica answers; `kv_transfer_params` is vLLM's address of the KV blocks."""

    usage: Usage | None = None
    kv_transfer_params: dict[str, object] | None = None
    choices: tuple[PrefillChoice, ...] = ()


def last_usage(tail: bytes) -> Usage | None:
    """Token counts in the last bytes of an answer, streamed or whole; None where it broke off before them."""
    for line in reversed(tail.splitlines()):
        text = line.removeprefix(b"data: ")
        if b'"usage"' in text:
            try:
                found = Chunk.model_validate_json(text).usage
            except ValidationError:  # cut off at the start: too long for the bytes kept
                return None
            if found is not None:
                return found
    return None


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
