"""The life of a deployment as a state machine: an event in, a new state and instructions out.

    PLACING -> STARTING -> [ROUTING] -> IDLE <-> MEASURING
       any of them -> STOPPING -> STOPPED

Pure: the time comes with each event. What carries out the instructions reports back by events; events that come late
(from a phase that is over) change nothing. Devices are reserved once, at the beginning, and freed once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from search_spaces.errors import require
from search_spaces.measuring import TimeLimits
from search_spaces.outcome import Failure, FailureReason, Outcome

START_GRACE_S = 5.0
"""Beyond `start_s`: time for a replica's own report, which holds its last log lines, to come in."""
MEASURE_GRACE_S = 10.0
"""Beyond `measure_s`: time for the load generator, which keeps the same limit, to sum up what it has."""


class Phase(StrEnum):
    """Where a deployment stands."""

    PLACING = "placing"
    STARTING = "starting"
    ROUTING = "routing"
    IDLE = "idle"
    MEASURING = "measuring"
    STOPPING = "stopping"
    STOPPED = "stopped"


_TIMED_AS = {Phase.PLACING: "placement", Phase.STARTING: "start", Phase.ROUTING: "start", Phase.STOPPING: "stop"}
BOOTING = frozenset({Phase.PLACING, Phase.STARTING, Phase.ROUTING})
"""Before everything serves."""
_ENDING = frozenset({Phase.STOPPING, Phase.STOPPED})


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The devices are reserved."""


@dataclass(frozen=True, kw_only=True)
class ReplicasReady:
    """Every replica serves."""


@dataclass(frozen=True, kw_only=True)
class RouterReady:
    """The router serves."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Trial `trial` is to be measured on the deployment."""

    trial: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """`outcome` of measuring `trial`; a Failure that comes so is not the deployment's fault, which stays up."""

    trial: str
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class Faulted:
    """Something of the deployment failed."""

    failure: Failure


@dataclass(frozen=True, kw_only=True)
class StopAsked:
    """The deployment is no longer wanted."""

    why: str


@dataclass(frozen=True, kw_only=True)
class ProcessesEnded:
    """All processes have ended."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time passes; limits are looked at."""


Event = (
    Placed | ReplicasReady | RouterReady | Asked | Measured | Faulted | StopAsked | ProcessesEnded | Tick
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """Reserve the devices."""


@dataclass(frozen=True, kw_only=True)
class StartReplicas:
    """Start the processes of all replicas; they must serve within `limit_s`."""

    limit_s: float


@dataclass(frozen=True, kw_only=True)
class StartRouter:
    """Start the router's process; it must serve within `limit_s`."""

    limit_s: float


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Put the load of `trial` on the deployment."""

    trial: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """`outcome` is what became of `trial`."""

    trial: str
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class Requeue:
    """`trial` was waiting for a deployment that broke under another load: it needs a new one."""

    trial: str


@dataclass(frozen=True, kw_only=True)
class StopProcesses:
    """End all processes, politely first, within `limit_s`."""

    limit_s: float


@dataclass(frozen=True, kw_only=True)
class Free:
    """Give the devices back, and end by force what still runs on them."""


Instruction = Reserve | StartReplicas | StartRouter | Measure | Report | Requeue | StopProcesses | Free


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """State of a deployment. `spent_s` are the seconds of its finished phases; `waiting` trials are measured in order.

    `booted_for` is the trial that made it start: the one whose timings hold placement and start.
    """

    limits: TimeLimits
    routed: bool
    booted_for: str
    since_s: float
    phase: Phase = Phase.PLACING
    start_began_s: float = 0.0
    measuring: str | None = None
    waiting: tuple[str, ...] = ()
    failure: Failure | None = None
    spent_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """True while another trial can be asked of it."""
        return self.phase not in _ENDING

    @property
    def warm(self) -> bool:
        """True while it is up and has nothing to do."""
        return self.phase is Phase.IDLE

    def enter(self, phase: Phase, now_s: float) -> Deployment:
        """The state at the beginning of `phase`, with the seconds of the last one booked."""
        label = _TIMED_AS.get(self.phase)
        spent = dict(self.spent_s)
        if label is not None:
            spent[label] = spent.get(label, 0.0) + now_s - self.since_s
        began = now_s if phase is Phase.STARTING else self.start_began_s
        return replace(self, phase=phase, since_s=now_s, start_began_s=began, spent_s=spent)


Step = tuple[Deployment, tuple[Instruction, ...]]


def begin(trial: str, *, limits: TimeLimits, routed: bool, now_s: float) -> Step:
    """A new deployment, wanted for `trial`."""
    state = Deployment(limits=limits, routed=routed, booted_for=trial, since_s=now_s, waiting=(trial,))
    return state, (Reserve(),)


def advance(state: Deployment, event: Event, now_s: float) -> Step:
    """The state after `event` at `now_s` (a monotonic clock), and what is to be done."""
    step: Step = (state, ())
    match event:
        case Placed() if state.phase is Phase.PLACING:
            step = state.enter(Phase.STARTING, now_s), (StartReplicas(limit_s=state.limits.start_s),)
        case ReplicasReady() if state.phase is Phase.STARTING:
            step = _replicas_ready(state, now_s)
        case RouterReady() if state.phase is Phase.ROUTING:
            step = _next_trial(state, now_s)
        case Asked(trial=trial):
            step = _asked(state, trial, now_s)
        case Measured(trial=trial, outcome=outcome) if state.phase is Phase.MEASURING and state.measuring == trial:
            after, instructions = _next_trial(replace(state, measuring=None), now_s)
            step = after, (Report(trial=trial, outcome=outcome), *instructions)
        case Faulted(failure=failure) if state.alive:
            step = _fail(state, failure, now_s)
        case StopAsked(why=why) if state.alive:
            step = _fail(state, Failure(reason=FailureReason.LOST_COORDINATOR, detail=why), now_s, for_all=True)
        case ProcessesEnded() if state.phase is Phase.STOPPING:
            step = _stopped(state, now_s)
        case Tick():
            step = _check_limits(state, now_s)
    return step


def _replicas_ready(state: Deployment, now_s: float) -> Step:
    if not state.routed:
        return _next_trial(state, now_s)
    left_s = max(0.0, state.limits.start_s - (now_s - state.start_began_s))
    return state.enter(Phase.ROUTING, now_s), (StartRouter(limit_s=left_s),)


def _next_trial(state: Deployment, now_s: float) -> Step:
    if not state.waiting:
        return state.enter(Phase.IDLE, now_s), ()
    trial, *rest = state.waiting
    measuring = replace(state.enter(Phase.MEASURING, now_s), measuring=trial, waiting=tuple(rest))
    return measuring, (Measure(trial=trial),)


def _asked(state: Deployment, trial: str, now_s: float) -> Step:
    if not state.alive:
        return state, (Requeue(trial=trial),)
    known = (*state.waiting, state.measuring)
    require(trial not in known, f"trial {trial!r} was asked of its deployment twice; give each trial its own name")
    waiting = replace(state, waiting=(*state.waiting, trial))
    return _next_trial(waiting, now_s) if state.warm else (waiting, ())


def _fail(state: Deployment, failure: Failure, now_s: float, *, for_all: bool = False) -> Step:
    """Begin to stop for `failure`. Who only waits while another load breaks the deployment gets another one."""
    blamed = for_all or state.phase in BOOTING
    told = state.waiting if blamed else ()
    requeued = () if blamed else state.waiting
    owners = (*((state.measuring,) if state.measuring is not None else ()), *told)
    reserved_only = state.phase is Phase.PLACING
    stopping = replace(state.enter(Phase.STOPPING, now_s), failure=failure, measuring=None, waiting=owners)
    instructions: tuple[Instruction, ...] = tuple(Requeue(trial=trial) for trial in requeued)
    if reserved_only:
        stopped, last = _stopped(stopping, now_s)
        return stopped, (*instructions, *last)
    return stopping, (*instructions, StopProcesses(limit_s=state.limits.stop_s))


def _stopped(state: Deployment, now_s: float) -> Step:
    """Free the devices, then tell the trials (still in `waiting`) what became of them."""
    stopped = replace(state.enter(Phase.STOPPED, now_s), waiting=())
    failure = state.failure
    reports = () if failure is None else tuple(Report(trial=trial, outcome=failure) for trial in state.waiting)
    return stopped, (Free(), *reports)


def _check_limits(state: Deployment, now_s: float) -> Step:
    limits, elapsed_s = state.limits, now_s - state.since_s
    if state.phase is Phase.STOPPING and elapsed_s > limits.stop_s + START_GRACE_S:
        return _stopped(state, now_s)
    if state.phase is Phase.PLACING and elapsed_s > limits.placement_s:
        detail = (
            f"the devices were not free within placement_s={limits.placement_s:g} s; wait for what else runs on the "
            "cluster, or raise the limit"
        )
        return _fail(state, Failure(reason=FailureReason.PLACEMENT, detail=detail), now_s)
    booting = state.phase in {Phase.STARTING, Phase.ROUTING}
    if booting and now_s - state.start_began_s > limits.start_s + START_GRACE_S:
        detail = f"the deployment was not ready within start_s={limits.start_s:g} s; raise the limit"
        return _fail(state, Failure(reason=FailureReason.STARTUP_TIMEOUT, detail=detail), now_s)
    if state.phase is Phase.MEASURING and elapsed_s > limits.measure_s + MEASURE_GRACE_S:
        detail = f"the load generator did not answer within measure_s={limits.measure_s:g} s; raise the limit"
        return _fail(state, Failure(reason=FailureReason.MEASUREMENT_TIMEOUT, detail=detail), now_s)
    return state, ()
