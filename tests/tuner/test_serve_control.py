"""Submitting studies to `tuner serve`: what runs, for whom, and what a study may not say."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from starlette.testclient import TestClient

from studies.lease import take_lease
from studies.storage import open_storage
from tests.support.served import READ, WRITE, client, service, study_text, toy_storage

SLEEPER = (sys.executable, "-c", "import time; time.sleep(600)")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toy_storage(tmp_path_factory.mktemp("control"))


def submit(asked: TestClient, text: str) -> Any:
    return asked.post("/api/v1/studies", json={"study": text})


def ended(asked: TestClient, name: str, limit_s: float = 240) -> dict[str, Any]:
    """The last run of a study, once its process has ended."""
    deadline = time.monotonic() + limit_s
    while (run := asked.get(f"/api/v1/submissions/{name}").json())["exit_code"] is None:
        assert time.monotonic() < deadline, f"the run of {name} did not end: {run}"
        time.sleep(0.2)
    return dict(run)


def events(text: str, kind: str) -> list[dict[str, Any]]:
    parts = [part.split("\n") for part in text.strip().split("\n\n")]
    return [json.loads(part[1].removeprefix("data: ")) for part in parts if part[0] == f"event: {kind}"]


@pytest.mark.long
def test_a_submitted_study_runs_is_followed_and_goes_on(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_READ_TOKEN", READ)  # the child ends with an error where it is handed on
    monkeypatch.setenv("TUNER_WRITE_TOKEN", WRITE)
    asked = client(service(url), WRITE)
    answer = submit(asked, study_text("sent"))
    assert answer.status_code == 202, answer.text
    assert (answer.json()["study"], answer.json()["state"] in {"starting", "running"}) == ("sent", True)
    run = ended(asked, "sent")
    assert (run["state"], run["exit_code"]) == ("ended", 0), run["tail"]
    assert [each["study"] for each in asked.get("/api/v1/submissions").json()] == ["sent"]

    told = asked.get("/api/v1/studies/sent/trials/stream").text
    trials = events(told, "trial")
    assert [trial["trial"] for trial in trials] == list(range(len(trials)))
    assert len([trial for trial in trials if trial["status"] in {"measured", "failed"}]) == 3
    (front,) = events(told, "front")
    members = asked.get("/api/v1/studies/sent/front").json()["front"]
    assert [point["trial"] for point in front["front"]] == [member["trial"] for member in members]
    assert events(told, "status")[-1]["state"] == "finished"
    assert told.endswith("event: end\ndata: {}\n\n")

    again = submit(asked, study_text("sent"))
    assert (again.status_code, "resume" in again.json()["detail"]) == (409, True)
    onwards = asked.post("/api/v1/studies/sent/resume", json={"trials": 5})
    assert onwards.status_code == 202, onwards.text
    run = ended(asked, "sent")
    assert run["state"] == "ended", run["tail"]
    assert asked.get("/api/v1/studies/sent/status").json()["trials"]["finished"] == 5


def test_a_run_that_cannot_begin_says_why(url: str) -> None:
    command = (sys.executable, "-c", "print('no sqlite://me:hush@host here'); raise SystemExit(3)")
    asked = client(service(url, command=command), WRITE)
    assert submit(asked, study_text("failing")).status_code == 202
    run = ended(asked, "failing")
    assert (run["state"], run["exit_code"], run["tail"]) == ("failed", 3, "no sqlite://me:***@host here")
    assert asked.get("/api/v1/submissions/other").status_code == 404
    assert submit(asked, study_text("failing")).status_code == 202, "it is not in the storage: it may be sent again"
    ended(asked, "failing")


def test_one_study_at_a_time_on_this_machine_and_many_on_a_cluster(url: str) -> None:
    alone = service(url, command=SLEEPER)
    asked = client(alone, WRITE)
    other = service(url, command=SLEEPER, address="127.0.0.1:1")
    asked_cluster = client(other, WRITE)
    try:
        assert submit(asked, study_text("first")).status_code == 202
        refused = submit(asked, study_text("second"))
        assert (refused.status_code, "one at a time" in refused.json()["detail"]) == (409, True)
        assert [submit(asked_cluster, study_text(name)).status_code for name in ("a", "b")] == [202, 202]
        assert submit(asked_cluster, study_text("a")).status_code == 409
        (run, *_) = other.runs.all()
        assert os.getsid(run.process.pid) != os.getsid(0), "it goes on when the service ends"
        words = Path(f"/proc/{run.process.pid}/cmdline").read_bytes().split(b"\0")
        assert words[-4:-1] == [b"--address", b"127.0.0.1:1", b"--detach"]
        assert url.encode() not in words, "a storage URL may hold a password"
    finally:
        for run in (*alone.runs.all(), *other.runs.all()):
            run.process.kill()
            run.process.wait(60)


def test_a_study_that_runs_elsewhere_is_busy(url: str) -> None:
    asked = client(service(url), WRITE)
    with take_lease(open_storage(url), "toy"):
        assert asked.post("/api/v1/studies/toy/resume", json={}).status_code == 409
        refused = submit(asked, study_text("beside"))
        assert (refused.status_code, "'toy' runs on this machine" in refused.json()["detail"]) == (409, True)


def test_writing_takes_the_write_token(url: str) -> None:
    for token, status in ((None, 401), (READ, 403), ("x" * 32, 401)):
        asked = client(service(url), token)
        assert submit(asked, study_text("mine")).status_code == status
        assert asked.post("/api/v1/studies/toy/resume", json={}).status_code == status
        assert asked.post("/api/v1/studies/toy/stop").status_code == status
    assert not Path(service(url).place.directory / "work" / "mine").exists()


PLAIN = study_text("reaching")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (PLAIN + "storage: sqlite:////tmp/other.db\n", "storage"),
        (PLAIN + "layers: [/etc]\n", "layers"),
        (PLAIN + "experiments: {a: {model: {gguf: /etc/passwd}}}\n", "experiments"),
        (PLAIN + "experiments: {a: {}}\nexperiment: a\n", "experiment"),
        (PLAIN + "calibration: ../prior.json\n", "calibration"),
        (PLAIN + "model: {gguf: /etc/passwd}\n", "model.gguf"),
        (PLAIN + "model: {gguf: /not/there}\n", "model.gguf"),
        (PLAIN + "model: {config: /etc}\n", "model.config"),
        (PLAIN + "model: {<<: {config: /etc}}\n", "model.config"),
        (PLAIN + "model: {name: Qwen3-32B, source: /models/mine}\n", "model.source"),
        (PLAIN + "model: {name: Qwen3-32B, source: ../mine}\n", "model.source"),
        (PLAIN + "model: {name: Qwen3-32B, source: a/b/c}\n", "model.source"),
        (PLAIN.replace("isl: 64", "isl: 64, trace: {file: /etc/passwd, format: azure}"), "workload.trace"),
        (PLAIN.replace("cpus_per_node: 4", "cpus_per_node: 4, engines: {vllm: /bin/sh}"), "node_pools.*.engines"),
        (
            PLAIN.replace("cpus_per_node: 4", "cpus_per_node: 4, engines: {vllm: {env: {LD_PRELOAD: /x}}}"),
            "node_pools.*.engines",
        ),
    ],
)
def test_a_study_that_reaches_for_the_server_is_refused_before_anything_is_opened(
    url: str, text: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("the study was read before it was found harmless")

    monkeypatch.setattr("tuner.serve.questions.load_study_file", opened)
    asked = client(service(url), WRITE)
    for path in ("/api/v1/studies", "/api/v1/predict"):
        answer = asked.post(path, json={"study": text})
        assert answer.status_code == 422, answer.text
        assert answer.json()["detail"].startswith(f"{key} ") or f"; {key} " in answer.json()["detail"]
        assert "/tmp" not in answer.text  # noqa: S108 - what must not be told


def test_what_an_operator_allows_in_a_profile_may_be_chosen(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.serve.questions import study_of

    text = "name: house\nstage: profile\nkind: hardware\nabout: our nodes\nsource: ours\nset:\n  node_pools:\n"
    (tmp_path / "house.yaml").write_text(
        text + "    house: {device: h100_sxm, gpus_per_node: 8, engines: {vllm: /opt/vllm/bin/vllm}}\n"
    )
    monkeypatch.setenv("TUNER_LAYERS", str(tmp_path))
    study = "name: asked\nprofiles: [house, chat]\nmodel: {name: Qwen3-32B, source: Qwen/Qwen3-32B}\n"
    found = study_of(study)
    assert found.node_pools["house"].engines["vllm"].command == ["/opt/vllm/bin/vllm"]
    assert found.model.source == "Qwen/Qwen3-32B"
    assert client(service(url), READ).post("/api/v1/predict", json={"study": study}).status_code == 200


def test_a_study_that_cannot_run_is_not_begun(url: str) -> None:
    served = service(url)
    asked = client(served, WRITE)
    for text, part in (
        (PLAIN.replace("isl: 64", "isl: -1"), "workload.isl"),
        ("name: cloud\nprofiles: [h100, chat]\nmodel: {name: Qwen3-32B}\n", "model.source is missing"),
        ("{", "no valid YAML"),
    ):
        answer = submit(asked, text)
        assert (answer.status_code, part in answer.json()["detail"]) == (422, True), answer.text
    assert served.runs.all() == ()
    for body in ({"trials": 0}, {"storage": "sqlite://"}, {"trials": "many"}, {"trials": True}, {"cost": "5"}):
        assert asked.post("/api/v1/studies/toy/resume", json=body).status_code == 422
    assert asked.post("/api/v1/studies/none/resume", json={}).status_code == 404
