"""Deployment files of a front in optuna-dashboard: archives that its own API hands out."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from cluster.runner import TrialRequest
from search_spaces.outcome import Measurement, Outcome
from studies.dashboard import open_dashboard
from studies.storage import open_storage
from tests.support.commands import TEXT, NoCluster
from tests.support.deployable import processes
from tests.support.memory_runner import MemoryRunner, measured
from tests.support.toy_study import toy_storage
from tuner.deploy.archives import attach_deployments
from tuner.places import existing_place
from tuner.stored import history_of, make_report, stored_file
from tuner.study_file import parse_study


def half_deployable(request: TrialRequest) -> Outcome:
    """What is measured in memory; of single pools without the record of the processes, as old studies have it."""
    found = measured(request)
    assert isinstance(found, Measurement)
    if len(request.candidate.config.pools) == 1:
        return found
    work = request.artifact_dir / "deployments" / "one"
    return replace(found, processes=processes(parse_study(TEXT), request.candidate.config, work, ("node-a",)))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        runner = MemoryRunner(outcome_of=half_deployable, polls=0)
        patch.setattr(NoCluster, "runner", lambda _self, _study: runner)
        return toy_storage(tmp_path_factory.mktemp("archives"))


@contextmanager
def dashboard(url: str) -> Iterator[str]:
    place = existing_place(url)
    with open_dashboard(open_storage(url), place.artifacts, host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def get(address: str) -> bytes:
    with urllib.request.urlopen(address) as answer:  # noqa: S310 - a local address
        return bytes(answer.read())


def archives(address: str) -> dict[int, list[dict[str, Any]]]:
    """The archives that the dashboard tells of, by number of their trial."""
    trials = json.loads(get(f"{address}/api/studies/1"))["trials"]
    named = {t["number"]: [a for a in t["artifacts"] if a["filename"].endswith(".tar.gz")] for t in trials}
    return {
        number: [{**a, "of": t["trial_id"]} for a in found]
        for (number, found), t in zip(named.items(), trials, strict=True)
    }


def test_the_dashboard_offers_the_deployment_of_each_member_of_the_front(url: str) -> None:
    place = existing_place(url)
    history = history_of(place, "toy")
    report = make_report(history, stored_file(history, place))
    with dashboard(url) as address:
        told = archives(address)
        assert {number for number, found in told.items() if found} == {member.number for member in report.front}
        best = report.front[0].number
        (archive,) = told[best]
        assert archive["filename"] == f"toy-{best}-shell.tar.gz"
        content = get(f"{address}/artifacts/1/{archive['of']}/{archive['artifact_id']}")
    with tarfile.open(fileobj=io.BytesIO(content)) as packed:
        names = {member.name.partition("/")[2]: member for member in packed.getmembers()}
        assert set(names) >= {"start.sh", "README.md", "benchmark.json", "ABOUT.txt"}
        assert names["start.sh"].mode & 0o100
        about = packed.extractfile(names["ABOUT.txt"])
        assert about is not None
        assert f"tuner deploy toy --trial {best} --target shell" in about.read().decode()
    assert len(gzip.decompress(content)) < 1_000_000, "the model is left out"


def test_what_is_attached_already_stays_and_what_cannot_be_deployed_is_told(url: str) -> None:
    place, storage = existing_place(url), open_storage(url)
    history = history_of(place, "toy")
    file = stored_file(history, place)
    report = make_report(history, file)
    with dashboard(url) as address:
        before = archives(address)
        assert attach_deployments(storage, place, report, file) == ()
        assert archives(address) == before
        single = next(t for t in report.trials if t.candidate and len(t.candidate.config.pools) == 1)
        report.__dict__["front"] = (single,)  # a front of one that cannot be deployed
        (line,) = attach_deployments(storage, place, report, file)
        assert line.startswith(f"no deployment files of trial {single.number}: it was measured by a version")
        assert archives(address) == before
