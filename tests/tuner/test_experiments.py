"""Experiments of a study file: what each is asked, and how all are run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import Invoke, commands_in
from tuner.experiments_run import Options, experiments_of, run_all
from tuner.study_errors import StudyFileError
from tuner.study_file import dump_study, load_study_file, parse_study

TEXT = """
name: both
workload: {isl: 64, osl: 16, concurrency: [1, 2]}
objectives: [output_tokens_per_s, ttft_p50_ms]
slos: {ttft_p99_ms: 60, tpot_p50_ms: 50}
node_pools: {local: {cpus_per_node: 4}}
engines: {llamacpp: {threads: [1, 2]}}
budget: {trials: 5}
experiments:
  agg: {space: {modes: [aggregated]}, budget: {trials: 3}}
  disagg:
    space: {modes: [disaggregated]}
    unset: slos.tpot_p50_ms
  other: {engines: [emulated], node_pools: {far: {device: h100_sxm, gpus_per_node: 8}}, model: {name: Llama-3.1-8B}}
  same:
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(TEXT)
    return path


def test_each_experiment_is_a_layer_over_the_common_part(file: Path) -> None:
    assert experiments_of(file) == ("agg", "disagg", "other", "same")
    assert experiments_of(file, ["experiment=agg"]) == ()
    agg, disagg, other, same = (load_study_file(file, [f"experiment={name}"]) for name in experiments_of(file))
    assert [study.name for study in (agg, disagg, other, same)] == [
        "both.agg",
        "both.disagg",
        "both.other",
        "both.same",
    ]
    assert (agg.space.modes, agg.budget.trials, disagg.budget.trials) == (["aggregated"], 3, 5)
    assert (set(agg.slos), set(disagg.slos)) == ({"ttft_p99_ms", "tpot_p50_ms"}, {"ttft_p99_ms"})
    assert (set(other.engines), set(other.node_pools)) == ({"emulated"}, {"far"}), "they replace the common ones"
    assert parse_study(dump_study(agg)) == agg, "what is stored names no experiments"


def test_one_experiment_alone_asks_what_a_file_without_them_would(file: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text(TEXT.split("experiments:", maxsplit=1)[0])
    alone = load_study_file(plain, ["name=both.same"])
    assert load_study_file(file, ["experiment=same"]) == alone
    assert experiments_of(plain) == ()


def test_the_command_line_overrules_the_experiment(file: Path) -> None:
    study = load_study_file(file, ["budget.trials=9", "experiment=agg", "slos.ttft_p99_ms=1"])
    assert (study.budget.trials, study.slos["ttft_p99_ms"].threshold) == (9, 1)


@pytest.mark.parametrize(
    ("text", "overrides", "part"),
    [
        (TEXT, [], "the file holds 4 experiments; pick one with --set experiment=agg"),
        (TEXT, ["experiment=aggg"], "did you mean agg?"),
        (TEXT.split("experiments:", maxsplit=1)[0], ["experiment=agg"], "the file holds no experiments"),
        (TEXT + "  bad: [1]\n", ["experiment=agg"], "experiments.bad: [1] is no mapping"),
        (TEXT + "  bad: {name: x}\n", ["experiment=agg"], "experiments.bad.name: an experiment has no such key"),
        (TEXT + "  bad: {bugdet: {trials: 3}}\n", ["experiment=bad"], "did you mean budget"),
    ],
)
def test_what_is_wrong_with_experiments_is_told(tmp_path: Path, text: str, overrides: list[str], part: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(StudyFileError) as caught:
        load_study_file(path, overrides)
    assert part in str(caught.value)


def test_every_experiment_is_a_command_of_its_own(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both fail at once, through their files, so that no engine starts."""
    options = Options(address=None, overrides=("budget.trials=0",), storage=None, detached=False)
    assert run_all(file, ["agg", "disagg"], options) == {"agg": 2, "disagg": 2}
    said = capfd.readouterr().out
    assert "[agg] error: " in said
    assert "[disagg]   budget.trials" in said


def test_run_takes_one_experiment_and_compare_takes_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    invoke: Invoke = commands_in(tmp_path, monkeypatch, capsys)
    common = (tmp_path / "study.yaml").read_text()
    layers = "experiments: {one: {workload: {concurrency: [1]}}, four: {workload: {concurrency: [4]}}}\n"
    (tmp_path / "study.yaml").write_text(f"{common}earlier_studies: none\n{layers}")
    for name in ("one", "four"):
        assert invoke("study", "run", "study.yaml", "--set", f"experiment={name}").code == 0
    done = invoke("study", "compare", "toy")
    assert done.code == 0, done.err
    assert "Comparison of toy.one, toy.four" in done.out
    assert "workload.concurrency: [1] -> [4]" in done.out
    refused = invoke("study", "run", "study.yaml", "--json")
    assert (refused.code, "--set experiment=NAME" in refused.err) == (2, True)
