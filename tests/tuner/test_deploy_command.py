"""The deployed processes are those that were measured: the law, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.errors import InvalidValueError
from search_spaces.outcome import LaunchedProcess, Probe
from search_spaces.serving import Mode
from search_spaces.workload import Arrival, Conversation, Length, Load, Trace, TraceFormat
from studies.codec import from_json, to_json
from studies.noise import Basis, Interval
from tests.support.deployable import KEY, ON_GPUS, config, embedded, measured, on_gpus
from tests.support.reports import a_report
from tuner.deploy.bench import Benchmark, dump_benchmark, load_benchmark
from tuner.deploy.chosen import Chosen, choose
from tuner.deploy.command import Target, make_files
from tuner.deploy.layout import CommandChangedError, Place, parts_of
from tuner.deploy.nodes import measured_nodes
from tuner.deploy.pods import dns_name
from tuner.deploy.readme import benchmark_of, workload_text
from tuner.report import metrics_of
from tuner.study_file import parse_study

MakeChosen = Callable[[Path], Chosen]
TRIALS: dict[str, MakeChosen] = {
    "embedded": lambda folder: embedded(folder, replicas=2),
    "embedded-pd": lambda folder: embedded(folder, Mode.DISAGGREGATED),
    "emulated": lambda folder: on_gpus("emulated", folder, tp=2, replicas=2),
    "emulated-pd": lambda folder: on_gpus("emulated", folder, Mode.DISAGGREGATED, tp=2),
    "vllm": lambda folder: on_gpus("vllm", folder, tp=2, replicas=2),
    "vllm-pd": lambda folder: on_gpus("vllm", folder, Mode.DISAGGREGATED, tp=2),
    "sglang-pd": lambda folder: on_gpus("sglang", folder, Mode.DISAGGREGATED, tp=2),
    "trtllm-pd": lambda folder: on_gpus("trtllm", folder, Mode.DISAGGREGATED, tp=2),
}


def as_it_was(process: LaunchedProcess) -> Place:
    return Place(
        host=process.host,
        port=process.port,
        url=f"http://{process.host}:{process.port}",
        device_ids=process.device_ids,
        work_dir=process.work_dir,
        shared_dir=process.shared_dir,
        model_source=process.model_source,
        cluster_node=process.cluster_node,
    )


@pytest.mark.parametrize("case", TRIALS)
def test_in_its_own_place_the_deployed_argv_is_the_measured_one(case: str, tmp_path: Path) -> None:
    chosen = TRIALS[case](tmp_path)
    parts = parts_of(chosen, as_it_was)
    assert [part.name for part in parts] == [process.name for process in chosen.measurement.processes]
    for part in parts:
        assert part.command.argv == part.measured.argv
        files = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in part.command.files.items()}
        assert files == part.measured.files
        kept = {key: value for key, value in part.measured.env.items() if key in part.command.env}
        assert kept == part.command.env


@pytest.mark.parametrize("case", TRIALS)
def test_elsewhere_only_the_place_differs(case: str, tmp_path: Path) -> None:
    """Every number and word of the configuration stays; addresses, devices and paths go with the place."""
    chosen = TRIALS[case](tmp_path)
    _, made = make_files(chosen, Target.SHELL, tmp_path / "out", port=9000)
    assert made
    places = {"host", "port", "model_path", "slot_dir", "cores", "ledger", "devices", "seed"}
    for part in parts_of(chosen, lambda process: replace(as_it_was(process), port=process.port + 1, work_dir="w")):
        for line in part.differences:
            assert any(word in line for word in ("port", "PORT", "_urls", "work", "w/", "content of", "DEV_MODE")), line
        if part.measured.argv[-1].startswith("{"):
            before, after = json.loads(part.measured.argv[-1]), json.loads(part.command.argv[-1])
            assert {k for k in before if before[k] != after[k]} <= places | {
                "mixed_urls",
                "prefill_urls",
                "decode_urls",
            }


def test_what_can_no_longer_be_made_is_not_deployed(tmp_path: Path) -> None:
    chosen = embedded(tmp_path)
    (process,) = chosen.measurement.processes
    spec = json.loads(process.argv[-1]) | {"batch_size": 64}
    other = replace(process, argv=(*process.argv[:-1], json.dumps(spec)))
    changed = replace(chosen, measurement=replace(chosen.measurement, processes=(other,)))
    with pytest.raises(CommandChangedError, match=r"mixed-0 otherwise than it was measured: batch_size: 64 -> 2048"):
        make_files(changed, Target.SHELL, tmp_path / "out")


def test_a_file_that_would_differ_is_noticed(tmp_path: Path) -> None:
    chosen = on_gpus("emulated", tmp_path, tp=2)
    (process,) = chosen.measurement.processes
    other = replace(process, files=dict.fromkeys(process.files, "0" * 64))
    changed = replace(chosen, measurement=replace(chosen.measurement, processes=(other,)))
    with pytest.raises(CommandChangedError, match=r"content of mixed-0\.spec\.json"):
        make_files(changed, Target.SHELL, tmp_path / "out")


def test_a_replica_on_two_nodes_keeps_its_parts(tmp_path: Path) -> None:
    file = parse_study(ON_GPUS.format(engine="vllm"))
    chosen = measured(file, config("vllm", Mode.AGGREGATED, pool="h100", tp=8, pp=2), tmp_path, nodes=("one", "two"))
    assert measured_nodes(chosen) == (("one", "10.0.0.1"), ("two", "10.0.0.2"))
    output, made = make_files(chosen, Target.SHELL, tmp_path / "out", hosts=("192.0.2.1", "192.0.2.2"))
    scripts = {file.path: file.text for file in made if file.path.endswith(".sh")}
    assert scripts.keys() == {"start-one.sh", "start-two.sh"}
    leader, follower = (part.command.argv for part in output.parts)
    for argv, rank in ((leader, "0"), (follower, "1")):
        assert argv[argv.index("--node-rank") + 1] == rank
        assert argv[argv.index("--master-addr") + 1] == "192.0.2.1"
    assert leader[leader.index("--master-port") + 1] == follower[follower.index("--master-port") + 1]
    assert output.endpoint == "http://192.0.2.1:8000"
    with pytest.raises(InvalidValueError, match="ran on 2"):
        make_files(chosen, Target.SHELL, tmp_path / "other", hosts=("192.0.2.1",))


def test_a_replica_on_two_nodes_is_a_leader_worker_set(tmp_path: Path) -> None:
    file = parse_study(ON_GPUS.format(engine="vllm"))
    chosen = measured(file, config("vllm", Mode.AGGREGATED, pool="h100", tp=8, pp=2), tmp_path, nodes=("one", "two"))
    _, made = make_files(chosen, Target.LWS, tmp_path / "out")
    trees = list(yaml.safe_load_all(made[0].text))
    (group,) = (tree for tree in trees if tree["kind"] == "LeaderWorkerSet")
    template = group["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    leader, worker = (template[f"{kind}Template"]["spec"]["containers"][0] for kind in ("leader", "worker"))
    address = f"{group['metadata']['name']}-0.{group['metadata']['name']}"
    for container, rank in ((leader, "0"), (worker, "1")):
        args = container["args"]
        assert args[args.index("--node-rank") + 1] == rank
        assert args[args.index("--master-addr") + 1] == address
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert "readinessProbe" in leader
    assert "readinessProbe" not in worker
    (service,) = (tree for tree in trees if tree["kind"] == "Service")
    assert service["spec"]["selector"] == template["leaderTemplate"]["metadata"]["labels"]
    for target in (Target.KUBERNETES, Target.DYNAMO):
        with pytest.raises(InvalidValueError, match="span nodes"):
            make_files(chosen, target, tmp_path / target)


def test_records_survive_the_storage(tmp_path: Path) -> None:
    file = parse_study(ON_GPUS.format(engine="vllm"))
    chosen = measured(file, config("vllm", Mode.AGGREGATED, pool="h100", tp=8, pp=2), tmp_path, nodes=("one", "two"))
    for process in chosen.measurement.processes:
        assert from_json(LaunchedProcess, json.loads(json.dumps(to_json(process)))) == process


def test_best_is_the_front_member_that_is_best_in_an_objective() -> None:
    found, file = a_report(), parse_study("name: toy\nworkload: {isl: 64, osl: 16, concurrency: 4}\n" + TOY)
    measured_all = tuple(
        replace(t, outcome=replace(t.measurement, processes=(SOME,))) if t.measurement else t for t in found.trials
    )
    found = replace(found, trials=measured_all)
    by_rate, by_ttft = choose(found, file, "best"), choose(found, file, "best", "ttft_p50_ms")
    front = [metrics_of(t) for t in found.front]
    assert metrics_of(by_rate.trial)["output_tokens_per_s"] == max(m["output_tokens_per_s"] for m in front)
    assert metrics_of(by_ttft.trial)["ttft_p50_ms"] == min(m["ttft_p50_ms"] for m in front)
    assert by_rate.trial.number != by_ttft.trial.number
    assert "best in ttft_p50_ms" in by_ttft.rule
    for wanted, objective, words in (
        ("best", "e2e_p99_ms", "no objective"),
        ("best-ish", None, "neither"),
        ("999", None, "no trial 999"),
        (str(found.trials[-1].number), None, "is failed"),
    ):
        with pytest.raises(InvalidValueError, match=words):
            choose(found, file, wanted, objective)
    with pytest.raises(InvalidValueError, match="did not record"):
        choose(a_report(), file, "0")


def test_the_readme_states_intervals_where_runs_were_repeated(tmp_path: Path) -> None:
    chosen = embedded(tmp_path)
    assert "95% interval" not in readme_of(chosen, tmp_path / "plain")
    known = Interval(mean=11.0, low=10.0, high=12.5, runs=3, basis=Basis.REPEATS)
    text = readme_of(replace(chosen, intervals={"ttft_p50_ms": known}), tmp_path / "known")
    assert "| ttft\\_p50\\_ms | 11 | ms | 10 to 12.5 (3 runs) |" in text
    assert "| tpot\\_p50\\_ms | 11 | ms |  |" in text


def readme_of(chosen: Chosen, out: Path) -> str:
    return next(file.text for file in make_files(chosen, Target.SHELL, out)[1] if file.path == "README.md")


def test_of_a_searched_rate_the_highest_that_was_met_is_measured_again(tmp_path: Path) -> None:
    chosen = embedded(tmp_path)
    probes = (Probe(request_rate=2.0, met=True), Probe(request_rate=3.0, met=False), Probe(request_rate=2.5, met=True))
    load = Load(arrival=Arrival.POISSON, value=64.0)
    searched = replace(
        chosen,
        candidate=replace(chosen.candidate, load=load),
        measurement=replace(chosen.measurement, probes=probes),
    )
    assert benchmark_of(searched).load == Load(arrival=Arrival.POISSON, value=2.5)


TOY = """
objectives: [output_tokens_per_s, ttft_p50_ms]
node_pools: {here: {cpus_per_node: 4}}
engines: [llamacpp]
"""
SOME = LaunchedProcess(
    name="mixed-0", trial="t", node="n", host="127.0.0.1", port=1, argv=("x",), work_dir="w", shared_dir="s"
)


def test_the_benchmark_sends_what_was_measured(tmp_path: Path) -> None:
    chosen = embedded(tmp_path)
    benchmark = benchmark_of(chosen)
    path = tmp_path / "benchmark.json"
    path.write_text(dump_benchmark(benchmark))
    assert load_benchmark(path) == benchmark
    assert benchmark.seed == chosen.file.seed + chosen.trial.number
    assert benchmark.load == chosen.candidate.load
    assert benchmark.workload == chosen.problem.workload
    path.write_text("{}")
    with pytest.raises(InvalidValueError, match="no benchmark of this version"):
        load_benchmark(path)
    with pytest.raises(InvalidValueError, match="cannot be read"):
        load_benchmark(tmp_path / "none.json")
    assert isinstance(benchmark, Benchmark)


@settings(deadline=None)  # other processes may have the machine
@given(st.text(max_size=80), st.text(max_size=80))
def test_names_in_a_cluster_are_dns_labels_and_differ(one: str, other: str) -> None:
    first, second = dns_name(one), dns_name(other)
    assert len(first) <= 40
    assert first[0].isalpha()
    assert first[-1].isalnum()
    assert all(c.isascii() and (c.islower() or c.isdigit() or c == "-") for c in first)
    assert (first == second) == (one == other)


def test_the_readme_names_the_variables_of_keys_and_holds_none(tmp_path: Path) -> None:
    text = readme_of(on_gpus("vllm", tmp_path, tp=2), tmp_path / "out")
    assert "TUNER\\_API\\_KEY and VLLM\\_API\\_KEY" in text
    assert KEY not in text


def test_the_readme_says_what_was_sent(tmp_path: Path) -> None:
    chosen = embedded(tmp_path)
    talk = Conversation(turns=Length(mean=4, spread=0.5), new_isl=Length(mean=20), osl=Length(mean=8), think_time_s=2)
    traced = Trace(file="/a/b.jsonl", format=TraceFormat.AZURE, requests=90, request_rate=2.0, longest_context=900)
    plain = chosen.problem.workload
    texts = {
        "48 tokens in, 8 out, closed": plain,
        "conversations of 2 to 6 turns, 2 s between them; 20 new tokens in, 8 out": talk.workload(Arrival.CLOSED),
        "90 requests of the trace b.jsonl": replace(plain, arrival=Arrival.TRACE, trace=traced),
    }
    for words, workload in texts.items():
        assert words in workload_text(workload)
