"""Laws of the surrogate, its gradient against differences, and its answers against the textbook formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_model import surrogate
from perf_model.surrogate import Features, Hyperparameters, HyperPrior, condition, fit, interval_width, learn
from search_spaces.errors import InvalidValueError


def make_features(count: int, seed: int = 0, categories: int = 3, studies: int = 1) -> Features:
    rng = np.random.default_rng(seed)
    return Features(
        configs=rng.integers(0, max(2, count // 2), count),
        studies=np.arange(count) % studies,
        categories=rng.integers(0, 3, (count, categories)),
        sizes=np.log(2.0 ** rng.integers(0, 4, (count, 2))),
        loads=np.log(2.0 ** rng.integers(0, 9, (count, 2))),
        doubt=np.ones(count),
    )


def drawn(features: Features, hyper: Hyperparameters, seed: int = 1) -> np.ndarray:
    """A draw from the process itself."""
    empty = fit(features.take(np.array([], dtype=int)), [])
    kernel = replace(empty, hyper=hyper).covariance(features, features)
    rng = np.random.default_rng(1_000 + seed)
    noise = hyper.noise * rng.standard_normal(len(features))
    return np.linalg.cholesky(kernel + 1e-10 * np.eye(len(features))) @ rng.standard_normal(len(features)) + noise


def test_without_observations_there_is_no_correction_and_the_prior_spread() -> None:
    features = make_features(5)
    hyper = Hyperparameters(bias=0.3, level=0.4, trend=1.2, own=0.1)
    found = fit(features.take(np.array([], dtype=int)), [], prior=HyperPrior(centre=hyper)).correct(features)
    assert found.mean == pytest.approx(np.zeros(5))
    assert found.stddev == pytest.approx(np.full(5, np.sqrt(0.3**2 + 0.4**2 + 1.2**2 + 0.1**2)))


def test_mean_and_variance_are_those_of_the_textbook() -> None:
    features, hyper = make_features(8), Hyperparameters()
    seen, new = features.take(np.arange(5)), features.take(np.arange(5, 8))
    target = np.array([0.1, -0.1, 0.2, 0.0, 0.05])
    found = surrogate.condition(seen, target, hyper)
    assert (found.noise_variance == hyper.noise**2).all()
    inverse = np.linalg.inv(found.covariance(seen, seen) + hyper.noise**2 * np.eye(5))
    cross = found.covariance(new, seen)
    assert found.correct(new).mean == pytest.approx(cross @ inverse @ target, rel=1e-5, abs=1e-8)
    expected = np.diag(found.covariance(new, new) - cross @ inverse @ cross.T)
    assert found.correct(new).stddev ** 2 == pytest.approx(expected, rel=1e-5)
    full = found.covariance(new, new) - cross @ inverse @ cross.T
    assert found.correct(new).shared(1) == pytest.approx(full[:, 1], rel=1e-5, abs=1e-9)


def test_gradient_of_the_likelihood() -> None:
    features = make_features(12, studies=2)
    gap = surrogate._distances(features, features)
    target = drawn(features, Hyperparameters())
    start = Hyperparameters(rho=0.4, kin=0.7, size_scale=1.1).to_vector()

    def value(vector: np.ndarray) -> float:
        return surrogate.negative_log_likelihood(Hyperparameters.from_vector(vector), gap, target)[0]

    gradient = surrogate.negative_log_likelihood(Hyperparameters.from_vector(start), gap, target)[1]
    steps = 1e-5 * np.eye(len(start))
    numeric = [(value(start + step) - value(start - step)) / 2e-5 for step in steps]
    assert gradient == pytest.approx(numeric, rel=1e-4, abs=1e-5)


def test_coordinates_round_trip() -> None:
    hyper = Hyperparameters(bias=0.1, rho=0.35, load_scale=2.2)
    found = Hyperparameters.from_vector(hyper.to_vector())
    assert found.to_vector() == pytest.approx(hyper.to_vector())
    assert found.rho == pytest.approx(0.35)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 20))
def test_measuring_never_widens_what_is_believed(seed: int, count: int) -> None:
    features, hyper = make_features(count + 6, seed), Hyperparameters()
    target = drawn(features, hyper, seed)
    new = features.take(np.arange(count, count + 6))
    before = surrogate.condition(features.take(np.arange(count - 1)), target[: count - 1], hyper)
    after = surrogate.condition(features.take(np.arange(count)), target[:count], hyper)
    if (before.noise_variance == hyper.noise**2).all() and (after.noise_variance == hyper.noise**2).all():
        assert (after.correct(new).stddev <= before.correct(new).stddev + 1e-9).all()
    assert (after.correct(new).stddev <= np.sqrt(surrogate._prior_variance(new, hyper)) + 1e-9).all()


def test_knows_what_it_has_seen_and_doubts_what_is_far() -> None:
    features = make_features(1)
    far = replace(features, categories=features.categories + 9, sizes=features.sizes + 9, loads=features.loads + 20)
    found = surrogate.condition(features, [0.7], Hyperparameters(noise=0.02))
    here, there = found.correct(features), found.correct(far)
    assert here.mean[0] == pytest.approx(0.7, abs=0.02)
    assert here.stddev[0] < 0.03
    assert there.stddev[0] > 0.4
    assert abs(there.mean[0]) < abs(here.mean[0]) / 2


def test_what_is_believed_moves_no_mean_and_counts_as_measured() -> None:
    features, hyper = make_features(20, seed=4), Hyperparameters()
    seen, added, others = features.take(np.arange(8)), features.take(np.arange(8, 12)), features.take(np.arange(12, 20))
    before = condition(seen, drawn(seen, hyper), hyper)
    correction = before.correct(added)
    found = surrogate.believing(correction, seen.joined(added))
    assert found.correct(others).mean == pytest.approx(before.correct(others).mean, abs=1e-9)
    plain = condition(seen.joined(added), np.concatenate([before.log_ratio, correction.mean]), hyper)
    assert found.factor == pytest.approx(plain.factor, abs=1e-6)
    assert found.correct(others).stddev == pytest.approx(plain.correct(others).stddev, abs=1e-6)
    other = surrogate.alike(before, 2 * before.log_ratio)
    alike = surrogate.believing_alike(found, other.correct(added))
    assert alike.correct(others).mean == pytest.approx(2 * before.correct(others).mean, abs=1e-8)


def test_a_dozen_measurements_help_and_never_hurt_much() -> None:
    """Errors of a model that is wrong in a structured way fall; those of a perfect model stay small."""
    hyper = Hyperparameters(noise=0.03)
    for structured in (True, False):
        before, after = [], []
        for seed in range(12):
            features = make_features(80, seed)
            truth = drawn(features, hyper, seed) if structured else 0.03 * np.random.default_rng(seed).normal(size=80)
            found = fit(features.take(np.arange(12)), truth[:12]).correct(features.take(np.arange(12, 80)))
            before.append(np.median(np.abs(truth[12:])))
            after.append(np.median(np.abs(truth[12:] - found.mean)))
        assert np.median(after) < (0.7 if structured else 1.3) * np.median(before)


def test_intervals_cover_what_they_say() -> None:
    hyper, hits = Hyperparameters(), []
    for seed in range(30):
        features = make_features(60, seed)
        truth = drawn(features, hyper, seed)
        found = fit(features.take(np.arange(25)), truth[:25], prior=HyperPrior(centre=hyper))
        new = found.correct(features.take(np.arange(25, 60)))
        spread = np.sqrt(new.stddev**2 + found.noise_stddev**2)
        hits.append(np.abs(truth[25:] - new.mean) <= 1.645 * spread)
    assert 0.86 <= np.mean(hits) <= 0.94


def test_one_outlier_does_not_drag_the_rest() -> None:
    features, hyper = make_features(20, categories=1), Hyperparameters(noise=0.03)
    target = drawn(features, hyper)
    spoilt = target.copy()
    spoilt[7] += 3.0
    others = features.take(np.delete(np.arange(20), 7))
    clean = surrogate.condition(features, target, hyper).correct(others).mean
    found = surrogate.condition(features, spoilt, hyper)
    assert found.noise_variance[7] > 10 * hyper.noise**2
    assert np.abs(found.correct(others).mean - clean).max() < 0.1


def test_where_the_model_guesses_it_is_corrected_more_readily() -> None:
    features = make_features(1)
    doubtful = replace(features, doubt=np.array([3.0]))
    usual, guessed = (surrogate.condition(f, [1.0], Hyperparameters(noise=0.3)) for f in (features, doubtful))
    assert guessed.correct(doubtful).mean > usual.correct(features).mean
    empty = surrogate.condition(features.take(np.array([], dtype=int)), [], Hyperparameters())
    assert empty.correct(doubtful).stddev == pytest.approx(3 * empty.correct(features).stddev)


def test_learn_finds_the_scale_of_errors() -> None:
    truth = Hyperparameters(bias=0.6, level=0.05, trend=0.5, noise=0.1, rho=0.8, size_scale=3.0, load_scale=3.0)
    studies = []
    for seed in range(25):
        features = make_features(40, seed)
        studies.append((features, drawn(features, truth, seed)))
    found = learn(studies)
    assert found.noise == pytest.approx(0.1, rel=0.3)
    assert found.trend == pytest.approx(0.5, rel=0.4)
    assert found.bias == pytest.approx(0.6, rel=0.5)


def test_width_follows_the_residuals() -> None:
    assert interval_width([]) == 1.0
    assert interval_width([1.0] * 50) == pytest.approx(1.0)
    assert interval_width([2.0] * 50) > 1.7
    assert interval_width([0.1] * 50) < 0.5
    assert interval_width([1.0] * 50 + [1000.0]) < 1.1, "one outlier must not widen every interval"


def test_width_scales_every_deviation() -> None:
    features = make_features(10)
    narrow = surrogate.condition(features.take(np.arange(4)), np.zeros(4), Hyperparameters())
    wide = surrogate.with_width(narrow, 1.5)
    assert wide.correct(features).stddev == pytest.approx(1.5 * narrow.correct(features).stddev)


@pytest.mark.parametrize(
    ("ratios", "message"), [([0.1], "1 ratios for 3 candidates"), ([0.1, np.nan, 0.2], "not finite")]
)
def test_bad_observations_are_named(ratios: list[float], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        fit(make_features(3), ratios)


def test_bad_features_are_named() -> None:
    features = make_features(3)
    with pytest.raises(InvalidValueError, match="rows"):
        replace(features, sizes=features.sizes[:2])
    with pytest.raises(InvalidValueError, match="size is not finite"):
        replace(features, sizes=np.full((3, 2), np.nan))
    with pytest.raises(InvalidValueError, match=r"rho=1\.0"):
        Hyperparameters(rho=1.0)


def test_intervals_widen_soon_after_the_noise_has_grown() -> None:
    covered, falsely = [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        sizes = np.concatenate([rng.normal(size=20), 4.0 * rng.normal(size=24)])
        covered += [abs(sizes[i]) <= 1.645 * interval_width(sizes[:i]) for i in range(28, 44)]
        falsely.append(interval_width(sizes[:20]) > 1.5)
    assert 0.7 < np.mean(covered) < 0.95, "without noticing, less than half would be"
    assert np.mean(falsely) < 0.05


def test_the_kernel_is_the_sum_of_its_parts_and_solves_agree_with_plain_ones() -> None:
    rng = np.random.default_rng(0)
    hyper = Hyperparameters(bias=0.3)
    first, second = (
        Features(
            configs=rng.integers(0, 30, count),
            studies=rng.integers(0, 2, count),
            categories=rng.integers(0, 3, (count, 4)),
            sizes=rng.normal(size=(count, 3)),
            loads=rng.normal(size=(count, 2)),
            doubt=rng.uniform(0.5, 2.0, count),
        )
        for count in (40, 700)
    )
    correction = fit(first, rng.normal(size=40)).correct(second)
    surrogate = correction.surrogate
    cross = surrogate.covariance(first, second)
    plain = np.linalg.solve(surrogate.factor, cross)
    np.testing.assert_allclose(correction.solved, plain, atol=1e-9)
    alike = np.array([[hyper.rho ** (a != b).sum() for b in second.categories] for a in first.categories])
    gaps = [((a[:, None] - b[None]) ** 2).sum(2) for a, b in ((first.sizes, second.sizes), (first.loads, second.loads))]
    near = np.exp(-0.5 * gaps[0] / hyper.size_scale**2 - 0.5 * gaps[1] / hyper.load_scale**2)
    same = first.configs[:, None] == second.configs[None]
    assert same.any()
    alike *= np.where(first.studies[:, None] == second.studies[None], 1.0, hyper.kin)
    expected = hyper.bias**2 + alike * (hyper.level**2 + hyper.trend**2 * near) + hyper.own**2 * same
    found = condition(first, np.zeros(40), hyper).covariance(first, second)
    np.testing.assert_allclose(found, expected * np.outer(first.doubt, second.doubt), rtol=1e-9)


def test_what_a_configuration_has_to_itself_is_known_under_other_loads_and_of_no_other_configuration() -> None:
    features, hyper = make_features(3), Hyperparameters(bias=1e-6, level=1e-6, trend=1e-6, own=0.2, noise=1e-3)
    features = replace(features, configs=np.array([7, 7, 8]))
    found = condition(features.take([0]), [0.3], hyper).correct(features)
    assert found.mean == pytest.approx([0.3, 0.3, 0.0], abs=1e-3)
    assert found.stddev == pytest.approx([0.0, 0.0, 0.2], abs=2e-3)


def test_how_much_studies_have_in_common_is_learnt_from_them() -> None:
    features, found = make_features(80, studies=2), []
    for kin in (0.1, 0.99):
        truth = Hyperparameters(bias=0.1, level=0.5, trend=0.5, kin=kin)
        found.append(fit(features, drawn(features, truth)).hyper.kin)
    assert found[0] < 0.8
    assert found[1] > 0.93
