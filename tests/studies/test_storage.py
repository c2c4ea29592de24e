"""Opening storages: folders, pragmas, and errors that name the remedy and no secret."""

from __future__ import annotations

import sqlite3
import sys
import threading
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from sqlalchemy import text

from studies.errors import StorageError, StudyFormatError
from studies.history import StudyHistory, study_names, summaries
from studies.storage import default_storage_url, masked, open_storage


def test_sqlite_makes_its_folder_and_writes_ahead(tmp_path: Path) -> None:
    url = default_storage_url(tmp_path / "deep" / "folder")
    storage = open_storage(url)
    backend = storage.backend._backend  # type: ignore[attr-defined] # the cache holds the real storage
    assert isinstance(backend, RDBStorage)
    with backend.engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 1
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 60_000
    assert study_names(open_storage(url)) == ()


def test_a_database_that_another_one_writes_the_old_way_is_waited_for(tmp_path: Path) -> None:
    """Two processes that make a database at once: one turns the write-ahead log on while the other still writes."""
    url = f"sqlite:///{tmp_path}/s.db"
    RDBStorage(url).remove_session()
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None, check_same_thread=False)
    assert other.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    other.execute("BEGIN IMMEDIATE")
    end = threading.Timer(0.5, other.execute, ["COMMIT"])
    end.start()
    try:
        assert study_names(open_storage(url)) == ()
    finally:
        end.join()
        other.close()


@pytest.mark.parametrize("form", ["journal://{}/x/s.journal", "{}/x/s.journal", "{}/x/s.log"])
def test_journal_files_have_an_url_and_a_plain_path(tmp_path: Path, form: str) -> None:
    storage = open_storage(form.format(tmp_path))
    assert Path(storage.dashboard_url).is_file()
    assert storage.url.startswith("journal:///")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("studies", "is no storage URL; give an URL such as sqlite:///"),
        ("oracel://h/d", "names an unknown database"),
        ("sqlite:////proc/none/s.db", "cannot be made"),
        ("journal:///proc/none/s.journal", "cannot be made"),
    ],
)
def test_bad_urls_are_refused_with_a_remedy(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        open_storage(url)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_text("these are notes, not a database\n" * 100)
    with pytest.raises(StorageError, match=r"notes\.db cannot be opened: .*not a database"):
        open_storage(f"sqlite:///{path}")


def test_a_missing_driver_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StorageError, match=r"no driver for storage postgresql://u:\*\*\*@h/d; .*tuner\[postgresql\]"):
        open_storage("postgresql://u:hush@h/d")


def test_passwords_are_never_shown() -> None:
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is an extra")
    url = "postgresql://user:hush{}@127.0.0.1:1/db?application_name=a&sslpassword=alsohush&connect_timeout=2"
    with pytest.raises(StorageError) as caught:
        open_storage(url)
    shown = f"{caught.value}"
    assert "hush" not in shown
    assert "user:***@127.0.0.1" in shown
    assert masked("no url at//all:hush@here") == "no url at//***@here"


def test_studies_of_other_programs_are_left_out_and_refused(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    optuna.create_study(study_name="foreign", storage=storage.backend)
    assert study_names(storage) == ("foreign",)
    assert summaries(storage) == ()
    with pytest.raises(StudyFormatError, match="'foreign' has schema None"):
        StudyHistory(storage, "foreign")
