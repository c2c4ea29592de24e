"""Calibration: what measurements change in predictions, and what they never change."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from perf_model.calibration import STATED_LOG_STDDEV, CalibratedPredictor, one_step_ahead
from perf_model.features import features_of
from perf_model.surrogate import Hyperparameters, condition
from search_spaces.outcome import Prediction
from search_spaces.serving import Candidate, Parallelism, Pool, Role, ServingConfig, make_options
from search_spaces.workload import Arrival, Load


class Tenfold:
    """A model that says TTFT is ten times the concurrency, and counts how many candidates it was asked for."""

    asked = 0

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        self.asked += len(candidates)
        return [
            Prediction(
                metrics={"ttft_p50_ms": 10 * c.load.value, "ttft_p99_ms": 15 * c.load.value, "devices": 1.0},
                log_stddev={"ttft_p50_ms": 0.4, "ttft_p99_ms": 0.4, "devices": 0.0},
            )
            for c in candidates
        ]


def at(concurrency: int, tp: int = 1, kv: str = "f16", roles: tuple[Role, ...] = (Role.MIXED,)) -> Candidate:
    options = make_options({"kv_cache_dtype": kv, "max_num_seqs": 4})
    pools = tuple(Pool(role=role, node_pool="local", parallelism=Parallelism(tp=tp), options=options) for role in roles)
    config = ServingConfig(engine="llamacpp", pools=pools)
    return Candidate(config=config, load=Load(arrival=Arrival.CLOSED, value=concurrency))


def make() -> CalibratedPredictor:
    return CalibratedPredictor(model=Tenfold(), leaders=("ttft_p50_ms",))


def figures(candidate: Candidate, factor: float) -> dict[str, float]:
    value = 10 * candidate.load.value * factor
    return {"ttft_p50_ms": value, "ttft_p99_ms": 1.5 * value, "devices": 1.0}


DISAGG = (Role.PREFILL, Role.DECODE)


def test_before_any_measurement_the_model_speaks_for_itself() -> None:
    (said,) = make().predict([at(2)])
    assert said.metrics == {"ttft_p50_ms": 20.0, "ttft_p99_ms": 30.0, "devices": 1.0}
    assert said.log_stddev == {"ttft_p50_ms": 0.4, "ttft_p99_ms": 0.4, "devices": 0.0}
    silent = CalibratedPredictor(model=Silent())
    assert silent.predict([at(2)])[0].log_stddev == {"ttft_p50_ms": STATED_LOG_STDDEV}


class Silent:
    """A model that does not say how wrong it is."""

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        return [Prediction(metrics={"ttft_p50_ms": 1.0}) for _ in candidates]


def test_a_bias_is_learnt_from_a_few_measurements_and_held_for_their_kind() -> None:
    told = [(at(n, tp), figures(at(n, tp), 3.0)) for n in (1, 4) for tp in (1, 4)]
    learnt = make().learned(told)
    alike, other = learnt.predict([at(2, tp=2), at(2, roles=DISAGG, kv="q8_0")])
    assert alike.metrics["ttft_p50_ms"] == pytest.approx(60, rel=0.12)
    assert 20 < other.metrics["ttft_p50_ms"] < alike.metrics["ttft_p50_ms"], "what is less alike follows less"
    assert alike.log_stddev["ttft_p50_ms"] < other.log_stddev["ttft_p50_ms"]
    assert alike.metrics["devices"] == 1.0
    assert alike.log_stddev["devices"] == 0.0
    assert 0 < alike.log_noise["ttft_p50_ms"] < alike.log_stddev["ttft_p50_ms"]


def test_metrics_that_nobody_asks_for_learn_their_own_bias() -> None:
    told = [(at(n), figures(at(n), 2.0) | {"ttft_p99_ms": 90.0 * n}) for n in (1, 2, 4, 8)]
    (said,) = make().learned(told).predict([at(3)])
    assert said.metrics["ttft_p50_ms"] == pytest.approx(60, rel=0.15)
    assert said.metrics["ttft_p99_ms"] == pytest.approx(270, rel=0.25)


def test_learning_starts_from_the_uncorrected_model_which_is_asked_once_for_each_candidate() -> None:
    model = Tenfold()
    predictor = CalibratedPredictor(model=model, leaders=("ttft_p50_ms",))
    told = [(at(n), figures(at(n), 2.0)) for n in (1, 2, 4, 8)]
    once = predictor.learned(told)
    again = predictor.learned(told).learned(told)
    first, second = once.predict([at(4)])[0], again.predict([at(4)])[0]
    assert second.metrics["ttft_p50_ms"] == pytest.approx(first.metrics["ttft_p50_ms"], rel=0.02)
    assert model.asked == 4


def test_infeasible_predictions_pass_unchanged_and_teach_nothing() -> None:
    class Refusing(Tenfold):
        def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
            return [Prediction(metrics={}, infeasible="does not fit")] * len(candidates)

    learnt = CalibratedPredictor(model=Refusing()).learned([(at(1), figures(at(1), 2.0))])
    assert learnt.predict([at(1)])[0].infeasible == "does not fit"
    assert not learnt.calibration.surrogates


def test_a_measured_zero_counts_as_far_too_little_and_absurd_ratios_are_cut() -> None:
    learnt = make().learned([(at(n), {"ttft_p50_ms": 0.0}) for n in (1, 2, 4, 8)])
    assert learnt.predict([at(2)])[0].metrics["ttft_p50_ms"] < 0.2 * 20
    absurd = make().learned([(at(1), {"ttft_p50_ms": 1e300})])
    assert math.isfinite(absurd.predict([at(1)])[0].metrics["ttft_p50_ms"])


def test_what_the_model_doubts_more_than_usual_keeps_a_wider_interval() -> None:
    class Doubtful(Tenfold):
        def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
            said = super().predict(candidates)
            wide = dict.fromkeys(("ttft_p50_ms", "ttft_p99_ms"), 0.8)
            return [
                replace(p, log_stddev=wide) if c.config.pools[0].parallelism.tp == 8 else p
                for c, p in zip(candidates, said, strict=True)
            ]

    learnt = CalibratedPredictor(model=Doubtful(), leaders=("ttft_p50_ms",)).learned(
        [(at(n), figures(at(n), 1.0)) for n in (1, 2, 4)]
    )
    sure = make().learned([(at(n), figures(at(n), 1.0)) for n in (1, 2, 4)])
    one, other = learnt.predict([at(2, tp=8)])[0], sure.predict([at(2, tp=8)])[0]
    assert one.log_stddev["ttft_p50_ms"] > 1.3 * other.log_stddev["ttft_p50_ms"]


def test_what_candidates_share_is_what_measuring_one_of_them_tells_of_the_others() -> None:
    """The covariance gives the variance that is left after an observation, noise included, in every metric."""
    told = [(at(n, tp), figures(at(n, tp), 1.5)) for n in (1, 3) for tp in (1, 2)]
    learnt = make().learned(told)
    candidates, metrics = [at(4), at(5), at(4, tp=4), at(9, kv="q8_0")], ["devices", "ttft_p50_ms", "ttft_p99_ms"]
    shared = learnt.shared(candidates, metrics)(1)
    assert shared.shape == (4, 3)
    assert not shared[:, 0].any(), "nobody corrects the number of devices"
    before, after = learnt.predict(candidates), learnt.believing([candidates[1]]).predict(candidates)
    for column, metric in enumerate(metrics[1:], start=1):
        noise = before[1].log_noise[metric] ** 2
        for row, (old, new) in enumerate(zip(before, after, strict=True)):
            gone = shared[row, column] ** 2 / (shared[1, column] + noise)
            assert new.log_stddev[metric] ** 2 == pytest.approx(old.log_stddev[metric] ** 2 - gone, rel=1e-4), metric


def test_believing_a_candidate_narrows_what_is_alike_and_moves_no_mean() -> None:
    learnt = make().learned([(at(n), figures(at(n), 2.0)) for n in (1, 2)])
    near, far = at(8, kv="q8_0"), at(8, roles=DISAGG, tp=8)
    before, after = learnt.predict([near, far]), learnt.believing([near]).predict([near, far])
    shrunk = [_known(b) - _known(a) for b, a in zip(before, after, strict=True)]
    assert shrunk[0] > shrunk[1] > 0
    for b, a in zip(before, after, strict=True):
        assert a.metrics["ttft_p50_ms"] == pytest.approx(b.metrics["ttft_p50_ms"], rel=1e-6)


def _known(prediction: Prediction) -> float:
    return math.sqrt(prediction.log_stddev["ttft_p50_ms"] ** 2 - prediction.log_noise["ttft_p50_ms"] ** 2)


def test_one_step_ahead_misses_are_those_of_the_process_grown_row_by_row() -> None:
    rng = np.random.default_rng(0)
    features = features_of([at(2**n, tp=2 ** (n % 3)) for n in range(6)], [1.0] * 6)
    target, hyper = rng.normal(size=6), Hyperparameters(noise=0.3)
    # few enough outliers that no pass changes the noise of an observation
    target /= 3
    found = one_step_ahead(condition(features, target, hyper))
    for n in range(6):
        known = condition(features.take(range(n)), target[:n], hyper) if n >= 3 else None
        if known is None:
            continue
        said = known.correct(features.take([n]))
        spread = math.sqrt(said.stddev[0] ** 2 + hyper.noise**2)
        assert found[n] == pytest.approx((target[n] - said.mean[0]) / spread, rel=1e-3)


def test_intervals_hold_about_nine_in_ten_of_new_measurements() -> None:
    """A world that is wrong by mode, by size and by noise: 40 measurements one by one, in five such worlds."""
    inside = []
    for seed in range(5):
        rng = random.Random(seed)
        bias = {role: rng.gauss(0, 0.5) for role in ((Role.MIXED,), DISAGG)}
        pool = [
            at(2**n, tp, kv, roles) for n in range(6) for tp in (1, 2, 4) for kv in ("f16", "q8_0") for roles in bias
        ]
        rng.shuffle(pool)
        told, predictor = [], make()
        for candidate in pool[:24]:
            factor = math.exp(bias[tuple(p.role for p in candidate.config.pools)] + rng.gauss(0, 0.15))
            (said,) = predictor.predict([candidate])
            miss = math.log(10 * candidate.load.value * factor / said.metrics["ttft_p50_ms"])
            inside.append(abs(miss) <= 1.6449 * said.log_stddev["ttft_p50_ms"])
            told.append((candidate, figures(candidate, factor)))
            predictor = predictor.learned(told)
    assert 0.8 <= sum(inside) / len(inside) <= 0.98


def test_node_pools_of_one_kind_share_what_is_learnt() -> None:
    def on(pool: str) -> Candidate:
        config = at(4).config
        return Candidate(config=replace(config, pools=(replace(config.pools[0], node_pool=pool),)), load=at(4).load)

    one, same = features_of([on("a"), on("b")], [1, 1], {"a": "h100", "b": "h100"}).categories
    other, different = features_of([on("a"), on("b")], [1, 1], {"a": "h100", "b": "a100"}).categories
    assert (one == same).all()
    assert (other != different).sum() == 2, "the slots of both pools"


def test_a_configuration_is_the_same_under_every_load_and_on_every_pool_of_its_kind_of_node() -> None:
    candidates = [at(1), at(8), at(1, tp=2), at(1, kv="q8_0")]
    one, loaded, larger, other = features_of(candidates, [1.0] * 4).configs
    assert one == loaded
    assert len({one, larger, other}) == 3
    assert (
        features_of([at(1)], [1.0], {"local": "h100"}, "earlier").configs
        == features_of([at(8)], [1.0], {"local": "h100"}).configs
    )
    assert (
        features_of([at(1)], [1.0], {"local": "a100"}).configs != features_of([at(1)], [1.0], {"local": "h100"}).configs
    )
    assert features_of([at(1)], [1.0], model="another").configs != one
