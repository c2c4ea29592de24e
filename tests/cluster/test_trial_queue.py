"""Who of the trials that wait for devices begins next."""

from __future__ import annotations

from pathlib import Path

from cluster.ray_runner import MOST_OVERTAKEN, _Trial, routed
from cluster.runner import TrialRequest
from search_spaces.measuring import MeasurementRule, TimeLimits
from search_spaces.serving import Candidate, Pool, Role, ServingConfig
from search_spaces.workload import Arrival, Load
from tests.studies.toy import toy_problem


def waiting(name: str, node_pool: str, overtaken: int = 0) -> _Trial:
    config = ServingConfig(engine="emulated", pools=(Pool(role=Role.MIXED, node_pool=node_pool),))
    request = TrialRequest(
        trial=name,
        candidate=Candidate(config=config, load=Load(arrival=Arrival.CLOSED, value=1.0)),
        problem=toy_problem(),
        rule=MeasurementRule(),
        limits=TimeLimits(),
        artifact_dir=Path(name),
        seed=0,
    )
    return _Trial(request=request, began_s=0.0, overtaken=overtaken)


def begun(queue: list[_Trial], *able: str) -> list[str]:
    return [trial.request.trial for trial in routed(queue, lambda trial: trial.request.trial in able)]


def test_small_ones_overtake_a_large_one_so_often_and_no_more() -> None:
    large = waiting("large", "new")
    for number in range(MOST_OVERTAKEN):
        assert begun([large, waiting(f"small-{number}", "new")], f"small-{number}") == [f"small-{number}"]
    assert begun([large, waiting("one-more", "new")], "one-more") == []
    assert begun([large, waiting("one-more", "new")], "large", "one-more") == ["large", "one-more"]


def test_a_trial_that_was_overtaken_often_holds_up_nobody_on_other_node_pools() -> None:
    queue = [waiting("large", "new", MOST_OVERTAKEN), waiting("small", "new"), waiting("elsewhere", "old")]
    assert begun(queue, "small", "elsewhere") == ["elsewhere"]


def test_nobody_is_overtaken_by_those_on_other_node_pools() -> None:
    large = waiting("large", "new")
    assert begun([large, waiting("elsewhere", "old")], "elsewhere") == ["elsewhere"]
    assert large.overtaken == 0
