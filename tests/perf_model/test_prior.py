"""The prior from measured runs: what it learns of groups, what it leaves alone, its file and its speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perf_model.layout import ReplicaLayout
from perf_model.precision import Precision
from perf_model.prior import (
    SHIPPED,
    Occasion,
    Prior,
    Subject,
    group_words,
    kind_word,
    model_word,
    precision_word,
    run_subject,
)
from perf_model.prior_fit import FOLDS, Fitter, Sample, fit, interval_sd, raw_errors
from perf_model.raw_errors import on_gpus
from perf_model.runs import Run, RunPool
from perf_model.validate import Predicted
from search_spaces.errors import InvalidValueError
from search_spaces.known_models import known_model
from search_spaces.serving import Mode

DENSE, EXPERTS, LATENT = "Qwen/Qwen3-32B", "Qwen/Qwen3-235B-A22B-FP8", "deepseek-ai/DeepSeek-R1"
FP8 = Precision(gemm="fp8", projections="fp8", moe="fp8", cache="fp8")


def predicted(
    number: int,
    *,
    model: str = DENSE,
    system: str = "h100_sxm",
    engine: str = "vllm",
    bias: tuple[float, float] = (1.0, 1.0),
    users: int = 16,
    noise: float = 0.0,
) -> Predicted:
    """A run whose measured TTFT and TPOT are `bias` times the predicted ones, with lognormal noise."""
    rng = np.random.default_rng(number)
    ttft, tpot = 100.0 + 5 * users + number % 7, 10.0 + 0.1 * users
    measured = np.array([ttft, tpot]) * bias * np.exp(noise * rng.normal(size=2))
    run = Run(
        id=f"run {number}",
        model=known_model(model),
        model_name=model,
        system=system,
        engine=engine,
        engine_version="",
        precision=FP8,
        mode=Mode.AGGREGATED,
        isl=1024.0,
        osl=1024.0,
        concurrency=float(users),
        pools=(RunPool(layout=ReplicaLayout(tp=4, pp=1, dp=1, ep=1)),),
        stream_tokens=1.0,
        admission_steps=0.0,
        ttft_ms=float(measured[0]),
        tpot_ms=float(measured[1]),
    )
    return Predicted(
        run=run,
        ttft_ms=ttft,
        tpot_ms=tpot,
        prefill_ms=50.0,
        queue_ms=10.0,
        step_ms=tpot,
        decode_seqs=float(users),
        sequences=100.0,
    )


def group(count: int, start: int = 0, **given: object) -> list[Predicted]:
    loads = (4, 8, 16, 32, 64)
    return [predicted(start + i, users=loads[i % len(loads)], **given) for i in range(count)]


def factors(prior: Prior, row: Predicted) -> np.ndarray:
    (values,) = prior.correct([row])
    return np.array(values) / (row.ttft_ms, row.tpot_ms)


def test_a_measured_group_is_corrected() -> None:
    rows = group(30, bias=(1.6, 0.8), noise=0.03)
    found = factors(fit(rows), rows[3])
    assert found == pytest.approx([1.6, 0.8], rel=0.07)


def test_other_models_and_systems_hardly_move() -> None:
    prior = fit(group(40, bias=(1.8, 1.5), noise=0.03))
    for other in (predicted(99, model=LATENT), predicted(99, system="b200_sxm"), predicted(99, engine="sglang")):
        assert factors(prior, other) == pytest.approx([1, 1], abs=0.1)


def test_excluded_models_teach_nothing() -> None:
    biased, fair = group(40, bias=(2.0, 2.0), noise=0.03), group(40, start=100, model=EXPERTS, noise=0.03)
    prior = fit([*biased, *fair], exclude_models=[DENSE])
    assert factors(prior, biased[0]) == pytest.approx([1, 1], abs=0.05)
    assert prior.provenance["left out"] == model_word(known_model(DENSE))
    assert factors(fit([*biased, *fair]), biased[0]) == pytest.approx([2, 2], rel=0.1)


def test_runs_made_otherwise_than_told_do_not_count() -> None:
    rows = group(40, noise=0.03) + group(6, start=100, bias=(500.0, 300.0))
    assert factors(fit(rows), rows[0]) == pytest.approx([1, 1], abs=0.05)


def test_outliers_count_little() -> None:
    rows = group(40, noise=0.03) + group(6, start=100, bias=(5.0, 4.0))
    assert factors(fit(rows), rows[0]) == pytest.approx([1, 1], abs=0.15)


def test_slopes_in_load_are_learned() -> None:
    rows = [
        predicted(100 * i + users, users=users, bias=(1.0, (users / 16) ** 0.15), noise=0.01)
        for i in range(12)
        for users in (2, 4, 8, 16, 32, 64, 128)
    ]
    prior = fit(rows)
    low, high = (factors(prior, predicted(1, users=users))[1] for users in (2, 128))
    assert high / low == pytest.approx(64**0.15, rel=0.15)


def test_corrections_stay_within_limits() -> None:
    rows = group(60, bias=(5.5, 5.5), noise=0.01)
    prior = fit(rows)
    assert factors(prior, rows[0]).max() <= np.exp(prior.ttft.highest) + 1e-9


def test_copies_of_a_measurement_count_once_and_are_left_out_together() -> None:
    rows = group(24, noise=0.2)
    listed_twice = replace(rows[0], run=replace(rows[0].run, id="again"))
    sample = Sample((*rows, listed_twice))
    assert sample.weights[0] + sample.weights[-1] == pytest.approx(sample.weights[1])
    folds = FOLDS["random fifths"](sample)
    assert folds[0] == folds[-1]
    assert len(set(folds)) == 5
    left_out = Fitter(sample, "tpot").residuals(list(range(len(rows) + 1)))
    assert left_out[0] == pytest.approx(left_out[-1])


def test_intervals_hold_what_they_state() -> None:
    rows: list[Predicted] = []
    rng = np.random.default_rng(0)
    for number, (model, system) in enumerate(
        (m, s) for m in (DENSE, EXPERTS, LATENT) for s in ("h100_sxm", "b200_sxm")
    ):
        bias = np.exp(rng.normal(0, 0.25, 2))
        rows += group(60, start=1000 * number, model=model, system=system, bias=tuple(bias), noise=0.1)
    prior = fit(rows)
    sds = prior.tpot.log_sds["aggregated"]
    assert sds["known"] == pytest.approx(0.1, rel=0.35)
    assert sds["unknown"] > 1.3 * sds["known"]
    assert prior.tpot.log_sd(run_subject(rows[0].run)) == sds["known"]
    stranger = replace(run_subject(rows[0].run), model="never seen")
    assert prior.tpot.log_sd(stranger) == sds["unknown"]


def test_the_interval_of_normal_residuals_is_theirs() -> None:
    residuals = np.random.default_rng(0).normal(0, 0.3, 100_000)
    assert interval_sd(residuals) == pytest.approx(0.3, rel=0.02)


def test_errors_of_raw_figures_are_the_scatter_of_runs() -> None:
    runs = [predicted(i, users=4, noise=0.3) for i in range(400)]
    found = raw_errors(runs, [predicted(i, users=4, noise=0.6) for i in range(400)])
    assert found["aggregated"]["ttft"] == pytest.approx(0.3, rel=0.15)
    assert found["no tables"]["tpot"] == pytest.approx(0.6, rel=0.15)
    assert 0.1 < found["aggregated"]["e2e"] < 0.35
    assert set(found) == {"aggregated", "no tables"}


def test_raw_figures_state_what_was_learned_and_more_where_no_table_backs_them() -> None:
    errors = on_gpus(Mode.AGGREGATED)
    stated = [errors.log_stddev("ttft_p99_ms", share) for share in (0.0, 0.5, 1.0)]
    assert stated[0] == errors.with_tables["ttft"]
    assert stated[2] == pytest.approx(max(errors.without["ttft"], errors.with_tables["ttft"]))
    assert stated == sorted(stated)
    assert errors.log_stddev("devices", 1.0) == 0.0
    assert errors.log_stddev("output_tokens_per_s", 0.0) == errors.with_tables["e2e"]
    assert on_gpus(Mode.DISAGGREGATED).with_tables["ttft"] > stated[0]


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="3 runs are too few"):
        fit(group(3))


def test_a_saved_prior_is_the_same_when_loaded(tmp_path: Path) -> None:
    rows = group(30, bias=(1.5, 0.8), noise=0.05)
    prior = fit(rows, provenance={"file": "runs.csv"})
    prior.save(tmp_path / "prior.json")
    again = Prior.load(tmp_path / "prior.json")
    assert again.provenance["file"] == "runs.csv"
    assert np.array(again.correct(rows)) == pytest.approx(np.array(prior.correct(rows)))


@pytest.mark.parametrize("text", ["", "{}", '{"format": 99}', '{"format": 1}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prior.json"
    path.write_text(text)
    with pytest.raises(InvalidValueError, match="prior"):
        Prior.load(path)
    with pytest.raises(InvalidValueError, match=r"absent\.json"):
        Prior.load(tmp_path / "absent.json")


def test_the_shipped_prior_tells_where_it_comes_from() -> None:
    prior = Prior.load()
    assert {"file", "sha256", "licence", "command", "runs"} <= set(prior.provenance)
    assert int(prior.provenance["runs"]) > 2000
    assert SHIPPED.stat().st_size < 300_000
    for sds in (*prior.tpot.log_sds.values(), *prior.ttft.log_sds.values()):
        assert 0 < sds["known"] <= sds["unknown"] < 2
    assert json.loads(SHIPPED.read_text())["format"] == 1


def shipped_subject() -> Subject:
    """A measured replica that the shipped prior knows."""
    return run_subject(predicted(0, engine="trtllm").run)


def test_the_shipped_prior_corrects_what_was_measured_and_spares_what_was_not() -> None:
    prior, known = Prior.load(), shipped_subject()
    at = occasions([16.0, 64.0])
    strange = replace(known, model="Unheard 10x1024", system="mi999", engine="mlc")
    assert group_words(known)["one"] in prior.tpot.effects["one"]["offset"]
    assert prior.apply(known, at).tpot_log_sd[0] < prior.apply(strange, at).tpot_log_sd[0]
    assert prior.apply(strange, at).ttft_factor == pytest.approx([1, 1], abs=0.1)
    assert prior.apply(strange, at).tpot_factor == pytest.approx([1, 1], abs=0.05)


def occasions(users: Sequence[float]) -> Occasion:
    loads = np.array(users, dtype=float)
    full = np.ones_like(loads)
    return Occasion(users=loads, isl=1024 * full, osl=1024 * full, ttft_ms=10 * loads + 100, tpot_ms=0.1 * loads + 8)


def test_arrays_give_what_single_loads_give() -> None:
    prior, who = Prior.load(), shipped_subject()
    users = [2.0, 16.0, 100.0]
    together = prior.apply(who, occasions(users)).ttft_factor
    assert together == pytest.approx([float(prior.apply(who, occasions([u])).ttft_factor[0]) for u in users])


def test_words_tell_models_and_formats_apart() -> None:
    assert kind_word(known_model(DENSE)) == "dense"
    assert kind_word(known_model(EXPERTS)) == "experts"
    assert kind_word(known_model(LATENT)) == "latent attention"
    assert model_word(known_model(DENSE)) != model_word(known_model(EXPERTS))
    assert precision_word(FP8) == "fp8"
    assert precision_word(Precision(moe="int4_wo")) == "int4"
    assert precision_word(Precision(gemm="nvfp4")) == "fp4"
    assert precision_word(Precision()) == "bf16"
