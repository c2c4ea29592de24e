"""Carrying out slices: here, one after the other, or on a joined cluster side by side, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from search_spaces.errors import TunerError
from tuner.access import Connect
from tuner.observer import Observer
from tuner.places import DATA_VARIABLE, STORAGE_VARIABLE, Place
from tuner.session import Again, run_study
from tuner.study_file import dump_study
from tuner.study_schema import BudgetSection, StudyFile

END_LIMIT_S = 60.0
"""How long a process whose slice was stopped is waited for before it is killed."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A study, how far it is to go, what it measures once more, and hosts that are to be avoided."""

    study: StudyFile
    portion: BudgetSection
    again: Again | None = None
    avoid: tuple[str, ...] = ()


class SliceRunner(Protocol):
    """Carries out slices. At most one of a study, and not more than `at_once` together."""

    @property
    def at_once(self) -> int:
        """Slices that may run side by side."""
        ...

    def start(self, order: Order, observer: Observer) -> None:
        """Begin a slice; may return only when it has ended."""
        ...

    def ended(self) -> dict[str, str | None]:
        """Studies whose slices have ended since the last call, with what went wrong, None where nothing did."""
        ...

    def stop(self) -> None:
        """Ask all slices to end; what they measure is given back."""
        ...

    def close(self) -> None:
        """End whatever still runs."""
        ...


Connector = Callable[[StudyFile, tuple[str, ...]], Connect]
"""How to reach the nodes of a study, but for the hosts that are avoided."""


@dataclass
class SlicesHere:
    """One slice at a time, in this process; `stop_requested` is asked several times a second."""

    connector: Connector
    place: Place
    stop_requested: Callable[[], bool]
    _ended: dict[str, str | None] = field(default_factory=dict)

    at_once: int = 1

    def start(self, order: Order, observer: Observer) -> None:
        """Run the slice to its end."""
        name = order.study.name
        try:
            connect = self.connector(order.study, order.avoid)
            run_study(
                order.study,
                self.place,
                connect=connect,
                stop=self._stop(),
                observer=observer,
                portion=order.portion,
                again=order.again,
            )
        except TunerError as error:
            self._ended[name] = str(error)
        else:
            self._ended[name] = None

    @contextmanager
    def _stop(self) -> Iterator[Callable[[], bool]]:
        yield self.stop_requested

    def ended(self) -> dict[str, str | None]:
        """As `SliceRunner.ended`."""
        found, self._ended = self._ended, {}
        return found

    def stop(self) -> None:
        """Nothing runs between two calls of `start`."""

    def close(self) -> None:
        """Nothing runs between two calls of `start`."""


@dataclass
class _Child:
    """A slice in a process of its own, and the last lines that it has printed."""

    process: subprocess.Popen[str]
    reader: threading.Thread
    tail: list[str]


@dataclass
class SlicesApart:
    """Slices as processes of this machine, on the Ray cluster at `address`, which gives each trial its devices."""

    address: str
    place: Place
    folder: Path
    at_once: int
    _children: dict[str, _Child] = field(default_factory=dict)

    def start(self, order: Order, observer: Observer) -> None:
        """Start the process; what it says goes to `observer`."""
        name = order.study.name
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.json"
        path.write_text(_order_text(order), encoding="utf-8")
        environment = os.environ | {
            STORAGE_VARIABLE: self.place.absolute_url,
            DATA_VARIABLE: str(self.place.directory),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "tuner.campaigns.slice_process", str(path), self.address],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a Ctrl-C of the terminal comes through this process, once
        )
        tail: list[str] = []
        reader = threading.Thread(target=_read, args=(process, tail, observer), daemon=True)
        reader.start()
        self._children[name] = _Child(process=process, reader=reader, tail=tail)

    def ended(self) -> dict[str, str | None]:
        """As `SliceRunner.ended`."""
        found: dict[str, str | None] = {}
        for name, child in tuple(self._children.items()):
            code = child.process.poll()
            if code is not None:
                child.reader.join(END_LIMIT_S)
                found[name] = None if code == 0 else f"exit code {code}: {' '.join(child.tail[-3:])}"
                del self._children[name]
        return found

    def stop(self) -> None:
        """As Ctrl-C would."""
        for child in self._children.values():
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Stop what runs; kill what has not ended in time."""
        self.stop()
        for child in self._children.values():
            try:
                child.process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._children.clear()


def _order_text(order: Order) -> str:
    portion = order.portion.model_dump(mode="json", exclude_none=True)
    again = None if order.again is None else {"trial": order.again.trial, "runs": order.again.runs}
    study = dump_study(order.study)
    return json.dumps({"study": study, "portion": portion, "again": again, "avoid": list(order.avoid)})


def _read(process: subprocess.Popen[str], tail: list[str], observer: Observer) -> None:
    for line in process.stdout or ():
        tail.append(line.strip())
        del tail[:-20]
        observer.note(line.rstrip())
