"""Several writes as one: they reach the storage together, or not at all.

Optuna commits every attribute by itself. Here its own calls are made inside a transaction that is begun outside: what
SQLAlchemy documents as joining a session into an external transaction. A journal collects the lines, and appends them
with one write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from optuna.storages import RDBStorage
from sqlalchemy.orm import scoped_session, sessionmaker

Batch = Callable[[], AbstractContextManager[None]]


def database_batch(database: RDBStorage) -> Batch:
    """A context in which all writes of this thread through `database` are one transaction, reads see them already.

    Any exception undoes them. It must not be nested, and no other thread may use `database` meanwhile.
    """

    @contextmanager
    def batch() -> Iterator[None]:
        usual = database.scoped_session
        with database.engine.connect() as connection, connection.begin():
            joined = scoped_session(sessionmaker(bind=connection, join_transaction_mode="rollback_only"))
            database.scoped_session = joined
            try:
                yield
            finally:
                joined.remove()
                database.scoped_session = usual

    return batch
