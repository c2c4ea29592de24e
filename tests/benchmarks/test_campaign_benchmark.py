"""The campaign benchmark: its world answers alike whenever it is asked, and its figures are what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.campaign import Gain, Transfer
from benchmarks.campaigns.arms import Step, together
from benchmarks.campaigns.world import campaign_text, every_candidate, yardstick
from studies.records import TrialRecord, TrialStatus
from tuner.campaigns.campaign import load_campaign
from tuner.campaigns.run import BUDGET_USED, NOTHING_LEFT
from tuner.wiring import make_space


def test_a_world_is_the_same_whenever_it_is_asked_and_a_whole_front_holds_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "twelve.yaml"
    path.write_text(campaign_text(3, 7.0))
    campaign, _ = load_campaign(path)
    assert len(campaign.cells) == 12
    cell = campaign.cell("twelve.llama-8b.rag.h100")
    rod = yardstick(cell.study, 3)
    candidates = list(every_candidate(make_space(cell.study, rod.truth.problem)))
    assert len(candidates) == rod.candidates == 54
    outcomes = [rod.truth.outcome(candidate, "run") for candidate in candidates[:5]]
    assert outcomes == [rod.truth.outcome(candidate, "run") for candidate in candidates[:5]]
    trials = [
        TrialRecord(
            number=number,
            status=TrialStatus.MEASURED,
            candidate=candidate,
            key=candidate.key,
            origin=None,
            prediction=None,
            outcome=None,
            values=None,
        )
        for number, candidate in enumerate(candidates)
    ]
    assert rod.share(trials) == pytest.approx(1.0)
    assert 0.0 < rod.share(trials[:9]) < 1.0
    assert rod.share([]) == 0.0


def test_studies_that_run_at_once_make_one_curve() -> None:
    one = [Step(device_hours=1.0, share=0.5), Step(device_hours=2.0, share=1.0)]
    other = [Step(device_hours=1.5, share=0.4)]
    assert together([one, other]) == (
        Step(device_hours=1.0, share=0.25),
        Step(device_hours=2.5, share=0.45),
        Step(device_hours=3.5, share=0.7),
    )


def test_what_never_got_there_counts_with_one_measurement_more_than_were_made() -> None:
    known = {"seed": 0, "study": "a", "trials": 14, "taught_share": 0.9, "alone_share": 0.8}
    assert Transfer(**known, taught=3, alone=None).ratio == pytest.approx(3 / 15)
    assert Transfer(**known, taught=None, alone=5).ratio == pytest.approx(3.0)


def test_a_gain_counts_device_hours_to_the_same_hypervolume_and_an_end_with_nothing_left_to_gain_is_on_budget() -> None:
    found = Gain(
        seed=0,
        budget=40.0,
        spent=30.0,
        reason=NOTHING_LEFT,
        trials=250,
        share=0.97,
        alone_spent=29.0,
        alone_share=0.94,
        hours_to_alone=20.0,
        alone_end_spent=35.0,
        alone_end_share=0.95,
        alone_end_trials=400,
        closed_spent=27.0,
        closed_share=0.98,
        hours_to_closed=None,
    )
    assert found.at_the_same == pytest.approx(1.45)
    assert found.against_closed == 0.0, "it never held that"
    assert found.off_budget == 0.0
    assert replace(found, reason=BUDGET_USED).off_budget == pytest.approx(-0.25)
    assert replace(found, spent=41.0).off_budget == pytest.approx(0.025), "beyond is beyond"
