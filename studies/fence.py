"""Checks before every write to a storage that its writer still may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from optuna.storages.journal import JournalFileBackend
from sqlalchemy import Connection, Engine, event

Guard = Callable[[], None]
_WRITES = ("INSERT", "UPDATE", "DELETE")
_WROTE = "tuner_wrote"


@dataclass
class Fence:
    """The guards of a storage: each raises where writing is not allowed (any more)."""

    guards: list[Guard] = field(default_factory=list)

    def check(self) -> None:
        """Ask every guard."""
        for guard in tuple(self.guards):
            guard()


class FencedJournal(JournalFileBackend):
    """A journal file that is appended to only where the fence lets it."""

    def __init__(self, file_path: str, fence: Fence) -> None:
        super().__init__(file_path)
        self._fence = fence
        self._collected: list[dict[str, Any]] | None = None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Check, then append, or collect in a batch; see `optuna.storages.journal.BaseJournalBackend`."""
        if self._collected is not None:
            self._collected += logs
            return
        self._fence.check()
        super().append_logs(logs)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """A context whose lines are appended together at its end; none of them where it raises."""
        self._collected = []
        try:
            yield
            logs = self._collected
        finally:
            self._collected = None
        self.append_logs(logs)


def fence_database(engine: Engine, fence: Fence) -> None:
    """Check before each statement of `engine` that writes, and again right before the commit that makes it count.

    A guard that raises there rolls the transaction back.
    """

    @event.listens_for(engine, "before_cursor_execute")
    def _before_statement(connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        if statement.lstrip()[:6].upper() in _WRITES:
            fence.check()
            connection.info[_WROTE] = True

    @event.listens_for(engine, "commit")
    def _before_commit(connection: Connection) -> None:
        if connection.info.pop(_WROTE, False):
            fence.check()

    @event.listens_for(engine, "rollback")
    def _after_rollback(connection: Connection) -> None:
        connection.info.pop(_WROTE, None)
