"""Engine steps: prefill, decode and mixed, from whatever can time a step."""

from __future__ import annotations

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


def decode_step_ms(steps: StepTimes, seqs: FloatArray, context: FloatArray) -> FloatArray:
    """A step in which `seqs` sequences decode one token each at a mean context of `context` tokens."""
    return steps.step_ms(step_batch(decode_seqs=seqs, decode_context=context))


def chunks(tokens: FloatArray, room: FloatArray) -> FloatArray:
    """Steps over which a prompt of `tokens` new tokens is computed when a step has room for `room` of them."""
    return np.maximum(np.ceil(tokens / np.maximum(room, 1.0)), 1.0)


def prefill_added_ms(
    steps: StepTimes,
    *,
    tokens: FloatArray,
    cached: FloatArray,
    room: FloatArray,
    decode_seqs: FloatArray,
    decode_context: FloatArray,
) -> FloatArray:
    """What the prefill of one prompt adds to the decode steps it rides on, in milliseconds, all chunks together.

    The prompt's `tokens` new tokens come after `cached` ones, in equal chunks of at most `room` tokens.
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
        )
    )
    return np.maximum(pieces * (mixed - decode_step_ms(steps, decode_seqs, decode_context)), 1e-6)
