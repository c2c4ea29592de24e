from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster import deployment as life
from cluster.deployment import Phase, advance, begin
from search_spaces.measuring import TimeLimits
from search_spaces.outcome import Failure, FailureReason

LIMITS = TimeLimits(placement_s=10, start_s=20, measure_s=30, stop_s=5)
CRASH = Failure(reason=FailureReason.ENGINE_CRASH, detail="it died")
LATE = Failure(reason=FailureReason.LATE_CLIENT, detail="it was late")


class Play:
    """A deployment that is fed events at growing times; keeps what it was told to do."""

    def __init__(self, *, routed: bool = False) -> None:
        self.now_s = 0.0
        self.state, first = begin("t0", limits=LIMITS, routed=routed, now_s=0.0)
        self.told: list[life.Instruction] = list(first)

    def feed(self, event: life.Event, after_s: float = 1.0) -> tuple[life.Instruction, ...]:
        self.now_s += after_s
        self.state, told = advance(self.state, event, self.now_s)
        self.told += told
        return told

    def until_idle(self) -> Play:
        for event in (life.Placed(), life.ReplicasReady(), life.RouterReady(), life.Measured(trial="t0", outcome=LATE)):
            self.feed(event)
        assert self.state.warm
        return self


def trials() -> st.SearchStrategy[str]:
    return st.sampled_from([f"t{i}" for i in range(4)])


def events() -> st.SearchStrategy[life.Event | str]:
    return st.one_of(
        st.sampled_from([life.Placed(), life.ReplicasReady(), life.RouterReady(), life.ProcessesEnded(), life.Tick()]),
        st.builds(life.Measured, trial=trials(), outcome=st.just(LATE)),
        st.just(life.Faulted(failure=CRASH)),
        st.just(life.StopAsked(why="the test wants it")),
        st.just("ask"),
    )


@given(st.booleans(), st.lists(st.tuples(events(), st.floats(0, 40)), max_size=40))
def test_under_any_events_devices_are_freed_once_and_nothing_is_measured_before_ready(
    routed: bool, moves: list[tuple[life.Event | str, float]]
) -> None:
    play = Play(routed=routed)
    asked, ready = ["t0"], False
    for move, after_s in moves:
        event = life.Asked(trial=f"t{len(asked)}") if isinstance(move, str) else move
        if isinstance(event, life.Asked):
            asked.append(event.trial)
        before = play.state.phase
        told = play.feed(event, after_s)
        ready = ready or (isinstance(event, life.RouterReady) and before is Phase.ROUTING)
        ready = ready or (isinstance(event, life.ReplicasReady) and before is Phase.STARTING and not routed)
        assert ready or not any(isinstance(i, life.Measure) for i in told)
    play.feed(life.StopAsked(why="the end"))
    play.feed(life.Tick(), 100.0)
    assert play.state.phase is Phase.STOPPED
    assert [type(i) for i in play.told].count(life.Reserve) == 1
    assert [type(i) for i in play.told].count(life.Free) == 1
    ends = [i.trial for i in play.told if isinstance(i, life.Report | life.Requeue)]
    assert sorted(ends) == sorted(asked), "each trial is told an outcome, or sent to another deployment, exactly once"
    after_free = play.told[[type(i) for i in play.told].index(life.Free) + 1 :]
    assert all(isinstance(i, life.Report | life.Requeue) for i in after_free)


@given(st.lists(events().filter(lambda e: e != "ask"), max_size=30))
def test_one_load_at_a_time(moves: list[life.Event | str]) -> None:
    play, running = Play(), 0
    for event in (life.Asked(trial="t1"), life.Asked(trial="t2"), *moves):
        assert not isinstance(event, str)
        measuring = play.state.measuring
        told = play.feed(event)
        if measuring is not None and play.state.measuring != measuring:
            running -= 1
        running += sum(isinstance(i, life.Measure) for i in told)
        assert running in {0, 1}


def test_a_router_starts_after_the_replicas_with_what_is_left_of_the_limit() -> None:
    play = Play(routed=True)
    assert play.feed(life.Placed()) == (life.StartReplicas(limit_s=20),)
    assert play.feed(life.ReplicasReady(), 8.0) == (life.StartRouter(limit_s=12.0),)
    assert play.feed(life.RouterReady()) == (life.Measure(trial="t0"),)
    assert play.state.spent_s == {"placement": 1.0, "start": 9.0}


def test_a_warm_deployment_measures_the_next_trial_without_a_start() -> None:
    play = Play().until_idle()
    assert play.feed(life.Asked(trial="t1")) == (life.Measure(trial="t1"),)


def test_trials_wait_their_turn() -> None:
    play = Play()
    play.feed(life.Asked(trial="t1"))
    play.feed(life.Placed())
    play.feed(life.ReplicasReady())
    assert play.feed(life.Measured(trial="t0", outcome=LATE)) == (
        life.Report(trial="t0", outcome=LATE),
        life.Measure(trial="t1"),
    )


def test_a_failure_is_told_after_the_devices_are_free() -> None:
    play = Play()
    play.feed(life.Placed())
    assert play.feed(life.Faulted(failure=CRASH)) == (life.StopProcesses(limit_s=5),)
    assert play.feed(life.ProcessesEnded(), 2.0) == (life.Free(), life.Report(trial="t0", outcome=CRASH))
    assert play.state.spent_s["stop"] == 2.0


def test_a_crash_under_one_load_sends_the_trials_that_wait_elsewhere() -> None:
    play = Play().until_idle()
    play.feed(life.Asked(trial="t1"))
    play.feed(life.Asked(trial="t2"))
    assert life.Requeue(trial="t2") in play.feed(life.Faulted(failure=CRASH))
    assert play.feed(life.ProcessesEnded()) == (life.Free(), life.Report(trial="t1", outcome=CRASH))


def test_a_crash_at_boot_is_the_outcome_of_all_that_wait() -> None:
    play = Play()
    play.feed(life.Asked(trial="t1"))
    play.feed(life.Placed())
    play.feed(life.Faulted(failure=CRASH))
    told = play.feed(life.ProcessesEnded())
    assert told == (life.Free(), *(life.Report(trial=t, outcome=CRASH) for t in ("t0", "t1")))


def test_an_idle_deployment_that_crashes_is_freed() -> None:
    play = Play().until_idle()
    play.feed(life.Faulted(failure=CRASH))
    assert play.feed(life.ProcessesEnded()) == (life.Free(),)
    assert play.feed(life.Asked(trial="t1")) == (life.Requeue(trial="t1"),)


def test_each_phase_has_its_limit_and_its_failure() -> None:
    assert _reason_after([], 10.5) is FailureReason.PLACEMENT
    assert _reason_after([life.Placed()], 25.5) is FailureReason.STARTUP_TIMEOUT
    assert _reason_after([life.Placed(), life.ReplicasReady()], 40.5) is FailureReason.MEASUREMENT_TIMEOUT


def _reason_after(events_before: list[life.Event], wait_s: float) -> FailureReason:
    play = Play()
    for event in events_before:
        play.feed(event, 0.0)
    play.feed(life.Tick(), wait_s - 1.0)
    assert play.state.alive
    play.feed(life.Tick(), 1.0)
    assert play.state.failure is not None
    return play.state.failure.reason


def test_processes_that_do_not_end_cannot_keep_the_devices() -> None:
    play = Play()
    play.feed(life.Placed())
    play.feed(life.StopAsked(why="enough"))
    assert play.feed(life.Tick(), 9.0) == ()
    assert life.Free() in play.feed(life.Tick(), 2.0)
    assert play.feed(life.ProcessesEnded()) == ()
