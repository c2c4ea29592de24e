"""From the latencies of engine steps to what a serving run shows, in closed form, for arrays of configurations.

Three step latencies describe an engine to this account: a decode step of the full batch, a step that carries one
prompt (or one chunk of it), and a step filled to the token budget. Everything else is scheduling.

Closed loop. b users per rank start together and each sends its next request when the last one ended; a run lasts
`waves` requests per user. Two regimes make up the mean time to first token.

- The first wave (one request in `waves`): b prompts queue at once and go through in n = b * isl / tokens_per_step
  full steps, so their mean is full * (n + 1) / 2.
- Later requests arrive one by one where lengths vary, each as another ends. Such a request waits for the next look at
  the queue (one step; half of `poll_steps` decode steps where the engine looks less often), for the prompts that came
  with it and for its own. With rho the share of time that prefills take, it meets rho^2 (1 - 1/b) prompts more (the
  form that follows an event simulation of the same schedulers best; the tests hold the error against one).
- Where lengths do not vary, users stay in step: engines that do not mix prefill with decode see a first wave each
  time, engines that mix spread the users by one step each and keep less of it (`_LOCKSTEP`).

Time per output token: a request that decodes for O steps sees as many prompts as there are users on its rank, so
tpot = decode + prompts per step * what a prompt adds to a step.

Where fewer than b sequences fit (KV cache, slots), the rest wait for a slot: (b - slots) / slots residences on average.

Open loop (Poisson). With decode steps linear in the batch, d0 + d1 N, Little's law and the added prefills give
N = rate * O * d0 / (1 - rate * (D + O * d1)), D the time that a prompt adds; no such N where the rate exceeds capacity.

Disaggregated. n_p prefill workers are a queue with service time s / n_p, decode is a delay of Z = O * tpot; for
exponential service mean value analysis gives R = (s N - Z + sqrt((s N - Z)^2 + 4 s Z)) / 2 (one-queue Schweitzer;
s here s / n_p, plus s (1 - 1/n_p) for the part that workers do in parallel, after Seidmann).

Times are in milliseconds; arrays have one element for each configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from perf_model.numeric import BoolArray, FloatArray, floats
from search_spaces.errors import InvalidValueError, require

_LOCKSTEP = 0.05  # of later waves that meet as a first wave where an engine mixes and lengths are equal
_SOME = 0.01  # prompts, or ms: below it a difference is none
_BISECTIONS = 30
_MATCHING = 12
_FAR = 20.0  # mean excesses within which every quantile below 1 - 1e-6 lies


@dataclass(frozen=True, kw_only=True)
class Scheduling:
    """How an engine fills its steps. Constants of one engine, or arrays where configurations differ.

    `mixes`: prompts ride on decode steps; otherwise prefill steps stop decoding. `chunked`: prompts are cut at the
    token budget. `poll_steps`: decode steps between two looks at the queue. `launch_ms_per_layer`: host time of a step
    that is not replayed from a CUDA graph, which hides under the device's time where that is longer. `request_ms`: time
    of a request outside the engine's steps (client, HTTP, tokenizer). `token_budget`: tokens a step may hold.
    """

    mixes: bool
    chunked: bool
    token_budget: int
    poll_steps: float
    launch_ms_per_layer: float
    request_ms: float

    def __post_init__(self) -> None:
        require(self.token_budget >= 1, f"token_budget={self.token_budget} must be at least 1 token")
        require(self.poll_steps >= 1, f"poll_steps={self.poll_steps} must be at least 1 step")
        require(self.launch_ms_per_layer >= 0, f"launch_ms_per_layer={self.launch_ms_per_layer} must not be negative")
        require(self.request_ms >= 0, f"request_ms={self.request_ms} must not be negative")


# Host times were fitted by grid search to the mean times to first token of the public measured runs (aggregated rows,
# absolute log error; see docs/silicon-prior.md); budgets and looks at the queue are the engines' own defaults.
SCHEDULING: dict[str, Scheduling] = {
    "vllm": Scheduling(
        mixes=True, chunked=True, token_budget=8192, poll_steps=1, launch_ms_per_layer=0.6, request_ms=40.0
    ),
    "trtllm": Scheduling(
        mixes=True, chunked=False, token_budget=8192, poll_steps=1, launch_ms_per_layer=0.0, request_ms=100.0
    ),
    "sglang": Scheduling(
        mixes=False, chunked=True, token_budget=8192, poll_steps=1, launch_ms_per_layer=1.2, request_ms=110.0
    ),
}


def scheduling(engine: str) -> Scheduling:
    """How `engine` schedules; raises `InvalidValueError` with the known names."""
    if engine not in SCHEDULING:
        raise InvalidValueError(f"no scheduling of engine {engine!r}; known are {', '.join(SCHEDULING)}")
    return SCHEDULING[engine]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one attention data-parallel rank is asked to do; arrays of one shape (see `load`).

    `users` requests in flight on the rank, `isl` and `osl` mean tokens (isl without what the prefix cache holds),
    `spread` the width of the uniform length distribution over its maximum (0.2: lengths at 80-100%), `waves` requests
    per user in the run (infinite: steady state), `slots` sequences that run together, `ranks` attention data-parallel
    ranks that step together, `layers` of the model.
    """

    users: FloatArray
    isl: FloatArray
    osl: FloatArray
    spread: FloatArray
    waves: FloatArray
    slots: FloatArray
    ranks: FloatArray
    layers: FloatArray
    mixes: BoolArray
    chunked: BoolArray
    token_budget: FloatArray
    poll_steps: FloatArray
    launch_ms: FloatArray
    request_ms: FloatArray

    @property
    def running(self) -> FloatArray:
        """Sequences that run together."""
        return np.clip(self.users, 1.0, self.slots)


def load(  # noqa: PLR0913 - a load is its fields
    scheduling: Scheduling,
    *,
    users: ArrayLike,
    isl: ArrayLike,
    osl: ArrayLike,
    layers: ArrayLike,
    spread: ArrayLike = 0.2,
    waves: ArrayLike = 10.0,
    slots: ArrayLike = np.inf,
    ranks: ArrayLike = 1.0,
    token_budget: ArrayLike | None = None,
    poll_steps: ArrayLike | None = None,
) -> Load:
    """A `Load` broadcast to one shape; `token_budget` and `poll_steps` override the engine's.

    Raises `InvalidValueError` where users, lengths, waves or slots are below 1.
    """
    budget = scheduling.token_budget if token_budget is None else token_budget
    poll = scheduling.poll_steps if poll_steps is None else poll_steps
    given = (users, isl, osl, spread, waves, slots, ranks, layers, budget, poll)
    arrays = [floats(v) for v in np.broadcast_arrays(*(floats(v) for v in given))]
    for name, values in zip(("users", "isl", "osl"), arrays, strict=False):
        if np.any(values < 1.0):
            raise InvalidValueError(f"{name}={np.min(values):g} must be at least 1 (users and lengths of every rank)")
    names = ("users", "isl", "osl", "spread", "waves", "slots", "ranks", "layers", "token_budget", "poll_steps")
    shape = arrays[0].shape
    return Load(
        **dict(zip(names, arrays, strict=True)),
        mixes=np.full(shape, scheduling.mixes),
        chunked=np.full(shape, scheduling.chunked),
        launch_ms=scheduling.launch_ms_per_layer * arrays[7],
        request_ms=np.full(shape, scheduling.request_ms),
    )


@dataclass(frozen=True, kw_only=True)
class StepQueries:
    """Steps whose latency the account needs: prompt tokens and sequences that decode beside them, per rank.

    One decode step of `decode_seqs`; one step of `prompt_tokens` beside `prompt_seqs` decoding; one of `full_tokens`
    beside `full_seqs`. The last two hold no decoding sequences where the engine does not mix.
    """

    decode_seqs: FloatArray
    prompt_tokens: FloatArray
    prompt_seqs: FloatArray
    full_tokens: FloatArray
    full_seqs: FloatArray


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Latencies of the steps of `StepQueries`, in ms. Launches of steps with prompts are added here."""

    decode_ms: FloatArray
    prompt_ms: FloatArray
    full_ms: FloatArray


def step_queries(work: Load) -> StepQueries:
    """The three steps to evaluate for `work`."""
    running = work.running
    budget = np.maximum(work.token_budget - np.where(work.mixes, running, 0.0), 1.0)
    budget = np.where(work.chunked, budget, np.maximum(np.floor(budget / work.isl) * work.isl, work.isl))
    prompt = np.minimum(work.isl, budget)
    return StepQueries(
        decode_seqs=running,
        prompt_tokens=prompt,
        prompt_seqs=np.where(work.mixes, np.maximum(running - 1.0, 1.0), 0.0),
        full_tokens=np.maximum(np.minimum(budget, running * work.isl), prompt),
        full_seqs=np.where(work.mixes, np.maximum(running / 2.0, 1.0), 0.0),
    )


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a run shows, by configuration.

    Means in ms and requests per second of the rank. The mean time to first token is `request_ms` (outside the engine) +
    `first_share` * `first_wave_ms` + (1 - `first_share`) * (`look_ms` + `later_ms`) + `slot_wait_ms`: the first wave;
    the wait for the next look at the queue, then prompts beside and the own one; the wait for a slot.
    `decode_ms` and `added_ms` are the two parts of the time per output token, `prefill_share` the share of the engine's
    time that prefills take, `one_ms` a request's own prefill, `full_ms` a full step.
    """

    ttft_ms: FloatArray
    tpot_ms: FloatArray
    requests_per_s: FloatArray
    request_ms: FloatArray
    first_wave_ms: FloatArray
    later_ms: FloatArray
    look_ms: FloatArray
    first_share: FloatArray
    slot_wait_ms: FloatArray
    decode_ms: FloatArray
    added_ms: FloatArray
    prefill_share: FloatArray
    one_ms: FloatArray
    full_ms: FloatArray

    @property
    def queue_share(self) -> FloatArray:
        """Share of the mean time to first token that is not a request's own prefill."""
        return 1.0 - np.minimum(self.one_ms / self.ttft_ms, 1.0)


@dataclass(frozen=True, kw_only=True)
class _Prefill:
    """A prompt's way through the engine.

    `one_ms` its own steps, `full_ms` a full step, `added_ms` what it adds to the steps of those that decode,
    `beside_ms` the cost of one more prompt in a step, `wave_steps` the full steps that take all users' prompts.
    """

    one_ms: FloatArray
    full_ms: FloatArray
    added_ms: FloatArray
    beside_ms: FloatArray
    wave_steps: FloatArray


def _prefill(work: Load, queries: StepQueries, times: StepTimes) -> _Prefill:
    pieces = np.maximum(work.isl / queries.prompt_tokens, 1.0)
    one = np.hypot(times.prompt_ms, work.launch_ms)
    full = np.maximum(np.hypot(times.full_ms, work.launch_ms), one)
    beside_decode = np.where(work.mixes, times.decode_ms, 0.0)
    blocked = np.maximum(one - beside_decode, 0.0) * pieces
    more = (queries.full_tokens - queries.prompt_tokens) / work.isl
    return _Prefill(
        one_ms=one * pieces,
        full_ms=full,
        added_ms=np.maximum(times.prompt_ms - beside_decode, 0.0) * pieces,
        beside_ms=np.where(more > _SOME, (full - one) / np.maximum(more, _SOME), blocked),
        wave_steps=np.maximum(work.running * work.isl / queries.full_tokens, 1.0),
    )


def closed_loop(work: Load, times: StepTimes) -> Serving:
    """Aggregated serving under a constant number of users per rank (see the module's text)."""
    prefill = _prefill(work, step_queries(work), times)
    running, per_step = work.running, work.running / work.osl
    in_step = np.where(work.mixes, 0.0, _in_step(work))
    met = np.where(work.ranks > 1.0, np.maximum(per_step, -np.expm1(-work.ranks * per_step)), per_step)
    behind = (prefill.wave_steps - 1.0) / 2.0 * prefill.full_ms / work.osl
    added = in_step * behind + (1.0 - in_step) * met * prefill.added_ms
    tpot = times.decode_ms + added
    rho = np.clip(added / tpot, 0.0, 1.0)
    company = np.minimum(per_step * work.poll_steps, running) / 2.0 + rho**2 * (1.0 - 1.0 / running)
    wait = np.where(work.poll_steps > 1.0, work.poll_steps / 2.0, 1.0) * tpot
    return _closed(
        work,
        first=prefill.full_ms * (prefill.wave_steps + 1.0) / 2.0,
        look=wait,
        later=prefill.one_ms + company * prefill.beside_ms,
        decode=times.decode_ms,
        added=added,
        prefill=prefill,
    )


def _closed(
    work: Load,
    *,
    first: FloatArray,
    look: FloatArray,
    later: FloatArray,
    decode: FloatArray,
    added: FloatArray,
    prefill: _Prefill,
) -> Serving:
    share = 1.0 / work.waves + (1.0 - 1.0 / work.waves) * _in_step(work)
    ttft = work.request_ms + share * first + (1.0 - share) * (look + later)
    stream = (decode + added) * np.maximum(work.osl - 1.0, 0.0)
    slot_wait = np.maximum(work.users - work.running, 0.0) / work.running * (ttft + stream)
    total = ttft + slot_wait
    return Serving(
        ttft_ms=total,
        tpot_ms=decode + added,
        requests_per_s=1000.0 * work.users / (total + stream),
        request_ms=work.request_ms,
        first_wave_ms=first,
        later_ms=later,
        look_ms=look,
        first_share=share,
        slot_wait_ms=slot_wait,
        decode_ms=decode,
        added_ms=added,
        prefill_share=np.clip(added / (decode + added), 0.0, 1.0),
        one_ms=prefill.one_ms,
        full_ms=prefill.full_ms,
    )


def _in_step(work: Load) -> FloatArray:
    """Share of the later requests that queue as a first wave does, because users stay in step."""
    return np.where(work.spread > 0.0, 0.0, np.where(work.mixes, _LOCKSTEP, 1.0))


def ttft_quantile(serving: Serving, quantile: float) -> FloatArray:
    """Quantile of the time to first token.

    The first wave is uniform from one full step to twice its mean; a later request's time beyond its own prefill has a
    gamma distribution of shape 3. The mixture is inverted by bisection.
    """
    require(0.0 < quantile < 1.0, f"quantile={quantile} must be between 0 and 1")
    share, own = serving.first_share, serving.one_ms
    excess = np.maximum(serving.look_ms + serving.later_ms - own, _SOME)
    width = np.maximum(2.0 * (serving.first_wave_ms - serving.full_ms), _SOME)
    low, high = np.zeros_like(own), np.maximum(own + _FAR * excess, serving.full_ms + width)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        beyond = np.maximum(3.0 * (middle - own) / excess, 0.0)
        below = share * np.clip((middle - serving.full_ms) / width, 0.0, 1.0)
        below = below + (1.0 - share) * (1.0 - (1.0 + beyond + beyond**2 / 2.0) * np.exp(-beyond))
        low, high = np.where(below < quantile, middle, low), np.where(below < quantile, high, middle)
    return high + serving.request_ms + serving.slot_wait_ms


@dataclass(frozen=True, kw_only=True)
class OpenServing:
    """Steady state under Poisson arrivals; where `overloaded`, times are infinite.

    `decoding` is the mean number of sequences that decode together; times are means in ms.
    """

    ttft_ms: FloatArray
    tpot_ms: FloatArray
    decoding: FloatArray
    prefill_share: FloatArray
    overloaded: BoolArray


def open_loop(work: Load, times: StepTimes, *, rate_per_s: ArrayLike, single_decode_ms: ArrayLike) -> OpenServing:
    """Aggregated serving of `rate_per_s` Poisson arrivals per rank.

    `work.users` is the largest batch (its slots), at which `times` were taken; `single_decode_ms` is a decode step of
    one sequence. A request waits for half a step (or half of `poll_steps`) and, as in an M/G/1 queue, for the prompts
    in front: added * rho / (1 - rho) with rho the share of time that prefills take.
    """
    single = floats(single_decode_ms)
    rate = floats(rate_per_s) / 1000.0
    prefill = _prefill(work, step_queries(work), times)
    slope = np.maximum(times.decode_ms - single, 0.0) / np.maximum(work.running - 1.0, 1.0)
    fixed = np.maximum(single - slope, 0.0)
    spare = 1.0 - rate * (prefill.added_ms + work.osl * slope)
    decoding = rate * work.osl * fixed / np.maximum(spare, 1e-9)
    overloaded = (spare <= 0.0) | (decoding > work.running)
    share = np.minimum(rate * prefill.added_ms, 1.0 - 1e-9)
    tpot = (fixed + slope * np.maximum(decoding, 1.0)) / (1.0 - share)
    wait = np.maximum(work.poll_steps, 1.0) / 2.0 * tpot * np.minimum(decoding, 1.0)
    ttft = work.request_ms + wait + prefill.one_ms + prefill.added_ms * share / (1.0 - share)
    return OpenServing(
        ttft_ms=np.where(overloaded, np.inf, ttft),
        tpot_ms=np.where(overloaded, np.inf, tpot),
        decoding=np.where(overloaded, np.inf, decoding),
        prefill_share=share,
        overloaded=overloaded,
    )


@dataclass(frozen=True, kw_only=True)
class Handover:
    """Two pools: `prefill_workers` that take one batch of prompts at a time, `decode_ranks` that hold the users.

    `prefill_ms` is one prefill batch of `prefill_batch` prompts, `full_decode_ms` and `single_decode_ms` a decode step
    with every user (at most `slots` per rank) and with one sequence on each rank, `handover_ms` the time of a KV cache
    on the wire; `users`, `osl`, `waves`, `spread` and `request_ms` as in `Load`, users over all ranks.
    """

    users: FloatArray
    osl: FloatArray
    waves: FloatArray
    spread: FloatArray
    prefill_workers: FloatArray
    prefill_batch: FloatArray
    prefill_ms: FloatArray
    decode_ranks: FloatArray
    slots: FloatArray
    full_decode_ms: FloatArray
    single_decode_ms: FloatArray
    handover_ms: FloatArray
    request_ms: FloatArray


@dataclass(frozen=True, kw_only=True)
class HandoverServing:
    """Means in ms; `prefill_busy` is the share of the prefill pool's time that is used, `decoding` per decode rank."""

    ttft_ms: FloatArray
    tpot_ms: FloatArray
    requests_per_s: FloatArray
    first_wave_ms: FloatArray
    later_ms: FloatArray
    prefill_busy: FloatArray
    decoding: FloatArray


def disaggregated(pools: Handover) -> HandoverServing:
    """Closed loop over a prefill pool and a decode pool (see the module's text).

    The pools match by themselves: the prefill stage is a queue, decode a delay that grows with the batch, and users
    circulate between them; the batch follows from their throughput in `_MATCHING` iterations.
    """
    per_prompt = pools.prefill_ms / pools.prefill_batch
    service = per_prompt / pools.prefill_workers
    parallel = pools.prefill_ms - service
    room = np.minimum(pools.users / pools.decode_ranks, pools.slots)
    slope = np.maximum(pools.full_decode_ms - pools.single_decode_ms, 0.0) / np.maximum(room - 1.0, 1.0)
    decoding = room
    for _ in range(_MATCHING):
        tpot = pools.single_decode_ms + slope * np.maximum(decoding - 1.0, 0.0)
        delay = pools.osl * tpot + pools.handover_ms + pools.request_ms + parallel
        half = (service * pools.users - delay) / 2.0
        queue = np.maximum(half + np.sqrt(half**2 + service * delay), service)
        cycle = queue + delay
        decoding = (decoding + np.minimum(pools.users * pools.osl * tpot / cycle / pools.decode_ranks, room)) / 2.0
    beyond = pools.request_ms + pools.handover_ms + parallel
    slot_wait = np.maximum(pools.users / pools.decode_ranks - pools.slots, 0.0) / room * pools.osl * tpot
    later = beyond + queue + slot_wait
    first = beyond + service * (pools.users + 1.0) / 2.0 + slot_wait
    share = 1.0 / pools.waves
    ttft = share * np.maximum(first, later) + (1.0 - share) * later
    rate = pools.users / (ttft + tpot * np.maximum(pools.osl - 1.0, 0.0))
    return HandoverServing(
        ttft_ms=ttft,
        tpot_ms=tpot,
        requests_per_s=1000.0 * rate,
        first_wave_ms=first,
        later_ms=later,
        prefill_busy=np.minimum(rate * service, 1.0),
        decoding=decoding,
    )
