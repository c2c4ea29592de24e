"""The commands, called in this process: what they print, where, and how they exit."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tuner.wiring
from search_spaces.metrics import METRICS, POWER_METRICS
from tests.support.commands import TEXT, Invoke, commands_in


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Invoke:
    """Commands in an empty folder."""
    return commands_in(tmp_path, monkeypatch, capsys)


BAD_FILES = {
    "syntax": ("name: [1\n", "no valid YAML"),
    "tab": ("name:\n\t- 1\n", "line 2, column 1"),
    "empty": ("", "it is empty"),
    "binary": ("\x00\x01", "no valid YAML"),
    "unknown key": (TEXT + "budgets: 1\n", "did you mean budget?"),
    "unknown metric": (TEXT.replace("ttft_p99_ms: 60", "tft: 60"), "slos.tft"),
    "wrong type": (TEXT.replace("trials: 5", "trials: lots"), "budget.trials"),
    "impossible value": (TEXT.replace("trials: 5", "trials: -3"), "-3 must be at least 1"),
    "missing": (TEXT.replace("workload: {isl: 64, osl: 16, concurrency: [1, 2, 4]}", ""), "workload: missing"),
    "unknown engine": (TEXT.replace("llamacpp", "lamacpp"), "'lamacpp' is unknown"),
    "impossible option": (TEXT.replace("threads: [1, 2]", "threads: [0]"), "engines.llamacpp.threads"),
    "contradiction": (TEXT.replace("concurrency", "request_rate"), "does not go with arrival: closed"),
    "key twice": (TEXT + "name: other\n", "stands in line 2 already"),
    "nothing fits": (TEXT.replace("isl: 64", "isl: 1000000"), "no configuration of study 'toy' can run"),
    "gpu": (TEXT.replace("{cpus_per_node: 4", "{device: h900, gpus_per_node: 8"), "'h900' is no known device"),
}


@pytest.mark.parametrize(("text", "part"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_malformed_study_file_is_one_clear_error_and_exit_code_2(invoke: Invoke, text: str, part: str) -> None:
    Path("bad.yaml").write_text(text)
    done = invoke("study", "run", "bad.yaml")
    assert done.code == 2
    assert done.out == ""
    assert done.err.splitlines()[-1] != ""
    assert "error: " in done.err
    assert part in done.err
    assert "Traceback" not in done.err


def test_a_bad_override_exits_with_2(invoke: Invoke) -> None:
    done = invoke("study", "run", "study.yaml", "--set", "budget.trails=3")
    assert (done.code, "did you mean trials?" in done.err) == (2, True)


def test_a_run_prints_the_front_on_stdout_and_the_rest_on_stderr(invoke: Invoke) -> None:
    done = invoke("study", "run", "study.yaml")
    assert done.code == 0
    assert "Pareto front of toy" in done.out
    assert "ttft_p50_ms" in done.out
    assert "beginning study toy" in done.err
    assert done.err.count("cores are shared") == 1
    assert "warning: cores are shared" in done.err
    assert "trial 0 (default): aggregated" in done.err
    assert "5 of 5 trials" in done.err
    assert "The search ended: the budget of trials is used." in done.err
    assert Path("tuner-data/studies.db").is_file()
    assert Path("tuner-data/reports/toy/front.html").is_file()


def test_pareto_as_json_holds_every_metric(invoke: Invoke) -> None:
    invoke("study", "run", "study.yaml")
    done = invoke("study", "pareto", "toy", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["study"] == "toy"
    assert found["counts"]["measured"] == 5
    assert set(found["measured_modes"]) == {"aggregated", "disaggregated"}
    assert found["front"]
    for trial in found["front"]:
        assert set(trial["metrics"]) == set(METRICS) - set(POWER_METRICS)
        assert trial["feasible"]
        assert trial["configuration"]["pools"][0]["options"]["max_num_seqs"] in (1, 4)
        assert trial["configuration"]["concurrency"] in (1, 2, 4)
        assert trial["predicted"]["ttft_p50_ms"] > 0


def test_run_with_json_prints_what_pareto_prints(invoke: Invoke) -> None:
    ran = invoke("study", "run", "study.yaml", "--json")
    assert json.loads(ran.out) == json.loads(invoke("study", "pareto", "toy", "--json").out)


def test_pareto_as_csv_has_a_row_for_each_member(invoke: Invoke) -> None:
    invoke("study", "run", "study.yaml")
    front = json.loads(invoke("study", "pareto", "toy", "--json").out)["front"]
    rows = list(csv.DictReader(io.StringIO(invoke("study", "pareto", "toy", "--csv").out)))
    assert [int(row["trial"]) for row in rows] == [trial["trial"] for trial in front]
    assert float(rows[0]["ttft_p50_ms"]) == front[0]["metrics"]["ttft_p50_ms"]


def test_show_lists_and_json(invoke: Invoke) -> None:
    invoke("study", "run", "study.yaml")
    text = invoke("study", "show", "toy").out
    for part in (
        "toy: finished, 5 of 5 trials",
        "Best feasible trial per objective",
        "No failures.",
        "median error",
        "1P x [",
    ):
        assert part in text
    found = json.loads(invoke("study", "show", "toy", "--json").out)
    assert len(found["trials"]) == 5
    assert found["prediction_error"]["ttft_p50_ms"] > 0
    listed = invoke("study", "list").out
    assert "toy" in listed
    assert json.loads(invoke("study", "list", "--json").out)[0]["measured"] == 5


def test_slos_that_nothing_meets_are_told_with_the_nearest(invoke: Invoke) -> None:
    done = invoke("study", "run", "study.yaml", "--set", "slos={ttft_p99_ms: 0.5}")
    assert done.code == 0
    assert "No configuration of toy meets every SLO. Nearest is trial" in done.out
    assert "(SLO 0.5)" in done.out


def test_a_resume_by_name_needs_no_file(invoke: Invoke) -> None:
    invoke("study", "run", "study.yaml", "--set", "budget.trials=3")
    Path("study.yaml").unlink()
    done = invoke("study", "resume", "toy", "--set", "budget.trials=4", "--json")
    assert done.code == 0
    assert "the budget changes: budget.trials: 3 -> 4" in done.err
    assert json.loads(done.out)["counts"]["measured"] == 4


def test_a_resume_of_what_is_not_there(invoke: Invoke) -> None:
    assert "does not exist; run a study first" in invoke("study", "resume", "toy").err
    invoke("study", "run", "study.yaml")
    done = invoke("study", "resume", "toi")
    assert (done.code, "has no study 'toi'; it has: toy" in done.err) == (2, True)
    assert invoke("study", "resume", "study.yaml", "--set", "name=new").code == 2


def test_another_file_is_refused_with_the_difference(invoke: Invoke) -> None:
    invoke("study", "run", "study.yaml", "--set", "budget.trials=2")
    done = invoke("study", "run", "study.yaml", "--set", "budget.trials=2", "--set", "seed=3")
    assert done.code == 2
    assert "seed: 0 -> 3" in done.err
    assert "Traceback" not in done.err


def test_the_storage_is_found_by_option_then_file_then_variable(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_STORAGE", "sqlite:///variable/s.db")
    invoke("study", "run", "study.yaml", "--set", "budget.trials=1")
    assert Path("variable/s.db").is_file()
    invoke("study", "run", "study.yaml", "--set", "budget.trials=1", "--set", "storage=sqlite:///file/s.db")
    assert Path("file/s.db").is_file()
    invoke("study", "run", "study.yaml", "--set", "budget.trials=1", "--storage", "sqlite:///option/s.db")
    assert Path("option/artifacts").is_dir()
    assert json.loads(invoke("study", "list", "--json").out)[0]["study"] == "toy"


def test_a_storage_that_cannot_be_used(invoke: Invoke) -> None:
    done = invoke("study", "run", "study.yaml", "--storage", "oracle9://x/y")
    assert (done.code, "Traceback" in done.err) == (2, False)
    Path("text.db").write_text("no database")
    done = invoke("study", "list", "--storage", "sqlite:///text.db")
    assert (done.code, "Traceback" in done.err) == (2, False)


def test_the_version(invoke: Invoke) -> None:
    done = invoke("--version")
    assert (done.code, done.out.split()[0]) == (0, "tuner")


def test_the_help_needs_no_heavy_module() -> None:
    code = (
        "import sys; sys.argv = ['tuner', '--help']\n"
        "from tuner.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'ray', 'optuna', 'plotly', 'pandas', 'numpy', 'pydantic', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dashboard" in done.stdout


def test_an_error_reaches_the_shell_as_one_message() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tuner.cli", "study", "run", "none.yaml"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: study file none.yaml cannot be read")


def test_an_engine_that_is_not_installed_is_told_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuner.wiring, "find_spec", lambda _name: None)
    Path("study.yaml").write_text(TEXT)
    done = Invoke(monkeypatch, capsys)("study", "run", "study.yaml")
    assert done.code == 2
    assert "the engine llamacpp needs the package xllamacpp; install it with: pip install 'tuner[llamacpp]'" in done.err
