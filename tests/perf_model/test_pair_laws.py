"""The account of two pools of llama.cpp against a simulation of each call, step, save and restore."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np
import pytest

from perf_model.batch import StepBatch
from perf_model.disaggregated import PairLoad, disaggregated
from perf_model.numeric import FloatArray

SPREAD = 0.25
REQUESTS = 600


@dataclass(frozen=True)
class LinearSteps:
    """Prefill steps by their tokens, decode steps by their sequences."""

    prompt_ms: float
    token_ms: float
    floor_ms: float
    sequence_ms: float

    def prefill(self, tokens: float) -> float:
        return self.prompt_ms + self.token_ms * tokens

    def decode(self, sequences: int) -> float:
        return self.floor_ms + self.sequence_ms * sequences

    def step_ms(self, batch: StepBatch) -> FloatArray:
        prefill = self.prompt_ms + self.token_ms * batch.prefill_tokens
        decode = self.floor_ms + self.sequence_ms * batch.decode_seqs
        return np.where(batch.prefill_tokens > 0, prefill, np.where(batch.decode_seqs > 0, decode, 0.0))

    def breakdown_ms(self, batch: StepBatch) -> dict[str, FloatArray]:
        return {"all": self.step_ms(batch)}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A deployment of prefill and decode replicas behind a router."""

    steps: LinearSteps
    users: int
    prefills: int = 1
    decodes: int = 1
    prefill_slots: int = 4
    decode_slots: int = 4
    budget: float = 2048
    isl: float = 64
    osl: float = 48
    save_ms: float = 0.3
    restore_ms: float = 0.3
    call_ms: float = 2.0

    @property
    def load(self) -> PairLoad:
        def full(value: float) -> FloatArray:
            return np.array([value], dtype=float)

        return PairLoad(
            users=full(self.users),
            rate_per_s=full(0),
            prefill_ranks=full(self.prefills),
            decode_ranks=full(self.decodes),
            decode_slots=full(self.decode_slots),
            token_budget=full(self.budget),
            isl=full(self.isl),
            osl=full(self.osl),
            cached=full(0),
            request_ms=full(0),
            wire_ms=full(0),
            send_ms=full(self.save_ms),
            receive_ms=full(self.restore_ms),
            run_requests=full(REQUESTS),
            burst_share=full(0),
            prefill_slots=full(self.prefill_slots),
            hop_ms=full(self.call_ms),
            through_engines=True,
        )


@dataclass
class Request:
    """What a user asked for, and how far it is."""

    sent_ms: float
    left: float
    output: int
    first_ms: float = 0.0
    made: int = 0


@dataclass
class Engine:
    """The loop of llama.cpp: saves and restores between steps, then one step of all that is there."""

    free: int
    busy: bool = False
    actions: deque[Callable[[], None]] = field(default_factory=deque)
    requests: list[Request] = field(default_factory=list)


class Simulation:
    """Router, engines and users; a call takes half of its time each way."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.half = pair, pair.call_ms / 2.0
        self.random = np.random.default_rng(0)
        self.prefills = [Engine(pair.prefill_slots) for _ in range(pair.prefills)]
        self.decodes = [Engine(pair.decode_slots) for _ in range(pair.decodes)]
        self.prompts: deque[Request] = deque()
        self.saved: deque[Request] = deque()
        self.done: list[tuple[float, float]] = []
        self.now_ms, self.numbers = 0.0, count()
        self.events: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, delay_ms: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now_ms + delay_ms, next(self.numbers), event))

    def run(self) -> FloatArray:
        """TTFT and TPOT of each request, without the first fifth."""
        for number in range(self.pair.users):
            self.after(1e-3 * number, self.send)
        while len(self.done) < REQUESTS:
            self.now_ms, _, event = heapq.heappop(self.events)
            event()
        return np.array(self.done[REQUESTS // 5 :])

    def send(self) -> None:
        prompt, output = (mean * self.random.uniform(1 - SPREAD, 1 + SPREAD) for mean in (self.pair.isl, self.pair.osl))
        request = Request(self.now_ms, prompt, max(int(output), 2))
        self.after(self.half, lambda: self.queue(self.prompts, request, self.prefills, self.start_prompt))

    def queue(
        self,
        line: deque[Request],
        request: Request,
        engines: list[Engine],
        start: Callable[[Engine, Request], None],
    ) -> None:
        """Give `request` a slot of the replica with most free ones, or let it wait."""
        engine = max(engines, key=lambda engine: engine.free)
        if engine.free == 0:
            line.append(request)
            return
        engine.free -= 1
        self.after(self.half, lambda: start(engine, request))

    def release(self, line: deque[Request], engine: Engine, start: Callable[[Engine, Request], None]) -> None:
        if line:
            request = line.popleft()
            self.after(self.half, lambda: start(engine, request))
        else:
            engine.free += 1

    def act(self, engine: Engine, time_ms: float, then: Callable[[], None]) -> None:
        """Occupy `engine` for an action or a step."""
        engine.busy = True

        def end() -> None:
            engine.busy = False
            then()
            self.turn(engine)

        self.after(time_ms, end)

    def turn(self, engine: Engine) -> None:
        """One turn of an engine's loop."""
        if engine.busy:
            return
        if engine.actions:
            engine.actions.popleft()()
        elif engine.requests and engine in self.prefills:
            self.prefill_step(engine)
        elif engine.requests:
            self.decode_step(engine)

    def start_prompt(self, engine: Engine, request: Request) -> None:
        engine.requests.append(request)
        self.turn(engine)

    def prefill_step(self, engine: Engine) -> None:
        room, ended = self.pair.budget, []
        for request in engine.requests:
            take = min(request.left, room)
            request.left, room = request.left - take, room - take
            if request.left <= 0:
                ended.append(request)
        engine.requests = [request for request in engine.requests if request.left > 0]

        def then() -> None:
            for request in ended:
                self.after(2 * self.half, lambda request=request: self.save(engine, request))  # type: ignore[misc]

        self.act(engine, self.pair.steps.prefill(self.pair.budget - room), then)

    def save(self, engine: Engine, request: Request) -> None:
        def written() -> None:
            self.release(self.prompts, engine, self.start_prompt)
            self.queue(self.saved, request, self.decodes, self.restore)

        engine.actions.append(lambda: self.act(engine, self.pair.save_ms, lambda: self.after(self.half, written)))
        self.turn(engine)

    def restore(self, engine: Engine, request: Request) -> None:
        def ask() -> None:
            engine.requests.append(request)
            self.turn(engine)

        engine.actions.append(lambda: self.act(engine, self.pair.restore_ms, lambda: self.after(2 * self.half, ask)))
        self.turn(engine)

    def decode_step(self, engine: Engine) -> None:
        batch = list(engine.requests)

        def then() -> None:
            for request in batch:
                self.token(engine, request)

        self.act(engine, self.pair.steps.decode(len(batch)), then)

    def token(self, engine: Engine, request: Request) -> None:
        request.made += 1
        seen_ms = self.now_ms + 2 * self.half
        if request.made == 1:
            request.first_ms = seen_ms
        if request.made == request.output:
            engine.requests.remove(request)
            tpot = (seen_ms - request.first_ms) / (request.output - 1)
            self.done.append((request.first_ms - request.sent_ms, tpot))
            self.after(self.half, lambda: self.release(self.saved, engine, self.restore))
            self.after(2 * self.half, self.send)


SLOW_PROMPTS = LinearSteps(prompt_ms=1.0, token_ms=0.28, floor_ms=0.7, sequence_ms=0.25)
SLOW_TOKENS = LinearSteps(prompt_ms=4.0, token_ms=0.02, floor_ms=3.0, sequence_ms=0.6)
PAIRS = {
    "one user": Pair(steps=SLOW_PROMPTS, users=1),
    "two users": Pair(steps=SLOW_PROMPTS, users=2),
    "two users, one slot": Pair(steps=SLOW_PROMPTS, users=2, prefill_slots=1),
    "four users": Pair(steps=SLOW_PROMPTS, users=4),
    "eight users": Pair(steps=SLOW_PROMPTS, users=8),
    "eight users, one slot": Pair(steps=SLOW_PROMPTS, users=8, prefill_slots=1),
    "eight users, small steps": Pair(steps=SLOW_PROMPTS, users=8, budget=128, prefill_slots=8),
    "two and two": Pair(steps=SLOW_PROMPTS, users=8, prefills=2, decodes=2),
    "slow saves": Pair(steps=SLOW_TOKENS, users=4, save_ms=20.0, restore_ms=10.0),
    "long answers": Pair(steps=SLOW_TOKENS, users=8, osl=128, decode_slots=8),
    "few decode slots": Pair(steps=SLOW_TOKENS, users=8, osl=128, decode_slots=2),
    "long prompts": Pair(steps=SLOW_PROMPTS, users=4, isl=256, budget=512),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_account_agrees_with_the_simulation(name: str) -> None:
    pair = PAIRS[name]
    found = disaggregated(pair.steps, pair.steps, pair.load)
    times = Simulation(pair).run()
    ttft, tpot = times.mean(axis=0)
    assert found.ttft.mean()[0] == pytest.approx(ttft, rel=0.2)
    assert found.tpot.mean()[0] == pytest.approx(tpot, rel=0.15)
    assert found.ttft.quantile(0.5)[0] == pytest.approx(np.quantile(times[:, 0], 0.5), rel=0.25)
    assert found.ttft.quantile(0.9)[0] == pytest.approx(np.quantile(times[:, 0], 0.9), rel=0.4)


def test_a_save_waits_for_the_prompts_that_came_meanwhile() -> None:
    """Two users: with one slot a prompt's hand-over goes first, with four the other's prompt does."""
    one, four = (
        disaggregated(SLOW_PROMPTS, SLOW_PROMPTS, replace(PAIRS["two users"], prefill_slots=slots).load).ttft.mean()[0]
        for slots in (1, 4)
    )
    assert four > 1.05 * one


def test_prompts_that_share_a_step_share_what_it_costs_whatever_its_prompts() -> None:
    steps = LinearSteps(prompt_ms=50.0, token_ms=0.01, floor_ms=1.0, sequence_ms=0.01)
    pair = Pair(steps=steps, users=32, prefill_slots=32, decode_slots=32)
    rate = disaggregated(steps, steps, pair.load).requests_per_s[0]
    assert rate > 5 * 1e3 / steps.prefill(pair.isl)
