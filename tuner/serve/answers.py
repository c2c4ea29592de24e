"""What the service answers, as OpenAPI tells it: the shapes of the JSON that the commands print.

Answers are made by the functions of the commands. They are not put through these models, which describe them; the
tests hold every answer against its model. Figures that are not finite are null.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Figure = float | int | None
"""A figure, null where it is not known or not finite."""
Figures = dict[str, Figure]
Setting = str | float | int | bool | None


class Answer(BaseModel):
    """Base of all answers: what they hold is told in full."""

    model_config = ConfigDict(extra="forbid")


class Problem(Answer):
    """Why there is no answer."""

    detail: str = Field(description="what is wrong, the limit, and the remedy, in words")


class Health(Answer):
    """That the service answers."""

    status: Literal["ok"]


class Summary(Answer):
    """A study at a glance: trials measured, failed through their configuration, lost, and open."""

    study: str
    objectives: list[str]
    measured: int
    failed: int
    lost: int
    open: int
    started_at: str | None = Field(description="ISO 8601")
    running: bool = Field(description="whether a coordinator holds its lease")


class Objective(Answer):
    """A metric that a study optimises."""

    metric: str
    direction: Literal["minimize", "maximize"]
    unit: str


class Slo(Answer):
    """A limit; see docs/slo.md."""

    metric: str
    threshold: float
    hard: bool
    fail_ratio: float
    weight: float
    steepness: float
    warning: float
    error: float


class Spent(Answer):
    """What the trials that ended took."""

    device_hours: float
    dollars: float
    trials: int


class DeviceUse(Answer):
    """Device-seconds while something was left to propose, and those that trials held of them."""

    reserved_device_s: float
    device_s: float


class Pool(BaseModel):
    """Replicas of one role. Beside these keys it has the parallel sizes that are not 1, or all of them."""

    model_config = ConfigDict(extra="allow")

    role: str
    node_pool: str
    replicas: int
    devices_per_replica: int
    options: dict[str, Setting]


class Configuration(Answer):
    """A serving configuration under a load, which has one of its units as key."""

    engine: str
    mode: str
    devices: int
    pools: list[Pool]
    arrival: str
    concurrency: float | None = None
    request_rate: float | None = None


class Failure(Answer):
    """Why a trial gave no figures."""

    reason: str
    detail: str
    log_tail: str = Field(description="the engine's last lines")


class Rate(Answer):
    """What a search for the highest rate found, in requests per second."""

    met: Figure
    missed: Figure
    probes: list[JsonValue]


class Trial(Answer):
    """A run, or a candidate with the means of its runs."""

    trial: int
    status: Literal["waiting", "running", "measured", "failed", "lost"]
    feasible: bool
    origin: str | None
    repeat_of: int | None
    key: str | None
    configuration: Configuration | None
    objectives: Figures
    metrics: Figures
    predicted: Figures | None
    violations: Figures
    requests: int | None
    errors: int | None
    highest_rate: Rate | None
    client_lateness_ms: JsonValue
    timings_s: Figures
    environment: dict[str, JsonValue]
    emulated: bool | None
    failure: Failure | None
    artifacts: dict[str, str]
    started_at: str | None
    ended_at: str | None


class Interval(Answer):
    """A 95% interval of a mean; `basis` says whose noise it is made of."""

    model_config = ConfigDict(extra="allow")

    low: Figure
    high: Figure
    basis: str
    level: float


class Member(Trial):
    """A member of the front."""

    runs: list[int]
    intervals: dict[str, Interval | None]
    ties_with: list[int]


class Overview(Answer):
    """A study without its trials."""

    study: str
    status: str
    emulated: bool
    storage: str
    earlier_studies: list[str]
    objectives: list[Objective]
    slos: list[Slo]
    spent: Spent
    device_use: DeviceUse
    counts: dict[str, int]
    measured_modes: dict[str, int]


class Front(Overview):
    """The Pareto front and how it was found."""

    front: list[Member]


class Stability(Answer):
    """Noise and drift by metric."""

    noise: dict[str, JsonValue]
    drift: dict[str, JsonValue]
    control: int | None
    control_runs: int
    repeats: int


class Study(Overview):
    """A study with every trial; `front` holds numbers of trials."""

    best: dict[str, int]
    stability: Stability
    prediction_error: Figures
    interval_coverage: Figures
    front: list[int]
    trials: list[Trial]


class Compared(Answer):
    """A metric of the recommended configuration beside that of the default, in words."""

    metric: str
    recommended: str
    default: str
    change: str
    better: bool | None


class Share(BaseModel):
    """How much a parameter matters."""

    model_config = ConfigDict(extra="allow")


class FailureGroup(Answer):
    """Failures of one reason, and one of them as an example."""

    reason: str
    trials: list[int]
    example: int
    detail: str
    log_tail: str


class Command(Answer):
    """A command, and what it is for."""

    purpose: str
    command: str


class Report(Study):
    """The whole report: the study and its story."""

    question: list[str]
    answer: str
    recommended: int | None
    default: int | None
    comparison: list[Compared]
    importance: dict[str, list[Share]]
    failures: list[FailureGroup]
    commands: list[Command]


class Counts(Answer):
    """Trials by state; `running` holds their numbers."""

    budget: int | None
    finished: int
    measured: int
    failed: int
    repeats: int
    running: list[int]
    waiting: int
    lost: int


class Coordinator(Answer):
    """The process that runs a study."""

    host: str
    pid: int
    run: int
    since_s: float
    heartbeat_age_s: float
    lease_left_s: float
    stop_ordered_by: str | None


class Status(Answer):
    """Who runs a study, its trials, and the time left."""

    study: str
    storage: str
    state: Literal["running", "stopping", "died", "stopped", "finished"]
    ended: str | None = Field(description="why the last run ended by itself; null where it runs or was stopped")
    trials: Counts
    eta_s: float | None
    coordinator: Coordinator | None


class Line(Answer):
    """A line of a study's log; `at_s` is in seconds since the epoch."""

    number: int
    at_s: float
    run: int
    text: str


class Progress(Answer):
    """A trial while its study runs: data of the event `trial`."""

    trial: int
    status: Literal["waiting", "running", "measured", "failed", "lost"]
    feasible: bool
    origin: str | None
    repeat_of: int | None
    configuration: str
    objectives: Figures
    failure: str | None
    started_at: str | None
    ended_at: str | None


class Axis(Answer):
    """An objective, and which way is better."""

    metric: str
    direction: Literal["minimize", "maximize"]


class Point(Answer):
    """A member of the front: the means of its runs."""

    trial: int
    runs: int
    configuration: str
    objectives: Figures


class Points(Answer):
    """The front while its study runs: data of the event `front`."""

    emulated: bool
    objectives: list[Axis]
    front: list[Point]


class RoleAccount(Answer):
    """A replica of one role: times of its steps by operation, and bytes of one rank."""

    role: str
    prefill_step_ms: Figures
    decode_step_ms: Figures
    decode_sequences: float
    time_from: Figures
    memory_bytes: Figures
    most_sequences: float


class Forecast(Answer):
    """What the model expects of a configuration."""

    title: str
    candidate: Configuration
    fits: bool
    does_not_fit: str | None
    too_small: dict[str, str]
    meets_slos: bool | None
    metrics: Figures
    log_stddev: Figures
    bottleneck: str | None
    sentence: str | None
    roles: list[RoleAccount]


class Outlook(Answer):
    """What the model expects of a study's defaults and of the best of its space."""

    predicted: Literal[True]
    study: str
    model: str
    calibration: JsonValue
    notes: list[str]
    configurations_predicted: int
    configurations_that_fit: int
    defaults: list[Forecast]
    best: list[Forecast]


class Predicted(Answer):
    """Predicted metrics with their 90% intervals."""

    infeasible: str | None
    metrics: Figures
    intervals_90: dict[str, list[Figure]]


class Base(Answer):
    """The trial that a what-if starts from."""

    trial: int
    configuration: Configuration | None
    measured: Figures
    predicted: Predicted


class Asked(Predicted):
    """A configuration that was asked for."""

    configuration: Configuration
    chance_of_meeting: Figures
    extrapolated: list[str]
    measured_as_trial: int | None


class WhatIf(Answer):
    """What the model that a study has corrected says of changed settings."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    predicted: Literal[True]
    study: str
    emulated: bool
    notes: list[str]
    settings: list[str]
    changes: list[str]
    measurements: int
    start: Base = Field(alias="from")
    answers: list[Asked]


class Demand(Answer):
    """What a plan was asked to serve."""

    rate: float | None
    users: float | None
    devices: int | None
    headroom: float


class Scaling(Answer):
    """How copies scale, and from how many pairs of measured configurations that is known."""

    efficiency: float
    measured_pairs: int


class Part(Answer):
    """Copies of one deployment."""

    copies: int
    trial: int | None
    predicted: bool
    emulated: bool
    runs: int
    rate: float
    users: float
    devices: int
    metrics: Figures
    configuration: Configuration


class Plan(Answer):
    """Replicas, nodes and money for a demand; where it is not met, the nearest that can be had."""

    study: str
    met: bool
    served_share: float | None
    demand: Demand
    nodes: dict[str, int]
    devices: int
    rate: float
    users: float
    cost_per_hour: float | None
    pricing: str
    gap: float
    scaling: Scaling
    latencies_at_most: Figures
    assumptions: list[str]
    parts: list[Part]


class Rank(Answer):
    """A measured configuration under other SLOs."""

    rank: int
    rank_before: int | None
    trial: int
    runs: int
    score: Figure
    base_score: Figure
    multiplier: Figure
    feasible: bool
    penalties: Figures
    tiers: dict[str, str]
    metrics: Figures
    emulated: bool


class Ranks(Answer):
    """The measured configurations of a study, best first."""

    study: str
    objectives: list[str]
    slos: list[Slo]
    ranks: list[Rank]


class Importance(Answer):
    """How much each parameter matters to each objective: among the measured trials, and as the model sees it."""

    study: str
    notes: list[str]
    evaluator: str
    measured_trials: int
    importances: dict[str, Figures]
    model_predicted: int
    model_sensitivity: dict[str, Figures]


class Ordered(Answer):
    """That a coordinator was told to stop."""

    study: str
    ordered: str = Field(description="the coordinator")


class Submission(Answer):
    """A run that this service has started; it goes on when the service ends."""

    study: str
    state: Literal["starting", "running", "ended", "stopped", "failed"]
    since_s: float = Field(description="seconds since the epoch")
    exit_code: int | None = Field(description="of the process that was started; null while it runs")
    tail: str = Field(description="the last lines that it wrote")
