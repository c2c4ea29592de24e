"""Study files: defaults, overrides, the resolved form and what is said of a bad one."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.study_errors import StudyFileError
from tuner.study_file import differences, dump_study, load_study_file, parse_study, study_hash
from tuner.study_schema import StudyFile
from tuner.wiring import make_budget

GOOD = """
name: small
workload: {isl: 128, osl: {mean: 32, spread: 0.25}, concurrency: [1, 2, 4]}
objectives: [output_tokens_per_s_per_gpu, ttft_p99_ms]
slos: {ttft_p99_ms: 500}
node_pools:
  local: {cpus_per_node: 2}
engines: [llamacpp]
budget: {trials: 16, wall_time: 4m}
"""


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


# Each case: the file, then the parts that the message must hold: key path, value, limit and remedy.
BAD = {
    "yaml syntax": ("name: [1,\nworkload: 3\n", ["line 3, column 1", "no valid YAML", "check indentation"]),
    "tab": ("name:\n\t- x\n", ["line 2, column 1", "no valid YAML"]),
    "empty": ("# nothing\n", ["it is empty", "mapping", "start with name: my-study"]),
    "a list": ("- name: x\n", ["it is a list", "mapping"]),
    "key twice": (GOOD + "seed: 1\nseed: 2\n", ["seed (line 11)", "line 10 already", "keep one"]),
    "unknown key": (GOOD + "objectivs: 3\n", ["objectivs (line 10)", "unknown key", "did you mean objectives?"]),
    "unknown key below": (
        changed("wall_time", "wall_tim"),
        ["budget.wall_tim (line 9)", "unknown key", "did you mean wall_time?", "trials, wall_time"],
    ),
    "missing section": (
        changed("objectives: [output_tokens_per_s_per_gpu, ttft_p99_ms]\n", ""),
        ["objectives: missing", "write such as objectives: [output_tokens_per_s_per_gpu, ttft_p99_ms]"],
    ),
    "text for a number": (
        changed("trials: 16", "trials: many"),
        ["budget.trials (line 9)", "'many' is a text", "must be a whole number", "write such as trials: 16"],
    ),
    "fraction of a trial": (changed("trials: 16", "trials: 1.5"), ["budget.trials", "1.5", "whole number"]),
    "no trials": (changed("trials: 16", "trials: 0"), ["budget.trials", "0 must be at least 1", "trials: 16"]),
    "duration": (changed("4m", "4 parsecs"), ["budget.wall_time", "'4 parsecs' is no duration", "90s, 4m, 2h"]),
    "share": (changed("4m", "4m, min_gain: half"), ["budget.min_gain", "'half' is no share", "0.5% or 0.005"]),
    "no time": (changed("4m", "0s"), ["budget.wall_time", "must be above 0"]),
    "metric": (
        changed("slos: {ttft_p99_ms", "slos: {ttft_p9_ms"),
        ["slos.ttft_p9_ms (line 5)", "'ttft_p9_ms' is unknown", "did you mean ttft_p99_ms"],
    ),
    "threshold": (changed("p99_ms: 500", "p99_ms: -500"), ["slos.ttft_p99_ms", "-500 must be above 0", "500"]),
    "one objective": (
        changed("[output_tokens_per_s_per_gpu, ttft_p99_ms]", "[ttft_p99_ms]"),
        ["objectives", "must hold at least 2", "write such as"],
    ),
    "objective twice": (
        changed("[output_tokens_per_s_per_gpu, ttft_p99_ms]", "[ttft_p99_ms, ttft_p99_ms]"),
        ["objectives", "ttft_p99_ms stands there twice", "once"],
    ),
    "goodput without SLOs": (
        changed("slos: {ttft_p99_ms: 500}\n", "").replace("output_tokens_per_s_per_gpu", "goodput_rps"),
        ["slos: missing", "goodput_rps", "give at least one SLO"],
    ),
    "dollars without a price": (
        changed("output_tokens_per_s_per_gpu", "output_tokens_per_dollar"),
        ["node_pools.local.price_per_hour", "0", "output_tokens_per_dollar", "give the node's price"],
    ),
    "engine": (changed("[llamacpp]", "[llamacp]"), ["engines.llamacp", "'llamacp' is unknown", "choose llamacpp"]),
    "engine option": (
        changed("[llamacpp]", "{llamacpp: {slots: [1]}}"),
        ["engines.llamacpp.slots (line 8)", "no option 'slots'", "max_num_seqs"],
    ),
    "engine option value": (
        changed("[llamacpp]", "{llamacpp: {kv_cache_dtype: [f16, f8]}}"),
        ["engines.llamacpp.kv_cache_dtype", "'f8' is no choice", "choose f16, q8_0, f32"],
    ),
    "arrival": (
        changed("isl: 128", "arrival: poison, isl: 128"),
        ["workload.arrival (line 3)", "'poison' is no choice", "closed, poisson, constant", "did you mean poisson?"],
    ),
    "rate of a closed loop": (
        changed("concurrency: [1, 2, 4]", "request_rate: 0.5"),
        ["workload.request_rate", "[0.5] does not go with arrival: closed", "give concurrency instead"],
    ),
    "open loop without a rate": (
        changed("concurrency: [1, 2, 4]", "arrival: poisson"),
        ["workload.request_rate", "missing with arrival: poisson", "request_rate: "],
    ),
    "length": (changed("isl: 128", "isl: long"), ["workload.isl", "'long' is no length", "{mean: 128, spread: 0.25}"]),
    "spread": (changed("0.25", "1.25"), ["workload.osl.spread", "1.25 must be below 1", "write such as spread: 0.25"]),
    "one output token": (changed("mean: 32, spread: 0.25", "mean: 1"), ["workload.osl", "1 ", "under 2 tokens"]),
    "concurrency": (changed("[1, 2, 4]", "[1, 0]"), ["workload.concurrency.1", "0 must be at least 1"]),
    "GPUs on a CPU": (
        changed("cpus_per_node: 2", "gpus_per_node: 2"),
        ["node_pools.local.gpus_per_node", "2 does not go with device: cpu", "give cpus_per_node instead"],
    ),
    "no devices": (changed("{cpus_per_node: 2}", "{}"), ["node_pools.local.cpus_per_node", "missing", "write such as"]),
    "section of the wrong kind": (
        changed("{trials: 16, wall_time: 4m}", "16"),
        ["budget", "16 is of type int, but must be a mapping", "{trials: 16, wall_time: 4m}"],
    ),
    "two models": (
        GOOD + "model: {preset: tiny, gguf: x.gguf}\n",
        ["model", "exactly one of preset, gguf, name and config"],
    ),
    "mode": (
        GOOD + "space: {modes: [agregated]}\n",
        ["space.modes.0", "'agregated' is no choice", "did you mean aggregated?"],
    ),
    "node pool of a role": (
        GOOD + "space: {decode: {node_pools: [h100]}}\n",
        ["space.decode.node_pools", "'h100' is no node pool", "choose local"],
    ),
    "name": (changed("name: small", "name: a/b"), ["name (line 2)", "'a/b' is no study name", "letters, digits"]),
    "storage": (GOOD + "storage: studies.db\n", ["storage", "'studies.db' is no storage URL", "sqlite:///"]),
    "not a number": (changed("spread: 0.25", "spread: .nan"), ["workload.osl.spread", "nan"]),
}


@pytest.mark.parametrize(("text", "parts"), BAD.values(), ids=BAD.keys())
def test_a_bad_file_names_key_value_limit_and_remedy(text: str, parts: list[str]) -> None:
    with pytest.raises(StudyFileError) as caught:
        parse_study(text, name="study.yaml")
    message = str(caught.value)
    assert message.startswith("study.yaml: 1 problem\n"), message
    for part in parts:
        assert part in message
    assert all(len(line) < 400 for line in message.splitlines())


def test_every_problem_is_told_at_once() -> None:
    text = changed("trials: 16", "trials: 0").replace("isl: 128", "isl: long").replace("[llamacpp]", "[vlm]")
    with pytest.raises(StudyFileError, match="3 problems") as caught:
        parse_study(text)
    for key in ("budget.trials", "workload.isl", "engines.vlm"):
        assert key in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StudyFileError, match=r"none\.yaml cannot be read \(No such file or directory\)"):
        load_study_file(tmp_path / "none.yaml")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(StudyFileError, match="no UTF-8 text"):
        load_study_file(tmp_path / "s.yaml")


def test_a_model_file_is_sought_beside_the_study_file(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(GOOD + "model: {gguf: m.gguf}\n")
    with pytest.raises(StudyFileError, match=r"model\.gguf: .*m\.gguf' is no file"):
        load_study_file(path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert load_study_file(path).model.gguf == str((tmp_path / "m.gguf").resolve())


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("budget.trials=3", lambda s: s.budget.trials == 3),
        ("budget.wall_time=1h30m", lambda s: s.budget.wall_time == 5400),
        ("budget.min_gain=0.5%", lambda s: make_budget(s).min_gain == 0.005 and make_budget(s).patience == 4),
        ("sampler=tpe", lambda s: s.sampler == "tpe"),
        ("workload.isl=64", lambda s: s.workload.isl.mean == 64),
        ("workload.osl.spread=0.5", lambda s: s.workload.osl.spread == 0.5 and s.workload.osl.mean == 32),
        ("objectives=[tpot_p50_ms, ttft_p50_ms]", lambda s: s.objectives == ["tpot_p50_ms", "ttft_p50_ms"]),
        ("objectives.1=tpot_p50_ms", lambda s: s.objectives[1] == "tpot_p50_ms"),
        ("engines.llamacpp.threads=1", lambda s: s.engines == {"llamacpp": {"threads": [1]}}),
        ("space.mixed.replicas=[1, 2]", lambda s: s.space.mixed.replicas == [1, 2]),
        ("storage=sqlite:///x=y.db", lambda s: s.storage == "sqlite:///x=y.db"),
    ],
)
def test_an_override_sets_its_key(override: str, read: Callable[[StudyFile], bool]) -> None:
    assert read(parse_study(GOOD, [override]))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("budget.trails=3", ["budget.trails", "unknown key", "did you mean trials?"]),
        ("nonsense.at.all=3", ["nonsense", "unknown key"]),
        ("budget.trials=[", ["'[' is no valid YAML value"]),
        ("budget.trials", ["is no override", "--set key.path=value"]),
        ("=3", ["is no override"]),
        ("workload.isl.mean=3", ["workload.isl is 128 and has no key 'mean'", "set workload.isl itself"]),
        ("objectives.7=tpot_p50_ms", ["'7' is no position of a list of 2", "use 0 to 1"]),
        ("budget.trials=-1", ["budget.trials", "-1 must be at least 1"]),
    ],
)
def test_a_bad_override_is_told_like_a_bad_file(override: str, parts: list[str]) -> None:
    with pytest.raises(StudyFileError) as caught:
        parse_study(GOOD, [override])
    for part in parts:
        assert part in str(caught.value)


def test_the_resolved_form_reads_back_and_holds_no_secret() -> None:
    study = parse_study(GOOD + "storage: postgresql://me:secret@db/tuner\n")
    text = dump_study(study)
    assert "secret" not in text
    assert "postgresql" not in text
    again = parse_study(text, ["storage=postgresql://me:secret@db/tuner"])
    assert again == study
    assert dump_study(again) == text
    assert yaml.safe_load(text)["measurement"]["requests"] == study.measurement.requests


def test_the_hash_follows_the_meaning_and_not_the_wording() -> None:
    reworded = parse_study(textwrap.dedent(GOOD).replace("wall_time: 4m", "wall_time: 240") + "seed: 0  # as it was\n")
    assert study_hash(reworded) == study_hash(parse_study(GOOD))
    assert study_hash(parse_study(GOOD, ["seed=1"])) != study_hash(reworded)


def test_differences_name_each_key_with_both_values() -> None:
    old, new = dump_study(parse_study(GOOD)), dump_study(parse_study(GOOD, ["seed=7", "slos={tpot_p50_ms: 9}"]))
    assert differences(old, new) == [
        "seed: 0 -> 7",
        "slos.tpot_p50_ms: not set -> 9.0",
        "slos.ttft_p99_ms: 500.0 -> not set",
    ]
    assert differences(old, old) == []


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_no_text_ends_in_anything_but_a_study_file_error(text: str) -> None:
    with pytest.raises(StudyFileError):
        parse_study(text)


@settings(deadline=None)
@given(
    key=st.sampled_from(["name", "workload", "slos", "objectives", "node_pools", "engines", "space", "budget", "seed"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_value_under_any_key_is_taken_or_told(key: str, value: object) -> None:
    tree = yaml.safe_load(GOOD) | {key: value}
    try:
        parse_study(yaml.safe_dump(tree))
    except StudyFileError as error:
        assert key in str(error) or "YAML" in str(error)  # noqa: PT017 - a good value raises nothing
