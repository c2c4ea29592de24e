"""How a running campaign is shown: lines in a pipe, a picture in a terminal."""

from __future__ import annotations

from io import StringIO
from typing import Any, cast

from rich.console import Console

from studies.records import Origin, Proposal
from tests.studies.toy import toy_problem, wide_space
from tuner.campaigns.look import View
from tuner.campaigns.view import CampaignView
from tuner.observer import Snapshot, Trying

PROPOSAL = Proposal(
    trial_number=7, candidate=wide_space(toy_problem()).default(), origin=Origin.SCREENED, prediction=None
)
NOTHING = cast("View", None)  # the pictures of these tests do not look at it


def snapshot() -> Snapshot:
    trying: Any = (Trying(proposal=PROPOSAL, phase="measure", elapsed_s=12.0),)
    return Snapshot(
        name="a",
        problem=toy_problem(),
        budget_trials=4,
        trials=(),
        screened_out=0,
        hypervolume=0.0,
        time_left_s=None,
        trying=trying,
    )


def test_in_a_pipe_every_event_is_a_line_and_the_campaign_s_own_go_to_its_log() -> None:
    out, log = StringIO(), list[str]()
    with CampaignView(Console(file=out, width=200), note_line=log.append) as view:
        view.note("slice 1, search in a: it has not begun")
        view.study("a").note("beginning study a")
        view.study("a").begun(PROPOSAL)
        view.study("a").now(snapshot())
        view.now(NOTHING)
    assert log == ["slice 1, search in a: it has not begun"]
    shown = out.getvalue()
    assert "slice 1, search in a" in shown
    assert "a: beginning study a" in shown
    assert "a: trial 7 (screened)" in shown


def test_in_a_terminal_the_picture_is_drawn_with_what_is_tried_and_the_last_events() -> None:
    out = StringIO()
    console = Console(file=out, width=160, force_terminal=True)
    with CampaignView(console, draw=lambda _: "the picture") as view:
        view.now(NOTHING)
        view.study("a").now(snapshot())
        view.note("slice 1 ended")
    assert "the picture" in out.getvalue()
    assert "measure 12 s: a: trial 7" in out.getvalue()
    assert "slice 1 ended" in out.getvalue()
