"""Which study gets the next slice of a budget, and how much."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.errors import TunerError
from search_spaces.outcome import Prediction
from search_spaces.problem import Problem
from search_spaces.slos import Slo
from studies.spending import NOTHING_SPENT, Spent
from studies.stopping import Progress, progress_of
from tests.tuner.test_campaign_run import CAMPAIGN
from tuner.campaigns.campaign import Campaign, CampaignFileError, fits, load_campaign
from tuner.campaigns.look import next_begin, window_end
from tuner.campaigns.policy import Choice, Cost, Offer, Purse, choose
from tuner.campaigns.record import CellRecord, Slice, SliceEnd, SliceKind
from tuner.campaigns.run import failed_in_a_row
from tuner.campaigns.schema import WindowSection
from tuner.campaigns.standing import FIRST_GROWTH, Standing, chance_of, first_growth
from tuner.wiring import make_problem

NO_PROGRESS = progress_of(())
ENDLESS = Purse(device_hours=None, dollars=None)


@functools.cache
def campaign() -> Campaign:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "campaign.yaml"
        path.write_text(CAMPAIGN.replace("trials: 4,", "trials: 40,"))
        return load_campaign(path)[0]


@functools.cache
def problem() -> Problem:
    return make_problem(campaign().cells[0].study)


def standing(name: str, **changes: Any) -> Standing:
    """A study that has not begun, but for `changes`."""
    cell = campaign().cells[0]
    values: dict[str, Any] = {
        "cell": replace(cell, name=name),
        "record": CellRecord(cell=name, study=name),
        "problem": problem(),
        "directions": (),
        "trials": (),
        "progress": NO_PROGRESS,
        "spent": NOTHING_SPENT,
        "total": NOTHING_SPENT,
        "lacking": 0,
        "growth": 1.0,
        "costs": (),
    }
    return Standing(**values | changes)


def begun(name: str, growth: float, hours: float, **changes: Any) -> Standing:
    progress = Progress(finished=2, running=0, waiting=0, lost=0, lost_in_a_row=0)
    cost = Cost(device_hours=hours, dollars=10 * hours)
    spent = Spent(device_hours=2 * hours, dollars=20 * hours, trials=2)
    return standing(name, growth=growth, costs=(cost,), progress=progress, spent=spent, **changes)


def offer(hours: float | None = 10.0, today: float | None = None, trials: int = 4) -> Offer:
    purse = Purse(device_hours=hours, dollars=None)
    total = Purse(device_hours=100.0, dollars=None)
    return Offer(total=total, left=purse, today=Purse(device_hours=today, dollars=None), trials=trials)


def chosen(
    standings: list[Standing], given: Offer, resting: tuple[str, ...] = (), **priorities: float
) -> Choice | None:
    names = {s.cell.name: priorities.get(s.cell.name, 1.0) for s in standings}
    return choose(standings, names, given, resting=resting)


def name_of(choice: Choice | None) -> str | None:
    return None if choice is None else choice.standing.cell.name


def test_every_study_begins_before_any_goes_on_the_most_important_first() -> None:
    studies = [begun("a", 0.9, 0.1), standing("b"), standing("c")]
    assert name_of(chosen(studies, offer())) == "b"
    assert name_of(chosen(studies, offer(), c=2.0)) == "c"
    assert name_of(chosen(studies, offer(), ("b", "c"))) == "a"


def test_the_budget_goes_where_a_device_hour_is_expected_to_bring_most() -> None:
    cheap, dear = begun("cheap", 0.02, 0.1), begun("dear", 0.05, 0.5)
    assert name_of(chosen([dear, cheap], offer())) == "cheap"
    assert name_of(chosen([dear, cheap], offer(), dear=3.0)) == "dear"
    closed = replace(cheap, record=replace(cheap.record, closed="done"))
    choice = chosen([dear, closed], offer())
    assert choice is not None
    assert (name_of(choice), choice.kind, choice.trials) == ("dear", SliceKind.SEARCH, 4)


def test_a_slice_takes_no_more_than_is_left_and_half_a_trial_is_kept_back() -> None:
    one = begun("one", 0.1, 1.0)
    plenty, scarce = chosen([one], offer(100.0)), chosen([one], offer(2.5))
    assert plenty is not None
    assert plenty.purse.device_hours == pytest.approx(6.0), "4 trials and half as much again"
    assert scarce is not None
    assert scarce.purse.device_hours == pytest.approx(1.5), "one trial: the next one is given out when it has ended"
    assert chosen([one], offer(0.4)) is None, "less than half a trial"
    today = chosen([one], offer(100.0, today=1.5))
    assert today is not None
    assert today.purse.device_hours == pytest.approx(1.0)


def test_the_last_of_the_budget_goes_where_the_dearest_trial_fits_and_a_near_end_is_an_end() -> None:
    steady, varying = begun("steady", 0.1, 2.0), begun("varying", 0.9, 1.0)
    varying = replace(varying, costs=(Cost(device_hours=0.2, dollars=2.0), Cost(device_hours=3.2, dollars=32.0)))
    assert name_of(chosen([steady, varying], offer(5.0))) == "varying"
    assert name_of(chosen([steady, varying], offer(4.0))) == "steady", "4.8 would be more than 0.5% of 100 too much"
    one = chosen([steady], offer(8.0))
    assert one is not None
    assert one.trials == 1, "what it leaves is known better then"
    assert name_of(chosen([varying], offer(2.0))) == "varying", "1.5 hours from the end on average, not 2.0"
    assert name_of(chosen([varying], offer(1.6))) == "varying", "1.5 hours from the end on average, not 1.6"
    assert name_of(chosen([varying], offer(1.5))) is None, "no more than 1.5% of 100 is left"
    assert name_of(chosen([replace(steady, costs=4 * (Cost(device_hours=3.5, dollars=0.0),))], offer(1.7))) is None


@settings(max_examples=60, deadline=None)
@given(
    typical=st.lists(st.floats(0.002, 0.2), min_size=1, max_size=6),
    small=st.floats(0.002, 0.01),
    spread=st.floats(0.0, 0.05),
    seed=st.integers(0, 10_000),
)
def test_a_campaign_ends_within_two_percent_of_its_budget_where_some_study_has_small_trials(
    typical: list[float], small: float, spread: float, seed: int
) -> None:
    rng = random.Random(seed)
    means = [*typical, small]
    studies = [begun(str(number), rng.random(), mean) for number, mean in enumerate(means)]
    taken = sum(2 * mean for mean in means)
    total = Purse(device_hours=taken + 1.0, dollars=None)
    while True:
        left = Purse(device_hours=total.device_hours - taken, dollars=None)
        choice = chosen(studies, Offer(total=total, left=left, today=ENDLESS, trials=3))
        if choice is None:
            break
        number = int(choice.standing.cell.name)
        slice_taken = 0.0
        for _ in range(choice.trials):
            if slice_taken >= choice.purse.device_hours:
                break
            hours = means[number] * rng.uniform(1 - spread, 1 + spread)
            slice_taken += hours
            costs = (*studies[number].costs, Cost(device_hours=hours, dollars=0.0))[-8:]
            studies[number] = replace(studies[number], costs=costs, growth=rng.random())
        taken += slice_taken
    assert abs(taken / total.device_hours - 1.0) <= 0.02


def test_a_closed_study_gets_the_runs_that_its_front_lacks_and_search_leaves_room_for_them() -> None:
    closed = begun("closed", 0.0, 1.0, lacking=3)
    closed = replace(closed, record=replace(closed.record, closed="little more is expected to be gained"))
    choice = chosen([begun("open", 0.5, 1.0), closed], offer())
    assert choice is not None
    assert (name_of(choice), choice.kind) == ("closed", SliceKind.CONFIRM)
    lacking = begun("open", 0.5, 1.0, lacking=3)
    kept = chosen([lacking], offer(4.2))
    assert kept is not None
    assert kept.purse.device_hours == pytest.approx(4.2 - 3.0 - 0.5)
    assert chosen([lacking], offer(3.2)) is None


def test_money_counts_like_device_hours_and_the_scarcer_one_decides() -> None:
    purse = Purse(device_hours=10.0, dollars=20.0)
    assert purse.share(Cost(device_hours=1.0, dollars=10.0)) == pytest.approx(0.5)
    assert not purse.affords(Cost(device_hours=1.0, dollars=50.0))
    assert ENDLESS.affords(Cost(device_hours=1e9, dollars=1e9))
    assert ENDLESS.share(Cost(device_hours=3.0, dollars=1.0)) == 3.0


def test_where_nothing_meets_the_slos_the_chance_that_something_will_is_the_growth() -> None:
    slo = Slo(metric="ttft_p99_ms", threshold=100.0)
    assert first_growth((), (slo,)) == FIRST_GROWTH
    near = Prediction(metrics={"ttft_p99_ms": 100.0}, log_stddev={"ttft_p99_ms": 0.2})
    far = Prediction(metrics={"ttft_p99_ms": 400.0}, log_stddev={"ttft_p99_ms": 0.2})
    assert chance_of(near, (slo,)) == pytest.approx(0.5)
    assert chance_of(far, (slo,)) < 1e-6
    assert chance_of(Prediction(metrics={}, infeasible="no memory"), (slo,)) == 0.0


def ended(number: int, *, failed: bool) -> Slice:
    end = SliceEnd(at_s=0.0, reason="", measured=0, device_hours=0.0, dollars=0.0, failed=failed)
    return Slice(number=number, cell="a", study="a", kind=SliceKind.SEARCH, begun_s=0.0, why="", trials=1, end=end)


def test_failures_in_a_row_begin_anew_after_a_slice_that_did_not_fail() -> None:
    flags = (True, False, True, True)
    found = failed_in_a_row([ended(n, failed=flag) for n, flag in enumerate(flags)])
    assert [slice_.number for slice_ in found] == [2, 3]


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_pauses_of_the_week_over_midnight_and_in_their_own_zone() -> None:
    night = WindowSection(days=["mon"], begin="22:00", end="06:00")
    assert window_end(night, moment("2026-11-23T23:00")) == moment("2026-11-24T06:00"), "a monday"
    assert window_end(night, moment("2026-11-24T05:59")) == moment("2026-11-24T06:00")
    assert window_end(night, moment("2026-11-24T06:00")) is None
    assert next_begin(night, moment("2026-11-24T07:00")) == moment("2026-11-30T22:00")
    berlin = WindowSection(begin="08:00", end="20:00", zone="Europe/Berlin")
    assert window_end(berlin, moment("2026-11-23T07:30")) == moment("2026-11-23T19:00")
    assert window_end(berlin, moment("2026-11-23T06:30")) is None


def test_cells_are_chosen_by_their_choices() -> None:
    assert fits({"model": ["a", "b"]}, {"model": "a", "pool": "x"})
    assert not fits({"model": ["a"], "pool": ["y"]}, {"model": "a", "pool": "x"})
    assert math.isclose(campaign().priority(campaign().cells[0]), 1.0)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("budget: {device_hours: 100}", "budget: {}", ["budget.device_hours", "missing, and so are cost and deadline"]),
        ("device_hours: 100", "device_hour: 100", ["budget.device_hour", "did you mean device_hours?"]),
        ("device_hours: 100", "deadline: 2027-01-01 10:00", ["budget.deadline", "has no zone"]),
        ("slices:", "leave_out: [{user: few}]\nslices:", ["leave_out.0.user", "is no dimension; choose users"]),
        ("slices:", "leave_out: [{users: [few, many]}]\nslices:", ["leave_out leaves no study"]),
        ("slices:", "notify: [{format: slack}]\nslices:", ["notify.0.url_env", "give url_env or url_file"]),
        ("slices:", "notify: [{url: http://x}]\nslices:", ["notify.0.url", "unknown key"]),
        ("slices:", "watch: {every: 1d}\nslices:", ["watch.every", "give budget.deadline"]),
        ("slices:", "pauses: [{begin: '8', end: '20:00'}]\nslices:", ["pauses.0.begin", "'8' is no time of day"]),
        ("isl: 64", "isl: -1", ["cell many.few", "workload.isl"]),
        ("common:", "study: other.yaml\ncommon:", ["study", "give study or common"]),
    ],
)
def test_a_mistake_is_answered_with_key_value_and_remedy(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    path = tmp_path / "campaign.yaml"
    assert old in CAMPAIGN
    path.write_text(CAMPAIGN.replace(old, new))
    with pytest.raises(TunerError) as caught:
        load_campaign(path)
    for part in parts:
        assert part in str(caught.value)


def test_the_example_is_seven_studies_of_which_the_large_model_s_count_twice() -> None:
    found, _ = load_campaign(Path(__file__).parents[2] / "examples" / "campaign-emulated.yaml")
    assert len(found.cells) == 7, "one of eight is left out"
    assert {cell.name.split(".")[1]: found.priority(cell) for cell in found.cells} == {
        "llama-8b": 1.0,
        "llama-70b": 2.0,
    }
    assert all(list(cell.study.node_pools) == [cell.choices["nodes"]] for cell in found.cells)


def test_a_campaign_may_name_a_study_file_beside_it(tmp_path: Path) -> None:
    common = CAMPAIGN.partition("common:\n")[2].partition("matrix:")[0]
    lines = [line.removeprefix("  ") for line in common.splitlines()]
    (tmp_path / "study.yaml").write_text("\n".join(["name: ignored", *lines, ""]))
    path = tmp_path / "campaign.yaml"
    path.write_text(CAMPAIGN.replace(f"common:\n{common}", "study: study.yaml\n"))
    apart = load_campaign(path)[0].cells
    path.write_text(CAMPAIGN)
    assert load_campaign(path)[0].cells == apart
    with pytest.raises(CampaignFileError, match="is no override"):
        load_campaign(path, ["budget"])
