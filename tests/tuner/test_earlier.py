"""What a study learns from earlier ones in its storage."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from search_spaces.outcome import Failure, FailureReason
from search_spaces.rules import infeasibility
from search_spaces.serving import Mode
from studies.history import StudyHistory
from studies.records import Origin, TrialRecord, TrialStatus
from studies.storage import open_storage
from tests.studies.toy import toy_problem, wide_space
from tests.tuner.test_session import Bench
from tuner.earlier import MOST_SEEDS, Lesson, _in_terms_of, _moved, _relation, seeds
from tuner.places import Place
from tuner.report import show_json

METRIC = "ttft_p50_ms"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(place=Place(url=f"sqlite:///{tmp_path}/studies.db", directory=tmp_path))


def first_miss(bench: Bench, name: str) -> float:
    """|log(measured / predicted)| of the first trial of a study."""
    first = StudyHistory(open_storage(bench.place.url), name).trials()[0]
    assert first.prediction is not None
    assert first.measurement is not None
    return abs(math.log(first.measurement.metrics.flat()[METRIC] / first.prediction.metrics[METRIC]))


def notes(bench: Bench) -> list[str]:
    return [note for note in bench.observer.notes if note.startswith("the model is corrected by earlier studies")]


def test_a_related_study_begins_with_what_the_last_one_learnt_and_says_so(bench: Bench) -> None:
    bench.run()
    assert notes(bench) == [], "there was no earlier one"
    bench.run("name=second", "workload.osl=24")
    (note,) = notes(bench)
    assert note.endswith("toy (6 measurements, model tiny too)")
    assert first_miss(bench, "second") < 0.5 * first_miss(bench, "toy")


@pytest.mark.long
def test_a_study_may_refuse_to_learn_from_others(bench: Bench) -> None:
    bench.run()
    bench.run("name=second", "earlier_studies=none")
    assert notes(bench) == []
    assert first_miss(bench, "second") == pytest.approx(first_miss(bench, "toy"))


@pytest.mark.long
def test_a_resume_learns_from_no_study_that_began_later(bench: Bench) -> None:
    bench.run()
    bench.run("name=second")
    bench.observer.notes.clear()
    bench.run("budget.trials=7")
    assert notes(bench) == []
    bench.run("name=second", "budget.trials=7")
    assert len(notes(bench)) == 1
    assert "toy (7 measurements" in notes(bench)[0]


def seeded(bench: Bench) -> list[str]:
    return [note for note in bench.observer.notes if note.startswith("the fronts of earlier studies are looked at")]


@pytest.mark.long
def test_the_front_of_a_related_study_is_looked_at_and_passes_the_screen(bench: Bench) -> None:
    first = bench.run("budget.trials=10").report
    assert seeded(bench) == []
    second = bench.run("name=second", "workload.osl=24", "budget.trials=16").report
    (note,) = seeded(bench)
    fronts = {trial.key for trial in first.front}
    defaults = {trial.key for trial in second.trials if trial.origin is Origin.DEFAULT}
    assert note.endswith(f"toy ({min(MOST_SEEDS, len(fronts - defaults))} candidates)")
    assert {trial.key for trial in second.trials if trial.origin is Origin.SEED} <= fronts - defaults
    assert second.earlier == ("toy (11 measurements, model tiny too)",), "10 candidates and a control"
    assert show_json(second)["earlier_studies"] == list(second.earlier)


@pytest.mark.long
def test_a_study_that_refuses_others_has_no_seeds_of_theirs(bench: Bench) -> None:
    bench.run("budget.trials=10")
    report = bench.run("name=second", "budget.trials=16", "earlier_studies=none").report
    assert seeded(bench) == []
    assert not any(trial.origin is Origin.SEED for trial in report.trials)


def test_seeds_are_what_the_new_space_has_and_can_run() -> None:
    space = wide_space(toy_problem())
    start = space.default(Mode.AGGREGATED)
    members = (start, *space.neighbours(start))
    lesson = Lesson(study="s", relation="r", observations=(), front=members, node_types={"gone": "core"})
    chosen = seeds([lesson], space)["s"]
    assert len(chosen) == MOST_SEEDS
    assert len({candidate.key for candidate in chosen}) == MOST_SEEDS
    assert start not in chosen, "defaults are measured anyway"
    assert all(infeasibility(candidate, space.problem) is None for candidate in chosen)
    elsewhere = replace(space, modes=(Mode.DISAGGREGATED,))
    assert seeds([lesson], elsewhere) == {}


def test_studies_are_related_by_model_or_by_nodes() -> None:
    ours = toy_problem()
    (pool,) = ours.node_pools
    other_model = replace(ours, model=replace(ours.model, name="other"))
    other_nodes = (replace(pool, device=replace(pool.device, name="other core")),)
    assert _relation(ours, ours) == "model toy too"
    assert _relation(other_model, ours) == "nodes with core too"
    assert _relation(replace(other_model, node_pools=other_nodes), ours) is None


def test_trials_of_the_same_model_and_kind_of_node_are_handed_over_in_terms_of_this_study() -> None:
    ours = toy_problem()
    (pool,) = ours.node_pools
    candidate = wide_space(ours).default(Mode.AGGREGATED)
    there = replace(candidate, config=_moved(candidate.config, {pool.name: "elsewhere"}))
    assert there.key != candidate.key
    failed = TrialRecord(
        number=0,
        status=TrialStatus.FAILED,
        candidate=there,
        key=there.key,
        origin=Origin.DEFAULT,
        prediction=None,
        outcome=Failure(reason=FailureReason.STARTUP_TIMEOUT, detail="it hung"),
        values=None,
    )
    (told,) = _in_terms_of(ours, [failed], {"elsewhere": pool.device.name})
    assert told.candidate == candidate
    assert _in_terms_of(ours, [failed], {"elsewhere": "another device"}) == ()
    assert _in_terms_of(ours, [replace(failed, status=TrialStatus.LOST)], {"elsewhere": pool.device.name}) == ()
