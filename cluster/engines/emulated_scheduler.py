"""Continuous batching as engines schedule it: which sequences a step computes, with slots, token budget and KV blocks.

Pure: no clock and no I/O. Running sequences come first (one token each, or the next part of their prompt), then waiting
ones while there are slots, tokens of the step and KV blocks. Where a running sequence finds no block, the one that was
admitted last gives up its own and is computed again later.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from search_spaces.emulation import Chunk

BLOCK_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a rank may do at once; `blocks` of `BLOCK_TOKENS` tokens make its KV cache."""

    sequences: int
    step_tokens: int
    blocks: int
    chunked: bool = True
    reuses_prefixes: bool = False


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A request on a rank: `prompt` tokens, and `wanted` tokens to produce.

    `computed` tokens are in its KV cache, of which `reused` came from earlier prompts. Where `keeps_cache`, its blocks
    stay when it has ended, until `Scheduler.release`.
    """

    prompt: tuple[int, ...]
    wanted: int
    keeps_cache: bool = False
    computed: int = 0
    reused: int = 0
    produced: int = 0
    blocks: int = 0
    under_way: bool = False
    aborted: bool = False

    @property
    def length(self) -> int:
        """Tokens known so far."""
        return len(self.prompt) + self.produced

    @property
    def missing(self) -> int:
        """Tokens whose keys and values must be computed before the next token is known."""
        return self.length - self.computed

    @cached_property
    def block_keys(self) -> tuple[int, ...]:
        """A key of each whole block of the prompt, which stands for all tokens up to the block's end."""
        keys, key = [], 0
        for end in range(BLOCK_TOKENS, len(self.prompt) + 1, BLOCK_TOKENS):
            key = hash((key, self.prompt[end - BLOCK_TOKENS : end]))
            keys.append(key)
        return tuple(keys)

    @property
    def ended(self) -> bool:
        """True when every wanted token has been produced."""
        return self.produced >= self.wanted


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step computes: `chunks` of prompts, and one token for each of `decoding` at a mean `context`."""

    chunks: tuple[tuple[Sequence, Chunk], ...]
    decoding: tuple[Sequence, ...]
    context: float

    @property
    def prompts(self) -> tuple[Chunk, ...]:
        """The chunks alone."""
        return tuple(chunk for _, chunk in self.chunks)


@dataclass
class _Plan:
    """A step in the making, with the tokens that it still has room for."""

    room: int
    chunks: list[tuple[Sequence, Chunk]] = field(default_factory=list)
    decoding: list[Sequence] = field(default_factory=list)

    def add(self, sequence: Sequence, tokens: int) -> None:
        if tokens == 1 and sequence.computed > 0 and sequence.missing == 1:
            self.decoding.append(sequence)
        else:
            self.chunks.append((sequence, Chunk(tokens=tokens, start=sequence.computed)))
        self.room -= tokens
        sequence.under_way = True


class Scheduler:
    """One data-parallel rank."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.free_blocks = limits.blocks
        self._prefixes: OrderedDict[int, None] = OrderedDict()

    @property
    def load(self) -> int:
        """Requests on the rank."""
        return len(self.waiting) + len(self.running)

    @property
    def used_share(self) -> float:
        """Share of the KV cache that is in use."""
        return 1.0 - self.free_blocks / self.limits.blocks

    def holds(self, tokens: int) -> bool:
        """True where a sequence of `tokens` tokens fits when it is alone."""
        return _blocks_of(tokens) <= self.limits.blocks

    def add(self, sequence: Sequence) -> None:
        """Queue `sequence`."""
        self.waiting.append(sequence)

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Give `sequence`, which is not queued yet, the blocks of `tokens` tokens; False where they are not free."""
        return self._allocate(sequence, tokens)

    def abort(self, sequence: Sequence) -> None:
        """Forget `sequence`; its blocks are free at once, or when the step that computes it ends."""
        sequence.aborted = True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if not sequence.under_way:
            self._leave(sequence)

    def release(self, sequence: Sequence) -> None:
        """Free the blocks of a sequence that is not running."""
        self.free_blocks += sequence.blocks
        sequence.blocks = 0

    def schedule(self) -> Step | None:
        """The next step, None where there is nothing that can be computed now."""
        plan = _Plan(room=self.limits.step_tokens)
        preempted = self._continue(plan)
        if not preempted:
            self._admit(plan)
        if not plan.chunks and not plan.decoding:
            return None
        context = sum(sequence.length for sequence in plan.decoding) / max(len(plan.decoding), 1)
        return Step(chunks=tuple(plan.chunks), decoding=tuple(plan.decoding), context=context)

    def finish(self, step: Step) -> list[Sequence]:
        """Book what `step` has computed; the sequences that have a new token."""
        worked: list[tuple[Sequence, int]] = [(sequence, chunk.tokens) for sequence, chunk in step.chunks]
        worked += [(sequence, 1) for sequence in step.decoding]
        told = []
        for sequence, tokens in worked:
            sequence.under_way = False
            if sequence.aborted:
                self._leave(sequence)
                continue
            sequence.computed += tokens
            if sequence.missing == 0:
                if sequence.produced == 0:
                    self._remember(sequence)
                sequence.produced += 1
                told.append(sequence)
                if sequence.ended:
                    self._leave(sequence)
        return told

    def _leave(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        if not sequence.keeps_cache or sequence.aborted:
            self.release(sequence)

    def _continue(self, plan: _Plan) -> bool:
        """Plan the running sequences; True where one lost its blocks."""
        preempted = False
        for sequence in list(self.running):
            tokens = min(sequence.missing, plan.room)
            if sequence.under_way or tokens == 0 or sequence not in self.running:
                continue
            if not self.limits.chunked and tokens < sequence.missing:
                continue
            while not self._allocate(sequence, sequence.computed + tokens):
                preempted = True
                if not self._preempt(sequence):
                    break
            else:
                plan.add(sequence, tokens)
        return preempted

    def _preempt(self, beneficiary: Sequence) -> bool:
        """Take the blocks of the sequence admitted last; False where that is `beneficiary`, or none can be taken."""
        victim = next((s for s in reversed(self.running) if not s.under_way), None)
        if victim is None:
            return False
        self.running.remove(victim)
        self.release(victim)
        victim.computed = victim.reused = 0
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return victim is not beneficiary

    def _admit(self, plan: _Plan) -> None:
        while self.waiting and plan.room > 0 and len(self.running) < self.limits.sequences:
            sequence = self.waiting[0]
            if sequence.computed == 0:
                sequence.computed = sequence.reused = self._known_prefix(sequence)
            tokens = min(sequence.missing, plan.room)
            if not self.limits.chunked and tokens < sequence.missing:
                return
            if not self._allocate(sequence, sequence.computed + tokens):
                return
            self.waiting.popleft()
            self.running.append(sequence)
            plan.add(sequence, tokens)

    def _allocate(self, sequence: Sequence, tokens: int) -> bool:
        needed = max(0, _blocks_of(tokens) - sequence.blocks)
        if needed > self.free_blocks:
            return False
        self.free_blocks -= needed
        sequence.blocks += needed
        return True

    # prefix caching: whole blocks of earlier prompts, as long as the cache had room for them

    def _known_prefix(self, sequence: Sequence) -> int:
        if not self.limits.reuses_prefixes:
            return 0
        tokens = 0
        for key in sequence.block_keys:
            if key not in self._prefixes or tokens + BLOCK_TOKENS >= sequence.length:
                break
            self._prefixes.move_to_end(key)
            tokens += BLOCK_TOKENS
        return tokens

    def forget_prefixes(self) -> None:
        """Reuse nothing of earlier prompts."""
        self._prefixes.clear()

    def _remember(self, sequence: Sequence) -> None:
        if not self.limits.reuses_prefixes:
            return
        for key in sequence.block_keys:
            self._prefixes[key] = None
            self._prefixes.move_to_end(key)
        for key in list(islice(self._prefixes, max(0, len(self._prefixes) - self.limits.blocks))):
            del self._prefixes[key]


def _blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
