"""What public measured runs teach the model: correction factors with uncertainty, shipped as a small data file.

The logarithm of measured over predicted is a sum of effects of nested groups: all runs, engine, engine and precision,
kind of model, GPU generation, model, system, and so on to one model on one system with one engine, precision, layout
and pair of lengths. Each group has an offset and some have slopes in load and lengths; all are shrunk to zero, the wide
groups most. What is known of a group corrects its members; a model or system that was never measured keeps the
prediction of the operation model, apart from the little that holds for every model (measured: wider corrections make
unseen models worse).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from perf_model.numeric import FloatArray, floats
from perf_model.precision import Precision
from perf_model.runs import Run
from perf_model.silicon import ReplicaKey
from perf_model.validate import Predicted
from search_spaces.errors import InvalidValueError, require
from search_spaces.model import LatentAttention, LinearAttention, ModelSpec, MoeFeedForward
from search_spaces.serving import Mode

SHIPPED = Path(__file__).parent / "data" / "silicon_prior.json"
FORMAT = 1
METRICS = ("ttft", "tpot")
_BAR = " | "


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A replica as the prior knows it; the decode replica where prefill has its own. All but the sizes are words.

    `model` tells models of one architecture apart by their sizes, not by their names, so that copies of a checkpoint
    share what was learned.
    """

    model: str
    kind: str
    system: str
    engine: str
    precision: str
    mode: Mode
    tp: int
    dp: int
    ep: int

    @property
    def served_by(self) -> str:
        """Engine, and how it serves."""
        return self.engine if self.mode is Mode.AGGREGATED else f"{self.engine} {self.mode.value}"


def subject(key: ReplicaKey, mode: Mode) -> Subject:
    """The replica of `key` serving in `mode`."""
    return Subject(
        model=model_word(key.model),
        kind=kind_word(key.model),
        system=key.system,
        engine=key.engine,
        precision=precision_word(key.precision),
        mode=mode,
        tp=key.layout.tp,
        dp=key.layout.dp,
        ep=key.layout.ep,
    )


def run_subject(run: Run) -> Subject:
    """The (decode) replica of a measured run."""
    return subject(
        ReplicaKey(
            model=run.model,
            system=run.system,
            engine=run.engine,
            layout=run.pools[-1].layout,
            precision=run.precision,
        ),
        run.mode,
    )


def model_word(model: ModelSpec) -> str:
    """Architecture and sizes of `model`."""
    return f"{model.architecture or 'unknown'} {model.num_layers}x{model.hidden_size}"


def kind_word(model: ModelSpec) -> str:
    """What most sets the operations of `model` apart."""
    if any(isinstance(group.attention, LatentAttention) for group in model.layers):
        return "latent attention"
    if any(isinstance(group.attention, LinearAttention) for group in model.layers):
        return "linear attention"
    experts = any(isinstance(group.feed_forward, MoeFeedForward) for group in model.layers)
    return "experts" if experts else "dense"


def precision_word(precision: Precision) -> str:
    """The narrowest kind of weight: of the experts or, where they are not quantised, of the other products."""
    held = precision.gemm if precision.moe == "bfloat16" else precision.moe
    return {"bfloat16": "bf16", "fp8_block": "fp8", "nvfp4": "fp4", "int4_wo": "int4", "int8_wo": "int8"}.get(
        held, held
    )


@dataclass(frozen=True, kw_only=True)
class Occasion:
    """Loads of one subject and what the model predicts there; arrays of one shape.

    `users` requests in flight on an attention rank (the mean where arrivals are open), `isl` and `osl` in tokens as a
    benchmark names them (the longest where lengths are drawn from a range), predicted mean latencies in ms.
    """

    users: FloatArray
    isl: FloatArray
    osl: FloatArray
    ttft_ms: FloatArray
    tpot_ms: FloatArray


# Slopes, each a function of an occasion that is near zero in the middle of the measured runs.
BASES = ("offset", "users", "isl", "tp", "share", "backlog")


def basis(name: str, who: Subject, at: Occasion) -> FloatArray:
    """Values of one of `BASES`: 1, ln users, ln isl, ln tp, ln(tpot / ttft), all centred, and the backlog.

    The backlog is ln(ttft / (osl * tpot)) + 1.5 where that is positive: requests that wait for a quarter of their
    decoding time or more, a wait that hangs on small differences of capacity.
    """
    if name == "users":
        return np.log(np.maximum(at.users, 1.0)) - 3.0
    if name == "isl":
        return np.log(at.isl) - 7.5
    if name == "tp":
        return np.full_like(at.isl, math.log(who.tp) - 1.0)
    if name == "share":
        return np.log(at.tpot_ms / at.ttft_ms) + 2.5
    if name == "backlog":
        return np.maximum(np.log(at.ttft_ms / (at.osl * at.tpot_ms)) + 1.5, 0.0)
    return np.ones_like(at.isl)


def group_words(who: Subject) -> dict[str, str]:
    """The groups that `who` belongs to, from wide to narrow, apart from those of lengths (see `lengths_word`).

    The engines of disaggregated replicas have a level of their own: what aggregated runs teach of a model's faults is
    not theirs, and fewer were measured.
    """
    engine = who.served_by
    generation = "hopper" if who.system.startswith("h") else "ampere" if who.system.startswith("a") else "blackwell"
    one = (who.model, who.system, engine, who.precision)
    apart = {} if who.mode is Mode.AGGREGATED else {"apart": engine}
    return apart | {
        "all": "all",
        "engine": engine,
        "engine, precision": _joined(engine, who.precision),
        "engine, kind": _joined(engine, who.kind),
        "engine, generation": _joined(engine, generation),
        "engine, parallel attention": _joined(engine, str(who.dp > 1)),
        "model": who.model,
        "model, engine": _joined(who.model, engine),
        "one": _joined(*one),
        "layout": _joined(*one, f"tp{who.tp} dp{who.dp} ep{who.ep}"),
    }


LENGTHS = "lengths"


def lengths_word(who: Subject, isl: float, osl: float) -> str:
    """The group of a subject's runs of the same lengths, whatever its layout."""
    return _joined(group_words(who)["one"], f"{isl:g}/{osl:g}")


def _joined(*words: str) -> str:
    return _BAR.join(words)


@dataclass(frozen=True, kw_only=True)
class MetricPrior:
    """Effects on one metric: level -> basis -> group -> natural-log units.

    The sum is kept within `lowest` .. `highest`. `log_sds` are standard deviations of the logarithm of measured over
    corrected, by mode: for members of a measured group "one" ("known") and for others ("unknown"), from left-out runs.
    """

    effects: Mapping[str, Mapping[str, Mapping[str, float]]]
    lowest: float
    highest: float
    log_sds: Mapping[str, Mapping[str, float]]

    def __post_init__(self) -> None:
        require(self.lowest <= 0 <= self.highest, f"limits {self.lowest}..{self.highest} must hold 0")
        for mode, sds in self.log_sds.items():
            require(min(sds.values()) > 0, f"standard deviations {dict(sds)} of {mode} replicas must be positive")

    def log_factor(self, who: Subject, at: Occasion) -> FloatArray:
        """Natural logarithm of the correction."""
        words = group_words(who)
        sums = dict.fromkeys(BASES, 0.0)
        for level, slopes in self.effects.items():
            for name, groups in slopes.items():
                sums[name] += groups.get(words.get(level, ""), 0.0)
        total = np.full_like(at.isl, sums.pop("offset")) + self._of_lengths(words["one"], at)
        for name, slope in sums.items():
            if slope:
                total += slope * basis(name, who, at)
        return np.clip(total, self.lowest, self.highest)

    def _of_lengths(self, one: str, at: Occasion) -> FloatArray | float:
        """Effects of the lengths at which the group `one` was measured."""
        total: FloatArray | float = 0.0
        for word, effect in self.effects.get(LENGTHS, {}).get("offset", {}).items():
            group, _, lengths = word.rpartition(_BAR)
            if group == one:
                isl, osl = (float(length) for length in lengths.split("/"))
                total = total + effect * ((at.isl == isl) & (at.osl == osl))
        return total

    def log_sd(self, who: Subject) -> float:
        """Standard deviation of the logarithm of measured over corrected."""
        known = any(group_words(who)["one"] in groups for groups in self.effects.get("one", {}).values())
        return self.log_sds[who.mode.value]["known" if known else "unknown"]


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Factors on mean TTFT and TPOT, and the standard deviations of the logarithms that remain; arrays of one shape."""

    ttft_factor: FloatArray
    tpot_factor: FloatArray
    ttft_log_sd: FloatArray
    tpot_log_sd: FloatArray


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Corrections of both metrics and where they come from; `raw` holds the errors of figures without them."""

    ttft: MetricPrior
    tpot: MetricPrior
    provenance: Mapping[str, str]
    raw: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path = SHIPPED) -> Prior:
        """The prior in `path`, the shipped one by default; raises `InvalidValueError` for another file."""
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["format"] != FORMAT:
                raise InvalidValueError(f"{path} has format {held['format']}; this version reads format {FORMAT}")
            metrics = {name: MetricPrior(**held[name]) for name in METRICS}
            return cls(**metrics, provenance=held["provenance"], raw=held.get("raw", {}))
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InvalidValueError(
                f"{path} holds no prior ({error}); make one with benchmarks/fit_prior.py or set calibration: none"
            ) from error

    def save(self, path: Path) -> None:
        """Write the prior as JSON."""
        held = {"format": FORMAT, "provenance": dict(self.provenance), "raw": dict(self.raw)}
        for name, metric in self._metrics.items():
            held[name] = {field: getattr(metric, field) for field in MetricPrior.__dataclass_fields__}
        path.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @cached_property
    def _metrics(self) -> dict[str, MetricPrior]:
        return {"ttft": self.ttft, "tpot": self.tpot}

    def apply(self, who: Subject, at: Occasion) -> Correction:
        """Corrections of one subject under many loads."""
        shape = at.isl.shape
        return Correction(
            ttft_factor=np.exp(self.ttft.log_factor(who, at)),
            tpot_factor=np.exp(self.tpot.log_factor(who, at)),
            ttft_log_sd=np.full(shape, self.ttft.log_sd(who)),
            tpot_log_sd=np.full(shape, self.tpot.log_sd(who)),
        )

    def correct(self, predicted: Sequence[Predicted]) -> list[tuple[float, float]]:
        """Corrected mean TTFT and TPOT of each measured run (what `validate` takes)."""
        values = []
        for p in predicted:
            found = self.apply(run_subject(p.run), occasion(p))
            values.append((p.ttft_ms * float(found.ttft_factor[0]), p.tpot_ms * float(found.tpot_factor[0])))
        return values


def occasion(predicted: Predicted) -> Occasion:
    """The load of a measured run and what was predicted, as arrays of one element."""
    run = predicted.run
    values = (run.rank_users, run.isl, run.osl, predicted.ttft_ms, predicted.tpot_ms)
    users_, isl, osl, ttft, tpot = (floats([value]) for value in values)
    return Occasion(users=users_, isl=isl, osl=osl, ttft_ms=ttft, tpot_ms=tpot)
