"""Steps of an emulated engine in real time: each begins and ends at its absolute time, however late the loop is.

A step lasts what the table of step times says, times a log-normal factor whose mean is one. With pipeline stages as
many steps are under way, and a new one begins when the first stage is free. Ranks in lockstep begin together and take
as long as the slowest of them.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.engines.emulated_scheduler import Scheduler, Step
from cluster.engines.emulated_scheduler import Sequence as Request
from search_spaces.emulation import Noise, StepTimes


class StepNoise:
    """Factors on the times of steps, from a seed: one bias of the launch, and one factor of each step."""

    def __init__(self, noise: Noise, seed: str) -> None:
        self._sigma = noise.step
        self._rng = random.Random(seed)  # noqa: S311  noise, no secret
        self.bias = self._factor(noise.launch)

    def __call__(self) -> float:
        """The factor of the next step."""
        return self.bias * self._factor(self._sigma)

    def _factor(self, sigma: float) -> float:
        return math.exp(self._rng.gauss(0.0, sigma) - sigma * sigma / 2.0) if sigma else 1.0


@dataclass
class Counters:
    """What the steps of an engine added up to. `late_ms` is how late the loop called back, in sum and at most."""

    steps: int = 0
    busy_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    late_ms: float = 0.0
    latest_ms: float = 0.0


class StepClock:
    """Runs the steps of `ranks`, which are in lockstep with each other.

    `told` is called with the sequences that have a new token, in the moment when the step ends. `hung` stops time.
    """

    def __init__(
        self,
        ranks: Sequence[Scheduler],
        times: StepTimes,
        noise: StepNoise,
        *,
        stages: int,
        told: Callable[[Sequence[Request]], None],
    ) -> None:
        self.ranks = tuple(ranks)
        self.counters = Counters()
        self.hung = False
        self._times, self._noise, self._stages, self._told = times, noise, stages, told
        self._under_way = 0
        self._free_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """Something has changed: begin a step if one can begin."""
        self._begin(asyncio.get_running_loop().time())

    def _begin(self, now_s: float) -> None:
        """Begin the next step at `now_s`, or when the first stage is free."""
        if self._under_way >= self._stages or self.hung:
            return
        loop = asyncio.get_running_loop()
        if self._free_at_s > now_s:
            if self._timer is None:
                self._timer = loop.call_at(self._free_at_s, self._stage_is_free, self._free_at_s)
            return
        steps = [(rank, step) for rank in self.ranks if (step := rank.schedule()) is not None]
        if not steps:
            return
        duration_s = self._duration_s([step for _, step in steps])
        self._under_way += 1
        self._free_at_s = now_s + duration_s / self._stages
        self.counters.steps += 1
        self.counters.busy_s += duration_s / self._stages
        loop.call_at(now_s + duration_s, self._end, steps, now_s + duration_s)
        if self._under_way < self._stages:
            self._begin(now_s)

    def _stage_is_free(self, due_s: float) -> None:
        self._timer = None
        self._begin(due_s)

    def _duration_s(self, steps: Sequence[Step]) -> float:
        slowest = max(self._times.step_ms(step.prompts, len(step.decoding), step.context) for step in steps)
        return slowest * self._noise() / 1e3

    def _end(self, steps: Sequence[tuple[Scheduler, Step]], due_s: float) -> None:
        """Tell the new tokens of a step that was due at `due_s`; the next begins at that very time."""
        if self.hung:
            return
        late_ms = 1e3 * (asyncio.get_running_loop().time() - due_s)
        counters = self.counters
        counters.late_ms += late_ms
        counters.latest_ms = max(counters.latest_ms, late_ms)
        self._under_way -= 1
        told: list[Request] = []
        for rank, step in steps:
            told += rank.finish(step)
            counters.prompt_tokens += sum(chunk.tokens for chunk in step.prompts)
        counters.output_tokens += len(told)
        self._told(told)
        self._begin(due_s)


class Link:
    """A link that carries one KV cache after another."""

    def __init__(self) -> None:
        self._free_at_s = 0.0

    async def carry(self, seconds: float) -> None:
        """Return when what takes `seconds` has gone over the link."""
        now_s = asyncio.get_running_loop().time()
        self._free_at_s = max(now_s, self._free_at_s) + seconds
        await asyncio.sleep(self._free_at_s - now_s)
