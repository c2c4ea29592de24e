"""Runs that the service starts: each a `tuner study run` of its own, which goes on when the service ends.

Where the service was given a Ray cluster, the command hands the coordinator over to the cluster (`--detach`) and ends;
otherwise it is the coordinator itself, on this machine, where one study runs at a time: two would disturb each other's
timings. Storage and other secrets go through the environment, and the tokens of the service go nowhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from studies.errors import StudyBusyError
from studies.redaction import redacted
from tuner.places import DATA_VARIABLE, STORAGE_VARIABLE, Place
from tuner.serve.access import READ_VARIABLE, WRITE_VARIABLE

TAIL_LINES = 20
TAIL_BYTES = 16 * 1024
KEPT = 100
"""Ended runs that are remembered; what they wrote stays beside the study."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A process that was started for a study."""

    study: str
    process: subprocess.Popen[bytes]
    log: Path
    since_s: float

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    @property
    def tail(self) -> str:
        """The last lines that it wrote, without passwords."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            lines = deque(log.read().decode("utf-8", "replace").splitlines(), TAIL_LINES)
        return redacted("\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of a service on `place`; `address` is that of its Ray cluster, None for this machine."""

    place: Place
    address: str | None = None
    command: Sequence[str] = (sys.executable, "-m", "tuner.cli")
    _known: dict[str, Run] = field(default_factory=dict)
    _starting: threading.Lock = field(default_factory=threading.Lock)

    def all(self) -> tuple[Run, ...]:
        """Every run that is remembered, the earliest first."""
        with self._starting:
            return tuple(self._known.values())

    def find(self, study: str) -> Run | None:
        """The last run of `study`."""
        return self._known.get(study)

    def submit(self, study: str, text: str) -> Run:
        """Run the study file in `text`, which was checked; raises `StudyBusyError` as `resume` does."""
        with self._starting:
            self._require_free(study)
            path = self._base(study).with_suffix(".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return self._start(study, ["run", str(path)])

    def resume(self, study: str, overrides: Sequence[str]) -> Run:
        """Go on with a stored study, after `overrides` (`budget.trials=8`).

        Raises `StudyBusyError` where its last run has not ended, and on this machine where any has not.
        """
        with self._starting:
            self._require_free(study)
            return self._start(study, ["resume", study, *(word for text in overrides for word in ("--set", text))])

    def _require_free(self, study: str) -> None:
        for run in self._known.values():
            if run.exit_code is not None:
                continue
            if run.study == study:
                raise StudyBusyError(f"study {study!r} runs already; follow it, or stop it first")
            if self.address is None:
                raise StudyBusyError(
                    f"study {run.study!r} runs, and this machine runs one at a time; wait for its end, or stop it"
                )

    def _base(self, study: str) -> Path:
        return self.place.coordinator(study).with_name("submitted")

    def _start(self, study: str, arguments: Sequence[str]) -> Run:
        log = self._base(study).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        cluster = ["--address", self.address, "--detach"] if self.address else []
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*self.command, "study", *arguments, "--no-progress", *cluster],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=self._environment(os.environ),
                start_new_session=True,  # a Ctrl-C of the service does not end what it has started
            )
        run = Run(study=study, process=process, log=log, since_s=time.time())
        self._remember(run)
        return run

    def _remember(self, run: Run) -> None:
        self._known.pop(run.study, None)
        self._known[run.study] = run
        ended = [name for name, known in self._known.items() if known.exit_code is not None]
        for name in ended[: max(0, len(ended) - KEPT)]:
            del self._known[name]

    def _environment(self, own: Mapping[str, str]) -> dict[str, str]:
        """That of the service without its tokens, and where the studies are."""
        kept = {key: value for key, value in own.items() if key not in (READ_VARIABLE, WRITE_VARIABLE)}
        return kept | {STORAGE_VARIABLE: self.place.absolute_url, DATA_VARIABLE: str(self.place.directory)}
