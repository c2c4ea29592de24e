"""A real study by the real command: killed, resumed, interrupted, inspected, opened in the dashboard."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from search_spaces.metrics import METRICS, POWER_METRICS
from tests.support.cli_study import TUNER, CliStudy

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(420)]

TRIALS = 4


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> CliStudy:
    """A study whose driver was killed in the middle of its third trial, and that was resumed to its end."""
    study = CliStudy.create(tmp_path_factory.mktemp("killed"), TRIALS)
    with study.running() as driver:
        study.wait_for(r"trial 2 \(", driver)
        engines = study.wait_for_engines()
        driver.send_signal(signal.SIGKILL)
        assert driver.wait(10) == -signal.SIGKILL
    assert engines
    study.wait_for_silence()
    assert study.json("study", "show", study.name)["counts"]["running"] == 1, "the kill must have come in mid-trial"
    done = study.call("study", "resume", study.name, "--no-progress")
    assert done.returncode == 0, done.stderr
    assert "an earlier run left trials behind; settled, or to be repeated: 2" in done.stderr
    return study


def test_after_kill_9_and_resume_no_trial_is_lost_repeated_or_left_running(resumed: CliStudy) -> None:
    found = resumed.json("study", "show", resumed.name)
    counts = found["counts"]
    assert (counts["measured"] + counts["failed"], counts["running"], counts["waiting"]) == (TRIALS, 0, 0)
    finished = Counter(t["key"] for t in found["trials"] if t["status"] in {"measured", "failed"})
    assert set(finished.values()) == {1}
    lost = [t for t in found["trials"] if t["status"] == "lost"]
    assert [t["failure"]["reason"] for t in lost] == ["lost_coordinator"]
    assert lost[0]["key"] in finished


def test_no_process_of_the_study_is_left(resumed: CliStudy) -> None:
    resumed.wait_for_silence()
    mentioning = [
        p for p in psutil.process_iter(["cmdline"]) if str(resumed.folder) in " ".join(p.info["cmdline"] or ())
    ]
    assert mentioning == []


def test_no_working_file_is_left(resumed: CliStudy) -> None:
    work = resumed.folder / "tuner-data" / "work" / resumed.name
    files = [path for path in work.rglob("*") if path.is_file() and "models" not in path.parts]
    assert files == []


def test_both_modes_were_measured_with_every_metric(resumed: CliStudy) -> None:
    found = resumed.json("study", "pareto", resumed.name)
    assert set(found["measured_modes"]) == {"aggregated", "disaggregated"}
    assert found["front"]
    for trial in found["front"]:
        assert set(trial["metrics"]) == set(METRICS) - set(POWER_METRICS)
        assert trial["metrics"]["output_tokens_per_s"] > 0
        assert trial["requests"] == 8
        assert trial["emulated"] is False
        assert trial["environment"]["engine_version"].startswith("xllamacpp")
        assert {"request_timings", "log_mixed-0", "log_decode-0"} & set(trial["artifacts"])


def test_a_finished_study_says_so_at_once(resumed: CliStudy) -> None:
    done = resumed.call("study", "run", "study.yaml")
    assert done.returncode == 0
    assert "has used its budget" in done.stderr
    assert "Ray" not in done.stderr


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310 - a local address
        content: bytes = answer.read()
    return content


@contextmanager
def dashboard(study: CliStudy) -> Iterator[str]:
    """`tuner dashboard` on a free port, ended by Ctrl-C."""
    process = subprocess.Popen(
        [*TUNER, "dashboard", "--port", "0"],
        cwd=study.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        yield found[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.communicate(timeout=15)


def test_the_dashboard_shows_the_front_the_constraints_and_the_artefacts(resumed: CliStudy) -> None:
    shown = resumed.json("study", "show", resumed.name)
    with dashboard(resumed) as address:
        assert b"<html" in get(f"{address}/dashboard/")
        (summary,) = json.loads(get(f"{address}/api/studies"))["study_summaries"]
        detail: dict[str, Any] = json.loads(get(f"{address}/api/studies/{summary['study_id']}"))
        assert summary["study_name"] == resumed.name
        assert detail["objective_names"] == ["output_tokens_per_s_per_gpu", "ttft_p50_ms"]
        assert sorted(t["number"] for t in detail["best_trials"]) == sorted(shown["front"])
        by_number = {t["number"]: t for t in detail["trials"]}
        for trial in shown["trials"]:
            if trial["status"] == "measured":
                seen = by_number[trial["trial"]]
                assert seen["values"] == list(trial["objectives"].values())
                assert seen["constraints"] == list(trial["violations"].values())
                names = {artifact["filename"] for artifact in seen["artifacts"]}
                assert "request_timings.parquet" in names
                assert any(name.endswith(".log") for name in names)
                artifact = seen["artifacts"][0]["artifact_id"]
                assert get(f"{address}/artifacts/{summary['study_id']}/{seen['trial_id']}/{artifact}")


@pytest.mark.long
def test_ctrl_c_stops_cleanly_and_a_resume_goes_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    study = CliStudy.create(tmp_path_factory.mktemp("interrupted"), TRIALS)
    with study.running() as driver:
        study.wait_for(r"trial 1 \(", driver)
        study.wait_for_engines()
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: Ray and the engines get it too
        assert driver.wait(60) == 130, study.log.read_text()
    study.wait_for_silence(limit_s=5)
    said = study.log.read_text()
    assert f"go on with: tuner study resume {study.name}" in said
    assert "Traceback" not in said
    counts = study.json("study", "show", study.name)["counts"]
    assert counts["running"] == 0
    assert counts["waiting"] >= 1
    done = study.call("study", "resume", "study.yaml", "--set", "budget.trials=2", "--no-progress")
    assert done.returncode == 0, done.stderr
    found = study.json("study", "show", study.name)
    finished = Counter(t["key"] for t in found["trials"] if t["status"] in {"measured", "failed"})
    assert (finished.total(), set(finished.values())) == (2, {1})
    assert found["counts"]["running"] == 0
