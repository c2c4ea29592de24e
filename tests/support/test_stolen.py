from __future__ import annotations

import pytest

from tests.support.stolen import STOLEN_LIMIT, Spent, judged_on_a_calm_machine


def test_the_share_is_of_what_was_wanted() -> None:
    before = Spent(worked_s=100.0, stolen_s=10.0)
    assert before.stolen_until(Spent(worked_s=109.0, stolen_s=11.0)) == pytest.approx(0.1)
    assert before.stolen_until(before) == 0.0
    now = Spent.now()
    assert now.worked_s > 0 <= now.stolen_s


@pytest.mark.parametrize(("stolen_s", "kind"), [(0.2, AssertionError), (3.0, pytest.skip.Exception)])
def test_a_failure_counts_unless_the_processor_was_stolen(stolen_s: float, kind: type[BaseException]) -> None:
    assert 0.2 / 10.2 < STOLEN_LIMIT < 3.0 / 13.0
    clock = iter([Spent(worked_s=0.0, stolen_s=0.0), Spent(worked_s=10.0, stolen_s=stolen_s)])
    with pytest.raises(kind, match="late by 9 ms"), judged_on_a_calm_machine("this", lambda: next(clock)):
        raise AssertionError("late by 9 ms")


def test_other_errors_and_success_are_left_alone() -> None:
    always = Spent(worked_s=0.0, stolen_s=0.0)
    with judged_on_a_calm_machine("this", lambda: always):
        pass
    with pytest.raises(ValueError, match="other"), judged_on_a_calm_machine("this", lambda: always):
        raise ValueError("other")
