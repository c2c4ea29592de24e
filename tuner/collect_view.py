"""Progress of a collection: bars on a terminal, a line for each part elsewhere; on standard error."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 2.0


class CollectView:
    """Shows what is measured; `tell` prints a line, `advance` moves a bar."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, markup=False, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._told_s = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def tell(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, soft_wrap=True)

    def advance(self, table: str, done: int, total: int) -> None:
        """`done` of the `total` points of a table are there."""
        if self._console.is_terminal:
            if table not in self._tasks:
                self._tasks[table] = self._bars.add_task(table, total=total)
            self._bars.update(self._tasks[table], completed=done)
            return
        now_s = time.monotonic()
        if done == total or now_s - self._told_s > LINE_EVERY_S:
            self._told_s = now_s
            self.tell(f"{table}: {done} of {total}")
