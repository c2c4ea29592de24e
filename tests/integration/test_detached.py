"""A detached study, with a token for Ray and a password for PostgreSQL: killed, followed, stopped, resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.janitor import tagged_processes
from tests.support.cli_study import TUNER, CliStudy
from tests.support.postgres import PASSWORD, PostgresServer
from tests.support.ray_head import RayHead, ray_head

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(420)]

TOKEN = "0123456789abcdef" * 4
SECRETS = (PASSWORD, TOKEN)


@dataclass
class Remote:
    """Commands against the study from a machine that knows the storage's URL, and what they printed."""

    study: CliStudy
    head: RayHead
    url: str
    printed: list[str] = field(default_factory=list)

    def __call__(self, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        known = {"TUNER_STORAGE": self.url, "TUNER_DATA": str(self.study.folder / "data"), "TUNER_LEASE_EXPIRY_S": "12"}
        done = subprocess.run(
            [*TUNER, "study", *args],
            cwd=self.study.folder,
            env={**self.head.environment, **known, **environment},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        self.printed += [done.stdout, done.stderr]
        return done

    def status(self) -> Any:
        done = self("status", self.study.name, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def wait_for(self, condition: Callable[[Any], bool], limit_s: float = 90.0) -> Any:
        deadline = time.monotonic() + limit_s
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, f"{status}\n{self('logs', self.study.name).stdout}"
            time.sleep(0.5)
        return status


@dataclass(frozen=True)
class Story:
    """What was seen at each step."""

    begun: subprocess.CompletedProcess[str]
    first: Any
    refused: subprocess.CompletedProcess[str]
    second: Any
    stopped: subprocess.CompletedProcess[str]
    at_rest: Any
    budget: int
    followed: subprocess.CompletedProcess[str]
    finished: Any


@pytest.fixture(scope="module")
def remote(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    study = CliStudy.create(tmp_path_factory.mktemp("detached"), 40)  # more than can be measured before the stop
    with (
        tempfile.TemporaryDirectory(
            prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
        ) as folder,  # sockets need a short path
        ray_head(Path(folder), TOKEN) as head,
    ):
        yield Remote(study=study, head=head, url=postgres_server.new_database())


@pytest.fixture(scope="module")
def story(remote: Remote) -> Story:
    name, there = remote.study.name, ("--address", remote.head.address)
    begun = remote("run", "study.yaml", "--detach", *there)
    assert begun.returncode == 0, begun.stderr
    first = remote.wait_for(lambda status: status["trials"]["measured"] >= 1 and status["trials"]["running"])
    refused = remote("run", "study.yaml", *there)
    os.kill(first["coordinator"]["pid"], signal.SIGKILL)
    second = remote.wait_for(lambda status: status["coordinator"] and status["coordinator"]["run"] == 2)
    remote.wait_for(lambda status: status["trials"]["running"])
    stopped = remote("stop", name)
    at_rest = remote.status()
    budget = at_rest["trials"]["measured"] + at_rest["trials"]["failed"] + 2
    resumed = remote("resume", name, "--detach", "--set", f"budget.trials={budget}", *there)
    assert resumed.returncode == 0, resumed.stderr
    followed = remote("logs", name, "-f")
    return Story(begun, first, refused, second, stopped, at_rest, budget, followed, remote.status())


def test_the_command_returns_while_the_study_runs(story: Story) -> None:
    assert re.search(r"runs detached: process \d+ on host ", story.begun.stdout)
    assert story.first["state"] == "running"
    assert story.first["coordinator"]["heartbeat_age_s"] < 12


def test_a_second_coordinator_is_refused_with_who_and_what_to_do(story: Story) -> None:
    assert story.refused.returncode == 2
    pid = story.first["coordinator"]["pid"]
    assert f"is run by process {pid} on host" in story.refused.stderr
    assert "tuner study stop" in story.refused.stderr


def test_a_killed_coordinator_is_followed_by_another(story: Story) -> None:
    assert story.second["coordinator"]["pid"] != story.first["coordinator"]["pid"]
    assert story.second["trials"]["lost"] <= 1


def test_a_stop_ends_it_and_leaves_nothing_running(remote: Remote, story: Story) -> None:
    assert story.stopped.returncode == 0, story.stopped.stderr
    assert (story.at_rest["state"], story.at_rest["coordinator"]) == ("stopped", None)
    assert story.at_rest["trials"]["running"] == []
    assert remote("stop", remote.study.name).returncode == 2


def test_a_resume_finishes_it_and_nothing_is_measured_twice(remote: Remote, story: Story) -> None:
    assert story.finished["state"] == "finished"
    found = json.loads(remote("show", remote.study.name, "--json").stdout)
    keys = [trial["key"] for trial in found["trials"] if trial["status"] in {"measured", "failed"}]
    assert len(keys) == len(set(keys)) == story.budget


def test_the_log_tells_the_whole_story(story: Story) -> None:
    assert story.followed.returncode == 0
    for part in ("run 1 of study", "run 2 of study", "run 3 of study", "stopped on the order of", "trial 0 measured"):
        assert part in story.followed.stdout
    assert story.followed.stdout.rstrip().endswith("the search ended: the budget of trials is used")


def test_engines_and_coordinators_are_gone(remote: Remote, story: Story) -> None:
    assert story.finished
    assert tagged_processes(remote.study.name) == []
    folder = str(remote.study.folder)
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or ())]
    assert left == []


def test_a_coordinator_that_refuses_says_so_here(remote: Remote, story: Story) -> None:
    assert story.finished
    done = remote("run", "study.yaml", "--set", "seed=9", "--detach", "--address", remote.head.address)
    assert done.returncode == 2
    assert "seed: 0 -> 9" in done.stderr


def test_without_the_token_it_is_told_what_to_set(remote: Remote) -> None:
    done = remote("run", "study.yaml", "--detach", "--address", remote.head.address, RAY_AUTH_TOKEN="wrong" * 8)
    assert done.returncode == 2
    assert "set RAY_AUTH_MODE=token and give its token in RAY_AUTH_TOKEN" in done.stderr


def test_secrets_are_in_nothing_that_was_printed_or_written(remote: Remote, story: Story) -> None:
    """Outputs, data folder (logs, reports, artefacts) and what Ray logged of its cluster."""
    assert story.finished
    for text in remote.printed:
        assert not any(secret in text for secret in SECRETS), text
    files = [path for root in (remote.study.folder, remote.head.folder) for path in root.rglob("*") if path.is_file()]
    assert len(files) > 30
    found = [(path, secret) for path in files for secret in SECRETS if secret.encode() in path.read_bytes()]
    assert found == []
