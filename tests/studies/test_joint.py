"""Several candidates asked for at once: chosen jointly, no two alike, of one generation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from search_spaces.outcome import Prediction
from search_spaces.serving import Candidate
from studies.errors import SpaceExhausted
from studies.generations import GENERATION
from studies.records import Origin, Proposal
from studies.repeats import RepeatRule
from studies.samplers import SamplerKind
from studies.screen import UNSCREENED_EVERY
from studies.storage import Storage, open_storage
from studies.study import Study, create_study
from tests.studies.toy import biased_model, measure, small_space, toy_problem, toy_setup, wide_space

SPACE = wide_space(toy_problem())


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(f"sqlite:///{tmp_path}/s.db")


def measured(study: Study, count: int) -> None:
    """Ask for `count` candidates at once, and measure them."""
    for proposal in study.ask_batch(count):
        study.tell(proposal, measure(proposal.candidate))


@pytest.mark.parametrize("sampler", [SamplerKind.NSGA2, pytest.param(SamplerKind.TPE, marks=pytest.mark.long)])
def test_a_batch_is_of_different_candidates_and_one_in_ten_is_unscreened(
    tmp_path: Path, storage: Storage, sampler: SamplerKind
) -> None:
    setup = toy_setup(tmp_path, space=SPACE, predict=biased_model(), sampler=sampler, budget_trials=40, in_flight=8)
    with create_study(storage, setup) as study:
        for _ in range(5):
            measured(study, 8)
        trials = study.trials()
    assert len({trial.key for trial in trials}) == len(trials) == 40
    proposed = {trial.number: trial.origin for trial in trials if trial.origin is not Origin.DEFAULT}
    for number, origin in proposed.items():
        expected = Origin.UNSCREENED if number % UNSCREENED_EVERY == UNSCREENED_EVERY - 1 else Origin.SCREENED
        assert origin is expected, number


def test_a_batch_costs_one_pass_of_the_model(tmp_path: Path, storage: Storage) -> None:
    passes: list[int] = []

    def counting(candidates: Sequence[Candidate]) -> list[Prediction]:
        passes.append(len(candidates))
        return biased_model()(candidates)

    with create_study(storage, toy_setup(tmp_path, space=SPACE, predict=counting, budget_trials=40)) as study:
        measured(study, 2)
        passes.clear()
        first = study.ask_batch(1)
        single = len(passes)
        passes.clear()
        six = study.ask_batch(6)
    assert len(first) == 1
    assert len(six) == 6
    assert len(passes) == single


def test_a_batch_has_one_stated_gain_since_it_was_looked_at_once(tmp_path: Path, storage: Storage) -> None:
    with create_study(storage, toy_setup(tmp_path, space=SPACE, predict=biased_model())) as study:
        measured(study, 4)
        before = len(study.trials())
        study.ask_batch(4)
        gains = [trial.expected_gain for trial in study.trials()[before:]]
    assert gains[0] is not None
    assert gains[1:] == [None] * 3


def test_generations_are_those_that_optuna_counts(tmp_path: Path, storage: Storage) -> None:
    """The storage shows a batch's generation as if Optuna had asked one by one, full generations before the next."""
    setup = toy_setup(tmp_path, space=SPACE, predict=biased_model(), budget_trials=24, in_flight=2)
    with create_study(storage, setup) as study:
        population = study.history.population
        for _ in range(5):
            measured(study, 5)
    loaded = optuna.load_study(study_name="toy", storage=storage.backend).trials
    generations = [trial.system_attrs[GENERATION] for trial in loaded]
    assert generations == sorted(generations)
    assert all(generations.count(number) >= population for number in range(max(generations)))
    assert max(generations) == 1


def test_what_waits_and_a_due_control_go_first(tmp_path: Path, storage: Storage) -> None:
    setup = toy_setup(tmp_path, space=SPACE, predict=biased_model(), repeats=RepeatRule(control_every=3, confirm=1))
    with create_study(storage, setup) as study:
        first = study.ask_batch(3)
        assert [proposal.origin for proposal in first[:2]] == [Origin.DEFAULT, Origin.DEFAULT]
        assert first[2].origin is Origin.SCREENED
        for proposal in first:
            study.tell(proposal, measure(proposal.candidate))
        second = study.ask_batch(3)
    assert [proposal.origin for proposal in second] == [Origin.CONTROL, Origin.SCREENED, Origin.SCREENED]
    assert second[0].repeat_of == first[0].trial_number


@pytest.mark.parametrize("predict", [None, biased_model()])
def test_the_end_of_the_space_gives_what_is_left_and_then_says_so(
    tmp_path: Path, storage: Storage, predict: object
) -> None:
    space = small_space(toy_problem())
    setup = toy_setup(tmp_path, space=space, predict=predict, budget_trials=500)
    with create_study(storage, setup) as study:
        keys: list[str] = []
        while found := _found(study, 7):
            keys += [proposal.candidate.key for proposal in found]
    assert len(keys) == len(set(keys)) > 7
    assert len(keys) % 7 != 0


def _found(study: Study, count: int) -> tuple[Proposal, ...]:
    try:
        return study.ask_batch(count)
    except SpaceExhausted:
        return ()


def test_nothing_is_chosen_for_a_crowded_pool_while_another_has_candidates(tmp_path: Path, storage: Storage) -> None:
    problem = toy_problem()
    here = problem.node_pools[0]
    two = replace(problem, node_pools=(here, replace(here, name="there")))
    setup = toy_setup(tmp_path, space=small_space(two), predict=biased_model(), budget_trials=40)
    with create_study(storage, setup) as study:
        measured(study, 1)  # the default
        with suppress(SpaceExhausted):
            while True:
                for proposal in study.ask_batch(3, crowded={"here"}):
                    study.tell(proposal, measure(proposal.candidate))
        chosen = [trial for trial in study.trials() if trial.origin is not Origin.DEFAULT and trial.candidate]
    pools = [trial.candidate.config.pools[0].node_pool for trial in chosen if trial.candidate]
    assert set(pools) == {"here", "there"}
    assert pools == sorted(pools, reverse=True), "all of there first"
    gains = [trial.expected_gain for trial, pool in zip(chosen, pools, strict=True) if pool == "there"]
    assert gains == [None] * len(gains), "what was chosen among a part says nothing of the whole"
