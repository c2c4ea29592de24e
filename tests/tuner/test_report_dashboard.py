"""Notes and charts of ours in optuna-dashboard: in its API, and in a real browser."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna_dashboard
import pytest

from search_spaces.outcome import Failure, FailureReason
from search_spaces.problem import Slo
from studies.dashboard import open_dashboard
from studies.dashboard_views import FOUND
from studies.history import load_optuna_study
from studies.storage import Storage, open_storage
from studies.study import create_study
from tests.studies.toy import measure, small_space, toy_problem, toy_setup
from tests.support.browser import Browser, find_browser
from tuner.report import StudyReport
from tuner.report_dashboard import publish


@pytest.fixture
def published(tmp_path: Path) -> tuple[Storage, StudyReport]:
    """A study with a failed trial, some that were measured, and its views."""
    problem = toy_problem((Slo(metric="ttft_p50_ms", threshold=40.0),))
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    with create_study(storage, toy_setup(tmp_path, space=small_space(problem))) as study:
        failure = Failure(
            reason=FailureReason.INVALID_FLAGS, detail="unknown argument --warp", log_tail="usage: engine"
        )
        study.tell(study.ask(), failure)
        for _ in range(5):
            proposal = study.ask()
            study.tell(proposal, measure(proposal.candidate))
        found = StudyReport(
            name=study.history.name, status="unfinished", problem=problem, trials=study.trials(), storage=storage.url
        )
        publish(storage, found)
    return storage, found


@contextmanager
def served(storage: Storage, folder: Path) -> Iterator[str]:
    with open_dashboard(storage, folder / "artifacts", host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def get(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(address) as answer:  # noqa: S310 - a local address
        return dict(json.load(answer))


def test_the_api_has_notes_charts_and_feasible_best_trials(
    published: tuple[Storage, StudyReport], tmp_path: Path
) -> None:
    storage, found = published
    with served(storage, tmp_path) as address:
        detail = get(f"{address}/api/studies/1")
    notes = {trial["number"]: trial["note"]["body"] for trial in detail["trials"]}
    assert "Reason: **invalid_flags**. unknown argument --warp" in notes[0]
    assert all("| ttft_p50_ms |" in notes[trial.number] for trial in found.measured)
    assert detail["note"]["body"].startswith(FOUND)
    charts = [chart["id"] for chart in detail["plotly_graph_objects"]]
    assert "hypervolume" in charts
    assert any(chart.startswith("points-") for chart in charts)
    assert {trial["number"] for trial in detail["best_trials"]} == {trial.number for trial in found.front}


def test_notes_of_people_stay(published: tuple[Storage, StudyReport]) -> None:
    storage, found = published
    study = load_optuna_study(storage, found.name)
    study_id = storage.backend.get_study_id_from_name(found.name)
    before = storage.backend.get_study_system_attrs(study_id)
    publish(storage, found)
    after = storage.backend.get_study_system_attrs(study_id)
    assert {key for key in before if "note" in key} == {key for key in after if "note" in key}
    optuna_dashboard.save_note(study, "ask Ada before using this")
    publish(storage, found)
    assert optuna_dashboard.get_note(study) == "ask Ada before using this"


@pytest.mark.slow
async def test_a_browser_shows_the_notes_and_draws_the_charts(
    published: tuple[Storage, StudyReport], tmp_path: Path
) -> None:
    find_browser()
    storage, _ = published
    with served(storage, tmp_path) as address:
        async with Browser(tmp_path) as browser:
            await browser.view(1440, dark=False)
            await browser.open(f"{address}/dashboard/studies/1", "document.body.innerText.includes('Hypervolume over')")
            await browser.until("document.querySelectorAll('.scatterlayer .trace').length > 8")
            await browser.open(
                f"{address}/dashboard/studies/1/trials?numbers=0", "document.body.innerText.includes('--warp')"
            )
            await browser.open(
                f"{address}/dashboard/studies/1/note", f"document.body.innerText.includes('{FOUND[2:-2]}')"
            )
            assert not browser.faults
