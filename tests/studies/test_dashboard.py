"""What optuna-dashboard shows of our studies: its own code reads the storages that ours wrote."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna_dashboard._serializer import serialize_frozen_trial

from search_spaces.outcome import Failure, FailureReason
from search_spaces.problem import Slo
from studies.constraints import LEGACY_KEY
from studies.storage import open_storage
from studies.study import create_study
from tests.studies.toy import measure, small_space, toy_problem, toy_setup


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_the_dashboard_shows_names_constraints_and_artefacts(tmp_path: Path, kind: str) -> None:
    url = f"sqlite:///{tmp_path}/s.db" if kind == "sqlite" else f"journal://{tmp_path}/s.journal"
    write_study(url, tmp_path)
    with dashboard(open_storage(url).dashboard_url, tmp_path / "artifacts") as address:
        (listed,) = get(f"{address}/api/studies")["study_summaries"]
        study_id = listed["study_id"]
        detail = get(f"{address}/api/studies/{study_id}")
        measured, failed = detail["trials"]
        (artifact,) = measured["artifacts"]
        path = f"{address}/artifacts/{study_id}/{measured['trial_id']}/{artifact['artifact_id']}"
        with urllib.request.urlopen(path) as answer:  # noqa: S310 - a local address
            content = answer.read()
    assert detail["objective_names"] == ["output_tokens_per_s", "ttft_p50_ms"]
    assert measured["constraints"] == [0.0, pytest.approx(measured["values"][1] / 1.0 - 1)]
    assert failed["constraints"][0] > max(0.0, sum(measured["constraints"]))
    assert artifact["filename"] == "engine.log"
    assert content == b"listening\n"


def test_the_dashboard_does_not_yet_read_the_new_form_of_constraints() -> None:
    """Fails on the day it does: then `studies.constraints.write_constraints` should use `trial.set_constraint`."""
    study = optuna.create_study(directions=["minimize", "minimize"])
    trial = study.ask()
    trial.set_constraint("started_and_held", 1.0)
    study.tell(trial, [1.0, 1.0])
    (frozen,) = study.get_trials()
    assert LEGACY_KEY not in frozen.system_attrs
    assert serialize_frozen_trial(0, frozen, {})["constraints"] == []


def write_study(url: str, folder: Path) -> None:
    """One measured trial that misses its SLO of 1 ms, with a log, and one that did not start."""
    log = folder / "engine.log"
    log.write_text("listening\n")
    space = small_space(toy_problem((Slo(metric="ttft_p50_ms", threshold=1.0),)))
    with create_study(open_storage(url), toy_setup(folder, space=space)) as study:
        proposal = study.ask()
        study.tell(proposal, measure(proposal.candidate, artifacts={"engine log": str(log)}))
        study.tell(study.ask(), Failure(reason=FailureReason.INVALID_FLAGS, detail="unknown argument --warp"))


@contextmanager
def dashboard(storage: str, artifact_dir: Path) -> Iterator[str]:
    """The real command on a free port, ended at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "optuna-dashboard"), storage, "--artifact-dir", str(artifact_dir)]
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)])
    try:
        wait_for(f"http://127.0.0.1:{port}/api/studies", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "optuna-dashboard ended"
        try:
            get(address)
        except urllib.error.URLError:
            time.sleep(0.1)
        else:
            return
    pytest.fail("optuna-dashboard did not answer within 60 s")


def get(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(address) as answer:  # noqa: S310 - a local address
        return dict(json.load(answer))
