"""The probability that a configuration starts and holds."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from search_spaces.outcome import Failure, FailureReason
from search_spaces.serving import Candidate, Mode
from studies.holding import BROKEN, CHANCE, holding_of, suspicions
from studies.records import Origin, TrialRecord, TrialStatus
from studies.screen import HOPELESS
from tests.studies.toy import measure, toy_problem, wide_space

SPACE = wide_space(toy_problem())


def told(candidate: Candidate, reason: FailureReason | None, status: TrialStatus | None = None) -> TrialRecord:
    outcome = measure(candidate) if reason is None else Failure(reason=reason, detail="it failed")
    return TrialRecord(
        number=0,
        status=status or (TrialStatus.MEASURED if reason is None else TrialStatus.FAILED),
        candidate=candidate,
        key=candidate.key,
        origin=Origin.SEED,
        prediction=None,
        outcome=outcome,
        values=None,
    )


def of_mode(mode: Mode, count: int, seed: int = 0) -> list[Candidate]:
    rng = random.Random(seed)
    drawn = (SPACE.sample(rng) for _ in range(50 * count))
    return list(dict.fromkeys(c for c in drawn if c.config.mode is mode))[:count]


AGGREGATED, DISAGGREGATED = of_mode(Mode.AGGREGATED, 8), of_mode(Mode.DISAGGREGATED, 12)
TIMEOUT = FailureReason.STARTUP_TIMEOUT


def chance(trials: list[TrialRecord], *candidates: Candidate) -> list[float]:
    return holding_of(trials).probability(candidates).tolist()


def test_without_failures_every_candidate_is_alike() -> None:
    assert chance([], *AGGREGATED) == [1 - CHANCE] * 8
    assert chance([told(AGGREGATED[0], None)], *AGGREGATED) == [1 - CHANCE] * 8


def test_a_family_that_always_failed_falls_exponentially_and_leaves_others_alone() -> None:
    held = [told(candidate, None) for candidate in AGGREGATED[:2]]
    unseen, other = DISAGGREGATED[-1], AGGREGATED[-1]
    found = []
    for count in range(1, 9):
        trials = held + [told(candidate, TIMEOUT) for candidate in DISAGGREGATED[:count]]
        found.append(chance(trials, unseen, other))
    falling = [probability for probability, _ in found]
    assert all(later < sooner for sooner, later in itertools.pairwise(falling))
    assert falling[0] > 0.3, "one failure proves little"
    assert falling[3] < 0.05
    assert falling[7] < 1e-3
    assert min(probability for _, probability in found) > 0.5


def test_one_success_clears_a_family_but_not_the_setting_that_fails_in_it() -> None:
    by_cache = {
        value: [c for c in of_mode(Mode.AGGREGATED, 60, seed=1) if c.config.pools[0].option("kv_cache_dtype") == value]
        for value in ("f16", "q8_0")
    }
    trials = [told(c, None) for c in by_cache["f16"][:6]] + [told(c, TIMEOUT) for c in by_cache["q8_0"][:6]]
    good, bad = chance(trials, by_cache["f16"][-1], by_cache["q8_0"][-1])
    assert good > 0.6
    assert bad < 0.05


def test_a_configuration_that_failed_at_its_start_is_worse_than_one_that_failed_under_load() -> None:
    candidate = AGGREGATED[0]
    (other,) = (c for c in SPACE.same_config(candidate)[:1])
    held = [told(c, None) for c in AGGREGATED[1:4]]
    (at_start,) = chance([*held, told(candidate, FailureReason.OUT_OF_MEMORY_AT_BOOT)], other)
    (under_load,) = chance([*held, told(candidate, FailureReason.OUT_OF_MEMORY_UNDER_LOAD)], other)
    assert at_start < 0.6 * under_load


def test_faults_of_the_infrastructure_teach_nothing() -> None:
    lost = [told(candidate, FailureReason.LOST_NODE, TrialStatus.LOST) for candidate in DISAGGREGATED]
    assert chance(lost, DISAGGREGATED[0]) == [1 - CHANCE]


def test_one_failure_gives_the_posterior_by_hand() -> None:
    """Every tree of an unseen configuration in the same mode that shares a setting with the failed one."""
    config_link = BROKEN[3] + (1 - BROKEN[3]) * CHANCE
    value_link = BROKEN[2] + (1 - BROKEN[2]) * config_link
    mode_link = BROKEN[1] + (1 - BROKEN[1]) * value_link
    engine_link = BROKEN[0] + (1 - BROKEN[0]) * mode_link
    sound = math.prod(
        [
            (1 - BROKEN[0]) * mode_link / engine_link,
            (1 - BROKEN[1]) * value_link / mode_link,
            (1 - BROKEN[2]) * config_link / value_link,
            1 - BROKEN[3],
        ]
    )
    assert chance([told(DISAGGREGATED[0], TIMEOUT)], DISAGGREGATED[1]) == [pytest.approx((1 - CHANCE) * sound)]


def test_what_failed_in_an_earlier_study_is_suspected_until_it_holds() -> None:
    bad, held = AGGREGATED[0], AGGREGATED[1]
    earlier = [told(held, None), told(bad, FailureReason.OUT_OF_MEMORY_AT_BOOT)]
    suspected = suspicions(earlier)
    before = holding_of([], suspected).probability([bad, held]).tolist()
    assert HOPELESS <= before[0] < 0.5 * before[1], "a suspicion is no certainty: an unscreened trial may try it"
    after = holding_of([told(bad, None)], suspected).probability([bad]).tolist()
    assert after == [pytest.approx(1 - CHANCE)]


def test_what_held_in_an_earlier_study_may_be_found_broken_here() -> None:
    bad = AGGREGATED[0]
    suspected = suspicions([told(bad, None), told(AGGREGATED[1], TIMEOUT)])
    trials = [told(candidate, None) for candidate in AGGREGATED[2:4]] + [told(bad, TIMEOUT)]
    found, alone = (holding_of(trials, known).probability([bad])[0] for known in (suspected, None))
    assert found <= alone < 0.5


def test_earlier_studies_without_failures_make_nothing_suspect() -> None:
    assert suspicions([told(candidate, None) for candidate in AGGREGATED]) == {}
