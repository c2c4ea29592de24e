"""What one engine step computes, as arrays: one element for each configuration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from perf_model.numeric import FloatArray, floats


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The work of one step of one rank; arrays of one shape.

    `prefill_tokens` prompt tokens of `prefill_seqs` sequences are computed. Each prompt has `prompt` tokens, of which
    `cached` were in the KV cache before (prefix caching); where the step computes fewer than the others, it is the mean
    step of a chunked prefill. `decode_seqs` sequences decode and attend to `decode_context` tokens, the new one
    included; `decode_width` tokens are computed for each of them, more than one where drafted tokens are checked.
    """

    prefill_tokens: FloatArray
    prefill_seqs: FloatArray
    prompt: FloatArray
    cached: FloatArray
    decode_seqs: FloatArray
    decode_context: FloatArray
    decode_width: FloatArray

    @property
    def tokens(self) -> FloatArray:
        """Rows of the matrices that every layer multiplies."""
        return self.prefill_tokens + self.decode_seqs * self.decode_width

    @property
    def prompt_share(self) -> FloatArray:
        """Share of the prompts' new tokens that this step computes."""
        return self.prefill_tokens / np.maximum(self.prefill_seqs * (self.prompt - self.cached), 1.0)

    @property
    def outputs(self) -> FloatArray:
        """Rows whose logits are computed."""
        return self.prefill_seqs + self.decode_seqs * self.decode_width


def step_batch(
    *,
    prefill_tokens: ArrayLike = 0.0,
    prefill_seqs: ArrayLike = 0.0,
    prompt: ArrayLike = 0.0,
    cached: ArrayLike = 0.0,
    decode_seqs: ArrayLike = 0.0,
    decode_context: ArrayLike = 0.0,
    decode_width: ArrayLike = 1.0,
) -> StepBatch:
    """A `StepBatch` whose fields are broadcast to one shape."""
    given = (prefill_tokens, prefill_seqs, prompt, cached, decode_seqs, decode_context, decode_width)
    arrays = [floats(value) for value in given]
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    names = ("prefill_tokens", "prefill_seqs", "prompt", "cached", "decode_seqs", "decode_context", "decode_width")
    return StepBatch(**{name: _spread(array, shape) for name, array in zip(names, arrays, strict=True)})


def _spread(array: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """`array` in `shape`; a prediction makes thousands of batches, and `np.broadcast_to` is slow for numbers."""
    if array.shape == shape:
        return array
    return np.full(shape, array) if array.ndim == 0 else np.broadcast_to(array, shape)
