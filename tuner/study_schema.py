"""The keys of a study file, with their types, limits and defaults.

Pydantic stays here, at the edge: `tuner.wiring` turns a checked `StudyFile` into the types of `search_spaces`. Every
field carries a description and an example, from which `tuner.study_errors` words its remedies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from search_spaces.emulation import FaultKind
from search_spaces.engines import engine_spec
from search_spaces.errors import InvalidValueError
from search_spaces.known_gpus import GPUS
from search_spaces.known_models import known_model
from search_spaces.metrics import METRICS, POWER_METRICS, metric_info
from search_spaces.serving import OptionValue

DEFAULT_STORAGE = "sqlite:///tuner-data/studies.db"
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class KeyProblemError(ValueError):
    """A problem that concerns `key` of the section being checked rather than the whole section."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key
        self.text = text


class Section(BaseModel):
    """Base of every part of a study file: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _as_list(value: object) -> object:
    return value if isinstance(value, list | type(None)) else [value]


def _as_length(value: object) -> object:
    if isinstance(value, dict | LengthSection):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"mean": value}
    raise InvalidValueError(f"{value!r} is no length; write a number of tokens or such as {{mean: 128, spread: 0.25}}")


def _as_engines(value: object) -> object:
    """A list of engine names is a mapping without restrictions."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return {name: {} for name in value}
    if isinstance(value, dict):
        return {name: {} if options is None else options for name, options in value.items()}
    return value


def _as_installation(value: object) -> object:
    """A command alone is an installation that needs nothing else."""
    return {"command": value} if isinstance(value, str | list) else value


def _as_words(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"\s*((?:\d+(?:\.\d+)?\s*[smhd]\s*)+)", value)
    if parts is None:
        raise InvalidValueError(f"{value!r} is no duration; write seconds, or such as 90s, 4m, 2h or 1h30m")
    return sum(float(n) * _SECONDS[unit] for n, unit in re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])", parts[1]))


def _as_share(value: object) -> object:
    if not isinstance(value, str):
        return value
    percent = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)
    if percent is None:
        raise InvalidValueError(f"{value!r} is no share; write such as 0.5% or 0.005")
    return float(percent[1]) / 100


def _as_slo(value: object) -> object:
    """A number alone is a hard SLO at that threshold."""
    return value if isinstance(value, dict | SloSection) else {"threshold": value}


def _unique(values: list[object]) -> list[object]:
    repeated = sorted({str(v) for v in values if values.count(v) > 1})
    if repeated:
        raise InvalidValueError(f"{', '.join(repeated)} stands there twice; give each value once")
    return values


def _known_metric(name: str) -> str:
    metric_info(name)
    return name


def _known_objective(name: str) -> str:
    metric_info(name)
    if name not in METRICS:
        raise InvalidValueError(f"{name!r} is measured where an SLO asks for it, and is no objective; choose p50, p99")
    return name


def _known_engine(name: str) -> str:
    engine_spec(name)
    return name


def _known_model(name: str | None) -> str | None:
    if name is not None:
        known_model(name)
    return name


def _known_device(name: str) -> str:
    if name != "cpu" and name not in GPUS:
        raise InvalidValueError(f"{name!r} is no known device; choose cpu, {', '.join(GPUS)}")
    return name


def _known_fault(name: str) -> str:
    kinds = [str(kind) for kind in FaultKind]
    if name not in kinds:
        raise InvalidValueError(f"fault {name!r} is unknown; choose {', '.join(kinds)}")
    return name


def _study_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidValueError(
            f"{name!r} is no study name; use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
    return name


def _storage_url(url: str) -> str:
    if "://" not in url:
        shown = f"***@{url.rpartition('@')[2]}" if "@" in url else url
        raise InvalidValueError(f"{shown!r} is no storage URL; write such as {DEFAULT_STORAGE}")
    return url


Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
MetricName = Annotated[str, AfterValidator(_known_metric)]
ObjectiveName = Annotated[str, AfterValidator(_known_objective)]
Counts = Annotated[list[Count], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_unique)]
Rates = Annotated[list[Positive], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_unique)]
Choices = Annotated[list[OptionValue], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_unique)]
Seconds = Annotated[Positive, BeforeValidator(_as_seconds)]
Share = Annotated[float, Field(gt=0, lt=1), BeforeValidator(_as_share)]
StudyName = Annotated[str, AfterValidator(_study_name)]
StorageUrl = Annotated[str, AfterValidator(_storage_url)]
ModeName = Literal["aggregated", "disaggregated"]
FaultName = Annotated[str, AfterValidator(_known_fault)]


def _every_mode() -> list[ModeName]:
    return ["aggregated", "disaggregated"]


class ModelSection(Section):
    """The model: one of `preset`, `gguf`, `name` or `config`."""

    preset: Literal["tiny"] | None = Field(
        default=None, description="a random-weight model that the tool writes itself", examples=["tiny"]
    )
    gguf: str | None = Field(
        default=None, description="path of a GGUF file, relative to the study file", examples=["models/qwen.gguf"]
    )
    name: Annotated[str | None, AfterValidator(_known_model)] = Field(
        default=None, description="a model of the catalogue (GPU engines, emulated or not)", examples=["Llama-3.1-70B"]
    )
    config: str | None = Field(
        default=None,
        description="path of a Hugging Face config.json (or its folder), relative to the study file",
        examples=["models/qwen3/config.json"],
    )
    source: str | None = Field(
        default=None,
        description="what engines load for name or config: a Hugging Face name, or a folder of the nodes",
        examples=["meta-llama/Llama-3.1-70B-Instruct"],
    )
    nearest_family: bool = Field(
        default=False,
        description="model an unknown architecture of config as the family that it resembles most",
        examples=["true"],
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("preset", "gguf", "name", "config") if getattr(self, key) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are given" if given else "none is given"
            raise InvalidValueError(f"give exactly one of preset, gguf, name and config ({said}); such as preset: tiny")
        if self.nearest_family and self.config is None:
            raise KeyProblemError("nearest_family", "goes with config alone; give config, or leave it out")
        if self.source is not None and self.name is None and self.config is None:
            raise KeyProblemError("source", "goes with name or config; a preset or a GGUF file is loaded itself")
        return self


class LengthSection(Section):
    """Sequence lengths in tokens, uniform around `mean` within `mean * spread`."""

    mean: int = Field(ge=1, description="tokens", examples=[128])
    spread: float = Field(
        default=0.0, ge=0, lt=1, description="relative half-width of the uniform range", examples=[0.25]
    )


class TraceSection(Section):
    """Recorded requests to replay, instead of lengths and a load; `time_scale` is a dimension of the search."""

    file: str = Field(
        description="path of the trace, relative to the study file", examples=["traces/conversation.jsonl"]
    )
    format: Literal["mooncake", "azure"] = Field(description="format of the trace", examples=["mooncake"])
    time_scale: Rates = Field(
        default_factory=lambda: [1.0], description="how much faster than recorded it is replayed", examples=["[0.5, 1]"]
    )
    start: Annotated[float, Field(ge=0), BeforeValidator(_as_seconds)] = Field(
        default=0.0, description="where in the recording the replay begins", examples=["10m"]
    )
    window: Seconds | None = Field(
        default=None, description="how much of the recording is replayed; none for all that follows", examples=["5m"]
    )
    longest: Count | None = Field(
        default=None,
        description="requests of more tokens, input and output together, are left out; none for no limit",
        examples=[8192],
    )


class RateSearchSection(Section):
    """The highest request rate that meets every SLO is searched in each trial, instead of a load that is given."""

    min: Positive = Field(description="requests per second below which nothing is tried", examples=[0.1])
    max: Positive = Field(description="requests per second above which nothing is tried", examples=[64])
    tolerance: Annotated[float, Field(gt=0, le=1), BeforeValidator(_as_share)] = Field(
        default=0.1, description="the rate is known when what was met and what was not are so near", examples=["10%"]
    )

    @model_validator(mode="after")
    def _an_interval(self) -> Self:
        if self.max <= self.min:
            raise KeyProblemError("max", f"{self.max:g} is not above min, {self.min:g}; give a larger one")
        return self


class WorkloadSection(Section):
    """What the users send. A list of loads makes the load a dimension of the search."""

    isl: Annotated[LengthSection, BeforeValidator(_as_length)] | None = Field(
        default=None, description="input tokens per request; of a conversation, new ones per turn", examples=[128]
    )
    osl: Annotated[LengthSection, BeforeValidator(_as_length)] | None = Field(
        default=None, description="output tokens per request", examples=[64]
    )
    arrival: Literal["closed", "poisson", "constant", "trace"] = Field(
        default="closed",
        description="closed loop, requests arriving at a rate, or as in the trace",
        examples=["closed"],
    )
    concurrency: Counts | None = Field(
        default=None, description="requests in flight (closed loop)", examples=["[1, 4]"]
    )
    request_rate: Rates | None = Field(
        default=None, description="requests per second (open loop)", examples=["[0.5, 2.0]"]
    )
    shared_prefix: float = Field(
        default=0.0, ge=0, le=1, description="share of the input that all requests have in common", examples=[0.5]
    )
    turns: Annotated[LengthSection, BeforeValidator(_as_length)] | None = Field(
        default=None, description="requests of a conversation, each with all that was said before", examples=[4]
    )
    think_time: Annotated[float, Field(ge=0), BeforeValidator(_as_seconds)] | None = Field(
        default=None, description="seconds from an answer's end to the next turn", examples=["2s"]
    )
    trace: TraceSection | None = Field(
        default=None, description="recorded requests to replay", examples=["{file: t.jsonl, format: mooncake}"]
    )

    rate_search: RateSearchSection | None = Field(
        default=None,
        description="search the highest request rate that meets every SLO, instead of giving loads",
        examples=["{min: 0.1, max: 64}"],
    )

    @model_validator(mode="before")
    @classmethod
    def _arrivals_that_follow(cls, value: object) -> object:
        """A trace has its own arrivals; the rate that is searched is one of Poisson arrivals unless told otherwise."""
        if not isinstance(value, dict) or "arrival" in value:
            return value
        if value.get("trace") is not None:
            return {**value, "arrival": "trace"}
        return {**value, "arrival": "poisson"} if value.get("rate_search") is not None else value

    @model_validator(mode="after")
    def _lengths_or_trace(self) -> Self:
        if self.trace is None:
            if self.arrival == "trace":
                raise KeyProblemError("trace", "missing with arrival: trace; give its file and format")
            for key in ("isl", "osl"):
                if getattr(self, key) is None:
                    raise KeyProblemError(key, "missing; give a number of tokens, such as 128, or a trace")
        for key in ("isl", "osl", "concurrency", "request_rate", "turns", "think_time"):
            if self.trace is not None and getattr(self, key) is not None:
                raise KeyProblemError(key, "is what the trace says (its rate by trace.time_scale); leave it out")
        if self.trace is not None and (self.arrival != "trace" or self.shared_prefix > 0):
            key = "arrival" if self.arrival != "trace" else "shared_prefix"
            raise KeyProblemError(key, f"{getattr(self, key)} does not go with a trace; leave it out")
        return self

    @model_validator(mode="after")
    def _turns_make_a_conversation(self) -> Self:
        if self.turns is None and self.think_time is not None:
            raise KeyProblemError("think_time", "goes with turns; give turns, such as 4, or leave it out")
        if self.turns is not None and self.turns.mean < 2:
            raise KeyProblemError("turns", f"{self.turns.mean} is no conversation; give at least 2, or leave it out")
        return self

    @model_validator(mode="after")
    def _load_fits_arrival(self) -> Self:
        if self.rate_search is not None:
            return self._rate_is_searched()
        if self.trace is not None:
            return self
        wanted, other = ("concurrency", "request_rate")
        if self.arrival != "closed":
            wanted, other = other, wanted
        if getattr(self, other) is not None:
            raise KeyProblemError(
                other, f"{getattr(self, other)} does not go with arrival: {self.arrival}; give {wanted} instead"
            )
        if getattr(self, wanted) is None:
            raise KeyProblemError(wanted, f"missing with arrival: {self.arrival}; write such as {wanted}: [1, 4]")
        return self

    def _rate_is_searched(self) -> Self:
        if self.arrival not in ("poisson", "constant"):
            raise KeyProblemError(
                "rate_search", f"does not go with arrival: {self.arrival}; choose poisson or constant, or leave it out"
            )
        for key in ("request_rate", "concurrency"):
            if getattr(self, key) is not None:
                raise KeyProblemError(key, "is what rate_search looks for; give one of the two")
        return self

    @model_validator(mode="after")
    def _two_output_tokens(self) -> Self:
        if self.osl is not None and round(self.osl.mean * (1 - self.osl.spread)) < 2:
            raise KeyProblemError(
                "osl", f"{self.osl.mean} leaves requests under 2 tokens, the least for a TPOT; give a larger mean"
            )
        return self

    @property
    def loads(self) -> list[float]:
        """The values of the load dimension, in order: requests in flight, or requests per second.

        Those of a trace follow from its own rate; see `tuner.wiring.loads_of`. Where the rate is searched, there is
        one: the upper end of the search.
        """
        if self.rate_search is not None:
            return [self.rate_search.max]
        return sorted(float(value) for value in (self.concurrency or self.request_rate or []))


class InstallationSection(Section):
    """An engine as installed on the nodes of a pool, apart from this tool. No secrets: the file is stored."""

    command: Annotated[list[str], BeforeValidator(_as_words), Field(min_length=1)] | None = Field(
        default=None,
        description="the engine's program, or a list of words; a path with a slash is relative to the study file",
        examples=["[/opt/vllm/bin/vllm]"],
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="environment variables of the engine", examples=['{HF_HUB_OFFLINE: "1"}']
    )
    draft_model: str | None = Field(
        default=None,
        description="what speculative decoding with a second model loads: a Hugging Face name, or a folder of the node",
        examples=["yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"],
    )


class SloSection(Section):
    """An SLO on a metric (see `search_spaces.slos`); a threshold alone is a hard SLO."""

    threshold: Positive = Field(description="at most this, or at least where higher is better", examples=[500])
    kind: Literal["hard", "soft"] = Field(
        default="hard",
        description="hard: a trial that misses it is infeasible; soft: missing it costs",
        examples=["soft"],
    )
    fail_ratio: float = Field(
        default=0.0, ge=0, description="violation that a hard SLO still lets pass, relative", examples=[0.1]
    )
    weight: Positive = Field(default=1.0, description="scale of the penalty", examples=[0.5])
    steepness: Positive = Field(
        default=1.0, description="violation over which the penalty grows by a factor of e", examples=[0.3]
    )
    warning: float = Field(default=0.0, ge=0, description="violation above which it is a warning", examples=[0.05])
    error: float = Field(default=0.2, ge=0, description="violation above which it is an error", examples=[0.2])

    @model_validator(mode="after")
    def _tiers_in_order(self) -> Self:
        if self.warning > self.error:
            raise KeyProblemError("warning", f"{self.warning:g} is above error: {self.error:g}; give a smaller one")
        if self.kind == "soft" and self.fail_ratio > 0:
            raise KeyProblemError("fail_ratio", "goes with kind: hard; leave it out, or make the SLO hard")
        return self

    @model_serializer(mode="wrap")
    def _plain_where_it_is(self, handler: SerializerFunctionWrapHandler) -> object:
        """The threshold alone where nothing else is said: stored studies keep the short form."""
        tree = handler(self)
        return self.threshold if self == SloSection(threshold=self.threshold) else tree


class NodePoolSection(Section):
    """Identical nodes: `gpus_per_node` of a catalogue device, or `cpus_per_node` with `device: cpu`."""

    device: Annotated[str, AfterValidator(_known_device)] = Field(
        default="cpu", description="cpu, or a GPU of the catalogue", examples=["h100_sxm"]
    )
    nodes: Count = Field(default=1, description="number of nodes", examples=[1])
    gpus_per_node: Count | None = Field(default=None, description="GPUs of a node", examples=[8])
    cpus_per_node: Count | None = Field(default=None, description="cores of a node that replicas may use", examples=[4])
    price_per_hour: float = Field(default=0.0, ge=0, description="dollars per node and hour, on demand", examples=[2.5])
    spot_price_per_hour: Positive | None = Field(
        default=None, description="dollars per node and hour for nodes that may be taken back", examples=[1.0]
    )
    reserved_price_per_hour: Positive | None = Field(
        default=None, description="dollars per node and hour for nodes that are rented for long", examples=[1.6]
    )
    pricing: Literal["on_demand", "spot", "reserved"] = Field(
        default="on_demand", description="which of the prices counts", examples=["spot"]
    )
    labels: dict[str, str] = Field(default_factory=dict, description="Ray node labels", examples=["{gpu: h100}"])
    accelerator_type: str | None = Field(default=None, description="Ray accelerator type", examples=["H100"])
    engines: dict[
        Annotated[str, AfterValidator(_known_engine)], Annotated[InstallationSection, BeforeValidator(_as_installation)]
    ] = Field(
        default_factory=dict,
        description="where the nodes have their engines; by default each engine's own program on the path",
        examples=["{vllm: /opt/vllm/bin/vllm}"],
    )

    @model_validator(mode="after")
    def _devices_fit(self) -> Self:
        wanted, other = ("cpus_per_node", "gpus_per_node")
        if self.device != "cpu":
            wanted, other = other, wanted
        if getattr(self, other) is not None:
            raise KeyProblemError(
                other, f"{getattr(self, other)} does not go with device: {self.device}; give {wanted} instead"
            )
        if getattr(self, wanted) is None:
            raise KeyProblemError(wanted, f"missing with device: {self.device}; write such as {wanted}: 2")
        return self

    @model_validator(mode="after")
    def _chosen_price_given(self) -> Self:
        if self.price is None:
            raise KeyProblemError("pricing", f"{self.pricing} needs {self.pricing}_price_per_hour; give it too")
        return self

    @property
    def price(self) -> float | None:
        """Dollars per node and hour that count; None where the chosen one is not given."""
        named = {"spot": self.spot_price_per_hour, "reserved": self.reserved_price_per_hour}
        return named.get(self.pricing, self.price_per_hour)

    @property
    def devices_per_node(self) -> int:
        """GPUs or cores of a node."""
        return self.cpus_per_node or self.gpus_per_node or 1


class RoleSection(Section):
    """What may vary in the pool of one role; what is left out follows the space's own lists."""

    node_pools: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_unique)] | None = (
        Field(default=None, description="node pools that may hold the replicas; all by default", examples=["[local]"])
    )
    replicas: Counts | None = Field(default=None, description="replicas of the pool", examples=["[1, 2]"])
    tp: Counts | None = Field(default=None, description="tensor-parallel sizes", examples=["[1, 2, 4]"])
    pp: Counts | None = Field(default=None, description="pipeline-parallel sizes", examples=["[1, 2]"])
    dp: Counts | None = Field(default=None, description="attention-data-parallel sizes", examples=["[1, 2]"])
    ep: Counts | None = Field(default=None, description="expert-parallel sizes", examples=["[1, 8]"])
    options: dict[str, Choices] = Field(
        default_factory=dict, description="engine options of this role alone", examples=["{max_num_seqs: [1, 4]}"]
    )


class SpaceSection(Section):
    """What may vary beside the engines' options. The lists hold for every role that does not give its own."""

    modes: Annotated[list[ModeName], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_unique)] = Field(
        default_factory=_every_mode,
        description="serving modes",
        examples=["[aggregated, disaggregated]"],
    )
    replicas: Counts = Field(default_factory=lambda: [1], description="replicas of a pool", examples=["[1, 2]"])
    tp: Counts = Field(default_factory=lambda: [1], description="tensor-parallel sizes", examples=["[1, 2, 4]"])
    pp: Counts = Field(default_factory=lambda: [1], description="pipeline-parallel sizes", examples=["[1, 2]"])
    dp: Counts = Field(default_factory=lambda: [1], description="attention-data-parallel sizes", examples=["[1, 2]"])
    ep: Counts = Field(default_factory=lambda: [1], description="expert-parallel sizes", examples=["[1, 8]"])
    compare_numerics: bool = Field(
        default=False,
        description="compare configurations that answer differently: options that change numerics may have many values",
        examples=["true"],
    )
    mixed: RoleSection = Field(default_factory=RoleSection, description="replicas of aggregated deployments")
    prefill: RoleSection = Field(default_factory=RoleSection, description="prefill replicas")
    decode: RoleSection = Field(default_factory=RoleSection, description="decode replicas")


class BudgetSection(Section):
    """When the study ends (whichever comes first), what is measured again, and how many trials run at once.

    Repeats count towards the wall time and not towards the trials. Where the wall time is limited, the search ends
    early enough to confirm the front, for which it leaves a third of the time at most.
    """

    trials: Count = Field(default=32, description="candidates that are measured", examples=[16])
    wall_time: Seconds | None = Field(
        default=None, description="duration, in seconds or such as 4m or 2h; none for no limit", examples=["4m"]
    )
    device_hours: Positive | None = Field(
        default=None,
        description="GPU-hours (core-hours on CPU nodes) that all trials may take; none for no limit",
        examples=[50],
    )
    cost: Positive | None = Field(
        default=None, description="dollars that all trials may cost, at the prices of the node pools", examples=[200]
    )
    min_gain: Share | None = Field(
        default=None,
        description="end when no proposal is expected to add this share to the hypervolume; none for no limit",
        examples=["0.5%"],
    )
    patience: Count = Field(default=4, description="proposals in a row that must be below min_gain", examples=[4])
    confirm: Count = Field(
        default=3,
        description="runs of every member of the final front, its first one included; 1 to confirm none",
        examples=[3],
    )
    control_every: int = Field(
        default=10,
        ge=0,
        description="candidates between repeats of the default configuration, which show noise and drift; 0 for none",
        examples=[10],
    )
    parallel_trials: Count | Literal["auto"] = Field(
        default="auto",
        description="trials at once, as far as they fit; auto is one for each node of a joined cluster, one elsewhere",
        examples=[4],
    )


class MeasurementSection(Section):
    """How carefully a trial is measured (see `search_spaces.measuring.MeasurementRule`)."""

    requests: Count = Field(default=64, description="requests measured after the warm-up", examples=[64])
    warm_up_share: float = Field(
        default=0.1, ge=0, le=1, description="warm-up requests per measured request", examples=[0.1]
    )
    lateness_limit_ms: Positive = Field(
        default=20.0, description="p99 of the load client's own lateness that still counts", examples=[20.0]
    )
    error_limit: float = Field(
        default=0.05, ge=0, le=1, description="share of failed requests that counts", examples=[0.05]
    )


class LimitsSection(Section):
    """Time limits of the phases of a trial, in seconds."""

    placement_s: Positive = Field(default=120.0, description="wait for free nodes", examples=[120])
    start_s: Positive = Field(default=600.0, description="start of the replicas", examples=[600])
    measure_s: Positive = Field(default=600.0, description="one measurement", examples=[600])
    stop_s: Positive = Field(default=30.0, description="stop of the replicas", examples=[30])


class EmulationSection(Section):
    """How the emulated engine behaves, and whether the nodes are emulated too (see `search_spaces.emulation`)."""

    nodes: bool = Field(
        default=True, description="node pools stand on this machine, as Ray nodes of their own", examples=["true"]
    )
    step_noise: float = Field(
        default=0.03, ge=0, lt=1, description="standard deviation of the log of a step's time", examples=[0.03]
    )
    launch_noise: float = Field(
        default=0.02, ge=0, lt=1, description="standard deviation of the log of a launch's speed", examples=[0.02]
    )
    faults: dict[FaultName, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description="faults, with the share of configurations or trials that they strike",
        examples=["{out_of_memory_under_load: 0.05}"],
    )


class StudyFile(Section):
    """A whole study file."""

    name: StudyName = Field(description="name of the study in its storage", examples=["quickstart"])
    model: ModelSection = Field(
        default_factory=lambda: ModelSection(preset="tiny"),
        description="the model to serve",
        examples=["{preset: tiny}"],
    )
    workload: WorkloadSection = Field(
        description="what the users send", examples=["{isl: 128, osl: 64, concurrency: [1, 4]}"]
    )
    slos: dict[MetricName, Annotated[SloSection, BeforeValidator(_as_slo)]] = Field(
        default_factory=dict,
        description="limits that a configuration must meet, by metric",
        examples=["{ttft_p99_ms: 500}"],
    )
    objectives: Annotated[list[ObjectiveName], Field(min_length=2, max_length=4), AfterValidator(_unique)] = Field(
        description="two to four metrics to optimise", examples=["[output_tokens_per_s_per_gpu, ttft_p99_ms]"]
    )
    node_pools: dict[str, NodePoolSection] = Field(
        min_length=1, description="the nodes, by pool", examples=["{local: {cpus_per_node: 2}}"]
    )
    engines: Annotated[
        dict[Annotated[str, AfterValidator(_known_engine)], dict[str, Choices]], BeforeValidator(_as_engines)
    ] = Field(
        min_length=1,
        description="the engines, each with the options to restrict",
        examples=["[llamacpp]"],
    )
    space: SpaceSection = Field(
        default_factory=SpaceSection, description="what may vary", examples=["{modes: [aggregated]}"]
    )
    budget: BudgetSection = Field(
        default_factory=BudgetSection, description="when the study ends", examples=["{trials: 16, wall_time: 4m}"]
    )
    measurement: MeasurementSection = Field(
        default_factory=MeasurementSection, description="how carefully is measured", examples=["{requests: 64}"]
    )
    limits: LimitsSection = Field(
        default_factory=LimitsSection, description="time limits of the phases", examples=["{start_s: 600}"]
    )
    emulation: EmulationSection | None = Field(
        default=None, description="how the emulated engine behaves", examples=["{step_noise: 0.03}"]
    )
    calibration: str = Field(
        default="shipped",
        description="corrections of the model for GPU engines: shipped, none, or the path of a prior's file",
        examples=["none"],
    )
    storage: StorageUrl = Field(
        default=DEFAULT_STORAGE, description="any Optuna storage URL", examples=[DEFAULT_STORAGE]
    )
    sampler: Literal["nsga2", "tpe", "gp", "random"] = Field(
        default="nsga2", description="sampler of Optuna whose suggestions are screened", examples=["nsga2"]
    )
    earlier_studies: Literal["related", "none"] = Field(
        default="related",
        description="whose measurements in the same storage correct the model from the start",
        examples=["none"],
    )
    seed: int = Field(default=0, ge=0, description="seed of every random choice", examples=[0])

    @model_validator(mode="after")
    def _options_known(self) -> Self:
        for engine, options in self.engines.items():
            for name, values in options.items():
                _check_option(engine, name, values, key=f"engines.{engine}.{name}")
        for role in ("mixed", "prefill", "decode"):
            for name, values in getattr(self.space, role).options.items():
                engine = next((e for e in self.engines if _has_option(e, name)), next(iter(self.engines)))
                _check_option(engine, name, values, key=f"space.{role}.options.{name}")
        return self

    @model_validator(mode="after")
    def _one_group_of_numerics(self) -> Self:
        """What changes the model's answers has one value, unless the study wants to compare."""
        if self.space.compare_numerics:
            return self
        for engine in self.engines:
            for name in (p.name for p in engine_spec(engine).parameters if p.numerics):
                values = [str(value) for _, listed in _listings(self, engine, name) for value in listed]
                if len(set(values)) > 1:
                    raise KeyProblemError(
                        _listings(self, engine, name)[0][0],
                        f"{', '.join(dict.fromkeys(values))} answer differently, so that their figures do not compare; "
                        "give one value, or set space.compare_numerics: true and judge the answers yourself",
                    )
        return self

    @model_validator(mode="after")
    def _installations_known(self) -> Self:
        for pool_name, pool in self.node_pools.items():
            for engine in pool.engines:
                key = f"node_pools.{pool_name}.engines.{engine}"
                if engine not in self.engines:
                    raise KeyProblemError(key, f"{engine} is no engine of the study; choose {', '.join(self.engines)}")
                if not engine_spec(engine).apart:
                    raise KeyProblemError(key, f"{engine} is part of this tool and has no command; leave it out")
        return self

    @model_validator(mode="after")
    def _node_pools_known(self) -> Self:
        for role in ("mixed", "prefill", "decode"):
            for name in getattr(self.space, role).node_pools or ():
                if name not in self.node_pools:
                    known = ", ".join(self.node_pools)
                    raise KeyProblemError(f"space.{role}.node_pools", f"{name!r} is no node pool; choose {known}")
        return self

    @model_validator(mode="after")
    def _engines_have_their_devices(self) -> Self:
        emulated = [name for name in self.engines if engine_spec(name).emulated]
        if emulated and len(emulated) < len(self.engines):
            raise KeyProblemError(
                "engines", f"{', '.join(self.engines)}: an emulated engine is not compared with a real one; choose one"
            )
        for engine in self.engines:
            kinds = [str(kind) for kind in engine_spec(engine).devices]
            for name, pool in self.node_pools.items():
                if ("cpu" if pool.device == "cpu" else "gpu") not in kinds:
                    raise KeyProblemError(f"node_pools.{name}.device", _wrong_device(engine, pool.device))
        if self.emulation is not None and not emulated:
            raise KeyProblemError("emulation", "goes with the engine emulated; choose it, or leave emulation out")
        return self

    @model_validator(mode="after")
    def _engines_load_the_model(self) -> Self:
        if "llamacpp" in self.engines and self.model.name is not None:
            raise KeyProblemError(
                "model.name",
                f"{self.model.name!r} has no weights here; give preset, gguf, or config for random weights",
            )
        others = [name for name in self.engines if engine_spec(name).apart]
        if others and self.model.gguf is not None:
            raise KeyProblemError("model.gguf", f"{', '.join(others)} loads no GGUF file here; give name or config")
        return self

    @model_validator(mode="after")
    def _prices_known(self) -> Self:
        free = sorted(name for name, pool in self.node_pools.items() if not pool.price)
        paid = sorted(metric for metric in (*self.objectives, *self.slos) if "dollar" in metric or "cost" in metric)
        paid += ["budget.cost"] if self.budget.cost is not None else []
        if free and paid:
            raise KeyProblemError(
                f"node_pools.{free[0]}.price_per_hour",
                f"0 leaves {paid[0]} undefined; give the node's price in dollars per hour, or another metric",
            )
        return self

    @model_validator(mode="after")
    def _a_searched_rate_has_an_end(self) -> Self:
        waits = any(metric.startswith(("ttft_", "e2e_")) for metric in self.slos)
        if self.workload.rate_search is not None and not waits:
            raise KeyProblemError(
                "slos",
                "workload.rate_search needs an SLO on TTFT or E2E, which grow without end where requests arrive faster "
                "than they are served; give one such as ttft_p99_ms: 1000",
            )
        return self

    @model_validator(mode="after")
    def _power_can_be_read(self) -> Self:
        wanted = [metric for metric in (*self.objectives, *self.slos) if metric in POWER_METRICS]
        without = [name for name, pool in self.node_pools.items() if pool.device == "cpu"]
        emulated = [name for name in self.engines if engine_spec(name).emulated]
        if wanted and (without or emulated):
            what = f"node pool {without[0]} has no GPUs" if without else "an emulated engine draws none"
            raise KeyProblemError(
                "objectives" if wanted[0] in self.objectives else f"slos.{wanted[0]}",
                f"{wanted[0]} is known where GPUs report their power, and {what}; choose another metric",
            )
        return self

    @model_validator(mode="after")
    def _goodput_has_slos(self) -> Self:
        for metric in self.objectives:
            if metric.startswith("goodput") and not self.slos:
                raise KeyProblemError(
                    "slos", f"missing, and objective {metric} counts requests that meet them; give at least one SLO"
                )
        return self


def _wrong_device(engine: str, device: str) -> str:
    spec = engine_spec(engine)
    if spec.emulated:
        return f"{device} is never emulated; name a GPU such as h100_sxm"
    kinds = " or ".join(str(kind) for kind in spec.devices)
    choices = "vllm, sglang, trtllm or emulated" if device != "cpu" else "llamacpp or vllm"
    return f"{engine} runs on {kinds} here, not on {device}; choose {choices}, or another device"


def _listings(study: StudyFile, engine: str, option: str) -> list[tuple[str, list[OptionValue]]]:
    """The places in `study` that list values of an option of `engine`: keys and values."""
    found = [(f"engines.{engine}.{option}", study.engines[engine].get(option, []))]
    roles = ((role, getattr(study.space, role)) for role in ("mixed", "prefill", "decode"))
    found += [(f"space.{role}.options.{option}", section.options.get(option, [])) for role, section in roles]
    return [(key, values) for key, values in found if values]


def _has_option(engine: str, name: str) -> bool:
    return any(parameter.name == name for parameter in engine_spec(engine).parameters)


def _check_option(engine: str, name: str, values: Iterable[OptionValue], *, key: str) -> None:
    try:
        parameter = engine_spec(engine).parameter(name)
    except InvalidValueError as error:
        raise KeyProblemError(key, str(error)) from error
    for value in values:
        if not parameter.accepts(value):
            listed = ", ".join(map(str, parameter.choices))
            raise KeyProblemError(key, f"{value!r} is no choice of {name} ({parameter.meaning}); choose {listed}")
