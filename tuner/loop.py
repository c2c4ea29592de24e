"""The search, from the first proposal to the last measurement.

Ask the study for a candidate, let the runner measure it, tell the study, correct the model with what was learned, until
the budget is used, the space is exhausted or someone asks to stop. At the end the front is confirmed: its members are
measured again until each has the runs that the study wants, and so are those that take their places.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.runner import Running, TrialHandle, TrialRequest, TrialRunner
from perf_model.calibration import CalibratedPredictor
from perf_model.numeric import FloatArray
from search_spaces.measuring import MeasurementRule, TimeLimits
from search_spaces.outcome import Failure, Outcome, Prediction
from search_spaces.problem import Problem
from search_spaces.serving import Candidate
from studies.errors import SpaceExhausted
from studies.records import Proposal, TrialRecord, TrialStatus
from studies.repeats import confirmation_s
from studies.spending import Spent, spent
from studies.stock import SHARE
from studies.stopping import Budget, Progress, StopReason, over_budget, stop_reason
from studies.study import Study
from tuner.observer import RECENT_TRIALS, Observer, Snapshot, Trying
from tuner.utilisation import Utilisation, crowded_pools

POLL_S = 0.1
ASKED_AT_ONCE = 8
"""Candidates that are chosen jointly, at most: the first of them waits for the last to be chosen."""
LEARNT_FROM = 400
"""Measurements that the model learns from: half of them the latest, the others spread over all earlier ones.

Learning and correcting cost the square of their number and more; a search ends near the front, where the latest are.
"""
LEARNT_ANEW = 100
"""The model learns anew when a hundredth more was measured; until then what was is believed as predicted."""
WAITING_PHASE = "placement"
CONFIRMING_SHARE = 1 / 3
"""Share of a limited wall time that the search leaves for confirmations, at most."""


NOTE_USE_S = 60.0
"""A run that is killed has noted how it used the devices up to so long before."""
DONE = object()


class LearningModel:
    """The performance model, corrected by every measurement."""

    def __init__(self, predictor: CalibratedPredictor) -> None:
        self._learned = predictor
        self._believing: CalibratedPredictor | None = predictor
        self._open: dict[int, Candidate] = {}
        self._believed: frozenset[int] = frozenset()
        self._known: frozenset[int] = frozenset()
        self._running = 0

    @property
    def _predictor(self) -> CalibratedPredictor:
        """As corrected so far, with what is open believed: made when it is asked for, not at every change."""
        if self._believing is None:
            self._believing = self._learned.believing(tuple(self._open.values()))
            self._believed = frozenset(self._open)
        return self._believing

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        """One prediction for each candidate, in order, as corrected so far."""
        return self._predictor.predict(candidates)

    def shared(self, candidates: Sequence[Candidate], metrics: Sequence[str]) -> Callable[[int], FloatArray]:
        """What the predictions of `candidates` have in common; see `CalibratedPredictor.shared`."""
        return self._predictor.shared(candidates, metrics)

    def learn(self, trials: Sequence[TrialRecord]) -> None:
        """Calibrate anew on the measured `trials`, and believe what is predicted of those being measured."""
        measured = {trial.number for trial in trials if trial.measurement}
        is_behind = len(measured - self._known) > max(len(self._known) // LEARNT_ANEW, self._running // SHARE)
        if not self._known or is_behind or not self._known <= measured:  # earlier studies teach before the first trial
            ended = sorted((t for t in trials if t.measurement), key=_end_s)
            known = [
                (t.candidate, t.measurement.metrics.flat()) for t in sampled(ended) if t.candidate and t.measurement
            ]
            self._learned = self._learned.learned(known)
            self._known, self._believing = frozenset(measured), None
        self.believe(trials)

    def believe(self, trials: Sequence[TrialRecord]) -> None:
        """Take what is being measured among `trials` for measured as predicted, so that nothing alike is asked.

        Where very many are, a few that began or ended make no difference (see `studies.stock`).
        """
        self._open = {t.number: t.candidate for t in trials if t.candidate and self._is_open(t)}
        self._running = sum(trial.status is TrialStatus.RUNNING for trial in trials)
        if len(self._open.keys() ^ self._believed) > self._running // SHARE:
            self._believing = None

    def _is_open(self, trial: TrialRecord) -> bool:
        is_new = trial.measurement is not None and trial.number not in self._known
        return is_new or trial.status is TrialStatus.RUNNING


def sampled(trials: Sequence[TrialRecord], most: int = LEARNT_FROM) -> Sequence[TrialRecord]:
    """`trials`, or where there are more than `most`: the latest half of so many, the rest evenly from all before."""
    if len(trials) <= most:
        return trials
    latest = most // 2
    earlier = trials[:-latest]
    count = most - latest
    return [*(earlier[i * len(earlier) // count] for i in range(count)), *trials[-latest:]]


def _end_s(trial: TrialRecord) -> float:
    return trial.ended_at.timestamp() if trial.ended_at else 0.0


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """How a search is carried out; every trial gets a folder of its own in `work_dir`."""

    problem: Problem
    rule: MeasurementRule
    limits: TimeLimits
    budget: Budget
    work_dir: Path
    seed: int
    in_flight: int = 1


@dataclass
class _InFlight:
    """A started trial."""

    proposal: Proposal
    handle: TrialHandle
    state: Running


@dataclass(frozen=True, kw_only=True)
class _View:
    """The study as it was after the last change: reading it costs too much for every poll.

    `confirming_s` are the seconds that confirming its front would take, 0 where the time is not limited.
    """

    trials: tuple[TrialRecord, ...]
    progress: Progress
    spent: Spent
    confirming_s: float
    hypervolume: float
    gain: float | None


def recent_gain(volumes: Sequence[float], trials: int = RECENT_TRIALS) -> float | None:
    """Relative growth of the hypervolume over the last `trials` trials; None where there was nothing before them."""
    if len(volumes) <= trials or volumes[-1 - trials] <= 0:
        return None
    return volumes[-1] / volumes[-1 - trials] - 1.0


@dataclass
class Search:
    """One run of a study. `stop_requested` is asked several times a second."""

    study: Study
    runner: TrialRunner
    model: LearningModel
    plan: SearchPlan
    observer: Observer
    stop_requested: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    utilisation: Utilisation = field(init=False)
    _trying: list[_InFlight] = field(default_factory=list)
    _unstarted: list[Proposal] = field(default_factory=list)
    _exhausted: bool = False
    _time_is_up: bool = False
    _confirming: bool = False
    _started: float = 0.0
    _view: _View = field(init=False)
    _use_noted_s: float = 0.0
    _thoughts: Iterator[None] = field(default_factory=lambda: iter(()))

    def run(self) -> StopReason | None:
        """Search until a reason to stop, then confirm the front; None where a stop was requested.

        Nothing is left running then.
        """
        self._started = self._use_noted_s = self.clock()
        self.utilisation = Utilisation(devices=sum(pool.devices for pool in self.plan.problem.node_pools))
        self._look()
        self.model.learn(self._view.trials)
        try:
            while not self.stop_requested():
                reason = self._reason_to_stop()
                self.utilisation.add(self.clock(), self._reserved(), proposals_remain=reason is None)
                begun = len(self._trying) < self.plan.in_flight and self._fill(reason)
                if reason is not None and not self._trying:
                    return reason
                if not self._collect() and self._trying and not begun:
                    self._wait()
                self.observer.now(self._snapshot())
            return None
        finally:
            self._abandon()

    def _crowded(self) -> AbstractSet[str]:
        """Node pools that enough is waiting for: what is chosen for them now would begin late, and know too little."""
        configs = [(trial.proposal.candidate.config, trial.state.phase == WAITING_PHASE) for trial in self._trying]
        held = [config for config, waits in configs if not waits]
        return crowded_pools(self.plan.problem.node_pools, held, [config for config, waits in configs if waits])

    def _reserved(self) -> int:
        """Devices that hold a deployment with a trial: those that only wait for devices have none."""
        return sum(t.proposal.candidate.config.devices for t in self._trying if t.state.phase != WAITING_PHASE)

    def _look(self) -> None:
        volumes = [point.hypervolume for point in self.study.hypervolume_history(RECENT_TRIALS + 1)]
        trials = self.study.trials()
        self._view = _View(
            trials=trials,
            progress=self.study.progress(),
            spent=spent(trials, self.plan.problem),
            confirming_s=self._confirming_s(trials),
            hypervolume=volumes[-1] if volumes else 0.0,
            gain=recent_gain(volumes),
        )

    def _confirming_s(self, trials: Sequence[TrialRecord]) -> float:
        rule, wall_s = self.study.setup.repeats, self.plan.budget.wall_s
        if wall_s is None or rule.confirm == 1:
            return 0.0
        expected_s = confirmation_s(trials, self.study.front(), rule, self.plan.in_flight)
        return min(expected_s, CONFIRMING_SHARE * wall_s)

    def _reason_to_stop(self, more: int = 0) -> StopReason | None:
        """Why no candidate is asked for once `more` have begun.

        Time that is up once stays so, though confirming then needs less.
        """
        needed_s = self._elapsed_s + self._view.confirming_s
        budget, view = self.plan.budget, self._view
        self._time_is_up = self._time_is_up or (budget.wall_s is not None and needed_s >= budget.wall_s)
        elapsed_s = math.inf if self._time_is_up else needed_s
        progress = replace(view.progress, running=view.progress.running + more)
        return stop_reason(budget, progress, elapsed_s=elapsed_s, space_exhausted=self._exhausted, spent=view.spent)

    def _wanted(self) -> int:
        """Candidates to ask for at once: for every free place, as far as the budget goes."""
        free = min(self.plan.in_flight - len(self._trying), ASKED_AT_ONCE)
        return 1 + sum(1 for _ in itertools.takewhile(lambda more: self._reason_to_stop(more) is None, range(1, free)))

    @property
    def _elapsed_s(self) -> float:
        return self.clock() - self._started

    def _fill(self, reason: StopReason | None) -> bool:
        """Begin what may be begun; True where that left places free, which are not to wait for the next turn."""
        began = len(self._trying)
        self._begin(self._wanted()) if reason is None else self._confirm(reason)
        return began < len(self._trying) < self.plan.in_flight

    def _begin(self, wanted: int) -> None:
        """Ask for candidates and start measuring them."""
        try:
            proposals = self.study.ask_batch(wanted, warm=self.runner.warm(), crowded=self._crowded())
        except SpaceExhausted:
            self._exhausted = True
            return
        self._start(proposals)

    def _confirm(self, reason: StopReason) -> None:
        """Measure again what the front is made of, once no candidate is being measured any more."""
        wall_s = self.plan.budget.wall_s
        is_late = wall_s is not None and self._elapsed_s >= wall_s
        if is_late or reason is StopReason.INFRASTRUCTURE or self._view.progress.running:
            return
        if over_budget(self.plan.budget, self._view.spent.with_running(len(self._trying))):
            return
        proposal = self.study.ask_repeat(warm=self.runner.warm())
        if proposal is None:
            return
        if not self._confirming:
            self._confirming = True
            runs = self.study.setup.repeats.confirm
            self.observer.note(f"{reason}; confirming the front: {runs} runs of each member")
        self._start([proposal])

    def _start(self, proposals: Sequence[Proposal]) -> None:
        self._unstarted = list(proposals)
        while self._unstarted:
            proposal = self._unstarted[0]
            handle = self.runner.start(self._request(proposal))
            started = Running(phase="start", elapsed_s=0.0)
            self._trying.append(_InFlight(proposal=proposal, handle=handle, state=started))
            self._unstarted.pop(0)
            self.observer.begun(proposal)
        self._look()
        self.model.believe(self._view.trials)
        self._thoughts = self._new_thoughts()

    def _request(self, proposal: Proposal) -> TrialRequest:
        directory = self._folder(proposal)
        directory.mkdir(parents=True, exist_ok=True)
        return TrialRequest(
            trial=directory.name,
            candidate=proposal.candidate,
            problem=self.plan.problem,
            rule=self.plan.rule,
            limits=self.plan.limits,
            artifact_dir=directory,
            seed=self.plan.seed + proposal.trial_number,
            first_rate=self._first_rate(proposal),
        )

    def _first_rate(self, proposal: Proposal) -> float | None:
        """Where a search for the highest rate begins: at the rate that the model expects to be served."""
        if self.plan.problem.workload.rate_search is None or proposal.prediction is None:
            return None
        return proposal.prediction.metrics.get("requests_per_s")

    def _collect(self) -> bool:
        """Poll what is in flight; tell the study of what has ended, and let the model learn from it: True for any."""
        ended = False
        for trial in tuple(self._trying):
            state = self.runner.poll(trial.handle)
            if isinstance(state, Running):
                trial.state = state
                continue
            if isinstance(state, Failure) and self.stop_requested():
                continue  # Ctrl-C reaches the engines too: their end says nothing of the configuration
            self._trying.remove(trial)
            self._tell(trial.proposal, state)
            ended = True
        if ended:
            self._look()
            self.model.learn(self._view.trials)
            self._thoughts = self._new_thoughts()
        return ended

    def _new_thoughts(self) -> Iterator[None]:
        """What to think of while trials run; nothing with one at a time: it may be measured on this very machine."""
        if self.plan.in_flight == 1:
            return iter(())
        return self.study.think_ahead(self.runner.warm(), self._crowded())

    def _wait(self) -> None:
        """Until the next poll is due: think ahead, and sleep when there is nothing to think of any more."""
        until_s = self.clock() + POLL_S
        while self.clock() < until_s:
            if next(self._thoughts, DONE) is DONE:
                self.sleep(POLL_S)
                return

    def _tell(self, proposal: Proposal, outcome: Outcome) -> None:
        """Record the outcome; its files are artefacts of the study then, and their first copies go."""
        record = self.study.tell(proposal, outcome)
        if self.clock() - self._use_noted_s >= NOTE_USE_S:
            self._note_use()
        shutil.rmtree(self._folder(proposal), ignore_errors=True)
        self.observer.ended(record, self.plan.problem)

    def _note_use(self) -> None:
        self._use_noted_s = self.clock()
        self.study.note_device_use(self.utilisation.use)

    def _folder(self, proposal: Proposal) -> Path:
        return self.plan.work_dir / f"{self.study.setup.name}-{proposal.trial_number}"

    def _snapshot(self) -> Snapshot:
        wall_s = self.plan.budget.wall_s
        return Snapshot(
            name=self.study.setup.name,
            problem=self.plan.problem,
            budget_trials=self.plan.budget.trials,
            trials=self._view.trials,
            screened_out=self.study.screened_out,
            hypervolume=self._view.hypervolume,
            recent_gain=self._view.gain,
            time_left_s=None if wall_s is None else max(0.0, wall_s - self._elapsed_s),
            trying=tuple(
                Trying(proposal=t.proposal, phase=t.state.phase, elapsed_s=t.state.elapsed_s) for t in self._trying
            ),
        )

    def _abandon(self) -> None:
        """Stop what is in flight and give its proposals back, so that a resume measures them."""
        for trial in self._trying:
            self.runner.stop(trial.handle)
            self.study.release(trial.proposal)
            shutil.rmtree(self._folder(trial.proposal), ignore_errors=True)
        for proposal in self._unstarted:
            self.study.release(proposal)
            shutil.rmtree(self._folder(proposal), ignore_errors=True)
        self._trying.clear()
        self._unstarted.clear()
