"""From the latencies of engine steps to what a serving run shows, in closed form, for arrays of configurations.

Three step latencies describe an engine to this account: a decode step of the full batch, a step that carries one
prompt (or one chunk of it), and a step filled to the token budget. Everything else is scheduling.

Closed loop. b users per rank start together and each sends its next request when the last one ended; a run lasts
`waves` requests per user. Two regimes make up the mean time to first token.

- The first wave (one request in `waves`): b prompts queue at once and go through in n = b * isl / tokens_per_step
  full steps, so their mean is full * (n + 1) / 2.
- Later requests arrive one by one where lengths vary, each as another ends. Such a request waits for the look at the
  queue that is next (one step; `poll_steps` decode steps where the engine looks less often), for the prompts that came
  with it and for its own. With rho the share of time that prefills take, prompts meet others with rho^2 / (1 - rho/2)
  more prompts in front (fitted to an event simulation of the same scheduler, see the tests: median error 2%).
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

_LOCKSTEP = 0.15  # of later waves that meet as a first wave where an engine mixes and lengths are equal
_HIGHEST_RHO = 0.97
_NORMAL_QUANTILES = {50: 0.0, 90: 1.2816, 99: 2.3263}


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


def load(
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
    """Latencies of the steps of `StepQueries`, in ms, on the device alone (host time is added here)."""

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

    Means in ms and requests per second of the rank; `first_wave_ms` and `later_ms` are the mean times to first token of
    the two regimes, `first_share` the share of requests in the first, `slot_wait_ms` the wait for a free slot (part
    of both), `decode_ms` and `added_ms` the two parts of the time per output token, `prefill_share` the share of the
    engine's time that prefills take, `one_ms` a request's own prefill.
    """

    ttft_ms: FloatArray
    tpot_ms: FloatArray
    requests_per_s: FloatArray
    first_wave_ms: FloatArray
    later_ms: FloatArray
    first_share: FloatArray
    slot_wait_ms: FloatArray
    decode_ms: FloatArray
    added_ms: FloatArray
    prefill_share: FloatArray
    one_ms: FloatArray

    @property
    def queue_share(self) -> FloatArray:
        """Share of the mean time to first token that is not a request's own prefill."""
        return 1.0 - np.minimum(self.one_ms / self.ttft_ms, 1.0)


@dataclass(frozen=True, kw_only=True)
class _Prefill:
    """A prompt's way through the engine: its own steps, what it adds to decoding, and the cost of one more beside it."""

    one_ms: FloatArray
    full_ms: FloatArray
    added_ms: FloatArray
    blocked_ms: FloatArray
    beside_ms: FloatArray


def _prefill(work: Load, queries: StepQueries, times: StepTimes) -> _Prefill:
    pieces = np.maximum(work.isl / queries.prompt_tokens, 1.0)
    one = np.hypot(times.prompt_ms, work.launch_ms)
    full = np.maximum(np.hypot(times.full_ms, work.launch_ms), one)
    beside_decode = np.where(work.mixes, times.decode_ms, 0.0)
    added = np.maximum(times.prompt_ms - beside_decode, 0.0) * pieces
    blocked = np.maximum(one - beside_decode, 0.0) * pieces
    more = (queries.full_tokens - queries.prompt_tokens) / work.isl
    beside = np.where(more > 0.01, (full - one) / np.maximum(more, 0.01), blocked)
    return _Prefill(one_ms=one * pieces, full_ms=full, added_ms=added, blocked_ms=blocked, beside_ms=beside)


def closed_loop(work: Load, times: StepTimes) -> Serving:
    """Aggregated serving under a constant number of users per rank (see the module's text)."""
    queries = step_queries(work)
    prefill = _prefill(work, queries, times)
    running, tokens = work.running, work.osl
    per_step = running / tokens
    met = np.where(work.ranks > 1.0, np.maximum(per_step, -np.expm1(-work.ranks * per_step)), per_step)
    added = met * prefill.added_ms
    tpot = times.decode_ms + added
    rho = np.clip(added / tpot, 0.0, _HIGHEST_RHO)
    first = prefill.full_ms * (running * work.isl / queries.full_tokens + 1.0) / 2.0
    company = np.minimum(per_step * work.poll_steps, running) / 2.0 + rho**2 * (1.0 - 1.0 / running)
    wait = np.where(work.poll_steps > 1.0, work.poll_steps / 2.0, 1.0) * tpot
    later = wait + prefill.one_ms + company * prefill.beside_ms
    share = _first_share(work)
    ttft = work.request_ms + share * first + (1.0 - share) * later
    slot_wait = np.maximum(work.users - running, 0.0) / running * (ttft + tpot * (tokens - 1.0))
    total = ttft + slot_wait
    return Serving(
        ttft_ms=total,
        tpot_ms=tpot,
        requests_per_s=1000.0 * work.users / (total + tpot * np.maximum(tokens - 1.0, 0.0)),
        first_wave_ms=work.request_ms + first + slot_wait,
        later_ms=work.request_ms + later + slot_wait,
        first_share=share,
        slot_wait_ms=slot_wait,
        decode_ms=times.decode_ms,
        added_ms=added,
        prefill_share=rho,
        one_ms=prefill.one_ms,
    )


def _first_share(work: Load) -> FloatArray:
    """Share of requests that queue as a first wave does."""
    start = 1.0 / work.waves
    kept = np.where(work.mixes, _LOCKSTEP, 1.0)
    return np.where(work.spread > 0.0, start, start + (1.0 - start) * kept)
