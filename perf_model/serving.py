"""From engine steps to what users see: continuous batching in one pool, or prefill and decode in two.

Closed loop: b users of a rank each send their next request when the last one ended. A rank is one server for prefill
(one prompt after another, in chunks that ride on decode steps) and a delay for decode. With S the time of one prefill
alone, D the time of decoding and F the time from entering a slot to the first token, an arriving request finds the
others' prefills queued; for deterministic service the arrival theorem gives F = S (1 + Q - U/2) with
Q = (b-1) F / (F+D) and U = (b-1) S / (F+D), that is

    F^2 + F (D - b S) - S D + S^2 (b-1)/2 = 0.

Steps are conserved: a cycle in which every slot turns over once takes K decode steps and b prefills.
Open loop: the same server with Poisson arrivals, F = S (1 + u / (2 (1-u))) with u = rate S (Pollaczek-Khinchine).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from perf_model.latency import Distribution, Latency, TwoPoint
from perf_model.numeric import BoolArray, FloatArray
from perf_model.phases import StepTimes, decode_step_ms, prefill

_ITERATIONS = 3
_STEFFENSEN = 3
_FULL = 0.999  # highest utilisation that an open loop can hold in steady state


@dataclass(frozen=True, kw_only=True)
class RankLoad:
    """What one rank of a pool is asked to do; arrays of one shape.

    `users` requests are in flight on the rank (closed loop; zero where open) or `rate_per_s` arrive (open loop; zero
    where closed). `slots` sequences run together, a step computes at most `token_budget` tokens, and `cached` of the
    `isl` prompt tokens come from the prefix cache. `request_ms` passes before prefill. The run has `run_requests`
    requests, of which `burst_share` were sent when all users started at once. The scheduler admits requests every
    `admission_steps` steps and sends tokens in packets of `stream_tokens`. With speculative decoding a decode step
    yields `accepted` tokens of a sequence on average and checks `drafted` more than one.
    """

    users: FloatArray
    rate_per_s: FloatArray
    slots: FloatArray
    token_budget: FloatArray
    isl: FloatArray
    osl: FloatArray
    cached: FloatArray
    request_ms: FloatArray
    run_requests: FloatArray
    burst_share: FloatArray
    admission_steps: FloatArray | float = 1.0
    stream_tokens: FloatArray | float = 1.0
    accepted: FloatArray | float = 1.0
    drafted: FloatArray | float = 0.0

    @property
    def new_tokens(self) -> FloatArray:
        """Prompt tokens that must be computed, at least one."""
        return np.maximum(self.isl - self.cached, 1.0)

    @property
    def decode_steps(self) -> FloatArray:
        """Decode steps of a request."""
        return np.maximum(self.osl - 1.0, 1.0) / self.accepted

    @property
    def mean_context(self) -> FloatArray:
        """Mean context while decoding."""
        return self.isl + self.osl / 2.0


@dataclass(frozen=True, kw_only=True)
class ServingEstimate:
    """What users see, by configuration. `requests_per_s` is that of the modelled rank (or of the whole, where noted).

    `decode_seqs` is the mean number of sequences that decode together on a rank and `prefill_share` the share of the
    engine's time that prefills take. `overloaded` marks open loops that arrive faster than they are served.
    """

    ttft: Latency
    tpot: Latency
    itl: Distribution
    requests_per_s: FloatArray
    decode_seqs: FloatArray
    prefill_share: FloatArray
    queue_ms: FloatArray
    overloaded: BoolArray


@dataclass(frozen=True, kw_only=True)
class _Cycle:
    """A steady state: per-request times in ms (see the module's text) and the number of decoding sequences."""

    alone_ms: FloatArray
    first_ms: FloatArray
    decode_ms: FloatArray
    added_ms: FloatArray
    step_ms: FloatArray
    pieces: FloatArray
    decode_seqs: FloatArray


def prefill_stage_ms(alone: FloatArray, decode: FloatArray, users: FloatArray) -> FloatArray:
    """F of the module's text: time from entering a slot to the first token among `users` (at least 1)."""
    b = np.maximum(users, 1.0)
    half = (b * alone - decode) / 2.0
    root = np.sqrt(np.maximum(half**2 + alone * decode - alone**2 * (b - 1.0) / 2.0, 0.0))
    return np.maximum(half + root, alone)


def aggregated(steps: StepTimes, load: RankLoad) -> ServingEstimate:
    """One rank that prefills and decodes in the same steps."""
    closed = _closed(steps, load)
    is_open = load.rate_per_s > 0
    if not np.any(is_open):
        return closed
    return _choose(is_open, _open(steps, load), closed)


def _times(steps: StepTimes, load: RankLoad, seqs: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Decode step, milliseconds that a prefill adds, and its chunks, with `seqs` sequences decoding."""
    decoding = np.maximum(seqs, 1.0)
    width = 1.0 + load.drafted
    step = decode_step_ms(steps, decoding, load.mean_context, width)
    first = prefill(
        steps,
        tokens=load.new_tokens,
        cached=load.cached,
        room=np.maximum(load.token_budget - decoding * width, 1.0),
        decode_seqs=decoding,
        decode_context=load.mean_context,
        decode_ms=step,
        decode_width=width,
    )
    return step, first.added_ms, first.pieces


def _closed_cycle(steps: StepTimes, load: RankLoad) -> _Cycle:
    running = np.clip(load.users, 1.0, load.slots)
    tokens = load.decode_steps
    seqs = running
    for _ in range(_ITERATIONS):
        step, added, pieces = _times(steps, load, seqs)
        alone = added + pieces * step * (running > 1.0)
        first, decode = _steady(alone, added, step, tokens, running)
        seqs = np.maximum(running * decode / (first + decode), np.minimum(running, 1.0))
    return _Cycle(
        alone_ms=alone,
        first_ms=first,
        decode_ms=decode,
        added_ms=added,
        step_ms=step,
        pieces=pieces,
        decode_seqs=seqs,
    )


def _steady(
    alone: FloatArray, added: FloatArray, step: FloatArray, tokens: FloatArray, running: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Times to the first token and of decoding for given step times: the fixed point in the steps K of a cycle.

    A request decodes over `tokens` steps among the prefills of the others, (b-1) in K steps. K is found by Steffensen's
    method from the busiest cycle, b prefills one after another.
    """
    others = (running - 1.0) * added
    pieces = np.maximum((alone - added) / step, 1.0)
    cycle = np.maximum(tokens + pieces, running * pieces)

    def stages(steps_in_cycle: FloatArray) -> tuple[FloatArray, FloatArray]:
        decode = tokens * (step + others / steps_in_cycle)
        return prefill_stage_ms(alone, decode, running), decode

    def following(steps_in_cycle: FloatArray) -> FloatArray:
        first, decode = stages(steps_in_cycle)
        return tokens * (1.0 + first / decode)

    for _ in range(_STEFFENSEN):
        second = following(cycle)
        third = following(second)
        bend = third - 2.0 * second + cycle
        straight = np.abs(bend) < 1e-9 * third
        cycle = np.where(straight, third, cycle - (second - cycle) ** 2 / np.where(straight, 1.0, bend))
        cycle = np.maximum(cycle, tokens)
    return stages(cycle)


def _closed(steps: StepTimes, load: RankLoad) -> ServingEstimate:
    cycle = _closed_cycle(steps, load)
    running = np.clip(load.users, 1.0, load.slots)
    slot_wait = (cycle.first_ms + cycle.decode_ms) * np.maximum(load.users / running - 1.0, 0.0)
    queue = cycle.first_ms - cycle.alone_ms
    burst = cycle.alone_ms * (running - 1.0) / 2.0
    queue = queue + load.burst_share * np.maximum(burst - queue, 0.0)
    occupancy = np.clip((running - 1.0) * cycle.alone_ms / (cycle.first_ms + cycle.decode_ms), 0.0, 1.0)
    total = load.request_ms + cycle.alone_ms + queue + slot_wait + cycle.decode_ms
    requests_per_s = 1e3 * np.maximum(load.users, 1e-9) / total
    return _estimate(load, cycle, queue, slot_wait, occupancy, requests_per_s)


def _estimate(
    load: RankLoad,
    cycle: _Cycle,
    queue: FloatArray,
    slot_wait: FloatArray,
    occupancy: FloatArray,
    requests_per_s: FloatArray,
) -> ServingEstimate:
    tokens = np.maximum(load.osl - 1.0, 1.0)
    tpot = cycle.decode_ms / tokens
    others = np.where(cycle.decode_seqs > 1.0, 1.0, 0.0)
    residual = tpot * others * load.admission_steps / 2.0
    held = tpot * np.where(np.asarray(load.stream_tokens) > 1.0, load.stream_tokens, 0.0)
    share = np.clip(occupancy, 1e-6, 1.0)
    ttft = Latency(
        base=load.request_ms + cycle.alone_ms + slot_wait + held,
        width=2.0 * residual,
        wait_share=share,
        wait_mean=queue / share,
    )
    short = cycle.step_ms / load.accepted
    interference = np.maximum(tpot - short, 0.0)
    long_step = short + cycle.added_ms / cycle.pieces
    long_share = np.clip(interference / np.maximum(long_step - short, 1e-9), 0.0, 1.0)
    zeros = np.zeros_like(tpot)
    spread = interference * np.sqrt(np.maximum(1.0 - long_share, 0.0) / np.maximum(long_share * tokens, 1.0))
    return ServingEstimate(
        ttft=ttft,
        tpot=Latency(base=np.maximum(tpot - spread, 1e-6), width=2.0 * spread, wait_share=zeros, wait_mean=zeros),
        itl=TwoPoint(short=np.minimum(short, tpot), long=long_step, long_share=long_share),
        requests_per_s=requests_per_s,
        decode_seqs=cycle.decode_seqs,
        prefill_share=np.clip(interference / tpot, 0.0, 1.0),
        queue_ms=queue + slot_wait,
        overloaded=np.zeros(tpot.shape, dtype=bool),
    )


def _open(steps: StepTimes, load: RankLoad) -> ServingEstimate:
    """Poisson (or steady) arrivals; where they outrun the rank, the backlog of a run of `run_requests` requests."""
    rate = load.rate_per_s / 1e3  # requests per ms
    tokens = load.decode_steps
    seqs = np.ones_like(rate)
    for _ in range(2 * _ITERATIONS):
        step, added, pieces = _times(steps, load, seqs)
        decode = tokens * step / np.maximum(1.0 - rate * added, 1.0 - _FULL)
        seqs = np.clip(0.5 * seqs + 0.5 * rate * decode, 1e-3, load.slots)
    alone = added + pieces * step * np.minimum(seqs, 1.0)
    use = np.minimum(rate * alone, _FULL)
    queue = alone * use / (2.0 * (1.0 - use))
    cycle = _Cycle(
        alone_ms=alone,
        first_ms=alone + queue,
        decode_ms=decode,
        added_ms=added,
        step_ms=step,
        pieces=pieces,
        decode_seqs=seqs,
    )
    steady = _estimate(load, cycle, queue, np.zeros_like(rate), use, load.rate_per_s)
    return _with_backlog(steps, load, steady)


def _with_backlog(steps: StepTimes, load: RankLoad, steady: ServingEstimate) -> ServingEstimate:
    """Where arrivals outrun what the rank serves with all slots busy, requests wait in a growing line."""
    full = _closed(steps, replace(load, users=load.slots, rate_per_s=np.zeros_like(load.users)))
    capacity = full.requests_per_s
    over = load.rate_per_s > capacity
    lag_ms = 1e3 * load.run_requests / 2.0 * np.maximum(1.0 / capacity - 1.0 / np.maximum(load.rate_per_s, 1e-12), 0.0)
    late = replace(
        full,
        ttft=replace(full.ttft, width=full.ttft.width + 2.0 * lag_ms),
        queue_ms=full.queue_ms + lag_ms,
        overloaded=over,
    )
    return _choose(over, late, steady)


def _choose(where: BoolArray, left: ServingEstimate, right: ServingEstimate) -> ServingEstimate:
    def pick(a: FloatArray, b: FloatArray) -> FloatArray:
        return np.where(where, a, b)

    def latency(a: Latency, b: Latency) -> Latency:
        return Latency(
            base=pick(a.base, b.base),
            width=pick(a.width, b.width),
            wait_share=pick(a.wait_share, b.wait_share),
            wait_mean=pick(a.wait_mean, b.wait_mean),
        )

    def gap(a: Distribution, b: Distribution) -> Distribution:
        if isinstance(a, TwoPoint) and isinstance(b, TwoPoint):
            return TwoPoint(
                short=pick(a.short, b.short), long=pick(a.long, b.long), long_share=pick(a.long_share, b.long_share)
            )
        raise TypeError(f"gaps of aggregated serving are two-point, not {type(a).__name__} and {type(b).__name__}")

    return ServingEstimate(
        ttft=latency(left.ttft, right.ttft),
        tpot=latency(left.tpot, right.tpot),
        itl=gap(left.itl, right.itl),
        requests_per_s=pick(left.requests_per_s, right.requests_per_s),
        decode_seqs=pick(left.decode_seqs, right.decode_seqs),
        prefill_share=pick(left.prefill_share, right.prefill_share),
        queue_ms=pick(left.queue_ms, right.queue_ms),
        overloaded=np.where(where, left.overloaded, right.overloaded),
    )
