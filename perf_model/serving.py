"""From engine steps to what users see: continuous batching in one pool.

Engines live in steps. A prompt of `new` tokens rides on p = ceil(new / room) steps, room being what the decoding
sequences leave of the token budget, and adds `added` milliseconds to them; short prompts share steps.

Closed loop: b users of a rank each send their next request when the last one ended. Let K be the steps in which every
user has one request served: O decode steps, p prefill steps, a/2 steps until the scheduler looks (it admits every a
steps), and W steps of queueing. The queue for room is a server with a service time of s = new / room steps and a finite
number of users, who are elsewhere for Z = K - W - s steps. For deterministic service the arrival theorem gives the time
in that queue and server f = s (1 + Q - U/2) with Q = (b-1) f / (f+Z) and U = (b-1) s / (f+Z), that is

    f^2 + f (Z - b s) - s Z + s^2 (b-1)/2 = 0,    W = f - s.

With d the decode step alone, the mean step is t = d + (b-1) added / K: a request shares its steps with the prompts of
the others. So TPOT = t, TTFT = (a/2 + p + W) t + added, and a cycle takes K d + b added: no step and no prompt is lost.
Long steps are met more often than short ones, which lengthens the wait for the end of a step: by half of a prompt's
part, times the share of time that prompts take.
Where attention is data-parallel, ranks step together, so a step is as long as the longest of theirs.

Requests sent all at once (a first wave; or users who stay in step because lengths do not vary) go through in n = b s
full steps, (n+1)/2 of them on average, and decode among the (n-1)/2 that are left.

Open loop (Poisson): the same server, W = s u / (2 (1-u)) with u = rate t s (Pollaczek-Khinchine) and
t = d / (1 - rate added).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from perf_model.latency import Distribution, Latency, TwoPoint
from perf_model.numeric import BoolArray, FloatArray
from perf_model.phases import StepTimes, decode_step_ms, prefill

_ITERATIONS = 3
_FULL = 0.999  # highest utilisation that an open loop can hold in steady state


@dataclass(frozen=True, kw_only=True)
class RankLoad:
    """What one rank of a pool is asked to do; arrays of one shape.

    `users` requests are in flight on the rank (closed loop; zero where open) or `rate_per_s` arrive (open loop; zero
    where closed). `slots` sequences run together, a step computes at most `token_budget` tokens, and `cached` of the
    `isl` prompt tokens come from the prefix cache. `request_ms` passes before prefill. The run has `run_requests`
    requests, of which `burst_share` are sent by all users at once. The scheduler admits requests every
    `admission_steps` steps and sends tokens in packets of `stream_tokens`. With speculative decoding a decode step
    yields `accepted` tokens of a sequence on average and checks `drafted` more than one. `ranks` step together.
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
    ranks: float = 1.0

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

    @property
    def running(self) -> FloatArray:
        """Requests that hold a slot in a closed loop."""
        return np.clip(self.users, 1.0, self.slots)


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
class _Prefills:
    """Step times with a number of sequences decoding: a decode step, and what prompts do to steps.

    `service` is the steps of room that a prompt takes, `pieces` the steps that it rides on.
    """

    step_ms: FloatArray
    added_ms: FloatArray
    pieces: FloatArray
    service: FloatArray


@dataclass(frozen=True, kw_only=True)
class _State:
    """A steady state: mean step, steps of queueing before prefill, decoding sequences, share of room in use."""

    at: _Prefills
    mean_step_ms: FloatArray
    queue_steps: FloatArray
    decode_seqs: FloatArray
    use: FloatArray

    @property
    def long_share(self) -> FloatArray:
        """Share of time that prompts take, in which an arriving request finds a step with a prompt."""
        share = np.clip((self.mean_step_ms - self.at.step_ms) / self.mean_step_ms, 0.0, 1.0)
        return share * (self.decode_seqs > 1.0)

    @property
    def rest_ms(self) -> FloatArray:
        """Mean rest of such steps beyond that of a mean step (half of one): long steps are met more often."""
        return self.long_share * self.at.added_ms / self.at.pieces / 2.0


@dataclass(frozen=True, kw_only=True)
class _Wave:
    """Wait of requests that are sent all at once, beyond their own prefill: even between `least_ms` and a width more.

    Both are times the share of such requests, so that means are right; quantiles are those of one mixed population.
    """

    least_ms: FloatArray
    width_ms: FloatArray

    @property
    def mean_ms(self) -> FloatArray:
        """Mean over all requests."""
        return self.least_ms + self.width_ms / 2.0


@dataclass(frozen=True, kw_only=True)
class _Waits:
    """Waits before the first token: for room in steps, for a slot, in a wave."""

    queue_ms: FloatArray
    slot_ms: FloatArray
    wave: _Wave


def stage(service: FloatArray, elsewhere: FloatArray, users: FloatArray) -> FloatArray:
    """Time in a queue and its server (f of the module's text) among `users` (at least 1), in any unit of time."""
    b = np.maximum(users, 1.0)
    half = (b * service - elsewhere) / 2.0
    root = np.sqrt(np.maximum(half**2 + service * elsewhere - service**2 * (b - 1.0) / 2.0, 0.0))
    return np.maximum(half + root, service)


def aggregated(steps: StepTimes, load: RankLoad) -> ServingEstimate:
    """One rank that prefills and decodes in the same steps."""
    closed = _closed(steps, load)
    is_open = load.rate_per_s > 0
    if not np.any(is_open):
        return closed
    return _choose(is_open, _open(steps, load), closed)


def _times(steps: StepTimes, load: RankLoad, seqs: FloatArray) -> _Prefills:
    """Step times with `seqs` sequences decoding."""
    decoding = np.maximum(seqs, 1.0)
    width = 1.0 + load.drafted
    step = decode_step_ms(steps, decoding, load.mean_context, width)
    room = np.maximum(load.token_budget - decoding * width, 1.0)
    first = prefill(
        steps,
        tokens=load.new_tokens,
        cached=load.cached,
        room=room,
        decode_seqs=decoding,
        decode_context=load.mean_context,
        decode_ms=step,
        decode_width=width,
    )
    return _Prefills(step_ms=step, added_ms=first.added_ms, pieces=first.pieces, service=load.new_tokens / room)


def _company(load: RankLoad, others_per_step: FloatArray) -> FloatArray:
    """Prompts of others in a step, of whichever rank has most of those that step together."""
    if load.ranks <= 1.0:
        return others_per_step
    return np.maximum(others_per_step, -np.expm1(-load.ranks * others_per_step))


def _closed_state(steps: StepTimes, load: RankLoad) -> _State:
    running, tokens = load.running, load.decode_steps
    shared = running > 1.0
    look = shared * load.admission_steps / 2.0
    seqs = running
    for _ in range(_ITERATIONS):
        at = _times(steps, load, seqs)
        known = tokens + at.pieces + look
        queue = stage(at.service, known - at.service, running) - at.service
        cycle = known + queue
        seqs = np.maximum(running * tokens / cycle, np.minimum(running, 1.0))
    met = _company(load, (running - 1.0) / cycle)
    return _State(
        at=at,
        mean_step_ms=at.step_ms + met * at.added_ms,
        queue_steps=queue,
        decode_seqs=seqs,
        use=np.clip((running - 1.0) * at.service / cycle, 0.0, 1.0),
    )


def _closed(steps: StepTimes, load: RankLoad) -> ServingEstimate:
    state, running = _closed_state(steps, load), load.running
    mean_step = state.mean_step_ms
    queue = state.queue_steps * mean_step
    alone = state.at.pieces * mean_step + state.at.added_ms
    wave_steps = np.maximum(running * state.at.service, 1.0)
    full_step = state.at.step_ms + state.at.added_ms * running / wave_steps
    wave = _Wave(
        least_ms=load.burst_share * np.maximum(full_step - alone, 0.0),
        width_ms=load.burst_share * (wave_steps - 1.0) * full_step,
    )
    queue = (1.0 - load.burst_share) * queue
    look = (running > 1.0) * load.admission_steps / 2.0 * mean_step
    in_wave = state.at.step_ms + (wave_steps - 1.0) / 2.0 * (full_step - state.at.step_ms) / load.decode_steps
    mean_step = mean_step + load.burst_share * np.minimum(in_wave - mean_step, 0.0)
    state = replace(state, mean_step_ms=mean_step)
    residence = look + state.rest_ms + alone + queue + wave.mean_ms + load.decode_steps * mean_step
    slot_wait = residence * np.maximum(load.users / running - 1.0, 0.0)
    requests_per_s = 1e3 * np.maximum(load.users, 1e-9) / (load.request_ms + residence + slot_wait)
    return _estimate(load, state, _Waits(queue_ms=queue, slot_ms=slot_wait, wave=wave), requests_per_s)


def _estimate(load: RankLoad, state: _State, waits: _Waits, requests_per_s: FloatArray) -> ServingEstimate:
    at, mean_step = state.at, state.mean_step_ms
    tpot = mean_step / load.accepted
    tokens = np.maximum(load.osl - 1.0, 1.0)
    look = mean_step * load.admission_steps * (state.decode_seqs > 1.0)
    held = tpot * np.where(np.asarray(load.stream_tokens) > 1.0, load.stream_tokens, 0.0)
    share = np.clip(np.maximum(state.use, state.long_share), 1e-6, 1.0)
    ttft = Latency(
        base=load.request_ms + at.pieces * mean_step + at.added_ms + waits.slot_ms + waits.wave.least_ms + held,
        width=look + waits.wave.width_ms,
        wait_share=share,
        wait_mean=(waits.queue_ms + state.rest_ms) / share,
    )
    short = at.step_ms / load.accepted
    interference = np.maximum(tpot - short, 0.0)
    long_step = short + at.added_ms / at.pieces
    long_share = np.clip(interference / np.maximum(long_step - short, 1e-9), 0.0, 1.0)
    zeros = np.zeros_like(tpot)
    spread = interference * np.sqrt(np.maximum(1.0 - long_share, 0.0) / np.maximum(long_share * tokens, 1.0))
    return ServingEstimate(
        ttft=ttft,
        tpot=Latency(base=np.maximum(tpot - spread, 1e-6), width=2.0 * spread, wait_share=zeros, wait_mean=zeros),
        itl=TwoPoint(short=np.minimum(short, tpot), long=long_step, long_share=long_share),
        requests_per_s=requests_per_s,
        decode_seqs=state.decode_seqs,
        prefill_share=np.clip(interference / tpot, 0.0, 1.0),
        queue_ms=waits.queue_ms + waits.slot_ms + waits.wave.mean_ms,
        overloaded=np.zeros(tpot.shape, dtype=bool),
    )


def _open(steps: StepTimes, load: RankLoad) -> ServingEstimate:
    """Poisson (or steady) arrivals; where they outrun the rank, the backlog of a run of `run_requests` requests."""
    rate = load.rate_per_s / 1e3  # requests per ms
    seqs = np.ones_like(rate)
    for _ in range(4 * _ITERATIONS):
        at = _times(steps, load, seqs)
        mean_step = at.step_ms / np.maximum(1.0 - rate * at.added_ms, 1.0 - _FULL)
        seqs = np.clip(0.5 * seqs + 0.5 * rate * load.decode_steps * mean_step, 1e-3, load.slots)
    use = np.minimum(rate * mean_step * at.service, _FULL)
    state = _State(
        at=at,
        mean_step_ms=mean_step,
        queue_steps=at.service * use / (2.0 * (1.0 - use)),
        decode_seqs=seqs,
        use=np.clip(use, 0.0, 1.0),
    )
    zeros = np.zeros_like(rate)
    waits = _Waits(queue_ms=state.queue_steps * mean_step, slot_ms=zeros, wave=_Wave(least_ms=zeros, width_ms=zeros))
    steady = _estimate(load, state, waits, load.rate_per_s)
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
