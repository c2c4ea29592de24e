"""The public API: its names, that it is light, and the examples as they stand."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import tuner
import tuner.api
from cluster.runner import TrialRequest
from search_spaces.errors import TunerError
from search_spaces.outcome import Measurement, Outcome
from tests.support.commands import TEXT, Invoke, NoCluster, commands_in, connector
from tests.support.deployable import processes
from tests.support.memory_runner import MemoryRunner, Silence, measured
from tests.support.toy_study import toy_storage
from tuner.study_file import parse_study

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_names_are_those_of_the_api() -> None:
    assert tuner.__all__ == tuner.api.__all__
    assert sorted(tuner.__all__) == tuner.__all__
    for name in tuner.__all__:
        assert getattr(tuner, name) is getattr(tuner.api, name)
    with pytest.raises(AttributeError, match="has no attribute 'prediktion'; it has Benchmark, Campaign"):
        tuner.prediktion  # type: ignore[attr-defined]  # noqa: B018 - a misspelt name
    assert (Path(tuner.__file__).parent / "py.typed").is_file()


def test_the_import_is_light_and_names_are_no_modules() -> None:
    code = (
        "import sys, tuner; heavy = {'optuna', 'ray', 'numpy', 'pydantic', 'plotly'} & set(sys.modules); "
        "assert not heavy, heavy; import tuner.cli, tuner.api; from tuner import compare, predict; "
        "assert callable(predict) and callable(compare); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def deployable(request: TrialRequest) -> Outcome:
    """What is measured in memory, with processes as they are recorded when they are started."""
    found = measured(request)
    assert isinstance(found, Measurement)
    work = request.artifact_dir / "deployments" / "one"
    return replace(found, processes=processes(parse_study(TEXT), request.candidate.config, work, ("node-a",)))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuner.Study]:
    """The study `toy`, measured in memory, whose trials can be deployed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoCluster, "runner", lambda _self, _study: MemoryRunner(outcome_of=deployable, polls=0))
        yield tuner.load_study("toy", toy_storage(tmp_path_factory.mktemp("toy")))


def test_from_a_study_to_production(
    toy: tuner.Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TUNER_STORAGE", toy.place.url)
    example("api_production").main("toy", str(tmp_path / "out"), "20")
    said = capsys.readouterr().out
    assert "stands:    finished" in said
    assert "met" in said
    assert "copies of trial" in said
    assert "best in output_tokens_per_s" in said
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")

    planned = toy.plan(rate=200, pools=["local=1"], slos=["ttft_p99_ms=none"])
    assert (planned.plan.met, planned.plan.nodes) == (False, {"local": 1})
    with pytest.raises(TunerError, match="nothing is demanded"):
        toy.plan()
    (best, *_) = toy.pareto()
    made = toy.deploy("compose", tmp_path / "compose", trial=best.number, image="mine:1", port=9000)
    assert made.trial == best.number
    assert {path.name for path in made.files} >= {"compose.yaml", "README.md", "benchmark.json"}
    assert all(path.is_file() for path in made.files)
    with pytest.raises(TunerError, match="no empty folder"):
        toy.deploy("shell", tmp_path / "compose")
    benchmark = tuner.load_benchmark(tmp_path / "compose" / "benchmark.json")
    assert (benchmark.study, benchmark.trial) == ("toy", best.number)
    with pytest.raises(TunerError, match="no measurement"):
        tuner.bench(tmp_path / "compose" / "benchmark.json", "http://127.0.0.1:1")


def test_reports_status_and_log(toy: tuner.Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for form, begin in (("html", "<!doctype html>"), ("markdown", "# "), ("json", "{")):
        path = toy.write_report(form=form)  # type: ignore[arg-type]  # literals of a loop
        assert path.parent == toy.place.reports("toy")
        assert path.read_text().startswith(begin)
    assert toy.write_report(tmp_path / "mine" / "r.md", form="markdown").is_file()
    assert toy.status().progress.finished == 5
    lines = toy.logs()
    assert lines[0].text.startswith("run 1 of study toy")
    assert toy.logs(after=lines[-1].number) == ()
    with pytest.raises(TunerError, match="nobody runs"):
        toy.stop()
    monkeypatch.setattr("tuner.wiring.connector", connector)
    more = toy.resume("budget.trials=6", observer=Silence())
    assert more.status().progress.finished == 6


def test_layers_and_profiles(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("name: a\nprofiles: [chat, h100]\nmodel: {name: Qwen3-32B}\n")
    found = tuner.config_show(tmp_path / "study.yaml", "budget.trials=3")
    assert found.study.budget.trials == 3
    assert found.resolved.origins["workload", "isl", "mean"] == "profile/chat"
    profiles = {layer.name: layer for layer in tuner.list_profiles()}
    assert "MLPerf" in profiles["balanced"].source
    assert all(layer.source for layer in profiles.values()), "every profile says where its figures come from"
    assert not {layer.name for layer in tuner.list_layers()} & set(profiles)


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    invoke: Invoke = commands_in(tmp_path, monkeypatch, capsys)
    example("api_whatif").main("study.yaml")
    said = capsys.readouterr().out
    assert "predicted: {" in said
    assert "measured: " in said
    assert "concurrency=16: measured were" in said
    other = ("name=other", "earlier_studies=none", "space.modes=aggregated")
    assert invoke("study", "run", "study.yaml", *(w for text in other for w in ("--set", text))).code == 0
    example("api_compare").main("toy", "other")
    said = capsys.readouterr().out
    assert "toy: " in said
    assert "of the joint hypervolume" in said
    assert "best ttft_p50_ms under all SLOs: " in said
    assert {summary.name for summary in tuner.list_studies()} == {"toy", "other"}
    with pytest.raises(TunerError, match="it has: toy, other"):
        tuner.load_study("nothing")
    with pytest.raises(TunerError, match="give overrides to load_study_file"):
        tuner.predict(tuner.load_study("toy").file, "budget.trials=3")
