"""A write that was allowed when it began and is not any more when it would count."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest

from studies.errors import LeaseLostError
from studies.lease_file import FileLeaseBook
from studies.redaction import redacted
from studies.storage import open_storage


def test_a_pause_between_a_statement_and_its_commit_undoes_the_statement(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    study = optuna.create_study(storage=storage.backend, study_name="toy")
    checks = iter([True, False])

    def guard() -> None:
        if not next(checks):
            raise LeaseLostError("lost since the statement")

    storage.fence.guards.append(guard)
    with pytest.raises(LeaseLostError, match="since the statement"):
        study.set_user_attr("late", 1)
    storage.fence.guards.clear()
    assert study.user_attrs == {}
    study.set_user_attr("on time", 1)
    assert study.user_attrs == {"on time": 1}


def test_reading_needs_no_lease(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    optuna.create_study(storage=storage.backend, study_name="toy")

    def guard() -> None:
        raise LeaseLostError("no")

    storage.fence.guards.append(guard)
    assert optuna.load_study(storage=storage.backend, study_name="toy").get_trials() == []


def test_a_line_that_a_kill_cut_short_spoils_no_other(tmp_path: Path) -> None:
    book = FileLeaseBook(tmp_path / "s.journal")
    book.append("toy", 1, [(1.0, "first")])
    with (tmp_path / "s.journal.events").open("a") as file:
        file.write("\n" + json.dumps(["toy", 2.0, 1, "cut"])[:-4])
    book.append("toy", 2, [(3.0, "after")])
    assert [(event.number, event.text) for event in book.events("toy")] == [(1, "first"), (2, "after")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("to postgresql://me:hush@db:5432/x now", "to postgresql://me:***@db:5432/x now"),
        ("to postgresql+psycopg://me:hu:s/h@db/x", "to postgresql+psycopg://me:***@db/x"),
        ("mysql://db/x?ssl=1&password=hush&a=b", "mysql://db/x?ssl=1&password=***&a=b"),
        ("connection to host=db password=hush failed", "connection to host=db password=*** failed"),
        ("RAY_AUTH_TOKEN=hush was refused", "RAY_AUTH_TOKEN=*** was refused"),
        ("auth_token=hush api_key=hush2", "auth_token=*** api_key=***"),
        ("sqlite:///a/b.db and http://127.0.0.1:8000/v1", "sqlite:///a/b.db and http://127.0.0.1:8000/v1"),
        (
            "output_tokens_per_s=12 max_tokens=3 at 10:30, me@host",
            "output_tokens_per_s=12 max_tokens=3 at 10:30, me@host",
        ),
    ],
)
def test_secrets_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == shown
