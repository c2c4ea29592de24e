"""The loop of a study: what is asked in which order, what the screen is worth, what is refused."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.storages import InMemoryStorage

from search_spaces.errors import TunerError
from search_spaces.metrics import Percentiles
from search_spaces.outcome import Failure, FailureReason, Prediction
from search_spaces.serving import Candidate, Mode
from studies.errors import StudyBusyError, StudyExistsError, StudyHalfMadeError, StudyNotFoundError
from studies.history import StudyHistory
from studies.pareto import hypervolume, points_of
from studies.records import Origin, Proposal, TrialRecord, TrialStatus
from studies.samplers import SamplerKind, population_size, suggestions
from studies.screen import Predict
from studies.storage import Storage, open_storage
from studies.study import Study, create_study, open_study
from tests.studies.toy import biased_model, measure, small_space, surface, toy_problem, toy_setup, wide_space

SPACE = wide_space(toy_problem())


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(f"journal://{tmp_path}/s.journal")


def tell(study: Study, proposal: Proposal) -> TrialRecord:
    return study.tell(proposal, measure(proposal.candidate))


def test_the_default_of_every_mode_is_measured_first(tmp_path: Path, storage: Storage) -> None:
    user_seed = SPACE.neighbours(SPACE.default())[-1]
    setup = toy_setup(tmp_path, space=SPACE, predict=biased_model(), seeds=(user_seed, SPACE.default()))
    study = create_study(storage, setup)
    first, second, third, fourth = (tell(study, study.ask()) for _ in range(4))
    assert first.candidate == SPACE.default(Mode.AGGREGATED)
    assert second.candidate == SPACE.default(Mode.DISAGGREGATED)
    assert third.candidate == user_seed
    assert [trial.origin for trial in (first, second, third)] == [Origin.DEFAULT, Origin.DEFAULT, Origin.SEED]
    assert fourth.origin is Origin.SCREENED
    study.close()
    assert len(open_study(storage, setup).trials()) == 4, "nothing is queued twice on resume"


def test_several_trials_in_flight_are_all_different(tmp_path: Path, storage: Storage) -> None:
    study = create_study(storage, toy_setup(tmp_path, space=SPACE, predict=biased_model(), in_flight=2))
    flying = [study.ask() for _ in range(4)]
    keys = {proposal.candidate.key for proposal in flying}
    for _ in range(36):
        tell(study, flying.pop(0))
        flying.append(study.ask(warm=(flying[0].candidate.config,)))
        keys.add(flying[-1].candidate.key)
    assert len(keys) == 40
    assert {Origin.SCREENED, Origin.UNSCREENED} <= {trial.origin for trial in study.trials()}


@pytest.mark.long
@pytest.mark.slow
def test_the_screen_finds_more_hypervolume_than_nsga2_alone(tmp_path: Path) -> None:
    """With a model that is wrong by 30%, 20 trials each: its worst of 3 seeds beats the best without it."""
    reference, axes = np.array([0.0, 40.0]), [objective.direction for objective in SPACE.problem.objectives]

    def found(seed: int, predict: Predict | None) -> float:
        backend = InMemoryStorage()
        memory = Storage(url="memory", dashboard_url="sqlite://", backend=backend, direct=backend)
        setup = toy_setup(tmp_path / f"{seed}", space=SPACE, predict=predict, seed=seed, budget_trials=20)
        study = create_study(memory, setup)
        for _ in range(20):
            tell(study, study.ask())
        return hypervolume(points_of(study.front()), reference, axes)

    assert min(found(seed, biased_model(1.3)) for seed in range(3)) > max(found(seed, None) for seed in range(3))


@pytest.mark.long
def test_thinking_ahead_changes_no_answer_and_leaves_little_to_predict(tmp_path: Path) -> None:
    """In the first generation and beyond, with a trial that is told between the thought and the ask."""
    plain, predicted = _proposed(tmp_path / "plain", thinks=False)
    ahead, left = _proposed(tmp_path / "ahead", thinks=True)
    assert ahead == plain
    assert left < predicted / 3


def _proposed(folder: Path, *, thinks: bool) -> tuple[list[str | None], float]:
    """Keys of 16 trials, and how many candidates every second ask has predicted that no thought had, the median."""
    asked: list[Candidate] = []

    def counting(candidates: Sequence[Candidate]) -> list[Prediction]:
        asked.extend(candidates)
        return biased_model()(candidates)

    left = []
    setup = toy_setup(folder, space=SPACE, predict=counting, budget_trials=16)
    with create_study(open_storage(f"sqlite:///{folder}/s.db"), setup) as study:
        for _ in range(8):
            first = study.ask()
            asked.clear()
            for _ in study.think_ahead() if thinks else ():
                pass
            thought = set(asked)
            tell(study, first)
            asked.clear()
            second = study.ask()
            left.append(len(set(asked) - thought))
            tell(study, second)
        return [trial.key for trial in study.trials()], statistics.median(left)


@pytest.mark.parametrize("sampler", [SamplerKind.TPE, SamplerKind.RANDOM])
@pytest.mark.parametrize("predict", [None, biased_model()])
def test_other_samplers_pass_the_same_screen(
    tmp_path: Path, storage: Storage, sampler: SamplerKind, predict: Predict | None
) -> None:
    study = create_study(storage, toy_setup(tmp_path, space=SPACE, predict=predict, sampler=sampler, budget_trials=16))
    trials = [tell(study, study.ask()) for _ in range(16)]
    assert len({trial.key for trial in trials}) == 16
    origins = {trial.origin for trial in trials[2:]}
    assert origins == ({Origin.SCREENED, Origin.UNSCREENED} if predict else {Origin.UNSCREENED})


def test_the_gp_sampler_says_what_it_needs(tmp_path: Path) -> None:
    if find_spec("torch") is not None:
        assert toy_setup(tmp_path, sampler=SamplerKind.GP).sampler is SamplerKind.GP
        return
    with pytest.raises(TunerError, match="needs the package torch; install it with: pip install torch"):
        toy_setup(tmp_path, sampler=SamplerKind.GP)


def test_tpe_learns_from_what_was_told(tmp_path: Path, storage: Storage) -> None:
    """After 25 trials its suggestions are better on average than at the start, where they are random."""
    study = create_study(storage, toy_setup(tmp_path, space=SPACE, sampler=SamplerKind.TPE, budget_trials=25))

    def mean_rate() -> float:
        found = [c for seed in range(4) for c in suggestions(SamplerKind.TPE, study._generations.study, SPACE, seed)]
        return statistics.mean(surface(candidate)[0] - 5 * surface(candidate)[1] for candidate in found)

    at_first = mean_rate()
    for _ in range(25):
        tell(study, study.ask())
    assert mean_rate() > at_first
    assert len(study.trials()) == 25, "suggestions leave no trial behind"


def test_population_grows_with_budget_and_with_trials_in_flight() -> None:
    assert [population_size(budget, 1) for budget in (1, 12, 40, 100, 1000)] == [6, 6, 10, 25, 50]
    assert population_size(40, 8) == 48


def test_late_trials_of_a_generation_still_breed(tmp_path: Path, storage: Storage) -> None:
    """Optuna fixes a generation's parents at its first ask; the best trial, told later, must become a parent too."""
    study = create_study(storage, toy_setup(tmp_path, space=SPACE))
    late = study.ask()
    for _ in range(study.history.population):
        tell(study, study.ask())
    tell(study, study.ask())
    told = tell(study, late)
    generations = study._generations
    parents = generations.sampler.get_parent_population(generations.study, 1)
    assert told.values not in [tuple(trial.values) for trial in parents]
    pool = [tuple(trial.values) for trial in study._breeding._with_latest(generations.study, parents)]
    assert told.values in pool or told not in study.front()
    assert {trial.values for trial in study.front()} <= set(pool)


def test_a_measurement_without_a_finite_objective_is_a_failure_that_says_so(tmp_path: Path, storage: Storage) -> None:
    study = create_study(storage, toy_setup(tmp_path))
    proposal = study.ask()
    good = measure(proposal.candidate)
    nothing = Percentiles(mean=float("nan"), p50=float("nan"), p90=1.0, p95=1.0, p99=1.0)
    record = study.tell(proposal, replace(good, metrics=replace(good.metrics, ttft_ms=nothing)))
    assert record.status is TrialStatus.FAILED
    assert record.failure is not None
    assert record.failure.reason is FailureReason.REQUESTS_FAILED
    assert "no finite value of ttft_p50_ms=nan" in record.failure.detail


def test_artefacts_that_are_gone_are_noted(tmp_path: Path, storage: Storage) -> None:
    study = create_study(storage, toy_setup(tmp_path))
    lost = Failure(reason=FailureReason.ENGINE_CRASH, detail="exit 139", artifacts={"log": str(tmp_path / "gone.log")})
    assert study.tell(study.ask(), lost).artifact_ids == {"log": "missing"}


def test_what_other_programs_queue_is_measured_as_a_seed_but_never_twice(tmp_path: Path, storage: Storage) -> None:
    space = small_space(toy_problem())
    study = create_study(storage, toy_setup(tmp_path, space=space))
    default = tell(study, study.ask())
    wanted = space.neighbours(space.default())[0]
    foreign = optuna.load_study(study_name="toy", storage=storage.backend)
    foreign.enqueue_trial(dict(space.encode(space.default())))
    foreign.enqueue_trial(dict(space.encode(wanted)))
    proposal = study.ask()
    assert (proposal.candidate, proposal.origin) == (wanted, Origin.SEED)
    assert [trial.key for trial in study.trials()].count(default.key) == 1


def test_names_are_taken_once_and_must_exist(tmp_path: Path, storage: Storage) -> None:
    create_study(storage, toy_setup(tmp_path)).close()
    with pytest.raises(StudyExistsError, match="resume it"):
        create_study(storage, toy_setup(tmp_path))
    with pytest.raises(StudyNotFoundError, match="it has: toy"):
        open_study(storage, toy_setup(tmp_path, name="other"))


def test_a_study_whose_maker_died_before_it_was_whole_is_made_again(tmp_path: Path, storage: Storage) -> None:
    for name, directions in (("toy", ["maximize", "minimize"]), ("theirs", ["minimize"])):
        optuna.create_study(study_name=name, storage=storage.backend, directions=directions)
        with pytest.raises(StudyHalfMadeError, match="it is being made, or another program's"):
            StudyHistory(storage, name)
    study = create_study(storage, toy_setup(tmp_path))
    assert study.ask().origin is Origin.DEFAULT
    study.close()
    with pytest.raises(StudyExistsError, match="choose another name"):
        create_study(storage, toy_setup(tmp_path, name="theirs"))


def test_a_second_live_coordinator_is_refused_and_a_dead_one_is_not(tmp_path: Path, storage: Storage) -> None:
    create_study(storage, toy_setup(tmp_path)).close()
    context = multiprocessing.get_context("fork")
    opened, finish = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, opened, finish))
    process.start()
    assert opened.wait(30)
    with pytest.raises(StudyBusyError, match=f"is run by process {process.pid} on host"):
        open_study(storage, toy_setup(tmp_path))
    process.kill()
    process.join(30)
    open_study(storage, toy_setup(tmp_path)).close()


def _hold(folder: Path, opened: Event, finish: Event) -> None:
    study = open_study(open_storage(f"journal://{folder}/s.journal"), toy_setup(folder))
    opened.set()
    finish.wait(60)
    study.close()
