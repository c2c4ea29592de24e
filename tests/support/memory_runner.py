"""A trial runner without processes: it keeps the promises of `cluster.runner.TrialRunner`, with outcomes by formula.

It checks its caller too: nothing is started twice, and a closed runner starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.runner import Running, TrialHandle, TrialRequest
from search_spaces.outcome import Outcome
from search_spaces.serving import ServingConfig
from tests.studies.toy import measure


def measured(request: TrialRequest) -> Outcome:
    """The outcome of `request` on the toy surface, with an artefact."""
    log = request.artifact_dir / "engine.log"
    log.write_text(f"{request.trial}\n")
    return measure(request.candidate, {"engine.log": str(log)})


@dataclass
class MemoryRunner:
    """Measures by `outcome_of`, after `polls` polls that say `Running`."""

    outcome_of: Callable[[TrialRequest], Outcome] = measured
    polls: int = 1
    requests: list[TrialRequest] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    most_in_flight: int = 0
    closed: bool = False
    _running: dict[str, tuple[TrialRequest, int]] = field(default_factory=dict)
    _warm: dict[str, ServingConfig] = field(default_factory=dict)

    def start(self, request: TrialRequest) -> TrialHandle:
        assert not self.closed, "a closed runner was asked to start a trial"
        assert request.trial not in self._running, f"{request.trial} runs already"
        assert request.artifact_dir.is_dir()
        self.requests.append(request)
        self._running[request.trial] = (request, self.polls)
        self.most_in_flight = max(self.most_in_flight, len(self._running))
        return TrialHandle(trial=request.trial, config_key=request.candidate.config.key)

    def poll(self, handle: TrialHandle) -> Running | Outcome:
        request, left = self._running[handle.trial]
        if left:
            self._running[handle.trial] = (request, left - 1)
            return Running(phase="measure", elapsed_s=float(self.polls - left))
        del self._running[handle.trial]
        self._warm = {handle.config_key: request.candidate.config}
        return self.outcome_of(request)

    def stop(self, handle: TrialHandle) -> None:
        if self._running.pop(handle.trial, None):
            self.stopped.append(handle.trial)

    def warm(self) -> tuple[ServingConfig, ...]:
        return tuple(self._warm.values())

    def release(self) -> None:
        self._warm.clear()

    def close(self) -> None:
        self.closed = True
        assert not self._running, f"{sorted(self._running)} were left running"


@dataclass
class Silence:
    """An observer that remembers what it was told."""

    notes: list[str] = field(default_factory=list)
    begun_trials: list[int] = field(default_factory=list)
    ended_trials: list[int] = field(default_factory=list)
    snapshots: list[object] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begun(self, proposal: object) -> None:
        self.begun_trials.append(proposal.trial_number)  # type: ignore[attr-defined]  # a Proposal

    def ended(self, record: object, _problem: object) -> None:
        self.ended_trials.append(record.number)  # type: ignore[attr-defined]  # a TrialRecord

    def now(self, snapshot: object) -> None:
        self.snapshots.append(snapshot)
