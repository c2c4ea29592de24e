"""Writes that arrive together or not at all, and how few of them a trial needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import optuna
import pytest
from sqlalchemy import Engine, event

from studies.errors import LeaseLostError
from studies.storage import Storage, open_storage
from studies.study import create_study
from tests.studies.toy import measure, toy_problem, toy_setup, wide_space


@pytest.fixture(params=["sqlite", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    urls = {"sqlite": f"sqlite:///{tmp_path}/s.db", "journal": f"journal://{tmp_path}/s.journal"}
    return open_storage(urls[request.param])


def other_view(storage: Storage) -> optuna.Study:
    """The study through a connection of its own."""
    return optuna.load_study(study_name="toy", storage=open_storage(storage.dashboard_url).backend)


def test_a_batch_is_seen_by_others_only_when_it_is_whole(storage: Storage) -> None:
    study = optuna.create_study(storage=storage.backend, study_name="toy")
    with storage.batch():
        study.set_user_attr("first", 1)
        study.set_user_attr("second", 2)
        assert other_view(storage).user_attrs == {}
    assert other_view(storage).user_attrs == {"first": 1, "second": 2}


def test_a_batch_that_fails_leaves_nothing_and_the_next_one_works(storage: Storage) -> None:
    study = optuna.create_study(storage=storage.backend, study_name="toy")
    with pytest.raises(InterruptedError):
        _write_and(storage, study, _die)
    assert study.user_attrs == other_view(storage).user_attrs == {}
    with storage.batch():
        study.set_user_attr("second", 2)
    assert study.user_attrs == other_view(storage).user_attrs == {"second": 2}


def test_a_batch_whose_writer_lost_its_lease_meanwhile_leaves_nothing(storage: Storage) -> None:
    study = optuna.create_study(storage=storage.backend, study_name="toy")

    storage.fence.guards.append(guard := Mock())
    with pytest.raises(LeaseLostError, match="in the middle"):
        _write_and(storage, study, lambda: guard.configure_mock(side_effect=LeaseLostError("in the middle")))
    assert other_view(storage).user_attrs == {}


def test_a_trial_is_a_handful_of_transactions_and_reads_no_other_trial(tmp_path: Path) -> None:
    """However many trials there are and however many run: what is counted is the same for the 12th as for the 30th."""
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    setup = toy_setup(tmp_path, space=wide_space(toy_problem()), budget_trials=60, in_flight=4)
    counts = []
    with create_study(storage, setup) as study:
        flying = [study.ask() for _ in range(8)]
        with _counted(storage.backend._backend.engine) as seen:  # type: ignore[attr-defined] # the cache holds it
            for _ in range(30):
                before = dict(seen)
                proposal = flying.pop(0)
                study.tell(proposal, measure(proposal.candidate))
                flying.append(study.ask())
                counts.append({key: seen[key] - before[key] for key in seen})
    assert counts[11]["commit"] == counts[29]["commit"] == 3
    assert max(count["statement"] for count in counts[11:]) <= 130


def _write_and(storage: Storage, study: optuna.Study, then: Callable[[], object]) -> None:
    with storage.batch():
        study.set_user_attr("first", 1)
        then()


def _die() -> None:
    raise InterruptedError


class _counted:  # noqa: N801 - reads as the context manager that it is
    """Counts of the statements and of the commits that wrote, of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seen = {"statement": 0, "commit": 0}
        self._wrote = False

    def _statement(self, _connection: object, _cursor: object, statement: str, *_: object) -> None:
        self.seen["statement"] += 1
        self._wrote |= statement.startswith(("INSERT", "UPDATE"))

    def _commit(self, _connection: object) -> None:
        self.seen["commit"] += self._wrote
        self._wrote = False

    def __enter__(self) -> dict[str, int]:
        event.listen(self.engine, "before_cursor_execute", self._statement)
        event.listen(self.engine, "commit", self._commit)
        return self.seen

    def __exit__(self, *_: object) -> None:
        event.remove(self.engine, "before_cursor_execute", self._statement)
        event.remove(self.engine, "commit", self._commit)
