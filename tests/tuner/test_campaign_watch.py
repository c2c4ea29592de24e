"""What a campaign does when the ground moves: other engines and nodes, and failures that repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.runner import TrialRequest
from search_spaces.outcome import Failure, FailureReason, Measurement, Outcome
from studies.records import Origin, TrialRecord, TrialStatus
from studies.storage import open_storage
from tests.studies.toy import measure, toy_problem, wide_space
from tests.support.memory_runner import MemoryRunner, Silence, measured
from tests.tuner.test_campaign_policy import standing
from tests.tuner.test_campaign_run import CAMPAIGN
from tuner.access import Connect
from tuner.campaigns.campaign import load_campaign
from tuner.campaigns.look import View
from tuner.campaigns.open import begin, campaign_lease
from tuner.campaigns.record import Record, Slice, SliceKind
from tuner.campaigns.run import CampaignRun
from tuner.campaigns.slices import SlicesHere
from tuner.campaigns.standing import Standing
from tuner.campaigns.watch import changes_since, due, odd_nodes, verdict
from tuner.places import Place
from tuner.study_schema import StudyFile
from tuner.wiring import UNMEASURED_CORE

NOON = datetime(2026, 11, 22, 12)  # noqa: DTZ001 - naive, as Optuna stores it
SPACE = wide_space(toy_problem())
CANDIDATE = SPACE.default()


def run_of(number: int, *, slower: float = 1.0, origin: Origin = Origin.CONTROL, **environment: str) -> TrialRecord:
    """A run of the default, an hour after the one before."""
    plain = measure(CANDIDATE)
    metrics = replace(
        plain.metrics,
        output_tokens_per_s=plain.metrics.output_tokens_per_s / slower,
        tpot_ms=replace(plain.metrics.tpot_ms, p50=plain.metrics.tpot_ms.p50 * slower),
        ttft_ms=replace(plain.metrics.ttft_ms, p50=plain.metrics.ttft_ms.p50 * slower),
    )
    flat = metrics.flat()
    named = {name.replace("__", "."): value for name, value in environment.items()}
    return TrialRecord(
        number=number,
        status=TrialStatus.MEASURED,
        candidate=CANDIDATE,
        key=CANDIDATE.key,
        origin=origin,
        prediction=None,
        outcome=Measurement(metrics=metrics, client_lateness_ms=0.0, environment=named),
        values=(flat["output_tokens_per_s"], flat["ttft_p50_ms"]),
        repeat_of=0 if origin.is_repeat else None,
        started_at=NOON + timedelta(hours=number),
        ended_at=NOON + timedelta(hours=number, minutes=5),
    )


def study_of(*trials: TrialRecord) -> Standing:
    problem = toy_problem()
    directions = tuple(objective.direction for objective in problem.objectives)
    return standing("a", trials=trials, problem=problem, directions=directions)


def first(**environment: str) -> TrialRecord:
    return run_of(0, origin=Origin.DEFAULT, **environment)


def test_a_later_trial_tells_of_another_engine_driver_or_node() -> None:
    old = first(engine_version="0.9", gpu_driver="550.1", node__mixed="a")
    assert changes_since(old, [run_of(1, engine_version="0.9", node__mixed="b")]) == []
    (change,) = changes_since(old, [run_of(1, engine_version="0.10", gpu_driver="550.1", node__mixed="a")])
    assert change == "engine_version: 0.9 -> 0.10"
    assert changes_since(old, [run_of(n, node__mixed="b") for n in (1, 2)]) == [], "two trials elsewhere are chance"
    assert changes_since(old, [run_of(n, node__mixed="b") for n in (1, 2, 3)]) == ["node: a -> b"]
    assert changes_since(run_of(5, engine_version="0.9"), [run_of(1, engine_version="0.8")]) == [], "that was before"


def test_a_check_is_due_after_a_change_or_after_so_long() -> None:
    study = study_of(first(engine_version="1"), run_of(1, engine_version="1"))
    later = (*study.trials, replace(run_of(2, engine_version="2"), key="other"))
    now_s = (NOON + timedelta(hours=30)).timestamp()
    found = due(study, later, every_s=None, now_s=now_s)
    assert found is not None
    assert (found.trial, found.runs, found.why) == (0, 3, "engine_version: 1 -> 2")
    assert due(study, study.trials, every_s=None, now_s=now_s) is None
    by_time = due(study, (), every_s=86400.0, now_s=now_s)
    assert by_time is not None
    assert by_time.why == "it was measured last 29 h ago"
    assert due(standing("empty"), later, every_s=1.0, now_s=now_s) is None


def test_within_the_noise_nothing_moved_and_beyond_it_something_did() -> None:
    noisy = (first(), run_of(1, slower=1.02), run_of(2, slower=0.98), run_of(3, slower=1.01))
    assert not any(moved.is_clear for moved in verdict(study_of(*noisy, run_of(4, slower=1.03)), 0))
    clear = verdict(study_of(*noisy, run_of(4, slower=1.3)), 0)
    assert [moved.metric for moved in clear if moved.is_clear] == ["output_tokens_per_s", "ttft_p50_ms"]
    assert "beyond the study's noise" in str(clear[0])
    (assumed, _) = verdict(study_of(first(), run_of(1, slower=1.1)), 0)
    assert not assumed.is_clear
    assert "assumed, nothing was repeated" in str(assumed)
    assert verdict(study_of(first()), 0) == ()


def test_a_node_whose_controls_differ_from_the_others_is_named() -> None:
    factors = {"a": (1.0, 1.01, 0.99), "b": (1.0, 1.01, 1.0), "c": (1.0, 1.3, 1.31)}
    runs = [first(node__mixed="a")]
    for host, slower in factors.items():
        runs += [run_of(len(runs) + i, slower=f, node__mixed=host) for i, f in enumerate(slower)]
    runs = [replace(run, number=n) for n, run in enumerate(runs)]
    (odd,) = odd_nodes(study_of(*runs))
    assert (odd.host, odd.pool) == ("c", "here")
    last = runs[-1].ended_at
    assert last is not None
    assert odd_nodes(study_of(*runs), since_s=last.timestamp() - 1) == (), "one control says nothing of a node"
    assert odd_nodes(study_of(*runs[:7])) == (), "a and b serve alike"
    assert odd_nodes(standing("empty")) == ()


@pytest.mark.parametrize(
    ("factors", "named"),
    [
        ({"a": 1.0, "b": 1.3, "c": 1.0}, ["b"]),
        ({"a": 1.0, "b": 1.3}, ["b"]),
        ({"a": 1.3, "b": 1.3, "c": 1.0, "d": 1.0, "e": 1.0}, ["a", "b"]),
        ({"a": 0.8, "b": 1.0, "c": 1.0, "d": 1.25}, ["a", "d"]),
    ],
)
def test_beside_an_odd_node_the_others_are_none(factors: dict[str, float], named: list[str]) -> None:
    """Without noise every node differs from the mean of the others where one of them does."""
    hosts = sorted([*factors, *factors])
    runs = [run_of(number, slower=factors[host], node__mixed=host) for number, host in enumerate(hosts)]
    found = odd_nodes(study_of(replace(runs[0], origin=Origin.DEFAULT, repeat_of=None), *runs[1:]))
    assert sorted(odd.host for odd in found) == named


@dataclass
class World:
    """Nodes in memory whose engine is renewed, and served `slower`, after so many trials in all."""

    changes_after: int = 10**6
    slower: float = 1.4
    fails: Callable[[TrialRequest], bool] = lambda _: False
    trials: int = 0
    trials_at_once: int = 1

    def outcome(self, request: TrialRequest) -> Outcome:
        self.trials += 1
        is_new = self.trials > self.changes_after
        if self.fails(request):
            return Failure(reason=FailureReason.LOST_NODE, detail="as arranged")
        plain = measured(request)
        assert isinstance(plain, Measurement)
        slower = self.slower if is_new else 1.0
        metrics = replace(plain.metrics, output_tokens_per_s=plain.metrics.output_tokens_per_s / slower)
        environment = {"engine_version": "2.0" if is_new else "1.0", "node.mixed": "a"}
        return replace(plain, metrics=metrics, environment=environment)

    def measure(self, _pool: object) -> object:
        return UNMEASURED_CORE

    def runner(self, _study: str) -> MemoryRunner:
        return MemoryRunner(outcome_of=self.outcome, polls=0)

    def connector(self, _study: object, _avoid: object) -> Connect:
        @contextmanager
        def connect(_problem: object, _place: object) -> Iterator[World]:
            yield self

        return connect  # type: ignore[return-value]  # a cluster by its behaviour


@dataclass
class Watcher(Silence):
    """Watches a campaign and its studies, and listens to what webhooks would be told."""

    drifts: list[str] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)

    def study(self, _name: str) -> Any:
        return self

    def turned(self, _view: View) -> None:
        pass

    def drifted(self, _view: View, _key: str, text: str, _standing: Standing) -> None:
        self.drifts.append(text)

    def ended(self, _of: object, what: object) -> None:  # a trial's problem, or a slice: both protocols say `ended`
        if isinstance(what, Slice):
            self.slices.append(what)

    def over(self, _view: View, reason: str) -> None:
        self.notes.append(reason)


def run_campaign(folder: Path, text: str, world: World | Pools) -> tuple[str | None, Record, Watcher]:
    path = folder / "campaign.yaml"
    path.write_text(text)
    place = Place(url=f"sqlite:///{folder}/studies.db", directory=folder)
    storage, watcher = open_storage(place.url), Watcher()
    campaign, _ = load_campaign(path)
    with campaign_lease(storage, campaign.name) as lease:
        record = begin(storage, campaign)
        run = CampaignRun(
            campaign=record.campaign(),
            record=record,
            storage=storage,
            place=place,
            lease=lease,
            slices=SlicesHere(connector=world.connector, place=place, stop_requested=lambda: False),
            observer=watcher,
            stop_requested=lambda: False,
            listeners=[watcher],
            sleep=lambda _: None,
            retry_s=0.0,
        )
        return run.run(), record, watcher


@pytest.mark.parametrize(("slower", "moves"), [(1.4, True), pytest.param(1.01, False, marks=pytest.mark.long)])
def test_a_new_engine_has_the_best_configuration_measured_again_and_may_begin_a_new_study(
    tmp_path: Path, slower: float, moves: bool
) -> None:
    """Two trials of each study; the engine is renewed after the first study's."""
    text = CAMPAIGN.replace("trials: 4,", "trials: 2,")
    reason, record, watcher = run_campaign(tmp_path, text, World(changes_after=2, slower=slower))
    assert reason == "nothing is left to gain: every study is closed"
    memory = record.memory()
    checks = [slice_ for slice_ in memory.slices if slice_.kind is SliceKind.CHECK]
    assert [check.study for check in checks] == ["many.few"]
    assert "engine_version: 1.0 -> 2.0" in checks[0].why
    cell = memory.cells["many.few"]
    assert (cell.generation, cell.study) == ((2, "many.few.g2") if moves else (1, "many.few"))
    assert cell.closed is not None
    assert len(watcher.drifts) == moves
    assert [slice_.number for slice_ in watcher.slices] == [slice_.number for slice_ in memory.slices]
    if moves:
        assert cell.earlier == ("many.few",)
        assert "A new study begins: many.few.g2" in watcher.drifts[0]


def test_a_study_that_always_fails_is_given_up_and_the_others_go_on(tmp_path: Path) -> None:
    world = World(fails=lambda request: request.trial.startswith("many.few"))
    text = CAMPAIGN.replace("trials: 4,", "trials: 2,").replace("slices:", "close: {failed_slices: 1}\nslices:")
    reason, record, _ = run_campaign(tmp_path, text, world)
    assert reason == "nothing is left to gain: every study is closed"
    memory = record.memory()
    assert str(memory.cells["many.few"].closed).startswith("given up, 1 of its last slices failed: too many faults")
    assert memory.cells["many.many"].closed == "the budget of trials is used"
    assert [slice_.end.failed for slice_ in memory.slices_of("many.few") if slice_.end] == [True]


TWO_POOLS = """
name: many
common:
  workload: {isl: 64, osl: 16, concurrency: [1, 2, 4]}
  objectives: [output_tokens_per_s, ttft_p50_ms]
  engines: {llamacpp: {threads: [1, 2], max_num_seqs: [1, 4], batch_size: 512, ubatch_size: 512, flash_attention: true,
    kv_cache_dtype: f16}}
  space: {modes: [aggregated]}
  budget: {trials: 2, confirm: 1, control_every: 0}
matrix:
  nodes:
    on-a: {node_pools: {a: {cpus_per_node: 4, nodes: 3}}, budget: {trials: 5, control_every: 1}}
    on-b: {node_pools: {b: {cpus_per_node: 4, nodes: 3}}}
    on-both: {node_pools: {b: {cpus_per_node: 4, nodes: 3}, a: {cpus_per_node: 4, nodes: 3}}}
    on-a-too: {node_pools: {a: {cpus_per_node: 4, nodes: 3}}}
budget: {device_hours: 100}
slices: {trials: 5}
watch: {environment: false}
"""


@dataclass
class Pools:
    """Nodes a0, a1 and a2 of a pool and b0, b1 and b2 of another one, used in turn but for those that are avoided.

    Some serve slower, by these factors.
    """

    slower: Mapping[str, float]
    avoided: dict[str, tuple[str, ...]] = field(default_factory=dict)
    used: dict[str, list[str]] = field(default_factory=dict)
    trials_at_once: int = 1

    def outcome(self, request: TrialRequest) -> Outcome:
        study, (pool,) = request.trial.rpartition("-")[0], request.candidate.config.pools
        hosts = [f"{pool.node_pool}{n}" for n in range(3)]
        free, used = [host for host in hosts if host not in self.avoided[study]], self.used.setdefault(study, [])
        host = free[len(used) % len(free)]
        used.append(host)
        plain = measured(request)
        assert isinstance(plain, Measurement)
        metrics = replace(
            plain.metrics, output_tokens_per_s=plain.metrics.output_tokens_per_s / self.slower.get(host, 1.0)
        )
        return replace(plain, metrics=metrics, environment={"node.mixed-0": host})

    def measure(self, _pool: object) -> object:
        return UNMEASURED_CORE

    def runner(self, _study: str) -> MemoryRunner:
        return MemoryRunner(outcome_of=self.outcome, polls=0)

    def connector(self, study: StudyFile, avoid: tuple[str, ...]) -> Connect:
        self.avoided[study.name] = avoid

        @contextmanager
        def connect(_problem: object, _place: object) -> Iterator[Pools]:
            yield self

        return connect  # type: ignore[return-value]  # a cluster by its behaviour


@pytest.mark.long
def test_a_node_that_differs_is_avoided_by_every_study_on_its_pool_and_by_no_other(tmp_path: Path) -> None:
    pools = Pools(slower={"a1": 1.3})
    reason, record, watcher = run_campaign(tmp_path, TWO_POOLS, pools)
    assert reason == "nothing is left to gain: every study is closed"
    assert pools.avoided == {"many.on-a": (), "many.on-b": (), "many.on-both": ("a1",), "many.on-a-too": ("a1",)}
    assert [(suspect.pool, suspect.host) for suspect in record.memory().quarantine] == [("a", "a1")]
    (told,) = [text for text in watcher.drifts if text.startswith("node ")]
    assert told.startswith("node a1 of pool a is avoided from now on: output_tokens_per_s of its last controls is -23")
    assert pools.used["many.on-a"].count("a1") >= 2
    assert pools.used["many.on-b"] == ["b0", "b1"]
    assert pools.used["many.on-a-too"] == ["a0", "a2"]
