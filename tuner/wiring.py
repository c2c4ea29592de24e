"""From the names in a study file to objects: the only factory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from search_spaces.emulation import FaultKind, FaultPlan, Noise
from search_spaces.engines import engine_spec
from search_spaces.errors import InvalidValueError, TunerError
from search_spaces.hardware import Device, DeviceKind, NodePool
from search_spaces.hf_config import read_model
from search_spaces.known_gpus import known_gpu
from search_spaces.known_models import known_model
from search_spaces.measuring import MeasurementRule, TimeLimits
from search_spaces.model import ModelSpec
from search_spaces.model_presets import TINY_MODEL
from search_spaces.problem import Objective, Problem, Slo
from search_spaces.serving import Mode, Role
from search_spaces.space import RoleChoices, Space, build_space
from search_spaces.workload import Arrival, Conversation, Length, Load, RateSearch, TraceFormat, Workload
from tuner.access import Cluster, Connect
from tuner.places import Place
from tuner.study_schema import (
    EmulationSection,
    InstallationSection,
    NodePoolSection,
    RoleSection,
    SloSection,
    StudyFile,
    TraceSection,
    WorkloadSection,
)

if TYPE_CHECKING:
    from cluster.engines.base import EngineBackend
    from cluster.engines.emulated import EmulatedBackend
    from cluster.engines.installation import Installation
    from cluster.ray_session import RayCluster
    from cluster.runner import TrialRunner
    from perf_model.calibration import CalibratedPredictor
    from perf_model.predictor import Predictor
    from perf_model.prior import Prior
    from perf_model.serving_predictor import ServingPredictor
    from studies.repeats import RepeatRule
    from studies.stopping import Budget

MICROBENCH_LIMIT_S = 180.0
MOST_AT_ONCE = 16
"""Trials in flight where the study file leaves their number open: NSGA-II's generations grow with it."""
MODEL_PRESETS: dict[str, ModelSpec] = {"tiny": TINY_MODEL}
BASIC_METRICS = ("output_tokens_per_s", "ttft_p50_ms", "tpot_p50_ms")
"""Metrics whose correction is fitted whatever the question is."""
_ROLE_LISTS = ("replicas", "tp", "pp", "dp", "ep")

UNMEASURED_CORE = Device(
    name="cpu-core",
    kind=DeviceKind.CPU,
    memory_bytes=4e9,
    memory_bandwidth=1e10,
    flops={"fp32": 1e10},
    link_bandwidth=1e9,
    network_bandwidth=1e9,
)
"""Stands for a core until it has been measured; only the order of magnitude is meant."""


def make_problem(study: StudyFile, devices: Mapping[str, Device] | None = None) -> Problem:
    """The question of `study`. `devices` holds the measured device of each CPU pool, by pool name."""
    return Problem(
        model=make_model(study),
        workload=make_workload(study),
        node_pools=tuple(_node_pool(name, pool, devices or {}) for name, pool in study.node_pools.items()),
        objectives=tuple(Objective(metric=metric) for metric in study.objectives),
        slos=tuple(make_slo(metric, slo) for metric, slo in sorted(study.slos.items())),
    )


def make_workload(study: StudyFile) -> Workload:
    """What the users of `study` send; raises `InvalidValueError` for a trace that cannot be replayed."""
    wanted = study.workload
    if wanted.trace is not None:
        return _traced(study, wanted.trace)
    if wanted.isl is None or wanted.osl is None:
        raise AssertionError("a study file without a trace has lengths: the schema checks it")
    isl = Length(mean=wanted.isl.mean, spread=wanted.isl.spread)
    osl = Length(mean=wanted.osl.mean, spread=wanted.osl.spread)
    arrival, search = Arrival(wanted.arrival), _rate_search(wanted)
    if wanted.turns is None:
        return Workload(isl=isl, osl=osl, arrival=arrival, shared_prefix=wanted.shared_prefix, rate_search=search)
    talk = Conversation(
        turns=Length(mean=wanted.turns.mean, spread=wanted.turns.spread),
        new_isl=isl,
        osl=osl,
        shared_prefix=wanted.shared_prefix,
        think_time_s=wanted.think_time or 0.0,
    )
    return replace(talk.workload(arrival), rate_search=search)


def _rate_search(wanted: WorkloadSection) -> RateSearch | None:
    found = wanted.rate_search
    return None if found is None else RateSearch(lowest=found.min, highest=found.max, tolerance=found.tolerance)


def _traced(study: StudyFile, wanted: TraceSection) -> Workload:
    from cluster.load.driver import warm_up_requests
    from cluster.load.traces import traced_workload

    workload = traced_workload(
        wanted.file,
        TraceFormat(wanted.format),
        start_s=wanted.start,
        window_s=wanted.window,
        longest=wanted.longest,
    )
    rule = make_rule(study)
    needed = rule.requests + warm_up_requests(rule, Load(arrival=Arrival.TRACE, value=1.0))
    if workload.trace is not None and workload.trace.requests < needed:
        raise InvalidValueError(
            f"workload.trace: the window holds {workload.trace.requests} requests, and {rule.requests} are measured "
            f"after {needed - rule.requests} of warm-up; widen the window or lower measurement.requests"
        )
    return workload


def loads_of(study: StudyFile, workload: Workload) -> tuple[float, ...]:
    """The values of the load dimension; of a trace, its mean requests per second at each time scale."""
    if workload.trace is None or study.workload.trace is None:
        return tuple(study.workload.loads)
    own = workload.trace.request_rate
    return tuple(float(f"{own * scale:.6g}") for scale in sorted(study.workload.trace.time_scale))


def make_slo(metric: str, slo: SloSection) -> Slo:
    """The SLO on `metric` that a study file words as `slo`."""
    return Slo(
        metric=metric,
        threshold=slo.threshold,
        hard=slo.kind == "hard",
        fail_ratio=slo.fail_ratio,
        weight=slo.weight,
        steepness=slo.steepness,
        warning=slo.warning,
        error=slo.error,
    )


def make_model(study: StudyFile) -> ModelSpec:
    """The model of `study`: a preset, one of the catalogue, or what a config.json or a GGUF file says."""
    if study.model.preset is not None:
        return MODEL_PRESETS[study.model.preset]
    if study.model.name is not None:
        return replace(known_model(study.model.name), source=study.model.source)
    if study.model.config is not None:
        found = read_model(Path(study.model.config), nearest=study.model.nearest_family)
        if "llamacpp" in study.engines:
            return replace(found, source=None)  # random weights of that shape
        return replace(found, source=study.model.source or found.source)
    _require_extra("gguf", "llamacpp", "reading a GGUF file")
    from cluster.engines.gguf_header import read_model as read_gguf

    path = Path(str(study.model.gguf))
    return replace(read_gguf(path), source=str(path))


def _require_extra(module: str, extra: str, purpose: str) -> None:
    if find_spec(module) is None:
        raise TunerError(f"{purpose} needs the package {module}; install it with: pip install 'tuner[{extra}]'")


def _node_pool(name: str, pool: NodePoolSection, devices: Mapping[str, Device]) -> NodePool:
    return NodePool(
        name=name,
        device=devices.get(name) or (UNMEASURED_CORE if pool.device == "cpu" else known_gpu(pool.device)),
        nodes=pool.nodes,
        devices_per_node=pool.devices_per_node,
        price_per_hour=pool.price or 0.0,
        labels=dict(pool.labels),
        accelerator_type=pool.accelerator_type,
    )


def make_space(study: StudyFile, problem: Problem) -> Space:
    """The search space of `study`. Only the order of its node pools matters: a role's first one is its default."""
    modes = tuple(Mode(mode) for mode in study.space.modes)
    return build_space(
        problem,
        engines={
            engine: {name: tuple(values) for name, values in options.items()}
            for engine, options in sorted(study.engines.items())
        },
        loads=loads_of(study, problem.workload),
        modes=modes,
        roles={role: _role_choices(study, role) for mode in modes for role in mode.roles},
    )


def _role_choices(study: StudyFile, role: Role) -> RoleChoices:
    own: RoleSection = getattr(study.space, str(role))
    lists = {name: tuple(getattr(own, name) or getattr(study.space, name)) for name in _ROLE_LISTS}
    return RoleChoices(
        node_pools=tuple(own.node_pools or study.node_pools),
        options={name: tuple(values) for name, values in own.options.items()},
        **lists,
    )


def make_rule(study: StudyFile) -> MeasurementRule:
    """How carefully `study` measures."""
    return MeasurementRule(**study.measurement.model_dump())


def make_limits(study: StudyFile) -> TimeLimits:
    """Time limits of the phases of a trial."""
    return TimeLimits(**study.limits.model_dump())


def make_budget(study: StudyFile) -> Budget:
    """When `study` ends."""
    from studies.stopping import Budget  # loads Optuna

    limits = study.budget
    return Budget(
        trials=limits.trials,
        wall_s=limits.wall_time,
        device_hours=limits.device_hours,
        dollars=limits.cost,
        min_gain=limits.min_gain,
        patience=limits.patience,
    )


def make_repeats(study: StudyFile) -> RepeatRule:
    """What `study` measures again."""
    from studies.repeats import RepeatRule  # loads Optuna

    return RepeatRule(control_every=study.budget.control_every, confirm=study.budget.confirm)


def make_predictor(problem: Problem, study: StudyFile) -> CalibratedPredictor:
    """The performance model of `problem`, not corrected by any measurement yet."""
    from perf_model.calibration import CalibratedPredictor

    asked = (*(objective.metric for objective in problem.objectives), *(slo.metric for slo in problem.slos))
    return CalibratedPredictor(
        model=uncalibrated(problem, study),
        leaders=tuple(dict.fromkeys((*asked, *BASIC_METRICS))),
        node_types={pool.name: pool.device.name for pool in problem.node_pools},
    )


def uncalibrated(problem: Problem, study: StudyFile) -> Predictor:
    """The performance model of `problem`, with the prior for GPU engines that `study` wants."""
    return with_prior(serving_model(problem, study), problem, study)


def serving_model(problem: Problem, study: StudyFile) -> ServingPredictor:
    """The performance model of `problem` alone, with the operation tables at hand."""
    from perf_model.serving_predictor import ServingPredictor
    from tuner.table_places import measured_nodes, tables_of

    return ServingPredictor(
        problem,
        run_requests=study.measurement.requests,
        tables=tables_of(problem).root,
        measured=measured_nodes(problem),
    )


def with_prior(model: ServingPredictor, problem: Problem, study: StudyFile) -> Predictor:
    """`model`, corrected by the prior that `study` wants where its engines run on GPUs.

    Where the rate is searched, it is asked at the highest rate that it expects to meet every SLO.
    """
    corrected, search = _corrected(model, problem, study), problem.workload.rate_search
    if search is None:
        return corrected
    from perf_model.highest_rate import HighestRatePredictor

    return HighestRatePredictor(model=corrected, search=search, slos=problem.slos)


def _corrected(model: ServingPredictor, problem: Problem, study: StudyFile) -> Predictor:
    prior = chosen_prior(study.calibration)
    on_gpus = any(pool.device.kind is DeviceKind.GPU for pool in problem.node_pools)
    if prior is None or not on_gpus or is_emulated(study):  # what is emulated takes the model's times as they are
        return model
    from perf_model.corrected import CorrectedPredictor

    return CorrectedPredictor(model=model, groups=model.gpus, problem=problem, prior=prior)


def chosen_prior(calibration: str) -> Prior | None:
    """The prior that `calibration` names: none, shipped, or the path of its file."""
    if calibration == "none":
        return None
    from perf_model.prior import Prior

    return Prior.load() if calibration == "shipped" else Prior.load(Path(calibration))


def is_emulated(study: StudyFile) -> bool:
    """True where the engines of `study` are emulated: nothing is measured on the hardware that it names."""
    return all(engine_spec(engine).emulated for engine in study.engines)


def connector(address: str | None, study: StudyFile, avoid: Collection[str] = ()) -> Connect:
    """How to reach the nodes of `study`: a Ray cluster at `address`, or one that is started on this machine.

    Hosts in `avoid` get no deployment where others have room for it.

    Raises `TunerError` for engines that cannot be launched, or that this machine is to run and that are not installed.
    """
    require_weights(study)
    if address is None:
        for engine in study.engines:
            _require_installed(engine, study)

    @contextmanager
    def connect(problem: Problem, place: Place) -> Iterator[Cluster]:
        with _reach(address, study, problem, trials_at_once(study, problem, address)) as cluster:
            yield RayAccess(cluster=cluster, place=place, study=study, avoid=frozenset(avoid))

    return connect


def trials_at_once(study: StudyFile, problem: Problem, address: str | None) -> int:
    """What `budget.parallel_trials` says; by default one for each node of a joined cluster, at most 16.

    On this machine it is one: trials at once would share its cores, and disturb each other's timings.
    """
    wanted = study.budget.parallel_trials
    if wanted != "auto":
        return wanted
    return 1 if address is None else min(MOST_AT_ONCE, sum(pool.nodes for pool in problem.node_pools))


def require_weights(study: StudyFile) -> None:
    """Raise `TunerError` where an engine of `study` would have nothing to load: a name alone is enough to predict."""
    needing = [engine for engine in study.engines if engine_spec(engine).apart]
    if needing and study.model.name is not None and study.model.source is None:
        raise TunerError(
            f"model.source is missing: {', '.join(needing)} loads {study.model.name} from somewhere; give a Hugging "
            "Face name or a folder of the nodes, or only predict (tuner predict FILE), or emulate (engines: emulated)"
        )


def _reach(address: str | None, study: StudyFile, problem: Problem, at_once: int) -> AbstractContextManager[RayCluster]:
    """Nodes at `address`, emulated ones, or this machine as it is."""
    if address is None and is_emulated(study) and (study.emulation is None or study.emulation.nodes):
        from cluster.ray_emulated import emulated_cluster

        return emulated_cluster(problem.node_pools, trials_at_once=at_once)
    from cluster.ray_session import connect as reach

    return reach(address, problem.node_pools, trials_at_once=at_once)


def _require_installed(engine: str, study: StudyFile) -> None:
    """Raise `TunerError` where this machine, which is to run `engine`, does not have it."""
    if engine == "llamacpp":
        _require_extra("xllamacpp", "llamacpp", "the engine llamacpp")
    if engine_spec(engine).apart:
        from cluster.engines.installation import missing_program

        for name, pool in study.node_pools.items():
            missing = missing_program(engine, _installation(pool, engine))
            if missing is not None:
                raise TunerError(f"{missing}; name it with node_pools.{name}.engines.{engine}.command")


@dataclass(frozen=True, kw_only=True)
class RayAccess:
    """The nodes of a Ray cluster; see `tuner.access.Cluster`."""

    cluster: RayCluster
    place: Place
    study: StudyFile
    avoid: frozenset[str] = frozenset()

    @property
    def trials_at_once(self) -> int:
        """Trials that may be in flight together."""
        return self.cluster.trials_at_once

    def measure(self, pool: NodePool) -> Device:
        """One core of a node of `pool`, measured there."""
        from perf_model.microbench import device_from_figures, measure_node

        figures = self.cluster.run_on_pool(pool, 1, MICROBENCH_LIMIT_S, measure_node)
        return device_from_figures(figures, name=f"core of {pool.name}")

    def runner(self, study: str) -> TrialRunner:
        """A runner whose working files lie beside the study."""
        from cluster.ray_nodes import WatchRule
        from cluster.ray_runner import RayTrialRunner

        backends = make_backends(self.study, make_problem(self.study))
        work_dir = self.place.deployments(study)
        rule = WatchRule(avoided_hosts=self.avoid)
        return RayTrialRunner(study=study, backends=backends, cluster=self.cluster, work_dir=work_dir, rule=rule)


def make_backends(study: StudyFile, problem: Problem) -> dict[str, EngineBackend]:
    """The engines that `study` may launch, by name."""
    from cluster.engines.llamacpp import LlamaCppBackend

    backends: dict[str, EngineBackend] = {"llamacpp": LlamaCppBackend()}
    if is_emulated(study):
        backends["emulated"] = emulated_backend(study, problem)
    return backends | {engine: _backend_apart(engine, study) for engine in study.engines if engine_spec(engine).apart}


def _backend_apart(engine: str, study: StudyFile) -> EngineBackend:
    """The backend of an engine that lives in an environment of its own."""
    from cluster.engines.catalogue import BACKENDS_APART

    return BACKENDS_APART[engine]({name: _installation(pool, engine) for name, pool in study.node_pools.items()})


def _installation(pool: NodePoolSection, engine: str) -> Installation:
    from cluster.engines.installation import Installation

    found = pool.engines.get(engine) or InstallationSection()
    return Installation(
        device=DeviceKind.CPU if pool.device == "cpu" else DeviceKind.GPU,
        command=tuple(found.command or ()),
        env=dict(found.env),
        draft_model=found.draft_model,
    )


def emulated_backend(study: StudyFile, problem: Problem) -> EmulatedBackend:
    """The emulated engine as `study` wants it to behave, with the times of the tables that its predictions use."""
    from cluster.engines.emulated import EmulatedBackend
    from tuner.emulation import Profiles
    from tuner.table_places import tables_of

    wanted = study.emulation or EmulationSection()
    return EmulatedBackend(
        source=Profiles(tables_of(problem).root),
        noise=Noise(step=wanted.step_noise, launch=wanted.launch_noise),
        plan=FaultPlan(shares={FaultKind(name): share for name, share in wanted.faults.items()}, seed=study.seed),
    )
