"""Fitting the prior: a robust ridge regression over nested groups, and what it is worth on runs left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from perf_model.numeric import BoolArray, FloatArray, IntArray
from perf_model.prior import (
    LENGTHS,
    METRICS,
    MetricPrior,
    Prior,
    Subject,
    basis,
    group_words,
    lengths_word,
    occasion,
    run_subject,
)
from perf_model.validate import Predicted
from search_spaces.errors import InvalidValueError
from search_spaces.serving import Mode

# Standard deviations of effects before any run is seen, in natural-log units: level -> basis -> sd. Chosen by
# cross-validation (`benchmarks/fit_prior.py` prints it): wide groups that are free to move spoil predictions for
# models and systems that were left out, while narrow ones can hardly move too much.
WIDTHS: dict[str, dict[str, dict[str, float]]] = {
    "tpot": {
        "all": {"offset": 0.01},
        "apart": {"offset": 0.2, "users": 0.05},
        "engine": {"offset": 0.01, "users": 0.0015, "tp": 0.0015},
        "engine, precision": {"offset": 0.003},
        "engine, kind": {"offset": 0.003},
        "engine, generation": {"offset": 0.003},
        "engine, parallel attention": {"offset": 0.003},
        "model": {"offset": 0.006},
        "model, engine": {"offset": 0.006},
        "one": {"offset": 0.4, "users": 0.13, "tp": 0.13},
        "layout": {"offset": 0.15, "users": 0.05},
        LENGTHS: {"offset": 0.2},
    },
    "ttft": {
        "all": {"offset": 0.01},
        "apart": {"offset": 0.05, "backlog": 0.3},
        "engine": {"offset": 0.012, "users": 0.003, "share": 0.003, "backlog": 0.015},
        "engine, precision": {"offset": 0.003},
        "engine, kind": {"offset": 0.006},
        "engine, generation": {"offset": 0.006},
        "engine, parallel attention": {"offset": 0.006},
        "model": {"offset": 0.006},
        "model, engine": {"offset": 0.006},
        "one": {"offset": 0.4, "users": 0.13, "isl": 0.13, "tp": 0.13, "share": 0.3, "backlog": 0.2},
        "layout": {"offset": 0.2, "users": 0.07},
        LENGTHS: {"offset": 0.2},
    },
}
NOISE = {"ttft": 0.2, "tpot": 0.15}  # scale of a run's own deviation; beyond it the loss turns from squares to lines
LIMITS = {"ttft": (-1.5, 0.7), "tpot": (-1.5, 0.7)}
OUTLIER = 1.8  # runs further than this from the model (natural log) teach nothing: they were made otherwise than told
_REWEIGHTINGS = 8


@dataclass(frozen=True)
class Sample:
    """Predicted runs as a design; `left_out` rows of it can be dropped without making it again."""

    predicted: tuple[Predicted, ...]

    @cached_property
    def subjects(self) -> list[Subject]:
        """The replica of each run."""
        return [run_subject(p.run) for p in self.predicted]

    @cached_property
    def log_ratio(self) -> dict[str, FloatArray]:
        """Natural logarithm of measured over predicted, by metric."""
        runs = self.predicted
        return {
            "ttft": np.log([p.run.ttft_ms / p.ttft_ms for p in runs]),
            "tpot": np.log([p.run.tpot_ms / p.tpot_ms for p in runs]),
        }

    @cached_property
    def copies(self) -> IntArray:
        """A number for each distinct measurement: the public file lists some runs two or three times."""
        marks = [(p.run.system, p.run.engine, round(p.run.ttft_ms, 1), round(p.run.tpot_ms, 2)) for p in self.predicted]
        numbers: dict[tuple[object, ...], int] = {}
        return np.array([numbers.setdefault(mark, len(numbers)) for mark in marks])

    @cached_property
    def weights(self) -> FloatArray:
        """One for each measurement however often it is listed, less in groups with many; their mean is one."""
        copies = np.bincount(self.copies)[self.copies]
        groups = [group_words(who)["one"] for who in self.subjects]
        sizes = Counter(groups)
        raw = np.array([1.0 / np.sqrt(sizes[group]) for group in groups]) / copies
        return np.asarray(raw / raw.mean(), dtype=np.float64)

    def design(self, metric: str) -> tuple[sparse.csr_matrix, FloatArray, list[tuple[str, str, str]]]:
        """The design matrix (runs x effects), the effects' widths and their names (level, basis, group)."""
        names: dict[tuple[str, str, str], int] = {}
        rows, columns, values = [], [], []
        widths = WIDTHS[metric]
        for row, (who, predicted) in enumerate(zip(self.subjects, self.predicted, strict=True)):
            at, run = occasion(predicted), predicted.run
            words = group_words(who) | {LENGTHS: lengths_word(who, run.isl, run.osl)}
            for level, slopes in widths.items():
                for name in slopes if level in words else ():
                    rows.append(row)
                    columns.append(names.setdefault((level, name, words[level]), len(names)))
                    values.append(float(basis(name, who, at)[0]))
        matrix = sparse.csr_matrix((values, (rows, columns)), shape=(len(self.predicted), len(names)))
        return matrix, np.array([widths[level][name] for level, name, _ in names]), list(names)


def ridge(
    design: sparse.csr_matrix, target: FloatArray, weights: FloatArray, widths: FloatArray, noise: float
) -> FloatArray:
    """Effects that minimise the weighted pseudo-Huber loss of scale `noise` plus (effect / width)^2 / 2.

    Iteratively reweighted least squares in units of the widths.
    """
    scaled = design @ sparse.diags(widths)
    effects = np.zeros(design.shape[1])
    for _ in range(_REWEIGHTINGS):
        deviation = (target - scaled @ effects) / noise
        strength = weights / noise**2 / np.sqrt(1.0 + deviation**2)
        weighted = scaled.T @ sparse.diags(strength)
        normal = (weighted @ scaled).toarray() + np.eye(len(effects))
        effects = np.linalg.solve(normal, weighted @ target)
    return np.asarray(effects * widths, dtype=np.float64)


def _effects(names: Sequence[tuple[str, str, str]], values: FloatArray) -> dict[str, dict[str, dict[str, float]]]:
    held: dict[str, dict[str, dict[str, float]]] = {}
    for (level, name, group), value in zip(names, values, strict=True):
        held.setdefault(level, {}).setdefault(name, {})[group] = round(float(value), 5)
    return held


@dataclass(frozen=True)
class Fitter:
    """Fits one metric to parts of a sample."""

    sample: Sample
    metric: str

    @cached_property
    def _design(self) -> tuple[sparse.csr_matrix, FloatArray, list[tuple[str, str, str]]]:
        return self.sample.design(self.metric)

    def effects(self, used: BoolArray) -> FloatArray:
        """Effects fitted to the `used` runs, outliers apart; groups without a run have none."""
        design, widths, _ = self._design
        target = self.sample.log_ratio[self.metric]
        kept = used & (np.abs(target) < OUTLIER)
        part = design[kept]
        seen = np.asarray(abs(part).sum(0)).ravel() > 0
        values = np.zeros(design.shape[1])
        noise = NOISE[self.metric]
        values[seen] = ridge(part[:, seen], target[kept], self.sample.weights[kept], widths[seen], noise)
        return values

    def residuals(self, folds: Sequence[object]) -> FloatArray:
        """Logarithm of measured over corrected of each run, corrected by a fit without its fold and its copies."""
        design, target = self._design[0], self.sample.log_ratio[self.metric]
        place = {fold: number for number, fold in enumerate(dict.fromkeys(folds))}
        fold_of = np.array([place[fold] for fold in folds])
        left = np.zeros(len(target))
        for fold in range(len(place)):
            out = fold_of == fold
            used = ~out & ~np.isin(self.sample.copies, self.sample.copies[out])
            left[out] = np.clip(design[out] @ self.effects(used), *LIMITS[self.metric])
        return target - left

    def prior(self) -> MetricPrior:
        """The prior of all runs."""
        values = self.effects(np.ones(len(self.sample.predicted), dtype=bool))
        lowest, highest = LIMITS[self.metric]
        return MetricPrior(
            effects=_effects(self._design[2], values),
            lowest=lowest,
            highest=highest,
            log_sds=self._log_sds(),
        )

    def _log_sds(self) -> dict[str, dict[str, float]]:
        """Standard deviations from runs left out alone ("known") or with their model on their system ("unknown")."""
        known = self.residuals(FOLDS["random fifths"](self.sample))
        unknown = self.residuals(FOLDS["one model on one system"](self.sample))
        modes = np.array([who.mode.value for who in self.sample.subjects])
        held = {}
        for mode in dict.fromkeys(modes):
            sds = [interval_sd(residuals[modes == mode]) for residuals in (known, unknown)]
            held[str(mode)] = {"known": sds[0], "unknown": max(sds)}
        return held


def random_folds(sample: Sample, count: int = 5) -> list[int]:
    """Folds that keep the copies of a measurement together."""
    numbers = np.random.default_rng(0).integers(0, count, int(sample.copies.max()) + 1)
    return [int(number) for number in numbers[sample.copies]]


FOLDS: Mapping[str, Callable[[Sample], Sequence[object]]] = {
    "random fifths": random_folds,
    "one model": lambda sample: [who.model for who in sample.subjects],
    "one system": lambda sample: [who.system for who in sample.subjects],
    "one model on one system": lambda sample: [(who.model, who.system) for who in sample.subjects],
}


def interval_sd(residuals: FloatArray) -> float:
    """The standard deviation whose normal 90% interval holds nine of ten residuals."""
    return round(float(np.quantile(np.abs(residuals), 0.9)) / 1.645, 3)


def raw_sds(predicted: Sequence[Predicted]) -> dict[str, float]:
    """Standard deviations of measured over predicted TTFT, TPOT and E2E of runs as they are."""
    measured = np.array([(p.run.ttft_ms, p.run.tpot_ms, p.run.osl * p.run.length_share) for p in predicted])
    modelled = np.array([(p.ttft_ms, p.tpot_ms, p.run.osl * p.run.length_share) for p in predicted])
    pairs = {"ttft": (measured[:, 0], modelled[:, 0]), "tpot": (measured[:, 1], modelled[:, 1])}
    ends = [ttft + tpot * np.maximum(tokens - 1.0, 1.0) for ttft, tpot, tokens in (measured.T, modelled.T)]
    pairs["e2e"] = (ends[0], ends[1])
    return {name: interval_sd(np.log(one / other)) for name, (one, other) in pairs.items()}


def raw_errors(predicted: Sequence[Predicted], without_tables: Sequence[Predicted]) -> dict[str, dict[str, float]]:
    """What the shipped file says of figures without a prior: by mode, and where no operation has a table."""
    by_mode = {mode: [p for p in predicted if p.run.mode is mode] for mode in Mode}
    aggregated = [p for p in without_tables if p.run.mode is Mode.AGGREGATED]
    return {mode.value: raw_sds(runs) for mode, runs in by_mode.items() if runs} | {"no tables": raw_sds(aggregated)}


def fit(
    predicted: Sequence[Predicted],
    *,
    exclude_models: Sequence[str] = (),
    provenance: Mapping[str, str] | None = None,
    raw: Mapping[str, Mapping[str, float]] | None = None,
) -> Prior:
    """A prior from measured runs and their predictions, without the runs of `exclude_models`.

    `exclude_models` holds names as in the file of runs; runs of the same architecture and sizes go with them, since
    they are copies of one another. Raises `InvalidValueError` where fewer than 20 runs are left.
    """
    words = {run_subject(p.run).model for p in predicted if p.run.model_name in exclude_models}
    used = tuple(p for p in predicted if run_subject(p.run).model not in words)
    if len(used) < 20:
        raise InvalidValueError(f"{len(used)} runs are too few to fit a prior; give at least 20")
    sample = Sample(used)
    fitted = {metric: Fitter(sample, metric).prior() for metric in METRICS}
    origin = {"runs": str(len(used)), "left out": ", ".join(sorted(words)) or "none", **(provenance or {})}
    return Prior(ttft=fitted["ttft"], tpot=fitted["tpot"], provenance=origin, raw=raw or {})
