"""The search benchmark: replayed surfaces, kept results, figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import measure_surface
from benchmarks.search.figures import Run, Yardstick, replay
from benchmarks.search.hindsight import told_all_others
from benchmarks.search.hosts import neutral_hosts
from benchmarks.search.jobs import (
    GP,
    HINDSIGHT,
    NSGA2,
    OURS,
    RANDOM,
    Job,
    Result,
    complete_seeds,
    kept_result,
    perform_kept,
)
from benchmarks.search.modelled import CorrectedSearch, Modelled
from benchmarks.search.report import Findings
from benchmarks.search.samplers import TableSpace, random_order, sampler_order
from benchmarks.search.surface import read_surface
from benchmarks.search_efficiency import SURFACE, main
from perf_model.hosts import HOSTS
from perf_model.surrogate import HyperPrior, fit
from tuner.study_file import load_study_file


@pytest.fixture(scope="module")
def surface() -> Modelled:
    return read_surface(SURFACE).modelled


@pytest.fixture(scope="module")
def small(surface: Modelled) -> Modelled:
    """Every eighth candidate of the surface."""
    rows = np.arange(0, len(surface.table), 8)
    table = replace(
        surface.table,
        rows=surface.table.rows.iloc[rows].reset_index(drop=True),
        log_answers=surface.table.log_answers[rows],
        gpus=surface.table.gpus[rows],
    )
    return Modelled(table=table, log_mean=surface.log_mean[rows], features=surface.features.take(rows))


def make_job(modelled: Modelled, searcher: str, *, seed: int = 0, limit: int | None = None) -> Job:
    priors = tuple(HyperPrior() for _ in modelled.table.metrics)
    return Job(modelled=modelled, priors=priors, searcher=searcher, seed=seed, limit=limit)


def test_the_surface_holds_every_candidate_of_its_study(surface: Modelled) -> None:
    candidates = measure_surface.candidates_of(load_study_file(measure_surface.STUDY))
    assert len(candidates) >= 150
    assert len(surface.table) == len(candidates)
    assert surface.table.started.all()
    assert set(surface.table.rows["mode"]) == {"aggregated", "disaggregated"}
    assert (surface.table.values > 0).all()


def test_each_pass_measures_each_configuration_once_in_its_own_order() -> None:
    candidates = measure_surface.candidates_of(load_study_file(measure_surface.STUDY))
    tasks = measure_surface.tasks_of(candidates, 2, seed=0)
    first, second = ([t.candidates for t in tasks if t.number == number] for number in (0, 1))
    assert first != second
    assert set(first) == set(second)
    assert sorted(c.key for group in first for c in group) == sorted(c.key for c in candidates)
    assert all(len({c.config for c in group}) == 1 for group in first)


def test_the_provenance_says_when_and_with_what_and_names_no_place() -> None:
    import pyarrow.parquet as pq

    schema = pq.read_schema(SURFACE)
    origin = json.loads(schema.metadata[b"provenance"])
    assert {"date", "engine", "cores", "device", "study", "note"} <= set(origin)
    assert "/" not in json.dumps({name: value for name, value in origin.items() if name != "command"}).replace(
        "(s/", ""
    )


def test_every_row_is_nearest_to_its_own_parameters(surface: Modelled) -> None:
    space = TableSpace(surface.table)
    rng = np.random.default_rng(0)
    for row, codes in enumerate(space.codes):
        params = {name: int(max(code, 0)) for name, code in zip(space.names, codes, strict=True)}
        assert space.nearest(params, rng) == row


@pytest.mark.parametrize("name", ["nsga2", "tpe"])
def test_a_sampler_measures_every_row_once(small: Modelled, name: str) -> None:
    assert sorted(sampler_order(small.table, name, 0)) == list(range(len(small.table)))


def test_a_replay_counts_to_its_targets_and_ends_at_its_limit(surface: Modelled) -> None:
    yardstick = Yardstick(surface.table)
    whole = replay(yardstick, random_order(surface.table, 1))
    assert whole.reached == (True, True)
    assert whole.needed[0] <= whole.needed[1] <= len(surface.table)
    cut = replay(yardstick, random_order(surface.table, 1), limit=3)
    assert cut.needed == (3, 3)
    assert cut.reached == (False, False)
    assert max(yardstick.oracle().needed) <= min(whole.needed)


def test_a_batch_of_ours_is_chosen_before_any_of_it_is_measured(small: Modelled) -> None:
    """The answers of a batch change what comes after it, and nothing in it; every row is measured once."""
    other = replace(small, table=replace(small.table, log_answers=small.table.log_answers[::-1].copy()))
    priors = tuple(HyperPrior() for _ in small.table.metrics)
    orders = [list(CorrectedSearch(modelled=m, priors=priors, seed=0, at_once=8).order()) for m in (small, other)]
    assert orders[0][:8] == orders[1][:8]
    assert orders[0][8:] != orders[1][8:]
    assert [sorted(order) for order in orders] == [list(range(len(small.table)))] * 2


def test_kept_results_are_read_again_and_tell_what_a_smaller_limit_would(small: Modelled, tmp_path: Path) -> None:
    job = make_job(small, NSGA2, limit=15)
    result = perform_kept(job, tmp_path)
    assert perform_kept(job, tmp_path) == result
    under = kept_result(replace(job, limit=2), tmp_path)
    assert under is not None
    assert under.run.needed == tuple(min(needed, 2) for needed in result.run.needed)
    if not all(result.run.reached):
        assert kept_result(replace(job, limit=None), tmp_path) is None, "a run without limit goes on"
    assert kept_result(replace(job, seed=1), tmp_path) is None


def test_what_ours_believes_is_part_of_its_name_only(small: Modelled, tmp_path: Path) -> None:
    other = replace(small, log_mean=small.log_mean + 0.1)
    assert make_job(small, RANDOM).kept_in(tmp_path) == make_job(other, RANDOM).kept_in(tmp_path)
    assert make_job(small, OURS).kept_in(tmp_path) != make_job(other, OURS).kept_in(tmp_path)


def test_a_prior_of_neutral_constants_keeps_nothing_that_was_fitted() -> None:
    for engine, traits in neutral_hosts().items():
        assert traits.decode_factor == traits.prefill_factor == 1.0
        assert (traits.request_ms, traits.latent_layer_ms, traits.sequence_ms) == (0.0, 0.0, 0.0)
        assert traits.reserves_whole == HOSTS[engine].reserves_whole


def test_hindsight_believes_of_a_candidate_what_all_others_tell(small: Modelled) -> None:
    priors = tuple(HyperPrior() for _ in small.table.metrics)
    beliefs = told_all_others(small, priors)
    surrogate = fit(small.features, small.log_ratio[:, 1], prior=priors[1])
    row, others = 3, np.delete(np.arange(len(small.table)), 3)
    covariance = surrogate.covariance(small.features, small.features)
    known = covariance[np.ix_(others, others)] + np.diag(surrogate.noise_variance[others])
    told = np.linalg.solve(known, covariance[others, row])
    assert beliefs.mean[row, 1] == pytest.approx(small.log_mean[row, 1] + told @ small.log_ratio[others, 1], abs=1e-6)
    variance = covariance[row, row] + surrogate.noise_variance[row] - told @ covariance[others, row]
    assert beliefs.stddev[row, 1] == pytest.approx(np.sqrt(variance), rel=1e-6)


def test_hindsight_measures_until_its_targets_are_reached(small: Modelled, tmp_path: Path) -> None:
    result = perform_kept(make_job(small, HINDSIGHT), tmp_path)
    assert result.run.reached == (True, True)
    assert min(result.run.needed) >= min(Yardstick(small.table).oracle().needed)


def make_result(searcher: str, table: str, needed: tuple[int, int], seed: int = 0) -> Result:
    run = Run(needed=needed, reached=(True, True), early_regret=0.01)
    return Result(table=table, searcher=searcher, seed=seed, run=run, seconds=1.0)


def test_medians_take_searchers_and_seeds_that_ran_everywhere() -> None:
    results = [
        *(make_result(OURS, table, (5, 8)) for table in "ab"),
        *(make_result(NSGA2, table, (50, 60)) for table in "ab"),
        make_result(NSGA2, "a", (2, 2), seed=1),
        make_result(GP, "a", (10, 20)),
    ]
    kept, incomplete = complete_seeds(results, ["a", "b"])
    assert incomplete == [GP]
    found = Findings(facts=(), sizes={"a": 10, "b": 10}, results=tuple(kept))
    assert set(found.medians) == {OURS, NSGA2}
    assert found.medians[NSGA2].needed == (50, 60)
    assert {c.criterion: (c.value, c.met) for c in found.criteria}["to 95%: ours / NSGA-II alone"] == (0.1, True)
    assert found.paired(0) == {NSGA2: 0.1, GP: 0.5}


def test_the_command_prints_json_of_the_surface_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--seeds", "1", "--only", "ours", "random", "--jobs", "1", "--json", "--cache", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["medians"]) == {"ours", "random", "perfect model"}
    assert any("embedded_surface.parquet" in fact for fact in found["facts"])
