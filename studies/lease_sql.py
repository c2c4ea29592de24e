"""Leases and logs in a database: two tables beside Optuna's own, reached through connections of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    func,
    insert,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from studies.codec import from_json, to_json
from studies.errors import StorageError, StorageLostError
from studies.lease_record import Event, LeaseRecord, Seen

WAIT_S = 15
"""How long a statement waits for SQLite's lock, and a connection for a server."""
_MEMORY = (None, "", ":memory:")
_NAME = String(255)
_TABLES = MetaData()
_LEASES = Table(
    "tuner_leases",
    _TABLES,
    Column("study", _NAME, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("record", Text, nullable=False),
)
_EVENTS = Table(
    "tuner_events",
    _TABLES,
    Column("study", _NAME, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at_s", Float(53), nullable=False),
    Column("run", Integer, nullable=False),
    Column("text", Text, nullable=False),
)
_CLOCKS = {
    "postgresql": "SELECT extract(epoch FROM clock_timestamp())",
    "mysql": "SELECT unix_timestamp(now(6))",
    "mariadb": "SELECT unix_timestamp(now(6))",
}
"""The server's clock; SQLite has none of its own, but its file is used on one machine only."""


class SqlLeaseBook:
    """See `studies.lease_record.LeaseBook`. `shown` is the URL as it may be shown."""

    def __init__(self, url: str, shown: str) -> None:
        self._shown = shown
        self._engine = _engine(url)
        self._ready = False

    def read(self, study: str) -> Seen:
        """One row, and the server's clock."""
        with self._connection() as connection:
            if not self._has_tables(connection):
                return Seen(now_s=_now_s(connection), record=None)
            found = connection.execute(select(_LEASES.c.record).where(_LEASES.c.study == study)).scalar()
            record = None if found is None else from_json(LeaseRecord, json.loads(found))
            return Seen(now_s=_now_s(connection), record=record)

    def swap(self, study: str, version: int, record: LeaseRecord) -> bool:
        """One statement in a transaction of its own: the database decides who wins."""
        self._make_tables()
        values = {"version": record.version, "record": json.dumps(to_json(record))}
        try:
            with self._connection() as connection:
                if version == 0:
                    connection.execute(insert(_LEASES).values(study=study, **values))
                    return True
                same = (_LEASES.c.study == study) & (_LEASES.c.version == version)
                return connection.execute(update(_LEASES).where(same).values(**values)).rowcount == 1
        except IntegrityError:
            return False

    def append(self, study: str, run: int, lines: Sequence[tuple[float, str]]) -> None:
        """All lines or none."""
        self._make_tables()
        last = select(func.coalesce(func.max(_EVENTS.c.number), 0)).where(_EVENTS.c.study == study)
        with self._connection() as connection:
            first = int(connection.execute(last).scalar_one()) + 1
            rows = [
                {"study": study, "number": first + i, "at_s": at_s, "run": run, "text": line}
                for i, (at_s, line) in enumerate(lines)
            ]
            connection.execute(insert(_EVENTS), rows)

    def events(self, study: str, after: int = 0) -> list[Event]:
        """In order."""
        wanted = (_EVENTS.c.study == study) & (_EVENTS.c.number > after)
        with self._connection() as connection:
            if not self._has_tables(connection):
                return []
            rows = connection.execute(select(_EVENTS).where(wanted).order_by(_EVENTS.c.number)).all()
        return [Event(number=row.number, at_s=row.at_s, run=row.run, text=row.text) for row in rows]

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """A transaction; faults of the database become `StorageError`, conflicts stay `IntegrityError`."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise StorageLostError(
                f"storage {self._shown} does not answer ({cause}); check that it runs and can be reached"
            ) from error

    def _has_tables(self, connection: Connection) -> bool:
        self._ready = self._ready or inspect(connection).has_table(_EVENTS.name)
        return self._ready

    def _make_tables(self) -> None:
        """Both tables, made by whoever comes first."""
        if self._ready:
            return
        try:
            with self._connection() as connection:
                if not self._has_tables(connection):
                    _TABLES.create_all(connection)
        except (IntegrityError, StorageError):
            with self._connection() as connection:
                if not self._has_tables(connection):
                    raise
        self._ready = True


def _engine(url: str) -> Engine:
    if url.startswith("sqlite"):
        in_memory = {"poolclass": StaticPool} if make_url(url).database in _MEMORY else {}
        return create_engine(url, connect_args={"timeout": WAIT_S, "check_same_thread": False}, **in_memory)
    return create_engine(url, pool_size=1, max_overflow=2, pool_pre_ping=True, pool_timeout=WAIT_S)


def _now_s(connection: Connection) -> float:
    """The clock of the server, or of this machine for SQLite."""
    query = _CLOCKS.get(connection.dialect.name)
    return time.time() if query is None else float(connection.execute(text(query)).scalar_one())
