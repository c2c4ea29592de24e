"""All experiments of a study file: one after the other on this machine, at once on a cluster that was joined.

On one machine they would share its cores and disturb each other's timings. On a cluster each has a coordinator of its
own, a process of this machine, and Ray gives each trial its devices; what waits for devices waits there.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self, cast

from tuner.experiments import names_in
from tuner.layers_file import LayerError
from tuner.study_errors import StudyFileError
from tuner.study_file import raw_tree

NOT_BEGUN = 130
"""Exit code of an experiment that was not begun after Ctrl-C, as of one that was interrupted."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `tuner study run` was given beside the file."""

    address: str | None
    overrides: tuple[str, ...]
    storage: str | None
    detached: bool


def experiments_of(file: Path, overrides: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the experiments to run: all of the file, or none where `overrides` picks one, or it holds none."""
    tree = raw_tree(file)
    try:
        names = names_in(tree)
    except LayerError as error:
        raise StudyFileError(f"{file}: {error}") from error
    picked = "experiment" in tree or any(text.partition("=")[0].strip() == "experiment" for text in overrides)
    return () if picked else names


def run_all(file: Path, names: Sequence[str], options: Options) -> dict[str, int]:
    """Run every experiment by a command of its own, and return their exit codes by name; 130 for one not begun.

    They run at once where an address is given, else one after the other. SIGINT and SIGTERM are handed on to those that
    run, which stop as a single study does; the others do not begin.
    """
    with _Running() as running, ThreadPoolExecutor(len(names) if options.address else 1) as pool:
        futures = {name: pool.submit(running.run, name, _command(file, name, options)) for name in names}
        return {name: future.result() for name, future in futures.items()}


class _Running:
    """The processes that run; inside its `with` block they get the signals that this process gets."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._stopped = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, cast("signal.Handlers", handler))

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        self._stopped = True
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def run(self, name: str, command: Sequence[str]) -> int:
        """Run `command`, print what it says under `name`, and return its exit code."""
        if self._stopped:
            return NOT_BEGUN
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a Ctrl-C of the terminal comes through this process, once
        )
        self._processes.append(process)
        with process:
            for line in process.stdout or ():
                print(f"[{name}] {line}", end="", flush=True)
        return process.returncode


def _command(file: Path, name: str, options: Options) -> list[str]:
    sets = [word for text in (f"experiment={name}", *options.overrides) for word in ("--set", text)]
    address = ["--address", options.address] if options.address else []
    storage = ["--storage", options.storage] if options.storage else []
    detached = ["--detach"] if options.detached else []
    base = [sys.executable, "-m", "tuner.cli", "study", "run", str(file), "--no-progress"]
    return [*base, *sets, *address, *storage, *detached]
