"""Opening Optuna storages by URL.

Accepted: any SQLAlchemy URL that Optuna takes (`sqlite:///study.db`, `postgresql://...`, `mysql+pymysql://...`) and a
journal file, as `journal:///path` or as the plain path of a file that ends in `.journal` or `.log` (as the dashboard
takes it). Passwords are never shown. SQLite on a network file system is refused: its locks do not hold there, and
its write-ahead log needs memory that the processes share (https://www.sqlite.org/wal.html).
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from sqlalchemy import URL, Engine, event, make_url
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from studies.batches import Batch, database_batch
from studies.errors import StorageError, StorageLostError
from studies.fence import Fence, FencedJournal, fence_database
from studies.filesystems import network_file_system
from studies.lease_file import FileLeaseBook
from studies.lease_record import LeaseBook
from studies.lease_sql import SqlLeaseBook
from studies.redaction import redacted

JOURNAL_PREFIX = "journal://"
JOURNAL_SUFFIXES = (".journal", ".log")
SQLITE_WAIT_S = 60
OPEN_TRIES = 20
_SECRET_KEYS = re.compile(r"(password|passwd|pwd|secret|token)", re.IGNORECASE)
_DRIVERS = {
    "postgresql": "install it with: pip install 'tuner[postgresql]'",
    "mysql": "install one and name it, such as mysql+pymysql:// with: pip install pymysql",
}


@dataclass(frozen=True, kw_only=True)
class Storage:
    """An open storage. `url` is fit to be shown; `dashboard_url` is what optuna-dashboard takes, secrets included.

    Every write through `backend` passes `fence`. What is written in a `batch` arrives together or not at all. `direct`
    is the backend without the cache in which Optuna would keep every trial whole: for the writer of a study, which
    remembers what it needs.
    """

    url: str
    dashboard_url: str = field(repr=False)
    backend: BaseStorage
    direct: BaseStorage = field(repr=False)
    fence: Fence = field(default_factory=Fence)
    batch: Batch = field(default=nullcontext, repr=False)


def open_storage(url: str) -> Storage:
    """Open `url`, making its parent folder and its tables; raises `StorageError` with the remedy.

    Optuna's own log is lowered to warnings: progress is the caller's to show.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = _journal_path(url)
    if path is not None:
        return _open_journal(path)
    return _open_database(url)


def open_lease_book(storage: Storage) -> LeaseBook:
    """Where `storage` keeps who runs its studies, and their logs; the caller closes it."""
    path = _journal_path(storage.dashboard_url)
    return FileLeaseBook(path) if path is not None else SqlLeaseBook(storage.dashboard_url, storage.url)


@contextmanager
def faults_told(storage: Storage) -> Iterator[None]:
    """Inside the block a database that fails is a `StorageLostError`, with its own words and without secrets."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = redacted(str(error.__cause__ or error).strip().splitlines()[0])
        raise StorageLostError(
            f"storage {storage.url} went away ({cause}); nothing told is lost: resume the study when it is back"
        ) from error


def default_storage_url(directory: Path) -> str:
    """The SQLite database that a study uses unless its file names another storage."""
    return f"sqlite:///{directory / 'studies.db'}"


def masked(url: str) -> str:
    """`url` without its secrets."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return re.sub(r"[^/@\s]*@", "***@", url)
    query = {key: "***" if _SECRET_KEYS.search(key) else value for key, value in parsed.query.items()}
    return parsed.set(query=query).render_as_string(hide_password=True)


def _journal_path(url: str) -> Path | None:
    if url.startswith(JOURNAL_PREFIX):
        return Path(url.removeprefix(JOURNAL_PREFIX))
    return Path(url) if "://" not in url and url.endswith(JOURNAL_SUFFIXES) else None


def _open_journal(path: Path) -> Storage:
    _make_folder(path)
    fence = Fence()
    try:
        journal = FencedJournal(str(path), fence)
        backend = JournalStorage(journal)
    except OSError as error:
        raise StorageError(
            f"journal file {path} cannot be opened ({error.strerror}); choose a writable path"
        ) from error
    except ValueError as error:
        raise StorageError(f"{path} is no journal of Optuna ({error}); choose another file") from error
    return Storage(
        url=f"{JOURNAL_PREFIX}{path}",
        dashboard_url=f"{path}",
        backend=backend,
        direct=backend,
        fence=fence,
        batch=journal.batch,
    )


def _open_database(url: str) -> Storage:
    parsed = _parse(url)
    shown = masked(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    if is_sqlite and parsed.database not in (None, "", ":memory:"):
        _require_local(Path(str(parsed.database)))
        _make_folder(Path(str(parsed.database)))
    kwargs = {"connect_args": {"timeout": SQLITE_WAIT_S}} if is_sqlite else {"pool_pre_ping": True}
    template_safe = url.replace("{", "{{").replace("}", "}}")  # Optuna formats the URL; a password may hold braces
    try:
        database = _make_database(template_safe, kwargs)
    except ImportError as error:
        raise StorageError(f"no driver for storage {shown}; {_driver_remedy(parsed)}") from error
    except (SQLAlchemyError, RuntimeError, optuna.exceptions.OptunaError) as error:
        cause = _without_secrets(str(error.__cause__ or error), parsed)
        away = isinstance(error, OperationalError) and not is_sqlite
        kind = StorageLostError if away else StorageError
        raise kind(f"storage {shown} cannot be opened: {cause}; check address, name and rights") from error
    if is_sqlite:
        _tune_sqlite(database.engine)
    fence = Fence()
    fence_database(database.engine, fence)
    return Storage(
        url=shown,
        dashboard_url=url,
        backend=get_storage(database),
        direct=database,
        fence=fence,
        batch=database_batch(database),
    )


def _make_database(url: str, engine_kwargs: dict[str, Any]) -> RDBStorage:
    """Optuna's storage; where several processes make its tables at once, all but one have to look again."""
    for _ in range(OPEN_TRIES - 1):
        try:
            return RDBStorage(url, engine_kwargs=engine_kwargs)
        except IntegrityError:
            time.sleep(0.1)
        except (OperationalError, ProgrammingError) as error:
            if "already exists" not in str(error):
                raise
            time.sleep(0.1)
    return RDBStorage(url, engine_kwargs=engine_kwargs)


def _require_local(path: Path) -> None:
    found = network_file_system(path)
    if found is not None:
        point, kind = found
        raise StorageError(
            f"SQLite database {path} would lie on a network file system ({kind} at {point}), where SQLite's locks do "
            "not hold and studies get damaged; use postgresql://..., journal:///... on the same path, or a path on a "
            "local disk (tuner study run --storage sqlite:////local/disk/studies.db)"
        )


def _parse(url: str) -> URL:
    remedy = "give an URL such as sqlite:///studies.db, postgresql://user@host/name or journal:///studies.journal"
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except NoSuchModuleError as error:
        raise StorageError(f"storage {masked(url)} names an unknown database; {remedy}") from error
    except (ArgumentError, ValueError) as error:
        raise StorageError(f"storage {masked(url)!r} is no storage URL; {remedy}") from error
    return parsed


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"folder {path.parent} cannot be made ({error.strerror}); choose a writable path") from error


def _driver_remedy(url: URL) -> str:
    return _DRIVERS.get(url.get_backend_name(), "install the driver that SQLAlchemy names for it")


def _without_secrets(text: str, url: URL) -> str:
    first_line = text.strip().splitlines()[0] if text.strip() else "no reason given"
    secrets = [str(url.password)] if url.password else []
    secrets += [str(value) for key, value in url.query.items() if _SECRET_KEYS.search(key)]
    for secret in secrets:
        first_line = first_line.replace(secret, "***")
    return first_line


def _tune_sqlite(engine: Engine) -> None:
    """Write-ahead log, so that a dashboard reads while the study writes, and one sync per checkpoint.

    A killed process loses nothing; a power cut may lose the last transactions, never consistency
    (https://www.sqlite.org/pragma.html#pragma_synchronous).
    """

    @event.listens_for(engine, "connect")
    def _set_pragmas(connection: sqlite3.Connection, _record: object) -> None:
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous=NORMAL")

    engine.dispose()  # connections opened before the listener was there are replaced


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turn the write-ahead log on. The change itself does not wait for a writer, whatever the connection's timeout.

    SQLite refuses it at once while another connection writes the old way, as where two processes make a database.
    """
    deadline = time.monotonic() + SQLITE_WAIT_S
    while not _is_set(connection, "journal_mode=WAL", last=time.monotonic() >= deadline):
        time.sleep(0.05)


def _is_set(connection: sqlite3.Connection, pragma: str, *, last: bool) -> bool:
    """False where another connection is in the way; that is an error at the `last` try."""
    try:
        connection.execute(f"PRAGMA {pragma}")
    except sqlite3.OperationalError as error:
        if last or "locked" not in str(error):
            raise
        return False
    return True
