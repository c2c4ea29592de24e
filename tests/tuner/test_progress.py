"""What is shown while a study runs, in a terminal and in a log."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console, RenderableType

from search_spaces.outcome import Failure, FailureReason
from search_spaces.serving import Mode
from studies.records import Origin, Proposal, TrialStatus
from tests.studies.toy import toy_problem, wide_space
from tests.support.reports import a_report
from tuner.observer import Snapshot, Trying
from tuner.progress import LineProgress, LiveProgress

REPORT = a_report()
CANDIDATE = wide_space(toy_problem()).default(Mode.DISAGGREGATED)
PROPOSAL = Proposal(trial_number=40, candidate=CANDIDATE, origin=Origin.SCREENED, prediction=None)


def snapshot() -> Snapshot:
    return Snapshot(
        name="toy",
        problem=REPORT.problem,
        budget_trials=50,
        trials=REPORT.trials,
        screened_out=1234,
        hypervolume=42.0,
        time_left_s=125.0,
        recent_gain=0.25,
        trying=(Trying(proposal=PROPOSAL, phase="measure", elapsed_s=3.2),),
    )


def terminal() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=160, color_system=None, markup=False, highlight=False)
    return console, text


def test_the_live_view_shows_counts_the_current_trial_and_the_best() -> None:
    console, text = terminal()
    with LiveProgress(console) as view:
        view.note("a step")
        view.begun(PROPOSAL)
        view.ended(REPORT.trials[0], REPORT.problem)
        view.now(snapshot())
    shown = text.getvalue()
    for part in (
        "a step",
        f"{len(REPORT.trials)} of 50 trials, 1 failed, 1,234 screened out by the model",
        "hypervolume 42 (+25% over 5 trials), 2 min 5 s left",
        "measure 3 s: trial 40 (screened): disaggregated 1P x [defaults] + 1D x [defaults] at concurrency=4",
        "trial 0 measured: output_tokens_per_s=",
        "(predicted ",
        "best so far",
    ):
        assert part in shown
    bar = next(line for line in shown.splitlines() if "\u2501" in line)
    assert "trials" not in bar


def test_drawing_takes_a_twentieth_of_the_time_at_most() -> None:
    """A view that takes 1 s to draw is drawn every 20 s."""
    now_s, drawn = 0.0, []

    class Slow(LiveProgress):
        def _view(self, snapshot: Snapshot) -> RenderableType:
            nonlocal now_s
            drawn.append(now_s)
            now_s += 1.0
            return super()._view(snapshot)

    with Slow(terminal()[0], clock=lambda: now_s) as view:
        while now_s < 60.0:
            view.now(snapshot())
            now_s += 0.5
    assert drawn == [0.0, 20.0, 40.0]


def test_a_log_has_one_line_per_event() -> None:
    text = io.StringIO()
    clock = iter([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    log = LineProgress(Console(file=text, width=80, markup=False, highlight=False), clock=lambda: next(clock))
    with log:
        log.note("beginning")
        before = replace(snapshot(), trials=REPORT.trials[:-1])
        log.now(before)
        log.begun(replace(PROPOSAL, attempt=2))
        log.ended(REPORT.trials[-1], REPORT.problem)
        log.now(before)
        log.now(snapshot())
        log.now(snapshot())
    lines = text.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == "[   0.0 s] beginning"
    assert "trial 40 (screened, try 2): disaggregated" in lines[1]
    assert "failed: out_of_memory_at_boot: exit code 12" in lines[2]
    assert "1 failed" in lines[3]


def test_lost_trials_and_missed_slos_are_named() -> None:
    text = io.StringIO()
    log = LineProgress(Console(file=text, width=200, markup=False, highlight=False))
    missed = next(trial for trial in REPORT.measured if not trial.feasible)
    log.ended(missed, REPORT.problem)
    failure = Failure(reason=FailureReason.LOST_NODE, detail="node 1 left")
    log.ended(replace(missed, status=TrialStatus.LOST, outcome=failure), REPORT.problem)
    assert "misses the SLO on ttft_p99_ms" in text.getvalue()
    assert "lost: lost_node: node 1 left" in text.getvalue()
