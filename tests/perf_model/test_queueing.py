"""The closed-form account of serving against an event simulation of the same schedulers, and its laws."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np
import pytest

from perf_model.queueing import (
    SCHEDULING,
    Handover,
    Load,
    Scheduling,
    Serving,
    StepTimes,
    closed_loop,
    disaggregated,
    load,
    open_loop,
    scheduling,
    step_queries,
    ttft_quantile,
)
from search_spaces.errors import InvalidValueError

_IDLE_MS = 0.5  # between an answer and the user's next request

VLLM = Scheduling(mixes=True, chunked=True, token_budget=4096, poll_steps=1, launch_ms_per_layer=0.0, request_ms=0.0)
TRTLLM = replace(VLLM, chunked=False)
SGLANG = replace(VLLM, mixes=False, token_budget=8192)


@dataclass(frozen=True)
class Device:
    """Step time: a floor, or half of it and a cost per prompt token; and a cost per decoding sequence."""

    base_ms: float
    token_ms: float
    seq_ms: float

    def step_ms(self, tokens: float, seqs: float) -> float:
        return max(self.base_ms, self.base_ms / 2 + self.token_ms * tokens) + self.seq_ms * seqs

    def times(self, work: Load) -> StepTimes:
        asked = step_queries(work)
        step = np.vectorize(self.step_ms, otypes=[float])
        return StepTimes(
            decode_ms=step(0.0, asked.decode_seqs),
            prompt_ms=step(asked.prompt_tokens, asked.prompt_seqs),
            full_ms=step(asked.full_tokens, asked.full_seqs),
        )


@dataclass
class Request:
    arrived_ms: float
    prompt: float
    output: int
    first_ms: float = 0.0
    done_ms: float = 0.0


@dataclass
class Engine:
    """One rank of an engine, step by step."""

    device: Device
    policy: Scheduling
    slots: float = np.inf
    now_ms: float = 0.0
    decode_steps: int = 0
    since_look: float = np.inf
    running: int = 0
    arriving: deque[Request] = field(default_factory=deque)
    waiting: deque[Request] = field(default_factory=deque)
    ends: list[tuple[int, int, Request]] = field(default_factory=list)
    started: int = 0

    def step(self) -> list[Request]:
        """One step of the engine; the requests that end with it."""
        self._look()
        tokens, ready = self._admit()
        if not tokens and not self.running:
            self.now_ms = max(self.now_ms, self.arriving[0].arrived_ms)
            return []
        mixes = self.policy.mixes
        self.now_ms += self.device.step_ms(tokens, self.running if mixes or not tokens else 0)
        self.since_look = np.inf if tokens and not mixes else self.since_look + 1
        ended = list(self._decode()) if mixes or not tokens else []
        for request in ready:
            self._start(request)
        return ended

    def _look(self) -> None:
        if self.since_look < self.policy.poll_steps and self.running:
            return
        self.since_look = 0
        while self.arriving and self.arriving[0].arrived_ms <= self.now_ms:
            self.waiting.append(self.arriving.popleft())

    def _admit(self) -> tuple[float, list[Request]]:
        room = self.policy.token_budget - (self.running if self.policy.mixes else 0)
        tokens, ready = 0.0, list[Request]()
        while self.waiting and self.running + len(ready) < self.slots and tokens < room:
            request = self.waiting[0]
            if not self.policy.chunked and tokens and request.prompt > room - tokens:
                break
            take = min(request.prompt, room - tokens) if self.policy.chunked else request.prompt
            tokens += take
            request.prompt -= take
            if request.prompt > 0:
                break
            ready.append(self.waiting.popleft())
        return tokens, ready

    def _start(self, request: Request) -> None:
        request.first_ms = self.now_ms
        self.running += 1
        self.started += 1
        heapq.heappush(self.ends, (self.decode_steps + request.output - 1, self.started, request))

    def _decode(self) -> Iterator[Request]:
        self.decode_steps += 1
        while self.ends and self.ends[0][0] <= self.decode_steps:
            request = heapq.heappop(self.ends)[2]
            request.done_ms = self.now_ms
            self.running -= 1
            yield request


@dataclass(frozen=True)
class Case:
    """A run: `users` in a closed loop, lengths at (1 - spread) .. 1 of `isl` and `osl`."""

    device: Device
    policy: Scheduling
    users: int
    isl: int
    osl: int
    spread: float = 0.2
    slots: float = np.inf
    waves: int = 10

    def load(self) -> Load:
        mean = 1 - self.spread / 2
        return load(
            self.policy,
            users=self.users,
            isl=self.isl * mean,
            osl=self.osl * mean,
            layers=1,
            spread=self.spread,
            waves=self.waves,
            slots=self.slots,
        )

    def predicted(self) -> Serving:
        work = self.load()
        return closed_loop(work, self.device.times(work))

    def requests(self, rng: np.random.Generator) -> Iterator[Request]:
        low = 1 - self.spread
        while True:
            prompt, output = rng.uniform(low, 1, 2) * (self.isl, self.osl)
            yield Request(arrived_ms=0.0, prompt=float(round(prompt)), output=max(round(output), 2))

    def simulated(self, seed: int = 0) -> list[Request]:
        engine = Engine(self.device, self.policy, self.slots)
        source = self.requests(np.random.default_rng(seed))
        engine.arriving.extend(next(source) for _ in range(self.users))
        done: list[Request] = []
        sent, wanted = self.users, self.users * self.waves
        while len(done) < wanted:
            for request in engine.step():
                done.append(request)
                if sent < wanted:
                    engine.arriving.append(replace(next(source), arrived_ms=engine.now_ms + _IDLE_MS))
                    sent += 1
        return done


def ttft_ms(done: list[Request]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([r.first_ms - r.arrived_ms for r in done])


def tpot_ms(done: list[Request]) -> float:
    return float(np.mean([(r.done_ms - r.first_ms) / (r.output - 1) for r in done]))


def cases(policies: tuple[Scheduling, ...], seed: int, count: int, **fixed: float) -> list[Case]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        device = Device(
            base_ms=rng.uniform(3, 12), token_ms=10 ** rng.uniform(-2.3, -1), seq_ms=10 ** rng.uniform(-2.5, -1)
        )
        lengths = {"isl": int(rng.choice([256, 1024, 4096])), "osl": int(rng.choice([128, 512]))}
        policy = policies[rng.integers(len(policies))]
        made.append(Case(device, policy, users=int(rng.choice([2, 8, 32, 64])), **lengths, **fixed))
    return made


def ratios(policies: tuple[Scheduling, ...], **fixed: float) -> tuple[np.ndarray, np.ndarray]:
    """Predicted over simulated mean TTFT and TPOT of 30 random cases."""
    pairs = []
    for case in cases(policies, seed=3, count=30, **fixed):
        done, predicted = case.simulated(), case.predicted()
        pairs.append((predicted.ttft_ms / ttft_ms(done).mean(), predicted.tpot_ms / tpot_ms(done)))
    ttft, tpot = np.array(pairs).T
    return ttft, tpot


@pytest.mark.parametrize("policy", [VLLM, TRTLLM, SGLANG, replace(SGLANG, poll_steps=10)])
def test_means_follow_the_event_simulation(policy: Scheduling) -> None:
    ttft, tpot = ratios((policy,))
    assert np.median(np.abs(ttft - 1)) < 0.07
    assert np.max(np.abs(ttft - 1)) < 0.4
    assert np.median(np.abs(tpot - 1)) < 0.08
    assert np.max(np.abs(tpot - 1)) < 0.3


def test_waiting_for_a_slot_follows_the_event_simulation() -> None:
    ttft, tpot = ratios((VLLM, TRTLLM, SGLANG), slots=4)
    assert np.median(np.abs(ttft - 1)) < 0.15
    assert np.median(np.abs(tpot - 1)) < 0.08


def test_equal_lengths_keep_users_in_step_where_prefill_stops_decoding() -> None:
    ttft, tpot = ratios((SGLANG,), spread=0.0)
    assert np.median(np.abs(ttft - 1)) < 0.05
    assert np.median(np.abs(tpot - 1)) < 0.05


@pytest.mark.parametrize(("quantile", "tolerance"), [(0.5, 0.25), (0.99, 0.2)])
def test_quantiles_follow_the_event_simulation(quantile: float, tolerance: float) -> None:
    errors = []
    for case in cases((VLLM, TRTLLM), seed=5, count=30):
        simulated = np.quantile(ttft_ms(case.simulated()), quantile)
        errors.append(abs(ttft_quantile(case.predicted(), quantile) / simulated - 1))
    assert np.median(errors) < tolerance


def test_quantiles_rise() -> None:
    served = Case(Device(8.0, 0.03, 0.01), VLLM, users=32, isl=1024, osl=256).predicted()
    values = [float(ttft_quantile(served, q)) for q in (0.1, 0.5, 0.9, 0.99)]
    assert values == sorted(values)
    assert values[0] < float(served.ttft_ms) < values[-1]
    with pytest.raises(InvalidValueError, match="quantile=1"):
        ttft_quantile(served, 1.0)


def test_a_single_user_waits_for_a_step_and_its_own_prefill() -> None:
    device = Device(base_ms=10.0, token_ms=0.1, seq_ms=0.0)
    served = Case(device, VLLM, users=1, isl=1000, osl=200, spread=0.0, waves=10**9).predicted()
    assert float(served.one_ms) == pytest.approx(device.step_ms(1000, 0))
    assert float(served.ttft_ms) == pytest.approx(device.step_ms(1000, 0) + float(served.tpot_ms), rel=0.2)


def test_throughput_obeys_littles_law() -> None:
    case = Case(Device(8.0, 0.03, 0.05), VLLM, users=48, isl=2048, osl=256, slots=16)
    served = case.predicted()
    residence_ms = served.ttft_ms + served.tpot_ms * (case.load().osl - 1)
    assert float(served.requests_per_s * residence_ms / 1000) == pytest.approx(48)


def test_more_users_never_shorten_times() -> None:
    users = np.arange(1, 200)
    work = load(VLLM, users=users, isl=1024, osl=512, layers=1)
    served = closed_loop(work, Device(8.0, 0.03, 0.05).times(work))
    assert np.all(np.diff(served.ttft_ms) > -1e-9)
    assert np.all(np.diff(served.tpot_ms) > -1e-9)
    assert np.all((served.queue_share >= 0) & (served.queue_share < 1))


def test_ranks_that_step_together_wait_for_each_others_prompts() -> None:
    device = Device(8.0, 0.03, 0.05)
    alone, together = (
        closed_loop(work, device.times(work))
        for work in (load(VLLM, users=8, isl=2048, osl=512, layers=1, ranks=r) for r in (1, 8))
    )
    assert together.tpot_ms > alone.tpot_ms
    assert together.added_ms < 8.01 * alone.added_ms


def test_host_time_hides_under_long_steps_only() -> None:
    def added(token_ms: float) -> float:
        work = load(replace(VLLM, launch_ms_per_layer=1.0), users=1, isl=1000, osl=500, layers=40)
        times = Device(5.0, token_ms, 0.0).times(work)
        return float(closed_loop(work, times).one_ms - times.prompt_ms)

    assert added(0.001) > 30
    assert added(1.0) < 1


def poisson(case: Case, rate_per_s: float, count: int) -> list[Request]:
    rng = np.random.default_rng(1)
    at = np.cumsum(rng.exponential(1000 / rate_per_s, count))
    engine = Engine(case.device, case.policy)
    engine.arriving.extend(replace(r, arrived_ms=float(t)) for r, t in zip(case.requests(rng), at, strict=False))
    done: list[Request] = []
    while len(done) < count:
        done.extend(engine.step())
    return done[count // 5 :]


@pytest.mark.parametrize("rate_per_s", [0.5, 2.0, 4.0])
def test_open_loop_follows_the_event_simulation(rate_per_s: float) -> None:
    case = Case(Device(8.0, 0.05, 0.05), VLLM, users=128, isl=1024, osl=256)
    work = case.load()
    served = open_loop(work, case.device.times(work), rate_per_s=rate_per_s, single_decode_ms=case.device.step_ms(0, 1))
    done = poisson(case, rate_per_s, 800)
    assert not served.overloaded
    assert float(served.tpot_ms) == pytest.approx(tpot_ms(done), rel=0.1)
    assert float(served.ttft_ms) == pytest.approx(ttft_ms(done).mean(), rel=0.2)


def test_open_loop_beyond_capacity_is_overloaded() -> None:
    case = Case(Device(8.0, 0.05, 0.05), VLLM, users=128, isl=1024, osl=256)
    work = case.load()
    served = open_loop(work, case.device.times(work), rate_per_s=[1.0, 30.0], single_decode_ms=8.0)
    assert served.overloaded.tolist() == [False, True]
    assert np.isinf(served.ttft_ms[1])


def handover(users: int, prefill_workers: int, decode_ranks: int, waves: float = 10.0) -> Handover:
    room = users / decode_ranks
    values = {
        "users": users,
        "osl": 460.0,
        "waves": waves,
        "spread": 0.2,
        "prefill_workers": prefill_workers,
        "prefill_batch": 1.0,
        "prefill_ms": 90.0,
        "decode_ranks": decode_ranks,
        "slots": np.inf,
        "full_decode_ms": 8.0 + 0.1 * room,
        "single_decode_ms": 8.1,
        "handover_ms": 20.0,
        "request_ms": 0.0,
    }
    return Handover(**{name: np.float64(value) for name, value in values.items()})


def circulated(pools: Handover, seed: int = 0) -> tuple[float, float]:
    """Mean TTFT and TPOT of a closed loop over `pools`, simulated; decode steps are those of the mean batch."""
    rng = np.random.default_rng(seed)
    free = [0.0] * int(pools.prefill_workers)
    batch, users = float(pools.users / pools.decode_ranks), int(pools.users)
    for _ in range(20):
        queue = [(0.0, i) for i in range(users)]
        heapq.heapify(queue)
        workers, ttft, decoding = free.copy(), [], 0.0
        step = float(pools.single_decode_ms) + 0.1 * (batch - 1)
        for _ in range(users * int(pools.waves)):
            arrived, user = heapq.heappop(queue)
            start = max(arrived, heapq.heappop(workers))
            heapq.heappush(workers, start + 90.0)
            first = start + 90.0 + 20.0
            stream = rng.uniform(409, 511) * step
            ttft.append(first - arrived)
            decoding += stream
            heapq.heappush(queue, (first + stream, user))
        span = max(t for t, _ in queue)
        batch = (batch + decoding / span / float(pools.decode_ranks)) / 2
    return float(np.mean(ttft)), step


@pytest.mark.parametrize(
    ("users", "prefills", "decodes"), [(8, 1, 1), (64, 2, 1), (64, 1, 2), (256, 2, 4), (128, 8, 2)]
)
def test_disaggregated_follows_the_event_simulation(users: int, prefills: int, decodes: int) -> None:
    pools = handover(users, prefills, decodes)
    served = disaggregated(pools)
    ttft, tpot = circulated(pools)
    assert float(served.ttft_ms) == pytest.approx(ttft, rel=0.3)
    assert float(served.tpot_ms) == pytest.approx(tpot, rel=0.15)
    assert 0 < served.prefill_busy <= 1


def test_every_engine_schedules_and_an_unknown_one_is_named() -> None:
    assert set(SCHEDULING) == {"vllm", "trtllm", "sglang"}
    assert scheduling("vllm").mixes
    with pytest.raises(InvalidValueError, match="'mlc'"):
        scheduling("mlc")
    with pytest.raises(InvalidValueError, match="isl=0"):
        load(VLLM, users=1, isl=0, osl=1, layers=1)


def test_200k_configurations_take_less_than_a_second() -> None:
    users = np.tile(np.arange(1.0, 201.0), 1000)
    work = load(VLLM, users=users, isl=1024, osl=512, layers=60)
    times = StepTimes(decode_ms=8.0 + users / 10, prompt_ms=30.0 + users / 10, full_ms=100.0 + users / 10)
    started = perf_counter()
    closed_loop(work, times)
    assert perf_counter() - started < 1.0
