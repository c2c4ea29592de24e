from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.verdicts import _TELLING, most_telling
from search_spaces.outcome import Failure, FailureReason


def failure(reason: FailureReason, detail: str = "", **more: dict[str, str]) -> Failure:
    return Failure(reason=reason, detail=detail or str(reason), **more)  # type: ignore[arg-type]  # artefacts


def test_every_class_has_its_place() -> None:
    assert set(_TELLING) == set(FailureReason)
    assert len(_TELLING) == len(FailureReason)


def test_the_cause_comes_before_its_consequences() -> None:
    heard = failure(FailureReason.REQUESTS_FAILED, "3 of 12 requests failed", artifacts={"request_timings": "path"})
    crashed = failure(FailureReason.ENGINE_CRASH, "mixed-0.0 exited with code 1 under load")
    memory = failure(FailureReason.OUT_OF_MEMORY_UNDER_LOAD, "mixed-0.1 exited with code 1 under load")
    found = most_telling(heard, [crashed, memory])
    assert found.reason is FailureReason.OUT_OF_MEMORY_UNDER_LOAD
    assert found.detail == "mixed-0.1 exited with code 1 under load; 3 of 12 requests failed"
    assert found.artifacts == {"request_timings": "path"}


def test_a_lost_node_explains_everything_else() -> None:
    others = [failure(reason) for reason in FailureReason]
    assert most_telling(others[0], others).reason is FailureReason.LOST_NODE


@given(st.sampled_from(FailureReason), st.lists(st.sampled_from(FailureReason)))
def test_what_was_heard_first_stays_where_nothing_tells_more(first: FailureReason, others: list[FailureReason]) -> None:
    heard = failure(first)
    found = most_telling(heard, [failure(reason, f"other {reason}") for reason in others])
    best = min([first, *others], key=_TELLING.index)
    assert found.reason is best
    if best is first:
        assert found == heard
