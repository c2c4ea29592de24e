"""Candidates in stock: what is chosen before there is a place for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from search_spaces.outcome import Prediction
from search_spaces.serving import Candidate
from studies.generations import GENERATION
from studies.records import Origin, Proposal, TrialStatus
from studies.samplers import SamplerKind
from studies.screen import THOUGHT_AT_ONCE
from studies.stock import MOST, SHARE, Stock
from studies.storage import open_storage
from studies.study import Study, create_study
from tests.studies.toy import biased_model, measure, toy_problem, toy_setup, wide_space

SPACE = wide_space(toy_problem())
MANY = 4 * SHARE
"""Trials in flight with which four candidates are in stock."""


class Counted:
    """The biased model, and how many candidates it was asked for at a time."""

    def __init__(self) -> None:
        self.passes: list[int] = []

    def __call__(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        self.passes.append(len(candidates))
        return biased_model()(candidates)


def make_study(folder: Path, in_flight: int = MANY, sampler: SamplerKind = SamplerKind.NSGA2) -> tuple[Study, Counted]:
    model = Counted()
    setup = toy_setup(folder, space=SPACE, predict=model, budget_trials=40, in_flight=in_flight, sampler=sampler)
    return create_study(open_storage(f"sqlite:///{folder}/s.db"), setup), model


def begin_defaults(study: Study) -> tuple[Proposal, ...]:
    """Nothing waits any more."""
    return study.ask_batch(2)


def think(study: Study, **kwargs: object) -> None:
    for _ in study.think_ahead(**kwargs):  # type: ignore[arg-type]  # test convenience
        pass


def test_few_trials_in_flight_have_no_stock() -> None:
    assert Stock(SHARE - 1).size == 0
    assert Stock(SHARE).size == 1
    assert Stock(SHARE * 1000).size == MOST


@pytest.mark.parametrize("sampler", [SamplerKind.NSGA2, pytest.param(SamplerKind.RANDOM, marks=pytest.mark.long)])
def test_what_is_in_stock_is_begun_without_another_look(tmp_path: Path, sampler: SamplerKind) -> None:
    study, model = make_study(tmp_path, sampler=sampler)
    with study:
        begin_defaults(study)
        think(study)
        assert len(study.trials()) == 2, "thoughts are written nowhere"
        model.passes.clear()
        proposals = [*study.ask_batch(3), *study.ask_batch(3)]
        assert model.passes == []
        trials = study.trials()
        stored = study.history.storage.backend.get_all_trials(study.history.id)
    assert [proposal.trial_number for proposal in proposals] == [2, 3, 4, 5]
    assert [trial.system_attrs[GENERATION] for trial in stored[2:]] == [0] * 4, "as if Optuna had been asked"
    assert {trial.status for trial in trials} == {TrialStatus.RUNNING}
    assert len({trial.key for trial in trials}) == 6
    assert {trial.origin for trial in trials[2:]} == {Origin.SCREENED}
    assert all(trial.prediction is not None for trial in trials)


def test_a_thought_goes_on_after_a_tell_and_an_ask_brings_it_to_its_end(tmp_path: Path) -> None:
    study, model = make_study(tmp_path)
    with study:
        first, _ = begin_defaults(study)
        model.passes.clear()
        next(study.think_ahead())
        assert model.passes == [THOUGHT_AT_ONCE]
        study.tell(first, measure(first.candidate))
        assert len(study.ask_batch(2)) == 2
        looked_at = sum(model.passes)
        assert len(study.ask_batch(2)) == 2
        assert sum(model.passes) == looked_at > THOUGHT_AT_ONCE, "four were chosen together"


def test_new_ones_are_chosen_beside_what_is_in_stock(tmp_path: Path) -> None:
    study, model = make_study(tmp_path)
    with study:
        begin_defaults(study)
        think(study)
        study.ask_batch(2)
        model.passes.clear()
        think(study)
        assert model.passes == [], "half of it is left"
        study.ask_batch(1)
        think(study)
        assert model.passes
        keys = {proposal.candidate.key for proposal in study.ask_batch(4)}
    assert len(keys) == 4


def test_what_has_no_room_any_more_is_dropped(tmp_path: Path) -> None:
    study, model = make_study(tmp_path)
    with study:
        begin_defaults(study)
        think(study)
        model.passes.clear()
        assert study.ask_batch(4, crowded={"here"}), "where nothing has room, what has none is chosen"
        assert model.passes, "anew"
