"""Engine steps: prefill, decode and mixed, from whatever can time a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from perf_model.batch import StepBatch, step_batch
from perf_model.numeric import FloatArray


class StepTimes(Protocol):
    """Times engine steps of one replica layout on one kind of device."""

    def step_ms(self, batch: StepBatch) -> FloatArray:
        """Duration of the step that computes `batch`, in milliseconds, one for each element."""
        ...

    def breakdown_ms(self, batch: StepBatch) -> dict[str, FloatArray]:
        """Milliseconds by operation; they add up to `step_ms`."""
        ...


def decode_step_ms(
    steps: StepTimes, seqs: FloatArray, context: FloatArray, width: FloatArray | float = 1.0
) -> FloatArray:
    """A step in which `seqs` sequences decode at a mean context of `context` tokens, `width` tokens each."""
    return steps.step_ms(step_batch(decode_seqs=seqs, decode_context=context, decode_width=width))


def chunks(tokens: FloatArray, room: FloatArray) -> FloatArray:
    """Steps over which a prompt of `tokens` new tokens is computed when a step has room for `room` of them."""
    return np.maximum(np.ceil(tokens / np.maximum(room, 1.0)), 1.0)


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Prefill of one prompt: its `pieces` chunks and what all of them add to the steps that they ride on."""

    pieces: FloatArray
    added_ms: FloatArray


def prefill(  # noqa: PLR0913 - the prompt and the decodes that it rides on, each by keyword
    steps: StepTimes,
    *,
    tokens: FloatArray,
    cached: FloatArray,
    room: FloatArray,
    decode_seqs: FloatArray,
    decode_context: FloatArray,
    decode_ms: FloatArray,
    decode_width: FloatArray | float = 1.0,
) -> Prefill:
    """Prefill of a prompt of `tokens` new tokens after `cached` ones, in equal chunks of at most `room` tokens.

    The chunks ride on steps in which `decode_seqs` sequences decode at `decode_context`, which take `decode_ms` alone.
    """
    pieces = chunks(tokens, room)
    size = tokens / pieces
    mixed = steps.step_ms(
        step_batch(
            prefill_tokens=size,
            prefill_seqs=1.0,
            prompt=cached + tokens,
            cached=cached,
            decode_seqs=decode_seqs,
            decode_context=decode_context,
            decode_width=decode_width,
        )
    )
    return Prefill(pieces=pieces, added_ms=np.maximum(pieces * (mixed - decode_ms), 1e-6))
