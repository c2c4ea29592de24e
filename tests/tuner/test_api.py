"""The public API: its names, that it is light, and the examples as they stand."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import tuner
import tuner.api
from search_spaces.errors import TunerError
from tests.support.commands import Invoke, commands_in

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
    with pytest.raises(AttributeError, match="has no attribute 'prediktion'; it has Comparison"):
        tuner.prediktion  # type: ignore[attr-defined]  # noqa: B018 - a misspelt name
    assert (Path(tuner.__file__).parent / "py.typed").is_file()


def test_the_import_is_light_and_names_are_no_modules() -> None:
    code = (
        "import sys, tuner; heavy = {'optuna', 'ray', 'numpy', 'pydantic', 'plotly'} & set(sys.modules); "
        "assert not heavy, heavy; import tuner.cli, tuner.api; from tuner import compare, predict; "
        "assert callable(predict) and callable(compare); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


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
