"""Drives a load against an endpoint and watches its own punctuality."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from cluster.load.arrivals import arrival_times_s, traced_times_s
from cluster.load.client import Answer, Endpoint, StreamingClient, completion_body
from cluster.load.prompts import PlannedRequest, ordinary_ids, sessions_of
from cluster.load.timings import ErrorClass, Phase, RequestTiming, Timings
from cluster.load.traces import TracedRequest, traced_requests
from search_spaces.errors import require
from search_spaces.measuring import MeasurementRule
from search_spaces.workload import Load, Workload

Progress = Callable[[int, int], None]
"""Called with the requests done and to do (warm-up and measured) each time that one has ended."""

HEARTBEAT_S = 0.005
"""The loop waits in epoll, whose timeouts are whole milliseconds: up to 1 ms of the lateness is that."""


@dataclass(frozen=True, kw_only=True)
class LoadRun:
    """One load to put on one endpoint, and how it is measured.

    `load` says how hard; the arrival process is its own. Prompts, lengths and arrival times follow from `seed`: give
    each run on a running engine another one, or its prefix cache knows the prompts. `limit_s` limits the whole run,
    `request_limit_s` one request. `traced` are the requests of the workload's trace: they are read from its file where
    they are not given, and so travel with the run to where that file is not.
    """

    url: str
    model_name: str
    workload: Workload
    load: Load
    vocab_size: int
    seed: int
    rule: MeasurementRule
    limit_s: float
    timings_path: Path
    api_key: str | None = None
    request_limit_s: float = 300.0
    traced: tuple[TracedRequest, ...] = ()

    def __post_init__(self) -> None:
        if self.workload.trace is not None and not self.traced:
            object.__setattr__(self, "traced", traced_requests(self.workload.trace))
        require(self.limit_s > 0, f"limit_s={self.limit_s} must be above 0")
        require(self.request_limit_s > 0, f"request_limit_s={self.request_limit_s} must be above 0")
        Endpoint(base_url=self.url)
        ordinary_ids(self.vocab_size)

    @property
    def warm_up_requests(self) -> int:
        """Requests that come before the measured ones (see `MeasurementRule`)."""
        return warm_up_requests(self.rule, self.load)

    @property
    def requests_per_session(self) -> float:
        """Mean number of requests that one arrival brings."""
        conversation = self.workload.conversation
        return 1.0 if conversation is None else float(conversation.turns.mean)

    def phase(self, index: int) -> Phase:
        """The part of the run to which request number `index` belongs."""
        measured_from = self.warm_up_requests
        if index < measured_from:
            return Phase.WARM_UP
        return Phase.MEASURED if index < measured_from + self.rule.requests else Phase.AFTER


def warm_up_requests(rule: MeasurementRule, load: Load) -> int:
    """The larger of the rule's share of the measured requests, rounded up, and a closed loop's requests in flight."""
    return max(ceil(rule.warm_up_share * rule.requests), load.concurrency or 0)


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """What happened. `loop_lag_ns` holds how late the event loop ran each beat of a heartbeat while it was measured.

    `timed_out` says that `limit_s` ended the run, `hopeless` that more measured requests had failed than the rule
    allows, so that the rest was spared.
    """

    timings: Timings
    loop_lag_ns: tuple[int, ...]
    timed_out: bool = False
    hopeless: bool = False


async def run_load(run: LoadRun, progress: Progress | None = None) -> LoadResult:
    """Put the load on until the last measured request has ended, the limit is reached or the run is hopeless.

    Never raises for what the server does: its faults are in the timings.
    """
    driver = _Driver(run, progress)
    with _no_collection():
        return await driver.drive()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's cyclic garbage collector still: a full collection stops every stream for tens of milliseconds.

    Reference counting frees what a request leaves behind, so that memory does not grow for want of it.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


_Session = tuple[tuple[PlannedRequest, bytes], ...]


class _Bodies:
    """Sessions with their request bodies, made before the run for its first `ready` requests.

    Making one takes time from the streams.
    """

    def __init__(self, run: LoadRun, ready: int) -> None:
        self._model_name = run.model_name
        self._sessions = sessions_of(run.workload, ordinary_ids(run.vocab_size), run.seed, run.traced)
        self._ready: dict[int, _Session] = {}
        while ready > 0:
            number = len(self._ready)
            self._ready[number] = self._make(number)
            ready -= len(self._ready[number])

    def take(self, number: int) -> _Session:
        """Session `number`."""
        return self._ready.pop(number, None) or self._make(number)

    def _make(self, number: int) -> _Session:
        return tuple(
            (planned, completion_body(self._model_name, planned.prompt, planned.output_tokens))
            for planned in self._sessions.session(number)
        )


class _Driver:
    """The state of one run."""

    def __init__(self, run: LoadRun, progress: Progress | None) -> None:
        self._run = run
        self._progress = progress
        self._client = StreamingClient(Endpoint(base_url=run.url, api_key=run.api_key), run.request_limit_s)
        self._to_do = run.warm_up_requests + run.rule.requests
        self._bodies = _Bodies(run, self._to_do + 2 * (run.load.concurrency or 0))
        self._next_session = self._next_index = 0
        self._done = 0
        self._measured_left = run.rule.requests
        self._failed = 0
        self._hopeless = False
        self._over = asyncio.Event()
        self._tasks: set[asyncio.Task[object]] = set()
        self._timings: list[RequestTiming] = []
        self._loop_lag_ns: list[int] = []
        self._start_ns = 0

    async def drive(self) -> LoadResult:
        """The whole run."""
        start_epoch_ns, self._start_ns = time.time_ns(), time.monotonic_ns()
        self._start_sending()
        self._beat(self._start_ns)
        try:
            with suppress(TimeoutError):  # `LoadResult.timed_out` says so
                await asyncio.wait_for(self._over.wait(), self._run.limit_s)
        finally:
            self._over.set()
            self._client.abandon()
            await asyncio.gather(*self._tasks)
            self._client.close()
        return LoadResult(
            timings=Timings(
                start_epoch_ns=start_epoch_ns,
                start_monotonic_ns=self._start_ns,
                requests=tuple(sorted(self._timings, key=lambda timing: timing.index)),
            ),
            loop_lag_ns=tuple(self._loop_lag_ns),
            timed_out=self._measured_left > 0 and not self._hopeless,
            hopeless=self._hopeless,
        )

    def _start_sending(self) -> None:
        concurrency = self._run.load.concurrency
        if concurrency is None:
            times_ns = (self._start_ns + round(at * 1e9) for at in self._arrivals())
            self._send_due(times_ns, next(times_ns))
        else:
            for _ in range(concurrency):
                self._spawn(self._slot())

    def _arrivals(self) -> Iterator[float]:
        """Seconds from the start at which sessions are due."""
        run = self._run
        if run.workload.trace is not None:
            return traced_times_s(run.load, [request.at_s for request in run.traced])
        return arrival_times_s(replace(run.load, value=run.load.value / run.requests_per_session), run.seed)

    def _send_due(self, times_ns: Iterator[int], due_ns: int) -> None:
        """Open loop: send what is due, and come back when the next one is."""
        while not self._over.is_set() and due_ns <= time.monotonic_ns():
            self._spawn(self._session(due_ns))
            due_ns = next(times_ns)
        if not self._over.is_set():
            asyncio.get_running_loop().call_at(due_ns / 1e9, self._send_due, times_ns, due_ns)

    async def _slot(self) -> None:
        """Closed loop: one of the requests in flight, followed at once by the next."""
        due_ns = self._start_ns
        while not self._over.is_set():
            due_ns = await self._session(due_ns)

    async def _session(self, due_ns: int) -> int:
        """Send the requests of the next session, the first due at `due_ns`; returns when the last one ended."""
        number, self._next_session = self._next_session, self._next_session + 1
        for planned, body in self._bodies.take(number):
            if planned.think_time_s > 0:
                due_ns += round(planned.think_time_s * 1e9)
                with suppress(TimeoutError):  # the time is over: send
                    await asyncio.wait_for(self._over.wait(), max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
            if self._over.is_set():
                break
            due_ns = await self._request(planned, body, due_ns)
        return due_ns

    async def _request(self, planned: PlannedRequest, body: bytes, due_ns: int) -> int:
        """Send a request, due at `due_ns`, and record it; returns when it ended."""
        index, self._next_index = self._next_index, self._next_index + 1
        planned = replace(planned, index=index)
        answer = await self._client.complete(body, index)
        self._record(self._timing(planned, due_ns, answer))
        return answer.end_ns

    def _timing(self, planned: PlannedRequest, due_ns: int, answer: Answer) -> RequestTiming:
        short = _shortfall(planned, answer)
        return RequestTiming(
            index=planned.index,
            phase=self._run.phase(planned.index),
            scheduled_ns=due_ns - self._start_ns,
            sent_ns=answer.sent_ns - self._start_ns,
            connect_ns=answer.connect_ns,
            token_ns=tuple(at - self._start_ns for at in answer.token_ns),
            end_ns=answer.end_ns - self._start_ns,
            input_tokens=len(planned.prompt) if answer.prompt_tokens is None else answer.prompt_tokens,
            planned_tokens=planned.output_tokens,
            output_tokens=len(answer.token_ns) if answer.completion_tokens is None else answer.completion_tokens,
            resent=answer.resent,
            error=ErrorClass.SHORT if short else answer.error,
            error_text=short or answer.error_text,
        )

    def _record(self, timing: RequestTiming) -> None:
        self._timings.append(timing)
        if timing.error is ErrorClass.ABANDONED or timing.phase is Phase.AFTER:
            return
        self._done += 1
        if timing.phase is Phase.MEASURED:
            self._measured_left -= 1
            self._failed += timing.failed
            self._hopeless = self._failed > self._run.rule.error_limit * self._run.rule.requests
            if self._hopeless or self._measured_left == 0:
                self._over.set()
        if self._progress is not None:
            self._progress(self._done, self._to_do)

    def _beat(self, due_ns: int) -> None:
        """Note how late the loop calls back, once the first measured request has been sent; come again."""
        now_ns = time.monotonic_ns()
        if self._next_index > self._run.warm_up_requests:
            self._loop_lag_ns.append(now_ns - due_ns)
        if not self._over.is_set():
            next_ns = now_ns + round(HEARTBEAT_S * 1e9)
            asyncio.get_running_loop().call_at(next_ns / 1e9, self._beat, next_ns)

    def _spawn(self, coroutine: Coroutine[None, None, object]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[object]) -> None:
        """Forget a task that ended well; one that raised ends the run, which then raises for it."""
        if task.cancelled() or task.exception() is not None:
            self._over.set()
        else:
            self._tasks.discard(task)


def _shortfall(planned: PlannedRequest, answer: Answer) -> str | None:
    """What is missing of an answer that ended well, None where nothing is or the server gives no count."""
    counted = answer.completion_tokens
    if answer.error is not None or counted is None or counted >= planned.output_tokens:
        return None
    return (
        f"{counted} of {planned.output_tokens} tokens came; the engine must heed ignore_eos, and its context must hold "
        f"{len(planned.prompt)} + {planned.output_tokens} tokens"
    )
