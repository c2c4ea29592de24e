"""`tuner serve`: what it answers, to whom, and what it refuses."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import httpx
from starlette.testclient import TestClient

from search_spaces.errors import InvalidValueError
from studies.history import StudyHistory
from studies.lease import take_lease
from studies.storage import open_storage
from tests.support.commands import TEXT
from tests.support.served import READ, TOKENS, WRITE, service, toy_storage
from tests.support.served import client as asking
from tuner.report import StudyReport
from tuner.serve import answers, following
from tuner.serve.access import BODY_LIMIT_BYTES, Right, Tokens, find_tokens, require_safe
from tuner.stored import make_report
from tuner.study_schema import StudyFile

OPEN = {"/", "/health"}
ASKED = "name: asked\nobjectives: [output_tokens_per_s, ttft_p50_ms]\n" + TEXT.split("\n", 2)[2].replace(
    "objectives: [output_tokens_per_s, ttft_p50_ms]\n", ""
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A storage with the study `toy`, run by the real command on trials measured in memory."""
    return toy_storage(tmp_path_factory.mktemp("served"))


def client(url: str, tokens: Tokens = TOKENS, token: str | None = None) -> TestClient:
    return asking(service(url, tokens), token)


def test_studies_and_fronts_are_those_of_the_commands(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tuner.cli import app as commands

    def printed(*args: str) -> object:
        commands([*args, "toy", "--storage", url, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    asked = client(url, token=READ)
    assert [found["study"] for found in asked.get("/api/v1/studies").json()] == ["toy"]
    assert asked.get("/api/v1/studies/toy").json() == printed("study", "show")
    front = asked.get("/api/v1/studies/toy/front").json()
    assert front == printed("study", "pareto")
    assert front["front"]
    status = asked.get("/api/v1/studies/toy/status").json()
    assert (status["study"], status["trials"]["finished"]) == ("toy", 5)
    csv = asked.get("/api/v1/studies/toy/front.csv")
    assert csv.headers["content-type"].startswith("text/csv")
    assert len(csv.text.splitlines()) == 1 + len(front["front"])


def test_logs_are_listed_and_streamed_to_their_end(url: str) -> None:
    asked = client(url, token=READ)
    lines = asked.get("/api/v1/studies/toy/events").json()
    assert lines
    assert asked.get("/api/v1/studies/toy/events", params={"after": lines[0]["number"]}).json() == lines[1:]
    streamed = asked.get("/api/v1/studies/toy/events/stream")
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *told, end = streamed.text.strip().split("\n\n")
    assert [json.loads(text.split("data: ", 1)[1]) for text in told] == lines
    assert end == "event: end\ndata: {}"


def test_predictions_and_what_ifs(url: str) -> None:
    asked = client(url, token=READ)
    answer = asked.post("/api/v1/predict", json={"study": ASKED, "top": 1})
    assert answer.status_code == 200, answer.text
    assert answer.json()["predicted"]
    assert answer.json()["defaults"]
    changed = asked.post("/api/v1/studies/toy/whatif", json={"settings": ["load=2"]})
    assert changed.status_code == 200, changed.text
    assert changed.json()["answers"]


@pytest.mark.parametrize(
    ("study", "part"),
    [
        (ASKED + "layers: /etc\n", "layers names folders"),
        (ASKED + "model: {gguf: /etc/passwd}\n", "model.gguf names a file"),
        (ASKED + "calibration: /etc/passwd\n", "calibration names a file"),
        ("a: &a [1, 1]\nb: [*a, *a]\n", "aliases"),
        (ASKED.replace("isl: 64", "isl: -1"), "workload.isl"),
        (ASKED.replace("isl: 64", "isl: 64, turns: 999999999"), "workload.turns: 999999999 is beyond"),
        (ASKED.replace("[1, 2, 4]", str(list(range(1, 300)))), "workload.concurrency: 299 values"),
        (ASKED.replace("cpus_per_node: 4", "cpus_per_node: 4, nodes: 9999999"), "node_pools.local.nodes: 9999999 is"),
        (ASKED + f"space: {{tp: {list(range(1, 40))}}}\n", "space.tp: 39 values"),
        (ASKED + f"emulation: {dict.fromkeys(map(str, range(99)), 1)}\n", "emulation: 99 values"),
        ("[" * 2000, "nested more than 24 deep"),
        ("{", "no valid YAML"),
        ("\x00", "no valid YAML"),
        ("5", "study"),
    ],
)
def test_a_study_that_cannot_be_predicted_here_is_told(url: str, study: str, part: str) -> None:
    answer = client(url, token=READ).post("/api/v1/predict", json={"study": study})
    assert answer.status_code == 422, answer.text
    assert part in answer.json()["detail"]
    assert "/tmp" not in answer.text  # noqa: S108 - what must not be told


@pytest.mark.parametrize(
    "setting",
    ["model.gguf=/etc/passwd", "workload.trace={file: /etc/passwd}", "calibration=x", "layers=[/etc]", "load"],
)
def test_a_what_if_reaches_no_file(url: str, setting: str) -> None:
    answer = client(url, token=READ).post("/api/v1/studies/toy/whatif", json={"settings": [setting]})
    assert answer.status_code == 422
    assert "cannot be asked here" in answer.json()["detail"]


def test_a_what_if_that_would_take_for_ever_is_refused(url: str) -> None:
    answer = client(url, token=READ).post("/api/v1/studies/toy/whatif", json={"settings": ["workload.turns=99999999"]})
    assert (answer.status_code, "beyond what this service computes" in answer.json()["detail"]) == (422, True)


def test_halves_of_characters_are_no_fault_of_the_service(url: str) -> None:
    for body in (b'{"study": "\\ud800"}', b'{"\\ud800": 1}', b'{"study": ', b"\xff"):
        answer = client(url, token=READ).post(
            "/api/v1/predict", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code in {400, 422}, answer.text
        assert isinstance(answer.json()["detail"], str)


def test_one_prediction_at_a_time(url: str) -> None:
    held = service(url)
    asked = asking(held, READ)
    with held.computing:
        assert asked.post("/api/v1/predict", json={"study": ASKED}).status_code == 429
    assert asked.post("/api/v1/predict", json={"study": ASKED, "top": 0}).status_code == 200


def test_everything_but_health_asks_for_a_token(url: str) -> None:
    paths = client(url).get("/openapi.json").json()["paths"]
    assert len(paths) >= 10
    for token in (None, "x" * 32, ""):
        asked = client(url, token=token)
        for path, methods in paths.items():
            for method, told in methods.items():
                answer = asked.request(method, path.replace("{name}", "toy"), json={} if method == "post" else None)
                assert answer.status_code == (200 if path in OPEN else 401), (method, path)
                assert path in OPEN or told["security"] == [{"HTTPBearer": []}]


def test_answers_are_what_the_description_says(url: str) -> None:
    asked = client(url, token=READ)
    base = "/api/v1/studies/toy"
    posts: dict[str, dict[str, object]] = {
        f"{base}/plan": {"rate": 5, "headroom": 0.1, "predicted": 8, "pools": ["local=3"]},
        f"{base}/rescore": {"slos": ["ttft_p99_ms=40"], "by": ["output_tokens_per_s"]},
        f"{base}/whatif": {"settings": ["load=2"]},
        "/api/v1/predict": {"study": ASKED, "top": 1},
    }
    gets = ("", "/front", "/status", "/events", "/report.json", "/importance")
    document = asked.get("/openapi.json").json()
    asked_for = [("get", f"{base}{path}", None) for path in gets] + [
        ("post", path, body) for path, body in posts.items()
    ]
    for method, path, body in [("get", "/api/v1/studies", None), ("get", "/health", None), *asked_for]:
        answer = asked.request(method, path, json=body)
        assert answer.status_code == 200, answer.text
        told = document["paths"][path.replace("toy", "{name}")][method]["responses"]["200"]["content"]
        schema = told["application/json"]["schema"]
        name = (schema.get("items") or schema)["$ref"].rpartition("/")[2]
        model: type[answers.Answer] = getattr(answers, name)
        for found in answer.json() if "items" in schema else [answer.json()]:
            model.model_validate(found, strict=True)


def test_plans_and_ranks_are_those_of_the_commands(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tuner.cli import app as commands

    def printed(*args: str) -> object:
        commands([*args, "--storage", url, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    asked = client(url, token=READ)
    plan = asked.post("/api/v1/studies/toy/plan", json={"rate": 5}).json()
    assert plan == printed("plan", "toy", "--rate", "5/s")
    assert plan["met"]
    ranks = asked.post("/api/v1/studies/toy/rescore", json={"slos": ["ttft_p99_ms=40"]}).json()
    assert ranks == printed("study", "rescore", "toy", "--slo", "ttft_p99_ms=40")
    for path, body, part in (
        ("plan", {}, "nothing is demanded"),
        ("plan", {"rate": 5, "pools": ["moon"]}, "no node pool"),
        ("plan", {"rate": 1e300}, "body.rate"),
        ("plan", {"rate": 5, "slos": ["ttft_p99_ms=&a [*a]"]}, "aliases"),
        ("plan", {"rate": 5, "pricing": "spot"}, "no spot_price_per_hour"),
        ("rescore", {"slos": ["nothing"]}, "is no SLO"),
        ("rescore", {"slos": ["ttft_p99_ms={kind: odd}"]}, "ttft_p99_ms"),
        ("rescore", {"by": ["beauty"]}, "beauty"),
    ):
        answer = asked.post(f"/api/v1/studies/toy/{path}", json=body)
        assert (answer.status_code, part in answer.json()["detail"]) == (422, True), answer.text


def test_reports_are_sandboxed_files(url: str) -> None:
    asked = client(url, token=READ)
    page = asked.get("/api/v1/studies/toy/report")
    assert page.headers["content-security-policy"].startswith("sandbox allow-scripts")
    assert "<title>" in page.text
    assert "plotly" in page.text
    text = asked.get("/api/v1/studies/toy/report.md")
    assert (text.headers["content-type"].split(";")[0], text.text[0]) == ("text/markdown", "#")
    assert asked.get("/api/v1/studies").headers["content-security-policy"].startswith("default-src 'none'")


def test_a_follower_asks_for_a_report_only_where_a_trial_has_changed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(history: StudyHistory, file: StudyFile) -> StudyReport:
        made.append(history.name)
        return make_report(history, file)

    monkeypatch.setattr(following, "make_report", counted)
    seen = following._Seen(service=service(url), name="toy")
    first = seen.news()
    assert (first.count("event: trial"), first.count("event: front"), first.count("event: status")) == (5, 1, 1)
    assert seen.news() == seen.news() == ""
    assert len(made) == 1
    del seen._marks[2]  # as if it had been running
    again = seen.news()
    assert (again.count("event: trial"), again.count("event: front"), len(made)) == (1, 0, 2)


def test_trials_are_streamed_and_so_many_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = client(url, token=READ)
    streamed = asked.get("/api/v1/studies/toy/trials/stream")
    assert streamed.headers["content-type"].startswith("text/event-stream")
    parts = [part.split("\n") for part in streamed.text.strip().split("\n\n")]
    kinds = {"trial": answers.Progress, "front": answers.Points}
    for kind, data in parts:
        model = kinds.get(kind.removeprefix("event: "))
        if model is not None:
            model.model_validate(json.loads(data.removeprefix("data: ")), strict=True)
    assert [kind for kind, _ in parts[-3:]] == ["event: front", "event: status", "event: end"]
    monkeypatch.setattr("tuner.serve.studies.streams.most", 0)
    for path in ("trials", "events"):
        assert asked.get(f"/api/v1/studies/toy/{path}/stream").status_code == 429


def test_a_stop_takes_the_write_token(url: str) -> None:
    stop = "/api/v1/studies/toy/stop"
    assert client(url, token=READ).post(stop).status_code == 403
    assert client(url, Tokens()).post(stop).status_code == 403
    assert client(url, Tokens(read=READ), token=READ).post(stop).status_code == 403
    assert client(url, token=WRITE).get("/api/v1/studies").status_code == 200
    nobody = client(url, token=WRITE).post(stop)
    assert (nobody.status_code, "nobody runs" in nobody.json()["detail"]) == (404, True)
    with take_lease(open_storage(url), "toy") as lease:
        answer = client(url, token=WRITE).post(stop)
        assert answer.status_code == 200, answer.text
        deadline = time.monotonic() + 60
        while lease.stop_order is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert lease.stop_order is not None


def test_unknown_studies_and_bad_names(url: str) -> None:
    asked = client(url, token=READ)
    for path in ("", "/front", "/status", "/events", "/events/stream", "/front.csv"):
        answer = asked.get(f"/api/v1/studies/none{path}")
        assert (answer.status_code, "none" in answer.json()["detail"]) == (404, True)
    assert asked.get("/api/v1/studies/%00").status_code == 422
    assert asked.post("/api/v1/studies/none/whatif", json={"settings": []}).status_code == 404


def test_without_tokens_only_names_of_this_machine_are_answered(url: str) -> None:
    asked = client(url, Tokens())
    for host in ("127.0.0.1:8090", "localhost", "[::1]:8090"):
        assert asked.get("/api/v1/studies", headers={"Host": host}).status_code == 200
    for host in ("example.org", "127.0.0.1.example.org", ""):
        assert asked.get("/api/v1/studies", headers={"Host": host}).status_code == 403
    assert client(url, token=READ).get("/api/v1/studies", headers={"Host": "example.org"}).status_code == 200


def test_large_bodies_are_refused_unread(url: str) -> None:
    asked = client(url)
    assert asked.post("/api/v1/predict", content=b"x" * (BODY_LIMIT_BYTES + 1)).status_code == 413
    assert asked.post("/api/v1/predict", content=iter([b"x"])).status_code == 411
    assert asked.get("/health").headers["x-content-type-options"] == "nosniff"


def test_rights() -> None:
    assert [TOKENS.right_of(token) for token in (READ, WRITE, READ + "r", "", None)] == [
        Right.READ,
        Right.WRITE,
        Right.NONE,
        Right.NONE,
        Right.NONE,
    ]
    assert [Tokens().right_of(token) for token in ("", None, READ)] == [Right.READ] * 3
    assert [Tokens(write=WRITE).right_of(token) for token in ("", None, WRITE)] == [Right.NONE, Right.NONE, Right.WRITE]
    assert READ not in repr(TOKENS)
    with pytest.raises(InvalidValueError, match="at least 16"):
        Tokens(read="short")
    with pytest.raises(InvalidValueError, match="the same"):
        Tokens(read=READ, write=READ)


def test_a_service_that_others_reach_has_a_token() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        require_safe(host, Tokens())
    for host in ("0.0.0.0", "::", "10.1.2.3", "tuner.example"):  # noqa: S104 - what is refused
        require_safe(host, Tokens(read=READ))
        with pytest.raises(InvalidValueError, match="no token is set"):
            require_safe(host, Tokens())


def test_tokens_come_from_the_environment_or_a_private_file(tmp_path: Path) -> None:
    assert find_tokens(None, {"TUNER_READ_TOKEN": READ, "TUNER_WRITE_TOKEN": ""}) == Tokens(read=READ)
    file = tmp_path / "tokens"
    file.write_text(f"# of the service\nread {READ}\n\nwrite {WRITE}\n")
    file.chmod(0o644)
    with pytest.raises(InvalidValueError, match="chmod 600"):
        find_tokens(file)
    file.chmod(0o600)
    assert find_tokens(file) == TOKENS
    for text, part in ((f"read {READ}\nread {READ}\n", "line 2"), ("", "no token"), ("admin x\n", "line 1")):
        file.write_text(text)
        with pytest.raises(InvalidValueError, match=part):
            find_tokens(file)
    with pytest.raises(InvalidValueError, match="cannot be read"):
        find_tokens(tmp_path / "none")


def test_the_command_serves_and_ends(url: str) -> None:
    command = [sys.executable, "-m", "tuner.cli", "serve", "--port", "0", "--storage", url]
    environment = {**os.environ, "TUNER_READ_TOKEN": READ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = line.split()[1]
            assert address.startswith("http://127.0.0.1:")
            assert READ not in line
            assert httpx.get(f"{address}api/v1/studies", timeout=60).status_code == 401
            headers = {"Authorization": f"Bearer {READ}"}
            answer = httpx.get(f"{address}api/v1/studies", headers=headers, timeout=60)
            assert [found["study"] for found in answer.json()] == ["toy"]
            process.terminate()
            process.wait(60)
        finally:
            process.kill()


def test_the_command_refuses_an_open_service(url: str) -> None:
    command = [sys.executable, "-m", "tuner.cli", "serve", "--host", "0.0.0.0", "--port", "0", "--storage", url]  # noqa: S104 - what is refused
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TUNER_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "no token is set" in done.stderr) == (2, True)


def test_a_storage_that_fails_is_no_fault_of_the_service(url: str, tmp_path: Path) -> None:
    database = tmp_path / "studies.db"
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as whole, closing(sqlite3.connect(database)) as copy:
        whole.backup(copy)
    asked = client(f"sqlite:///{database}", token=READ)
    assert asked.get("/api/v1/studies/toy/front").status_code == 200
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("DROP TABLE studies")
        connection.commit()
    for path in ("/api/v1/studies", "/api/v1/studies/toy/front"):
        answer = asked.get(path)
        assert (answer.status_code, "storage" in answer.json()["detail"]) == (503, True), answer.text
