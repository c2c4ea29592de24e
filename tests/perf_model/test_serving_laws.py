"""The closed-form account of serving against a step-by-step simulation of the same scheduler, and its laws."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from perf_model.batch import StepBatch
from perf_model.disaggregated import PairLoad, disaggregated
from perf_model.numeric import FloatArray
from perf_model.serving import RankLoad, ServingEstimate, aggregated, stage


@dataclass(frozen=True)
class LinearSteps:
    """Steps whose time is linear: a floor, each prompt token, each decoding sequence."""

    floor_ms: float = 8.0
    token_ms: float = 0.05
    sequence_ms: float = 0.05

    def step_ms(self, batch: StepBatch) -> FloatArray:
        time = self.floor_ms + self.token_ms * batch.prefill_tokens + self.sequence_ms * batch.decode_seqs
        return np.where(batch.tokens > 0, time, 0.0)

    def breakdown_ms(self, batch: StepBatch) -> dict[str, FloatArray]:
        return {"all": self.step_ms(batch)}


STEPS = LinearSteps()


def load(users: float, *, isl: float = 1000, osl: float = 200, rate: float = 0.0, **more: float) -> RankLoad:
    def full(value: float) -> FloatArray:
        return np.array([value], dtype=float)

    return RankLoad(
        users=full(users),
        rate_per_s=full(rate),
        slots=full(more.get("slots", 1e6)),
        token_budget=full(more.get("budget", 4096)),
        isl=full(isl),
        osl=full(osl),
        cached=full(0),
        request_ms=full(0),
        run_requests=full(1000),
        burst_share=full(more.get("burst", 0.0)),
    )


@dataclass
class Request:
    sent_ms: float
    prompt: float
    output: int
    first_ms: float = 0.0
    made: int = 0


@dataclass
class Scheduler:
    """One rank with chunked prefill: decodes go first, prompts fill what is left of the budget, in order of arrival."""

    steps: LinearSteps
    budget: float
    slots: int
    random: np.random.Generator
    isl: float
    osl: float
    now_ms: float = 0.0
    last_step_ms: float = 0.0
    coming: list[Request] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    decoding: list[Request] = field(default_factory=list)
    done: list[tuple[float, float]] = field(default_factory=list)  # TTFT, TPOT

    def request(self) -> Request:
        """A user's next request, sent some time within the following step."""
        prompt = self.isl * self.random.uniform(0.8, 1.2)
        sent_ms = self.now_ms + self.random.uniform(0.0, 1.0) * self.last_step_ms
        return Request(sent_ms=sent_ms, prompt=prompt, output=int(self.osl * self.random.uniform(0.8, 1.2)))

    def step(self) -> int:
        """Compute one step; the number of requests that end with it."""
        if not self.waiting and not self.decoding:
            self.now_ms = max(self.now_ms, min(request.sent_ms for request in self.coming))
        self.waiting.extend(request for request in self.coming if request.sent_ms <= self.now_ms)
        self.coming = [request for request in self.coming if request.sent_ms > self.now_ms]
        room, tokens, ready = self.budget - len(self.decoding), 0.0, []
        while self.waiting and tokens < room and len(self.decoding) + len(ready) < self.slots:
            head = self.waiting[0]
            take = min(head.prompt, room - tokens)
            head.prompt, tokens = head.prompt - take, tokens + take
            if head.prompt > 1e-9:
                break
            ready.append(self.waiting.popleft())
        steps = self.steps
        self.last_step_ms = steps.floor_ms + steps.token_ms * tokens + steps.sequence_ms * len(self.decoding)
        self.now_ms += self.last_step_ms
        for request in self.decoding:
            request.made += 1
        ended = [request for request in self.decoding if request.made >= request.output]
        self.decoding = [request for request in self.decoding if request.made < request.output]
        for request in ready:
            request.first_ms, request.made = self.now_ms, 1
        self.decoding += ready
        for request in ended:
            ttft = request.first_ms - request.sent_ms
            self.done.append((ttft, (self.now_ms - request.first_ms) / (request.output - 1)))
        return len(ended)


def simulate(users: int, waves: int, work: RankLoad) -> FloatArray:
    """TTFT and TPOT of each request of a closed loop after its first waves, one row for a request."""
    scheduler = Scheduler(
        STEPS, float(work.token_budget[0]), int(work.slots[0]), np.random.default_rng(0), work.isl[0], work.osl[0]
    )
    scheduler.coming.extend(scheduler.request() for _ in range(users))
    while len(scheduler.done) < users * waves:
        ended = scheduler.step()
        scheduler.coming.extend(scheduler.request() for _ in range(ended))
    return np.array(scheduler.done[users * waves // 2 :])


@pytest.mark.parametrize(
    ("users", "more"),
    [
        (4, {}),
        (16, {}),
        (64, {}),
        (256, {"isl": 200, "osl": 400}),
        (32, {"isl": 8000, "osl": 400, "budget": 2048}),
        (64, {"isl": 4000, "osl": 100}),
        (48, {"slots": 16}),
    ],
)
def test_means_follow_a_simulation_of_the_scheduler(users: int, more: dict[str, float]) -> None:
    work = load(users, **more)
    found = aggregated(STEPS, work)
    ttft, tpot = simulate(users, 12, work).mean(axis=0)
    assert found.tpot.mean()[0] == pytest.approx(tpot, rel=0.08)
    assert found.ttft.mean()[0] == pytest.approx(ttft, rel=0.30)


@pytest.mark.parametrize(("users", "more"), [(4, {}), (16, {}), (64, {}), (256, {"isl": 200, "osl": 400})])
def test_quantiles_follow_a_simulation_of_the_scheduler(users: int, more: dict[str, float]) -> None:
    work = load(users, **more)
    found = aggregated(STEPS, work)
    simulated = simulate(users, 14, work)
    for level in (0.5, 0.9, 0.99):
        assert found.ttft.quantile(level)[0] == pytest.approx(np.quantile(simulated[:, 0], level), rel=0.35)
        assert found.tpot.quantile(level)[0] == pytest.approx(np.quantile(simulated[:, 1], level), rel=0.06)


def throughput(found: ServingEstimate) -> float:
    return float(found.requests_per_s[0])


@pytest.mark.parametrize("users", [1, 3, 10, 50, 400])
def test_littles_law(users: int) -> None:
    found = aggregated(STEPS, load(users))
    residence_ms = found.ttft.mean()[0] + 199 * found.tpot.mean()[0]
    assert throughput(found) * residence_ms / 1e3 == pytest.approx(users, rel=0.02)


def test_work_is_conserved_at_saturation() -> None:
    """A rank cannot compute more prompt tokens than its time allows."""
    found = aggregated(STEPS, load(500, isl=4000, osl=20))
    assert throughput(found) * 4000 * STEPS.token_ms < 1000


def test_open_and_closed_loops_agree_on_capacity() -> None:
    closed = aggregated(STEPS, load(200, slots=64))
    over = aggregated(STEPS, load(0, rate=10 * throughput(closed), slots=64))
    assert throughput(over) == pytest.approx(throughput(closed), rel=0.02)
    assert over.overloaded[0]


def test_a_quiet_open_loop_waits_for_nobody() -> None:
    found = aggregated(STEPS, load(0, rate=0.01))
    assert found.ttft.mean()[0] == pytest.approx(aggregated(STEPS, load(1)).ttft.mean()[0], rel=0.15)


def test_a_wave_of_short_prompts_shares_one_step() -> None:
    found = aggregated(STEPS, load(8, isl=100, osl=50, burst=1.0))
    one_step = STEPS.floor_ms + 8 * 100 * STEPS.token_ms + 8 * STEPS.sequence_ms
    assert found.ttft.quantile(0.5)[0] == pytest.approx(one_step, rel=0.15)


def test_speculation_shortens_decoding_by_what_is_accepted() -> None:
    plain = load(16)
    fast = aggregated(STEPS, replace(plain, accepted=2.0, drafted=1.0)).tpot.mean()[0]
    slow = aggregated(STEPS, plain).tpot.mean()[0]
    assert 0.4 * slow < fast < 0.75 * slow


def test_the_stage_has_the_limits_of_its_closed_form() -> None:
    one, many = np.array([1.0]), np.array([100.0])
    assert stage(np.array([5.0]), np.array([50.0]), one)[0] == pytest.approx(5.0)
    assert stage(np.array([5.0]), np.array([10.0]), many)[0] == pytest.approx(100 * 5 - 10, rel=0.02)


def pair(users: float, prefills: float = 1, decodes: float = 1, rate: float = 0.0) -> PairLoad:
    def full(value: float) -> FloatArray:
        return np.array([value], dtype=float)

    return PairLoad(
        users=full(users),
        rate_per_s=full(rate),
        prefill_ranks=full(prefills),
        decode_ranks=full(decodes),
        decode_slots=full(256),
        token_budget=full(8192),
        isl=full(1000),
        osl=full(200),
        cached=full(0),
        request_ms=full(0),
        wire_ms=full(5),
        send_ms=full(0),
        receive_ms=full(0),
        run_requests=full(1000),
        burst_share=full(0),
    )


def test_prefill_workers_raise_a_prefill_bound_rate() -> None:
    one, two = (throughput(disaggregated(STEPS, STEPS, pair(200, prefills=n))) for n in (1, 2))
    prompts = 8.192  # in a step of 8192 tokens
    assert one == pytest.approx(1e3 * prompts / (STEPS.floor_ms + prompts * 1000 * STEPS.token_ms), rel=0.02)
    assert two > 1.5 * one


def test_pools_of_two_keep_decoding_undisturbed() -> None:
    apart = disaggregated(STEPS, STEPS, pair(32, prefills=4))
    together = aggregated(STEPS, load(32))
    assert apart.tpot.mean()[0] < together.tpot.mean()[0]
    assert apart.tpot.quantile(0.99)[0] == pytest.approx(apart.tpot.mean()[0])
