"""`tuner predict FILE`: what the performance model expects of a study's default configurations, and of the best ones.

Nothing is launched and nothing is measured; every figure says that it is predicted. Heavy modules are imported when the
command runs, and only those that it needs: a prediction in a fresh process takes less than two seconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli_options import AsJson

if TYPE_CHECKING:
    from perf_model.accounts import Account
    from perf_model.serving_predictor import ServingPredictor
    from search_spaces.hardware import Device
    from search_spaces.outcome import Prediction
    from search_spaces.problem import Problem
    from search_spaces.serving import Candidate, Mode
    from search_spaces.space import Space
    from tuner.study_schema import StudyFile

SAMPLE = 600
"""Genotypes drawn from the space; the best of those are shown, not the best of all."""
REFINEMENTS = 2
"""How often the neighbours of the front found so far are predicted too."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A candidate with what is predicted of it; `account` is None where it cannot run.

    `too_small` says why smaller tensor-parallel sizes of the same configuration do not fit, by size.
    """

    title: str
    candidate: Candidate
    prediction: Prediction
    account: Account | None
    meets_slos: bool
    too_small: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Everything that the command shows. `notes` say where the figures come from."""

    study: str
    problem: Problem
    notes: tuple[str, ...]
    calibration: str
    defaults: tuple[Forecast, ...]
    best: tuple[Forecast, ...]
    sampled: int
    runnable: int


def predict(
    file: Annotated[Path, typer.Argument(help="A study file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: --set workload.concurrency=64.")
    ] = None,
    as_json: AsJson = False,
    top: Annotated[int, typer.Option("--top", min=0, help="Best configurations to show.")] = 5,
    calibration: Annotated[
        str | None, typer.Option(help="Corrections for GPU engines: none, shipped, or the file of a prior.")
    ] = None,
) -> None:
    """Predict the default configurations of FILE and the best of a sample of its space; nothing is launched."""
    from tuner.study_file import CALIBRATIONS, load_study_file

    given = list(overrides or [])
    if calibration is not None:
        named = calibration if calibration in CALIBRATIONS else str(Path(calibration).resolve())
        given.append(f"calibration={named}")
    outlook = look_out(load_study_file(file, given), top=top)
    if as_json:
        import json

        from tuner.predict_report import outlook_json

        print(json.dumps(outlook_json(outlook), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    from tuner.predict_report import show

    show(outlook, Console(markup=False, highlight=False))


def look_out(study: StudyFile, *, top: int, seed: int | None = None) -> Outlook:
    """Predict the defaults of `study`, and the `top` of the predicted front of a sample of its space."""
    from tuner.wiring import make_space, serving_model, with_prior

    problem, notes = problem_of(study)
    space = make_space(study, problem)
    model = serving_model(problem, study)
    teller = _Teller(model=model, predict=with_prior(model, problem, study).predict, problem=problem)
    defaults = tuple(teller.default(space, engine, mode) for engine in space.engines for mode in space.modes)
    drawn = _drawn(space, study.seed if seed is None else seed) if top else []
    best, sampled, runnable = teller.best(space, [*drawn, *(f.candidate for f in defaults)], top)
    return Outlook(
        study=study.name,
        problem=problem,
        notes=(*notes, *_prior_notes(study)),
        calibration=study.calibration,
        defaults=defaults,
        best=best,
        sampled=sampled,
        runnable=runnable,
    )


def problem_of(study: StudyFile) -> tuple[Problem, tuple[str, ...]]:
    """The question of `study` with what is known of its devices, and where that comes from."""
    from search_spaces.hardware import DeviceKind
    from tuner.table_places import measured_nodes, tables_of
    from tuner.wiring import make_problem

    bare = make_problem(study)
    on_cpus = [pool for pool in bare.node_pools if pool.device.kind is DeviceKind.CPU]
    if not on_cpus:
        return bare, (f"times from {tables_of(bare).text}",)
    measured = measured_nodes(bare)
    devices, notes = _cores(study, [pool.name for pool in on_cpus if pool.name not in measured])
    own = tuple(f"pool {name}: steps collected on {node.system} ({node.folder})" for name, node in measured.items())
    devices |= {name: node.device for name, node in measured.items()}
    return make_problem(study, devices), own + notes


def _cores(study: StudyFile, pools: Sequence[str]) -> tuple[dict[str, Device], tuple[str, ...]]:
    """Measured cores of the CPU pools: of a run of this study, else a stand-in."""
    from tuner.devices import load_devices
    from tuner.places import find_place
    from tuner.wiring import UNMEASURED_CORE

    known = load_devices(find_place(study.storage).nodes(study.name))
    notes = [f"pool {name}: a core as measured by an earlier run of this study" for name in pools if name in known]
    flops, bandwidth = UNMEASURED_CORE.flops["fp32"] / 1e9, UNMEASURED_CORE.memory_bandwidth / 1e9
    notes += [
        f"pool {name}: NOT MEASURED, a core of {flops:g} GFLOP/s and {bandwidth:g} GB/s stands in; measure its nodes "
        "with: tuner perf collect FILE"
        for name in pools
        if name not in known
    ]
    return known, tuple(notes)


def _prior_notes(study: StudyFile) -> tuple[str, ...]:
    if all(pool.device == "cpu" for pool in study.node_pools.values()):
        return ()
    if study.calibration == "none":
        return ("calibration: none, the model as it is",)
    which = "the shipped prior" if study.calibration == "shipped" else study.calibration
    return (f"calibration: {which}, fitted to public measured runs (switch it off with --calibration none)",)


def _drawn(space: Space, seed: int) -> list[Candidate]:
    rng = random.Random(seed)  # noqa: S311 - a sample of configurations, no secret
    wanted = min(SAMPLE, 4 * space.size)
    return list(dict.fromkeys(space.sample(rng) for _ in range(wanted)))


@dataclass(frozen=True, kw_only=True)
class _Teller:
    """Predicts candidates of `problem`; `model` accounts for them."""

    model: ServingPredictor
    predict: Callable[[Sequence[Candidate]], list[Prediction]]
    problem: Problem

    def default(self, space: Space, engine: str, mode: Mode) -> Forecast:
        """The default configuration of `engine` at the smallest tensor-parallel size that fits, if one does."""
        title = f"{engine} default, {mode}"
        smallest = space.default(mode, engine)
        sizes = space.roles[mode.roles[0]].tp
        start = smallest.config.pools[0].parallelism.tp
        candidates = [smallest, *(_with_tp(smallest, tp) for tp in sizes if tp > start)]
        refused: dict[int, str] = {}
        for candidate in candidates:
            found = self.forecast(title, candidate)
            if found.prediction.infeasible is None:
                return replace(found, too_small=refused)
            refused[candidate.config.pools[0].parallelism.tp] = found.prediction.infeasible
        return self.forecast(title, smallest)

    def forecast(self, title: str, candidate: Candidate) -> Forecast:
        """Predict and account for one candidate."""
        from search_spaces.rules import infeasibility

        reason = infeasibility(candidate, self.problem)
        if reason is not None:
            from search_spaces.outcome import Prediction as Made

            prediction = Made(metrics={}, infeasible=reason)
        else:
            prediction = self.predict([candidate])[0]
        return self._told(title, candidate, prediction)

    def _told(self, title: str, candidate: Candidate, prediction: Prediction) -> Forecast:
        from perf_model.accounts import account

        runs = prediction.infeasible is None
        return Forecast(
            title=title,
            candidate=candidate,
            prediction=prediction,
            account=account(self.model, self.problem, candidate) if runs else None,
            meets_slos=runs and self._meets(prediction),
        )

    def _meets(self, prediction: Prediction) -> bool:
        return all(slo.excess(prediction.metrics[slo.metric]) <= 0 for slo in self.problem.slos)

    def best(self, space: Space, candidates: Sequence[Candidate], top: int) -> tuple[tuple[Forecast, ...], int, int]:
        """The `top` of the predicted front, how many candidates were predicted, and how many can run."""
        from search_spaces.rules import infeasibility

        known: dict[Candidate, Prediction] = {}
        asked = dict.fromkeys(candidates if top else ())
        predicted = 0
        for turn in range(REFINEMENTS + 1):
            new = [c for c in asked if infeasibility(c, self.problem) is None]
            predicted += len(asked)
            answers = zip(new, self.predict(new), strict=True)
            known |= {c: p for c, p in answers if p.infeasible is None}
            chosen = self._front(known.items())
            if turn < REFINEMENTS:
                near = (other for candidate, _ in chosen[:20] for other in space.neighbours(candidate))
                asked = dict.fromkeys(other for other in near if other not in known)
        told = [self._told(f"best {rank}", c, p) for rank, (c, p) in enumerate(chosen[:top], start=1)]
        return tuple(told), predicted, len(known)

    def _front(self, known: Iterable[tuple[Candidate, Prediction]]) -> list[tuple[Candidate, Prediction]]:
        """Those that meet the SLOs and that none of these dominates, best first in the first objective.

        Of candidates with equal figures the one that differs least from the defaults stands for all.
        """
        import numpy as np

        from search_spaces.metrics import Direction
        from tuner.wording import pools_text

        meeting = [pair for pair in known if self._meets(pair[1])]
        signs = [-1.0 if o.direction is Direction.MAXIMIZE else 1.0 for o in self.problem.objectives]
        points = np.array(
            [[s * p.metrics[o.metric] for s, o in zip(signs, self.problem.objectives, strict=True)] for _, p in meeting]
        )
        kept = [
            index
            for index, point in enumerate(points)
            if not np.any(np.all(points <= point, axis=1) & np.any(points < point, axis=1))
        ]
        plainest: dict[tuple[float, ...], int] = {}
        for index in sorted(kept, key=lambda index: len(pools_text(meeting[index][0]))):
            plainest.setdefault(tuple(np.round(points[index], 6)), index)
        return [meeting[index] for index in sorted(plainest.values(), key=lambda index: float(points[index, 0]))]


def _with_tp(candidate: Candidate, tp: int) -> Candidate:
    pools = tuple(replace(pool, parallelism=replace(pool.parallelism, tp=tp)) for pool in candidate.config.pools)
    return replace(candidate, config=replace(candidate.config, pools=pools))
