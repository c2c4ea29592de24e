"""What is sent: prompts as token ids, and how many tokens are asked for, drawn from the workload by a seed.

Prompts of token ids need no tokenizer and have exactly the length asked for. Every request is drawn from a generator of
its own, so request k is the same whatever was sent before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from search_spaces.errors import require
from search_spaces.workload import Length, Workload

_PREFIX_STREAM = 0
_REQUEST_STREAM = 1


@dataclass(frozen=True, kw_only=True)
class PlannedRequest:
    """One request to send: `prompt` holds token ids, `output_tokens` is how many are asked for."""

    index: int
    prompt: list[int]
    output_tokens: int


def ordinary_ids(vocab_size: int) -> range:
    """The middle four fifths of the vocabulary.

    Tokens with a meaning of their own (padding, end of text, image placeholders) stand at the ends of a vocabulary.
    """
    require(vocab_size >= 2, f"vocab_size={vocab_size} must be at least 2")
    margin = vocab_size // 10
    return range(margin, vocab_size - margin)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The requests of one run, deterministic in `seed`, with token ids from `vocabulary`.

    The first `shared_prefix` of each prompt is common to all. The token after it differs between any `len(vocabulary)`
    requests in a row, so that a prefix cache holds nothing else of them. Give every run on a running engine its own
    seed, or its cache holds the prompts of the run before.
    """

    workload: Workload
    vocabulary: range
    seed: int
    _prefix: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed={self.seed} must not be negative")
        require(len(self.vocabulary) >= 2, f"{self.vocabulary} holds {len(self.vocabulary)} token ids; give at least 2")
        longest = _share(self.workload.shared_prefix, self.workload.isl.longest)
        object.__setattr__(self, "_prefix", self._draw(self._generator(_PREFIX_STREAM, 0), longest))

    def request(self, index: int) -> PlannedRequest:
        """Request number `index` (from 0)."""
        generator = self._generator(_REQUEST_STREAM, index)
        length = _uniform(generator, self.workload.isl)
        output_tokens = _uniform(generator, self.workload.osl)
        shared = _share(self.workload.shared_prefix, length)
        own = self._draw(generator, length - shared)
        if own:
            own[0] = self.vocabulary[(self.seed + index) % len(self.vocabulary)]
        return PlannedRequest(index=index, prompt=self._prefix[:shared] + own, output_tokens=output_tokens)

    def _generator(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=stream))

    def _draw(self, generator: np.random.Generator, count: int) -> list[int]:
        ids: list[int] = generator.integers(self.vocabulary.start, self.vocabulary.stop, size=count).tolist()
        return ids


def _uniform(generator: np.random.Generator, length: Length) -> int:
    return int(generator.integers(length.shortest, length.longest + 1))


def _share(share: float, length: int) -> int:
    return round(share * length)
