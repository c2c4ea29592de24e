"""Several runs of one candidate: their means, when another one is due, and what a search sees of them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.errors import InvalidValueError
from search_spaces.metrics import Direction
from search_spaces.outcome import Failure, FailureReason, Measurement
from search_spaces.serving import Candidate
from studies.constraints import HELD
from studies.pareto import front, hypervolume_history, study_reference
from studies.records import Origin, Plan, TrialRecord, TrialStatus
from studies.repeats import (
    RepeatRule,
    candidates_of,
    confirmation_s,
    control_of,
    due_confirmation,
    due_control,
    lacking_runs,
    runs_by_key,
)
from studies.stopping import progress_of
from tests.studies.toy import measure, small_space, toy_problem

UP, DOWN = Direction.MAXIMIZE, Direction.MINIMIZE
AXES = [UP, DOWN]
START = datetime(2026, 1, 1, tzinfo=UTC)
SPACE = small_space(toy_problem())
CANDIDATES = list(dict.fromkeys([SPACE.default(), *SPACE.neighbours(SPACE.default())]))


def scaled(measurement: Measurement, factor: float) -> Measurement:
    """`measurement` with all throughputs `factor` as large."""
    metrics = measurement.metrics
    return replace(measurement, metrics=replace(metrics, output_tokens_per_s=factor * metrics.output_tokens_per_s))


def run(
    number: int,
    candidate: Candidate,
    *,
    factor: float = 1.0,
    repeat_of: int | None = None,
    origin: Origin = Origin.SCREENED,
    status: TrialStatus = TrialStatus.MEASURED,
    **fields: object,
) -> TrialRecord:
    """A run of `candidate` on the toy surface, its throughput off by `factor`; a repeat is a control unless told."""
    outcome = scaled(measure(candidate), factor)
    flat = outcome.metrics.flat()
    measured = status is TrialStatus.MEASURED
    if repeat_of is not None and origin is Origin.SCREENED:
        origin = Origin.CONTROL
    record = TrialRecord(
        number=number,
        status=status,
        candidate=candidate,
        key=candidate.key,
        origin=origin,
        prediction=None,
        outcome=outcome if measured else None,
        values=(flat["output_tokens_per_s"], flat["ttft_p50_ms"]) if measured else None,
        violations={HELD: 0.0, "slo": factor - 2.0} if measured else {HELD: 1.0},
        repeat_of=repeat_of,
        ended_at=START + timedelta(minutes=number),
    )
    return replace(record, **fields)  # type: ignore[arg-type]  # any field may be overridden


def test_a_candidate_has_the_means_of_its_runs() -> None:
    first = run(0, CANDIDATES[0])
    trials = [
        first,
        run(1, CANDIDATES[1]),
        run(2, CANDIDATES[0], factor=1.2, repeat_of=0),
        run(3, CANDIDATES[0], factor=1.1, repeat_of=0),
    ]
    found = runs_by_key(trials)[CANDIDATES[0].key]
    assert [trial.number for trial in found.measured] == [0, 2, 3]
    base = measure(CANDIDATES[0]).metrics.output_tokens_per_s
    metrics = found.record.measurement.metrics  # type: ignore[union-attr]  # it was measured
    assert metrics.output_tokens_per_s == pytest.approx(1.1 * base)
    assert metrics.requests == 3 * 64
    assert found.record.number == 0
    assert found.record.values == pytest.approx((1.1 * base, metrics.ttft_ms.p50))
    assert found.record.violations["slo"] == pytest.approx(-0.9)
    assert found.record.feasible
    assert [trial.number for trial in candidates_of(trials)] == [0, 1]
    assert candidates_of(trials)[1] is trials[1]


def test_without_repeats_nothing_changes() -> None:
    trials = [run(0, CANDIDATES[0]), run(1, CANDIDATES[1])]
    assert all(seen is trial for seen, trial in zip(candidates_of(trials), trials, strict=True))


def test_a_candidate_that_failed_once_did_not_hold() -> None:
    trials = [run(0, CANDIDATES[0]), run(1, CANDIDATES[0], repeat_of=0, status=TrialStatus.FAILED)]
    record = candidates_of(trials)[0]
    assert record.violations[HELD] == 0.5
    assert not record.feasible
    assert front(trials, AXES) == ()


def test_a_repeat_that_runs_or_was_lost_changes_nothing() -> None:
    trials = [
        run(0, CANDIDATES[0]),
        run(1, CANDIDATES[0], repeat_of=0, status=TrialStatus.RUNNING),
        run(2, CANDIDATES[0], repeat_of=0, status=TrialStatus.LOST),
    ]
    assert candidates_of(trials) == (trials[0],)


def test_the_front_is_that_of_the_means_and_may_shrink() -> None:
    """A lucky first run is on the front until its repeats say what it was."""
    ahead, lucky = CANDIDATES[:2]
    trials = [run(0, ahead, values=(10.0, 5.0)), run(1, lucky, values=(11.0, 6.0))]
    assert [t.number for t in front(trials, AXES)] == [1, 0]
    trials += [run(2, lucky, repeat_of=1, values=(6.0, 6.0))]
    assert [t.number for t in front(trials, AXES)] == [0]
    volumes = [point.hypervolume for point in hypervolume_history(trials, AXES)]
    assert volumes[2] < volumes[1]
    assert volumes[2] == pytest.approx(
        hypervolume_history(trials[:1], AXES, study_reference(trials, AXES))[0].hypervolume
    )


def test_controls_come_after_every_so_many_candidates() -> None:
    rule = RepeatRule(control_every=2)
    trials: list[TrialRecord] = []
    due: list[int] = []
    for number, candidate in enumerate(CANDIDATES[:5]):
        origin = Origin.DEFAULT if number == 0 else Origin.SCREENED
        trials.append(run(len(trials), candidate, origin=origin))
        control = due_control(trials, rule)
        if control is not None:
            due.append(number)
            trials.append(run(len(trials), candidate, repeat_of=control.number, status=TrialStatus.RUNNING))
            assert due_control(trials, rule) is None, "one is being made"
    assert due == [1, 3]
    assert due_control(trials, RepeatRule(control_every=0)) is None


def test_the_control_is_the_first_default_that_could_be_measured() -> None:
    failed = run(0, CANDIDATES[0], origin=Origin.DEFAULT, status=TrialStatus.FAILED)
    second = run(1, CANDIDATES[1], origin=Origin.DEFAULT)
    assert control_of([failed]) is None
    assert control_of([failed, second]) == second
    assert due_control([failed, failed], RepeatRule(control_every=1)) is None


def test_a_control_that_was_lost_is_repeated_by_its_retry_alone() -> None:
    rule = RepeatRule(control_every=1)
    first = run(0, CANDIDATES[0], origin=Origin.DEFAULT)
    lost = run(1, CANDIDATES[0], repeat_of=0, status=TrialStatus.LOST)
    retry = run(2, CANDIDATES[0], repeat_of=0, retry_of=1, status=TrialStatus.WAITING)
    assert due_control([first, lost, retry], rule) is None


def test_every_member_of_the_front_is_run_as_often_as_the_rule_says() -> None:
    rule = RepeatRule(confirm=3)
    trials = [run(n, candidate) for n, candidate in enumerate(CANDIDATES)]
    asked: list[int] = []
    while (due := due_confirmation(trials, front(trials, AXES), rule)) is not None:
        assert due.candidate is not None
        asked.append(due.number)
        trials.append(run(len(trials), due.candidate, repeat_of=due.number, origin=Origin.CONFIRM))
    members = [trial.number for trial in front(trials, AXES)]
    assert sorted(asked) == sorted([*members, *members])
    assert asked[0::2] == asked[1::2], "runs of one deployment follow each other"
    assert set(lacking_runs(trials, front(trials, AXES), rule).values()) == {0}


def test_confirmations_begin_with_what_is_up() -> None:
    trials = [run(n, candidate) for n, candidate in enumerate(CANDIDATES)]
    members = front(trials, AXES)
    last = max(members, key=lambda t: t.candidate.config.key if t.candidate else "")
    assert last.candidate is not None
    due = due_confirmation(trials, members, RepeatRule(), warm=(last.candidate.config,))
    assert due is not None
    assert due.candidate is not None
    assert due.candidate.config == last.candidate.config
    assert due_confirmation(trials, members, RepeatRule(confirm=1)) is None


def test_a_confirmation_given_up_is_not_asked_for_ever() -> None:
    trials = [run(0, CANDIDATES[0])]
    trials += [run(n, CANDIDATES[0], repeat_of=0, origin=Origin.CONFIRM, status=TrialStatus.LOST) for n in (1, 2)]
    assert due_confirmation(trials, front(trials, AXES), RepeatRule(confirm=3)) is None


def test_repeats_count_as_no_candidates() -> None:
    trials = [
        run(0, CANDIDATES[0]),
        run(1, CANDIDATES[0], repeat_of=0),
        run(2, CANDIDATES[0], repeat_of=0, status=TrialStatus.RUNNING),
    ]
    progress = progress_of(trials)
    assert (progress.finished, progress.running, progress.repeats) == (1, 0, 1)


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.8, 1.25)), min_size=1, max_size=12))
def test_a_search_sees_every_candidate_once(drawn: list[tuple[int, float]]) -> None:
    trials: list[TrialRecord] = []
    firsts: dict[int, int] = {}
    for which, factor in drawn:
        number = len(trials)
        repeat_of = firsts.get(which)
        firsts.setdefault(which, number)
        trials.append(run(number, CANDIDATES[which], factor=factor, repeat_of=repeat_of))
    seen = candidates_of(trials)
    assert [t.key for t in seen] == [CANDIDATES[which].key for which in firsts]
    for trial in seen:
        values = [t.values[0] for t in trials if t.key == trial.key and t.values]
        assert trial.values is not None
        assert trial.values[0] == pytest.approx(sum(values) / len(values))


def test_impossible_rules_and_plans_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="control_every=-1"):
        RepeatRule(control_every=-1)
    with pytest.raises(InvalidValueError, match="confirm=0"):
        RepeatRule(confirm=0)
    with pytest.raises(InvalidValueError, match="names what it repeats"):
        Plan(candidate=CANDIDATES[0], key="k", origin=Origin.CONTROL)
    with pytest.raises(InvalidValueError, match="names what it repeats"):
        Plan(candidate=CANDIDATES[0], key="k", origin=Origin.SEED, repeat_of=1)


def test_the_failure_of_a_repeat_is_kept_apart_from_its_first_run() -> None:
    failure = Failure(reason=FailureReason.ENGINE_CRASH, detail="it died")
    trials = [
        run(0, CANDIDATES[0]),
        run(1, CANDIDATES[0], repeat_of=0, status=TrialStatus.FAILED, outcome=failure),
    ]
    found = runs_by_key(trials)[CANDIDATES[0].key]
    assert found.record.measurement == trials[0].measurement


def test_the_time_to_confirm_is_that_of_the_runs_and_starts_that_lack() -> None:
    """A candidate takes 2 s to start and 1 s to measure; two members on deployments of their own lack two runs each."""
    timings = {"start": 2.0, "warm_up": 0.0, "measure": 1.0}
    known = {c.config: c for c in CANDIDATES}
    trials = [
        run(number, candidate, outcome=replace(measure(candidate), timings_s=timings))
        for number, candidate in enumerate(list(known.values())[:2])
    ]
    rule = RepeatRule(confirm=3)
    assert confirmation_s(trials, trials, rule) == pytest.approx(3.0 + 4 * 1.0 + 2 * 2.0)
    assert confirmation_s(trials, trials, rule, at_once=2) == pytest.approx(3.0 + 4.0)
    assert confirmation_s(trials, trials, RepeatRule(confirm=1)) == 0.0
