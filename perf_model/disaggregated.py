"""Prefill and decode on pools of their own: rates matched by a closed or open network of two stations.

Station 1: `prefill_ranks` servers, first come first served. Then the KV cache changes hands. Station 2: `decode_ranks`
ranks on which a request is a delay, as long as slots are free. What the hand-over occupies of an engine is part of that
engine's work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perf_model.latency import Latency
from perf_model.numeric import FloatArray
from perf_model.phases import StepTimes, decode_step_ms, prefill
from perf_model.serving import ServingEstimate, stage

_ITERATIONS = 12
_FULL = 0.999


@dataclass(frozen=True, kw_only=True)
class PairLoad:
    """What a deployment of two pools is asked to do; arrays of one shape.

    `users` in flight (closed loop) or `rate_per_s` (open loop) are those of the whole deployment. `wire_ms` is the
    transfer of one KV cache; `send_ms` and `receive_ms` are what it occupies of the prefill and of the decode engine.
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


@dataclass(frozen=True, kw_only=True)
class _State:
    service_ms: FloatArray
    first_ms: FloatArray
    slot_wait_ms: FloatArray
    decode_ms: FloatArray
    step_ms: FloatArray
    decode_seqs: FloatArray
    rate: FloatArray  # requests per ms


def disaggregated(prefill_steps: StepTimes, decode: StepTimes, load: PairLoad) -> ServingEstimate:
    """The deployment as a whole; `requests_per_s` counts all of its replicas."""
    service = prefill_service_ms(prefill_steps, load)
    capacity = _capacity(decode, load, service)
    closed = _closed_state(decode, load, service, load.users)
    rate = np.where(load.rate_per_s > 0, np.minimum(load.rate_per_s / 1e3, _FULL * capacity), closed.rate)
    opened = _open_state(decode, load, service, rate)
    is_open = load.rate_per_s > 0
    state = _State(
        **{
            name: np.where(is_open, getattr(opened, name), getattr(closed, name))
            for name in _State.__dataclass_fields__
        }
    )
    return _estimate(load, state, capacity)


def prefill_service_ms(steps: StepTimes, load: PairLoad) -> FloatArray:
    """Time that one prompt occupies a prefill rank, sending its KV cache included."""
    new = np.maximum(load.isl - load.cached, 1.0)
    zero = np.zeros_like(new)
    alone = prefill(
        steps,
        tokens=new,
        cached=load.cached,
        room=load.token_budget,
        decode_seqs=zero,
        decode_context=zero,
        decode_ms=zero,
    )
    return alone.added_ms + load.send_ms


def _decode_ms(decode: StepTimes, load: PairLoad, seqs: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Time of all of a request's decode steps among `seqs` on its rank, receiving included, and one pure step."""
    step = decode_step_ms(decode, np.maximum(seqs, 1.0), load.isl + load.osl / 2.0)
    return np.maximum(load.osl - 1.0, 1.0) * step + seqs * load.receive_ms, step


def _capacity(decode: StepTimes, load: PairLoad, service: FloatArray) -> FloatArray:
    """Most requests per ms that the slower of the two pools serves."""
    full, _ = _decode_ms(decode, load, load.decode_slots)
    return np.minimum(load.prefill_ranks / service, load.decode_ranks * load.decode_slots / full)


def _closed_state(decode: StepTimes, load: PairLoad, service: FloatArray, users: FloatArray) -> _State:
    per_prefill = np.maximum(users / load.prefill_ranks, 1.0)
    seqs = np.clip(users / load.decode_ranks, 1e-3, load.decode_slots)
    for _ in range(_ITERATIONS):
        time, step = _decode_ms(decode, load, seqs)
        alone = service
        first = stage(alone, time + load.wire_ms, per_prefill)
        total = load.request_ms + first + load.wire_ms + time
        wanted = users / load.decode_ranks * time / total
        seqs = np.clip(0.5 * seqs + 0.5 * wanted, 1e-3, load.decode_slots)
    slot_cycle = users / load.decode_ranks * time / load.decode_slots
    slot_wait = np.maximum(slot_cycle - total, 0.0)
    rate = np.maximum(users, 1e-9) / (total + slot_wait)
    return _State(
        service_ms=service,
        first_ms=first,
        slot_wait_ms=slot_wait,
        decode_ms=time,
        step_ms=step,
        decode_seqs=seqs,
        rate=rate,
    )


def _open_state(decode: StepTimes, load: PairLoad, service: FloatArray, rate: FloatArray) -> _State:
    seqs = np.ones_like(rate)
    for _ in range(_ITERATIONS):
        time, step = _decode_ms(decode, load, seqs)
        seqs = np.clip(0.5 * seqs + 0.5 * rate * time / load.decode_ranks, 1e-3, load.decode_slots)
    use = np.clip(rate * service / load.prefill_ranks, 0.0, _FULL)
    first = service * (1.0 + use / (2.0 * (1.0 - use)) / load.prefill_ranks)
    return _State(
        service_ms=service,
        first_ms=first,
        slot_wait_ms=np.zeros_like(rate),
        decode_ms=time,
        step_ms=step,
        decode_seqs=seqs,
        rate=rate,
    )


def _estimate(load: PairLoad, state: _State, capacity: FloatArray) -> ServingEstimate:
    tokens = np.maximum(load.osl - 1.0, 1.0)
    tpot = state.decode_ms / tokens
    queue = state.first_ms - state.service_ms
    per_prefill = np.maximum(load.users / load.prefill_ranks, 1.0)
    burst = state.service_ms * (per_prefill - 1.0) / 2.0
    queue = queue + np.where(load.users > 0, load.burst_share * np.maximum(burst - queue, 0.0), 0.0)
    use = np.clip(state.rate * state.service_ms / load.prefill_ranks, 1e-6, 1.0)
    rate_in = load.rate_per_s / 1e3
    over = rate_in > capacity
    lag = load.run_requests / 2.0 * np.where(over, 1.0 / capacity - 1.0 / np.maximum(rate_in, 1e-12), 0.0)
    zeros = np.zeros_like(tpot)
    return ServingEstimate(
        ttft=Latency(
            base=load.request_ms + state.service_ms + load.wire_ms + load.receive_ms + state.slot_wait_ms,
            width=tpot * (state.decode_seqs > 1.0) + 2.0 * lag,
            wait_share=use,
            wait_mean=queue / use,
        ),
        tpot=Latency(base=tpot, width=zeros, wait_share=zeros, wait_mean=zeros),
        itl=Latency(base=tpot, width=zeros, wait_share=zeros, wait_mean=zeros),
        requests_per_s=1e3 * state.rate,
        decode_seqs=state.decode_seqs,
        prefill_share=zeros,
        queue_ms=queue + state.slot_wait_ms + lag,
        overloaded=over,
    )
