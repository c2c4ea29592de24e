"""Predictions against measured runs: coverage and errors of TTFT and TPOT by engine, system and model."""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perf_model.columns import columns, estimate_replica
from perf_model.disaggregated import PairLoad, disaggregated
from perf_model.numeric import FloatArray
from perf_model.runs import BURST_SHARE, Run, Unpredictable, read_runs
from perf_model.serving import ServingEstimate
from perf_model.silicon import GpuReplica, ReplicaKey, Silicon
from search_spaces.errors import InvalidValueError
from search_spaces.serving import Mode

HANDOVER_MS = 10.0  # meta-data exchange before a KV cache moves


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A run and what the model says of it. The parts of TTFT and TPOT serve corrections and explanations.

    `prefill_ms` is one prompt's prefill alone, `queue_ms` the wait for others and for slots, `step_ms` a pure decode
    step at `decode_seqs` sequences on a rank, `sequences` what memory allows on a rank.
    """

    run: Run
    ttft_ms: float
    tpot_ms: float
    prefill_ms: float
    queue_ms: float
    step_ms: float
    decode_seqs: float
    sequences: float


Correction = Callable[[Sequence[Predicted]], Sequence[tuple[float, float]]]


@dataclass(frozen=True, kw_only=True)
class ErrorSummary:
    """Absolute relative errors of a group of rows."""

    group: str
    rows: int
    ttft_median: float
    ttft_mean: float
    ttft_p90: float
    tpot_median: float
    tpot_mean: float
    tpot_p90: float


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """What `validate` found. `coverage` is the share of rows predicted, by mode; `reasons` counts the others' reasons.

    `summaries` maps a kind of group (mode, engine, system, model) to its groups; all but `mode` are of aggregated rows.
    """

    rows: int
    coverage: dict[str, float]
    reasons: dict[str, int]
    summaries: dict[str, list[ErrorSummary]]
    predictions: list[tuple[str, float, float]]


def validate(path: Path, silicon: Silicon, *, correct: Correction | None = None) -> ValidationReport:
    """Predict every row of the CSV file at `path`, corrected by `correct` where given.

    Raises `InvalidValueError` where the file cannot be read.
    """
    rows = read_runs(path)
    predicted, refused = predict_runs(rows, silicon)
    values = [(p.ttft_ms, p.tpot_ms) for p in predicted] if correct is None else list(correct(predicted))
    return report(rows, predicted, refused, values)


def predict_runs(rows: Sequence[Run | Unpredictable], silicon: Silicon) -> tuple[list[Predicted], list[Unpredictable]]:
    """What the model says of each run, and the rows that it cannot predict."""
    refused = [row for row in rows if isinstance(row, Unpredictable)]
    groups: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    for run in rows:
        if isinstance(run, Run):
            layouts = tuple((pool.layout, pool.replicas) for pool in run.pools)
            groups[run.model_name, run.system, run.engine, run.precision, run.mode, layouts].append(run)
    predicted: list[Predicted] = []
    for runs in groups.values():
        try:
            predicted += _group(runs, silicon)
        except InvalidValueError as error:
            refused += [Unpredictable(id=run.id, mode=run.mode.value, reason=str(error)) for run in runs]
    order = {row.id: index for index, row in enumerate(rows)}
    return sorted(predicted, key=lambda p: order[p.run.id]), refused


def _group(runs: list[Run], silicon: Silicon) -> list[Predicted]:
    replicas = [
        silicon.replica(
            ReplicaKey(
                model=runs[0].model,
                system=runs[0].system,
                engine=runs[0].engine,
                layout=pool.layout,
                precision=runs[0].precision,
            )
        )
        for pool in runs[0].pools
    ]
    if runs[0].mode is Mode.AGGREGATED:
        return _aggregated(runs, replicas[0])
    return _disaggregated(runs, replicas[0], replicas[1])


def _aggregated(runs: list[Run], replica: GpuReplica) -> list[Predicted]:
    rows = columns(
        tp=replica.key.layout.tp,
        pp=replica.key.layout.pp,
        dp=replica.key.layout.dp,
        ep=replica.key.layout.ep,
        users=[run.concurrency / runs[0].pools[0].replicas for run in runs],
        isl=[run.isl * run.length_share for run in runs],
        osl=[run.osl * run.length_share for run in runs],
        token_budget=replica.traits.token_budget,
        burst_share=[run.burst_share for run in runs],
        stream_tokens=[run.stream_tokens for run in runs],
        admission_steps=[run.admission_steps for run in runs],
        client_ms=[run.client_ms for run in runs],
        accepted=[run.speculation.accepted for run in runs],
        drafted=[run.speculation.drafted for run in runs],
    )
    most = replica.most_sequences(rows.isl, rows.osl, rows.token_budget)
    _require_room(most, replica)
    return _predicted(runs, estimate_replica(replica, rows), most)


def _require_room(most: FloatArray, replica: GpuReplica) -> None:
    if np.all(most < 1.0):
        layout = replica.key.layout
        raise InvalidValueError(
            f"{replica.key.model.name} does not fit on {replica.key.system} with tp={layout.tp}, pp={layout.pp}, "
            f"dp={layout.dp}, ep={layout.ep}: a rank's weights take {replica.footprint.weight_bytes / 2**30:.1f} of "
            f"{replica.footprint.system.memory_bytes / 2**30:.1f} GiB; use more GPUs for a replica"
        )


def _disaggregated(runs: list[Run], prefill: GpuReplica, decode: GpuReplica) -> list[Predicted]:
    isl = np.array([run.isl * run.length_share for run in runs])
    osl = np.array([run.osl * run.length_share for run in runs])
    budget = np.full_like(isl, prefill.traits.token_budget)
    most = decode.most_sequences(isl, osl, budget)
    _require_room(most, decode)
    _require_room(prefill.most_sequences(isl, 0.0 * isl, budget), prefill)
    full = np.ones_like(isl)
    ranks = [pool.replicas * pool.layout.dp * pool.layout.pp for pool in runs[0].pools]
    wire = HANDOVER_MS + 1e3 * decode.footprint.sequence_bytes(isl) / decode.footprint.system.network_bandwidth
    load = PairLoad(
        users=np.array([run.concurrency for run in runs]),
        rate_per_s=0.0 * full,
        prefill_ranks=ranks[0] * full,
        decode_ranks=ranks[1] * full,
        decode_slots=np.maximum(most, 1.0),
        token_budget=budget,
        isl=isl,
        osl=osl,
        cached=0.0 * full,
        request_ms=np.array([decode.request_ms + run.client_ms for run in runs]),
        wire_ms=wire,
        send_ms=0.0 * full,
        receive_ms=0.0 * full,
        run_requests=100.0 * full,
        burst_share=BURST_SHARE * full,
    )
    return _predicted(runs, disaggregated(prefill.steps, decode.steps, load), most)


def _predicted(runs: list[Run], estimate: ServingEstimate, most: FloatArray) -> list[Predicted]:
    ttft, tpot = estimate.ttft.mean(), estimate.tpot.mean()
    base, short = estimate.ttft.base - estimate.queue_ms, estimate.itl.quantile(0.0)
    return [
        Predicted(
            run=run,
            ttft_ms=float(ttft[i]),
            tpot_ms=float(tpot[i]),
            prefill_ms=float(base[i]),
            queue_ms=float(estimate.queue_ms[i]),
            step_ms=float(short[i]),
            decode_seqs=float(estimate.decode_seqs[i]),
            sequences=float(most[i]),
        )
        for i, run in enumerate(runs)
    ]


def report(
    rows: Sequence[Run | Unpredictable],
    predicted: Sequence[Predicted],
    refused: Sequence[Unpredictable],
    values: Sequence[tuple[float, float]],
) -> ValidationReport:
    """Coverage and errors of `values` (TTFT and TPOT of each of `predicted`)."""
    counts = Counter(row.mode if isinstance(row, Unpredictable) else row.mode.value for row in rows)
    known = Counter(p.run.mode.value for p in predicted)
    pairs = list(zip(predicted, values, strict=True))
    agg = [pair for pair in pairs if pair[0].run.mode is Mode.AGGREGATED]
    summaries = {
        "mode": _summaries(pairs, lambda run: run.mode.value),
        "engine": _summaries(agg, lambda run: run.engine),
        "system": _summaries(agg, lambda run: run.system),
        "model": _summaries(agg, lambda run: run.model_name),
    }
    return ValidationReport(
        rows=len(rows),
        coverage={mode: known[mode] / count for mode, count in counts.items()},
        reasons=dict(Counter(row.reason for row in refused)),
        summaries=summaries,
        predictions=[(p.run.id, ttft, tpot) for p, (ttft, tpot) in pairs],
    )


def _summaries(
    pairs: Sequence[tuple[Predicted, tuple[float, float]]], group: Callable[[Run], str]
) -> list[ErrorSummary]:
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for predicted, (ttft, tpot) in pairs:
        run = predicted.run
        errors = abs(ttft / run.ttft_ms - 1.0), abs(tpot / run.tpot_ms - 1.0)
        groups[group(run)].append(errors)
    return [_summary(name, np.array(errors)) for name, errors in sorted(groups.items())]


def _summary(name: str, errors: FloatArray) -> ErrorSummary:
    def statistics(values: FloatArray) -> tuple[float, float, float]:
        known = values[~np.isnan(values)]
        if not len(known):
            return math.nan, math.nan, math.nan
        return float(np.median(known)), float(np.mean(known)), float(np.quantile(known, 0.9))

    ttft, tpot = statistics(errors[:, 0]), statistics(errors[:, 1])
    return ErrorSummary(
        group=name,
        rows=len(errors),
        ttft_median=ttft[0],
        ttft_mean=ttft[1],
        ttft_p90=ttft[2],
        tpot_median=tpot[0],
        tpot_mean=tpot[1],
        tpot_p90=tpot[2],
    )


def write_predictions(found: ValidationReport, path: Path) -> None:
    """Write id, ttft_ms and tpot_ms of every predicted row."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("id", "ttft_ms", "tpot_ms"))
        writer.writerows((name, f"{ttft:.3f}", f"{tpot:.3f}") for name, ttft, tpot in found.predictions)
