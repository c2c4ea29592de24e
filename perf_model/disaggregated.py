"""Prefill and decode on pools of their own: a closed or open network of two stations with the hand-over between them.

Station 1: `prefill_ranks` servers. A server computes all prompts that wait in one step, as far as slots and the token
budget allow, so that a request waits for the rest of the step that it finds, then for the whole of its own: T(b) with
b prompts, T being linear from the times of one and of two. Station 2: `decode_ranks` ranks on which a request is a
delay, as long as slots are free. For N users and a rate of X, others arrive at X (N-1)/N.

Hand-over. Between GPUs it is a delay on the wire. Where it goes `through_engines` (llama.cpp saves a slot to a file and
restores it), both engines do it between two steps, and a router asks for each part of it with a call of its own:

    prefill slot -> prompt computed -> saved -> decode slot -> restored -> completion asked for -> first token

The router gives a prompt to the replica with most free slots, so that it meets a busy one only where all are: with the
probability that one is busy to the power of their number. A save waits for the step that began when its prompt ended,
if other prompts were waiting then; a restore waits for the rest of a decode step, the request after it for the step
that began meanwhile. With one prefill slot there is nothing to wait for, and the slot is a server whose service is all
of that. A replica whose slots are taken serves a prompt in

    T(s/2) / (s/2) + save + call / s         (s slots; while the slots are filled again, the engine has nothing to do)

whatever the order, which bounds the rate: first >= N / ranks * that - (time elsewhere).

`tests/perf_model/test_pair_laws.py` holds it against a simulation of each call, step, save and restore.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from perf_model.batch import step_batch
from perf_model.latency import Latency
from perf_model.numeric import FloatArray, IntArray
from perf_model.phases import StepTimes, chunks, decode_step_ms, prefill
from perf_model.serving import ServingEstimate, stage

_ITERATIONS = 14
_FULL = 0.999


@dataclass(frozen=True, kw_only=True)
class PairLoad:
    """What a deployment of two pools is asked to do; arrays of one shape.

    `users` in flight (closed loop) or `rate_per_s` (open loop) are those of the whole deployment. `wire_ms` is the
    transfer of one KV cache; `send_ms` and `receive_ms` are what it occupies of the prefill and of the decode engine,
    between two steps where it goes `through_engines`. `prefill_slots` requests hold one prefill rank from their prompt
    to the end of their hand-over's first half. A call between router and engine takes `hop_ms`, there and back.
    The other fields are as in `serving.RankLoad`.
    """

    users: FloatArray
    rate_per_s: FloatArray
    prefill_ranks: FloatArray
    decode_ranks: FloatArray
    decode_slots: FloatArray
    token_budget: FloatArray
    isl: FloatArray
    osl: FloatArray
    cached: FloatArray
    request_ms: FloatArray
    wire_ms: FloatArray
    send_ms: FloatArray
    receive_ms: FloatArray
    run_requests: FloatArray
    burst_share: FloatArray
    prefill_slots: FloatArray | float = np.inf
    hop_ms: FloatArray | float = 0.0
    through_engines: bool = False

    @property
    def new_tokens(self) -> FloatArray:
        """Prompt tokens that must be computed, at least one."""
        return np.maximum(self.isl - self.cached, 1.0)

    @property
    def later_tokens(self) -> FloatArray:
        """Tokens after the first."""
        return np.maximum(self.osl - 1.0, 1.0)

    @property
    def calls_ms(self) -> FloatArray:
        """Time of all calls before the first token: client, prompt, save, restore, completion."""
        return np.asarray(5.0 * self.hop_ms * self.through_engines)

    def take(self, rows: IntArray) -> PairLoad:
        """The given rows; what is one number for all of them stays so."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        arrays = {name: value[rows] for name, value in fields.items() if isinstance(value, np.ndarray)}
        return PairLoad(**{**fields, **arrays})


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A prefill step: `shared_ms` whatever its prompts, `each_ms` for each of them; `most` prompts go into one.

    A long prompt takes several steps (`pieces`), and `alone_ms` in all.
    """

    alone_ms: FloatArray
    shared_ms: FloatArray
    each_ms: FloatArray
    most: FloatArray
    pieces: FloatArray

    def step_ms(self, prompts: FloatArray) -> FloatArray:
        """Time of a step with that many prompts (of all pieces of a long one)."""
        return self.shared_ms + self.each_ms * prompts

    @staticmethod
    def joined(parts: Sequence[Prompts], rows: IntArray) -> Prompts:
        """The prompts of all `parts`, of which `rows` (n,) are wanted, counted through them."""
        names = Prompts.__dataclass_fields__
        return Prompts(**{name: np.concatenate([getattr(part, name) for part in parts])[rows] for name in names})


@dataclass(frozen=True, kw_only=True)
class DecodeSteps:
    """Times of decode steps of each configuration, on a grid of sequences of its own (a column); linear between."""

    grid: FloatArray
    times_ms: FloatArray  # both (sequences, configurations)

    def __call__(self, seqs: FloatArray) -> FloatArray:
        """Milliseconds of a step with `seqs` sequences, one number for each configuration."""
        last, columns = len(self.grid) - 1, np.arange(len(seqs))
        at = np.clip(seqs, self.grid[0], self.grid[last])
        below = np.clip((self.grid <= at).sum(0) - 1, 0, max(last - 1, 0))
        above = np.minimum(below + 1, last)
        least, low = self.grid[below, columns], self.times_ms[below, columns]
        share = (at - least) / np.maximum(self.grid[above, columns] - least, 1e-9)
        return np.asarray(low + share * (self.times_ms[above, columns] - low))

    @staticmethod
    def joined(parts: Sequence[DecodeSteps], rows: IntArray) -> DecodeSteps:
        """As `Prompts.joined`; the last point of the shorter grids is repeated."""
        most = max(len(part.grid) for part in parts)
        both = ([np.pad(a, ((0, most - len(a)), (0, 0)), mode="edge") for a in (p.grid, p.times_ms)] for p in parts)
        grids, times = zip(*both, strict=True)
        return DecodeSteps(grid=np.concatenate(grids, axis=1)[:, rows], times_ms=np.concatenate(times, axis=1)[:, rows])


def decode_steps_of(steps: StepTimes, load: PairLoad) -> DecodeSteps:
    """Steps of up to as many sequences as a rank may have, at the mean context."""
    grids = [_sequences(most) for most in np.maximum(load.decode_slots, 1.0).tolist()]
    longest = max(map(len, grids))
    seqs = np.stack([np.pad(grid, (0, longest - len(grid)), mode="edge") for grid in grids], axis=1)
    context = np.broadcast_to(load.isl + load.osl / 2.0, seqs.shape)
    times = decode_step_ms(steps, seqs.ravel(), context.ravel()).reshape(seqs.shape)
    return DecodeSteps(grid=seqs, times_ms=times)


@lru_cache(maxsize=1024)
def _sequences(most: float) -> FloatArray:
    """Numbers of sequences from 1 to `most`, some four for each doubling."""
    return np.unique(np.round(np.geomspace(1.0, most, 2 + 4 * math.ceil(math.log2(most + 1.0)))))


@dataclass(frozen=True, kw_only=True)
class _State:
    """The network at a rate (requests per ms): `batch` prompts in a prefill step, `decode_seqs` on a decode rank.

    `first_ms` passes from a prefill rank's queue to the saved KV cache, `bound_ms` is a prompt's share of a rank that
    is never idle, `enter_ms` passes on the decode rank before the first token is made (`late_ms` of it waiting for the
    end of a step, on average), `decode_ms` after it, `step_ms` in one of its steps.
    """

    rate: FloatArray
    batch: FloatArray
    decode_seqs: FloatArray
    first_ms: FloatArray
    bound_ms: FloatArray
    enter_ms: FloatArray
    late_ms: FloatArray
    decode_ms: FloatArray
    step_ms: FloatArray
    slot_wait_ms: FloatArray


def disaggregated(prefill_steps: StepTimes, decode: StepTimes, load: PairLoad) -> ServingEstimate:
    """The deployment as a whole; `requests_per_s` counts all of its replicas."""
    return network(prompts_of(prefill_steps, load), decode_steps_of(decode, load), load)


def network(prompts: Prompts, steps: DecodeSteps, load: PairLoad) -> ServingEstimate:
    """`disaggregated` of deployments whose steps are those of different replicas."""
    is_open = load.rate_per_s > 0
    state = _closed_state(steps, load, prompts)
    capacity = _capacity(steps, load, state)
    if np.any(is_open):
        opened = _open_state(steps, load, prompts, np.minimum(load.rate_per_s / 1e3, _FULL * capacity))
        names = _State.__dataclass_fields__
        state = _State(**{name: np.where(is_open, getattr(opened, name), getattr(state, name)) for name in names})
    return _estimate(load, state, prompts, capacity)


def prompts_of(steps: StepTimes, load: PairLoad) -> Prompts:
    """Prefill steps of one prompt and, where a step has room for them, of two."""
    new, zero = load.new_tokens, np.zeros_like(load.isl)
    alone = prefill(
        steps,
        tokens=new,
        cached=load.cached,
        room=load.token_budget,
        decode_seqs=zero,
        decode_context=zero,
        decode_ms=zero,
    ).added_ms
    two = step_batch(prefill_tokens=2.0 * new, prefill_seqs=2.0, prompt=load.cached + new, cached=load.cached)
    most = load.token_budget / new
    each = np.where(most >= 2.0, np.clip(steps.step_ms(two) - alone, 0.0, alone), alone)
    return Prompts(
        alone_ms=alone,
        shared_ms=alone - each,
        each_ms=each,
        most=np.maximum(most, 1.0),
        pieces=chunks(new, load.token_budget),
    )


def _capacity(steps: DecodeSteps, load: PairLoad, state: _State) -> FloatArray:
    """Most requests per ms that the slower of the two pools serves."""
    step = steps(load.decode_slots)
    full = load.later_tokens * step + load.decode_slots * load.receive_ms
    return np.minimum(load.prefill_ranks / state.bound_ms, load.decode_ranks * load.decode_slots / full)


def _start(steps: DecodeSteps, load: PairLoad, prompts: Prompts) -> _State:
    """An empty network."""
    step = steps(np.ones_like(load.isl))
    zero, time = np.zeros_like(step), load.later_tokens * step
    alone = prompts.alone_ms + load.send_ms
    users = np.maximum(load.users, 1.0)
    return _State(
        rate=users / (load.request_ms + load.calls_ms + alone + load.wire_ms + load.receive_ms + time),
        batch=np.ones_like(step),
        decode_seqs=zero,
        first_ms=alone,
        bound_ms=alone,
        enter_ms=load.receive_ms,
        late_ms=zero,
        decode_ms=time,
        step_ms=step,
        slot_wait_ms=zero,
    )


def _closed_state(steps: DecodeSteps, load: PairLoad, prompts: Prompts) -> _State:
    """Users who send again when answered."""
    users = np.maximum(load.users, 1.0)
    others = (users - 1.0) / users
    state = _start(steps, load, prompts)
    for _ in range(_ITERATIONS):
        state = _decoding(steps, load, state, others, users)
        elsewhere = load.request_ms + load.calls_ms + load.wire_ms + state.enter_ms + state.decode_ms
        state = _computing(load, prompts, state, others, elsewhere)
        total = state.first_ms + elsewhere
        wait = users / load.decode_ranks * (state.enter_ms + state.decode_ms) / load.decode_slots - total
        wait = np.maximum(wait, 0.0)
        state = _moved(state, 0.5 * state.rate + 0.5 * users / (total + wait), slot_wait_ms=wait)
    return state


def _open_state(steps: DecodeSteps, load: PairLoad, prompts: Prompts, rate: FloatArray) -> _State:
    """Requests that arrive at `rate` a ms, whoever sent them."""
    many = np.ones_like(rate)
    state = _moved(_start(steps, load, prompts), rate)
    for _ in range(_ITERATIONS):
        state = _decoding(steps, load, state, many, np.full_like(rate, np.inf))
        state = _computing(load, prompts, state, many, np.full_like(rate, np.inf))
    use = np.clip(rate * state.bound_ms / load.prefill_ranks, 0.0, _FULL)
    queued = state.bound_ms * (1.0 + use / (2.0 * (1.0 - use)) / load.prefill_ranks)
    return _moved(state, rate, first_ms=np.maximum(state.first_ms, queued))


def _moved(state: _State, rate: FloatArray, **changes: FloatArray) -> _State:
    return _State(**{**state.__dict__, "rate": rate, **changes})


def _decoding(steps: DecodeSteps, load: PairLoad, state: _State, others: FloatArray, users: FloatArray) -> _State:
    """The decode rank: sequences that decode together, time to enter, time of the later tokens.

    A request sees the mean number of others where they come at random, and no more than the mean number of all where
    the prefill pool lets them go one by one; prompts of one step go on together, apart by their saves.
    """
    through = float(load.through_engines)
    use = np.minimum(state.rate * state.bound_ms / load.prefill_ranks, 1.0)
    apart = 1.0 - (state.batch - 1.0) / 2.0 * load.send_ms / state.decode_ms
    together = 1.0 + (state.batch - 1.0) / load.decode_ranks * np.clip(apart, 0.0, 1.0)
    seen = use * np.maximum(state.decode_seqs, 1.0) + (1.0 - use) * (1.0 + state.decode_seqs * others)
    seqs = np.minimum(np.maximum(seen, together), np.minimum(load.decode_slots, users))
    step = steps(seqs)
    time = load.later_tokens * step + state.decode_seqs * others * load.receive_ms
    busy = _any(state.rate * time / load.decode_ranks, users)
    late = busy * (step / 2.0 + np.where(load.hop_ms < step, step - load.hop_ms, step / 2.0))
    held = np.minimum(state.rate / load.decode_ranks * (time + through * step), load.decode_slots)
    return _moved(
        state,
        state.rate,
        decode_seqs=0.5 * state.decode_seqs + 0.5 * held,
        enter_ms=load.receive_ms + through * (late + step),
        late_ms=through * late,
        decode_ms=time,
        step_ms=step,
    )


def _any(mean: FloatArray, users: FloatArray) -> FloatArray:
    """Probability that one of the other users is there, of whom all together are there `mean` times on average."""
    one = np.minimum(mean / users, 1.0 - 1e-9)
    closed = -np.expm1(np.where(np.isinf(users), 0.0, users - 1.0) * np.log1p(-one))
    return np.where(np.isinf(users), -np.expm1(-mean), closed)


def _computing(load: PairLoad, prompts: Prompts, state: _State, others: FloatArray, elsewhere: FloatArray) -> _State:
    """The prefill rank: prompts in a step, time from its queue to the saved KV cache."""
    per_rank = np.maximum(load.users / load.prefill_ranks, 1.0) if np.all(np.isfinite(elsewhere)) else np.inf
    most = np.maximum(np.minimum(np.minimum(load.prefill_slots, prompts.most), per_rank), 1.0)
    coming = state.rate * others / load.prefill_ranks
    step = prompts.step_ms(state.batch)
    met = np.minimum(coming * step / state.batch, 1.0)
    spread = met ** (load.prefill_ranks - 1.0) if load.through_engines else 1.0
    met, coming = met * spread, coming * spread
    wait = met * step / 2.0 + np.minimum(coming * load.send_ms, 1.0) * load.send_ms / 2.0
    saved = load.send_ms * (1.0 + (state.batch - 1.0) / 2.0) + _behind(load, prompts, coming * step, most)
    batch = np.clip(1.0 + met * coming * step, 1.0, most)
    half = np.maximum(np.minimum(np.asarray(load.prefill_slots) / 2.0, most), 1.0)
    bound = prompts.step_ms(half) / half + load.send_ms + load.through_engines * load.hop_ms / (2.0 * half)
    first = wait + step + saved
    if np.all(np.isfinite(elsewhere)):
        first = np.maximum(first, load.users / load.prefill_ranks * bound - elsewhere)
        first, bound = _one_slot(load, prompts, first, bound, elsewhere)
    return _moved(state, state.rate, batch=0.5 * state.batch + 0.5 * batch, first_ms=first, bound_ms=bound)


def _behind(load: PairLoad, prompts: Prompts, arrived: FloatArray, most: FloatArray) -> FloatArray:
    """Wait of a save for the step of those who `arrived` (mean number) while its prompt was computed."""
    if not load.through_engines:
        return np.zeros_like(arrived)
    some = -np.expm1(-arrived)
    whole = (prompts.shared_ms * some + prompts.each_ms * np.minimum(arrived, most)) / prompts.pieces
    return np.maximum(whole - load.hop_ms * some, 0.0)


def _one_slot(
    load: PairLoad, prompts: Prompts, first: FloatArray, bound: FloatArray, elsewhere: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """`first` and `bound` where a prefill rank has one slot: a queue whose server is prompt, save and the calls."""
    single = np.asarray(load.prefill_slots) <= 1.0
    if not np.any(single):
        return first, bound
    calls = 2.0 * load.hop_ms * load.through_engines
    service = prompts.alone_ms + load.send_ms + calls
    alone = stage(service, np.maximum(elsewhere - calls, 0.0), load.users / load.prefill_ranks) - calls
    return np.where(single, alone, first), np.where(single, service, bound)


def _estimate(load: PairLoad, state: _State, prompts: Prompts, capacity: FloatArray) -> ServingEstimate:
    tpot = state.decode_ms / load.later_tokens
    service = prompts.alone_ms + load.send_ms
    queue = np.maximum(state.first_ms - service, 0.0)
    per_prefill = np.maximum(load.users / load.prefill_ranks, 1.0)
    burst = service * (per_prefill - 1.0) / 2.0
    queue = queue + np.where(load.users > 0, load.burst_share * np.maximum(burst - queue, 0.0), 0.0)
    use = np.clip(state.rate * state.bound_ms / load.prefill_ranks, 1e-6, 1.0)
    rate_in = load.rate_per_s / 1e3
    over = rate_in > capacity
    lag = load.run_requests / 2.0 * np.where(over, 1.0 / capacity - 1.0 / np.maximum(rate_in, 1e-12), 0.0)
    fixed = load.request_ms + load.calls_ms + load.wire_ms + state.enter_ms - state.late_ms
    late = 2.0 * state.late_ms if load.through_engines else tpot * (state.decode_seqs > 1.0)
    zeros = np.zeros_like(tpot)
    even = np.where(load.users > 0, np.minimum(2.0 * queue, prompts.step_ms(state.batch)), 0.0)
    sure = np.where(load.users > 0, queue - even / 2.0, 0.0)
    return ServingEstimate(
        ttft=Latency(
            base=fixed + service + state.slot_wait_ms + sure,
            width=late + even + 2.0 * lag,
            wait_share=use,
            wait_mean=np.where(load.users > 0, 0.0, queue / use),
        ),
        tpot=Latency(base=tpot, width=zeros, wait_share=zeros, wait_mean=zeros),
        itl=Latency(base=tpot, width=zeros, wait_share=zeros, wait_mean=zeros),
        requests_per_s=1e3 * state.rate,
        decode_seqs=state.decode_seqs,
        prefill_share=zeros,
        queue_ms=queue + state.slot_wait_ms + lag,
        overloaded=over,
    )
