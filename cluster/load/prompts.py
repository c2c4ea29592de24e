"""What is sent: prompts as token ids, and how many tokens are asked for, drawn from the workload by a seed.

Prompts of token ids need no tokenizer and have exactly the length asked for. Requests come in sessions: one request, or
the turns of a conversation, each of which is sent when the one before has been answered. Every session is drawn from
generators of its own, so session k is the same whatever was sent before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cluster.load.traces import BLOCK_TOKENS, TracedRequest
from search_spaces.errors import require
from search_spaces.workload import Conversation, Length, Workload

_PREFIX_STREAM = 0
_REQUEST_STREAM = 1
_BLOCK_STREAM = 3  # 2 is that of `cluster.load.arrivals`


@dataclass(frozen=True, kw_only=True)
class PlannedRequest:
    """One request to send: `prompt` holds token ids, `output_tokens` is how many are asked for.

    It is due `think_time_s` after the request before it in its session has ended.
    """

    index: int
    prompt: list[int]
    output_tokens: int
    think_time_s: float = 0.0


class Sessions(Protocol):
    """The sessions of one run."""

    def session(self, number: int) -> tuple[PlannedRequest, ...]:
        """Session `number` (from 0): its requests, in the order in which they are sent."""
        ...


def sessions_of(workload: Workload, vocabulary: range, seed: int, traced: Sequence[TracedRequest] = ()) -> Sessions:
    """What users send under `workload`; `traced` are the requests of its trace."""
    if workload.trace is not None:
        return TracePrompts(requests=tuple(traced), vocabulary=vocabulary, seed=seed)
    if workload.conversation is not None:
        return Conversations(conversation=workload.conversation, vocabulary=vocabulary, seed=seed)
    return Prompts(workload=workload, vocabulary=vocabulary, seed=seed)


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

    def session(self, number: int) -> tuple[PlannedRequest, ...]:
        """Session `number`: one request."""
        return (self.request(number),)

    def _generator(self, *stream: int) -> np.random.Generator:
        return _generator(self.seed, *stream)

    def _draw(self, generator: np.random.Generator, count: int) -> list[int]:
        return _draw(generator, self.vocabulary, count)


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """The conversations of one run, deterministic in `seed`.

    A turn's prompt is all of the turn before, tokens in place of its answer, and what is new. The token after the
    common prefix differs between any `len(vocabulary)` conversations in a row.
    """

    conversation: Conversation
    vocabulary: range
    seed: int
    _prefix: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed={self.seed} must not be negative")
        longest = _share(self.conversation.shared_prefix, self.conversation.new_isl.longest)
        prefix = _draw(_generator(self.seed, _PREFIX_STREAM, 0), self.vocabulary, longest)
        object.__setattr__(self, "_prefix", prefix)

    def session(self, number: int) -> tuple[PlannedRequest, ...]:
        """Conversation `number`: its turns."""
        shape, generator = self.conversation, _generator(self.seed, _REQUEST_STREAM, number)
        turns: list[PlannedRequest] = []
        said: list[int] = []
        for turn in range(_uniform(generator, shape.turns)):
            new, output_tokens = _uniform(generator, shape.new_isl), _uniform(generator, shape.osl)
            prompt = said + (self._opening(generator, number, new) if turn == 0 else self._more(generator, new))
            pause_s = shape.think_time_s if turn else 0.0
            turns.append(PlannedRequest(index=turn, prompt=prompt, output_tokens=output_tokens, think_time_s=pause_s))
            said = prompt + self._more(generator, output_tokens)
        return tuple(turns)

    def _opening(self, generator: np.random.Generator, number: int, length: int) -> list[int]:
        shared = _share(self.conversation.shared_prefix, length)
        own = self._more(generator, length - shared)
        if own:
            own[0] = self.vocabulary[(self.seed + number) % len(self.vocabulary)]
        return self._prefix[:shared] + own

    def _more(self, generator: np.random.Generator, count: int) -> list[int]:
        return _draw(generator, self.vocabulary, count)


@dataclass(frozen=True, kw_only=True)
class TracePrompts:
    """The requests of a trace, over and over, deterministic in `seed`.

    Equal blocks are equal tokens, so that prompts share what they shared when they were recorded; what has no block is
    drawn anew. Every round has tokens of its own.
    """

    requests: tuple[TracedRequest, ...]
    vocabulary: range
    seed: int

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed={self.seed} must not be negative")
        require(len(self.requests) >= 1, "a trace without requests cannot be replayed")

    def session(self, number: int) -> tuple[PlannedRequest, ...]:
        """Session `number`: one request."""
        rounds, position = divmod(number, len(self.requests))
        request = self.requests[position]
        prompt = [token for block in request.blocks for token in self._block(rounds, block)][: request.input_tokens]
        generator = _generator(self.seed, _REQUEST_STREAM, number)
        own = _draw(generator, self.vocabulary, request.input_tokens - len(prompt))
        if own and not prompt:
            own[0] = self.vocabulary[(self.seed + number) % len(self.vocabulary)]
        return (PlannedRequest(index=number, prompt=prompt + own, output_tokens=request.output_tokens),)

    def _block(self, rounds: int, block: int) -> list[int]:
        return _draw(_generator(self.seed, _BLOCK_STREAM, rounds, block), self.vocabulary, BLOCK_TOKENS)


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _draw(generator: np.random.Generator, vocabulary: range, count: int) -> list[int]:
    ids: list[int] = generator.integers(vocabulary.start, vocabulary.stop, size=count).tolist()
    return ids


def _uniform(generator: np.random.Generator, length: Length) -> int:
    return int(generator.integers(length.shortest, length.longest + 1))


def _share(share: float, length: int) -> int:
    return round(share * length)
