"""The README of a deployment: what was measured, on what, how to start it, and how to measure it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.launched import REDACTED
from search_spaces.metrics import METRICS
from search_spaces.workload import Length, Workload
from studies.noise import Basis, Interval
from studies.records import EMULATED_NOTE
from tuner.deploy.bench import API_KEY_VARIABLE, Benchmark
from tuner.deploy.chosen import Chosen
from tuner.deploy.machines import Output, Wishes
from tuner.deploy.render import OutFile, render
from tuner.wording import candidate_text, number

BENCHMARK_FILE = "benchmark.json"
_FIGURES = (
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "itl_p99_ms",
    "e2e_p50_ms",
    "e2e_p99_ms",
    "output_tokens_per_s",
    "output_tokens_per_s_per_gpu",
    "requests_per_s",
    "goodput_rps",
    "cost_per_million_output_tokens",
)
_HARDWARE = {
    "cpu_model": "CPU",
    "gpu_model": "GPU",
    "nodes": "nodes",
    "cores": "cores",
    "python": "Python",
    "ray": "Ray",
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A row of the table of figures; `interval` is empty where nothing says how much it varies."""

    name: str
    value: str
    unit: str
    interval: str = ""


def benchmark_of(chosen: Chosen) -> Benchmark:
    """The measurement of `chosen`, to be repeated."""
    from tuner.wiring import make_rule

    problem, metrics = chosen.problem, chosen.measurement.metrics
    return Benchmark(
        study=chosen.study,
        trial=chosen.trial.number,
        model_name=problem.model.name,
        vocab_size=problem.model.vocab_size,
        workload=problem.workload,
        load=chosen.load,
        rule=make_rule(chosen.file),
        slos=problem.slos,
        devices=metrics.devices,
        price_per_hour=metrics.price_per_hour,
        seed=chosen.file.seed + chosen.trial.number,
        limit_s=chosen.file.limits.measure_s,
        emulated=chosen.measurement.emulated,
        measured=dict(metrics.flat()),
    )


def readme(chosen: Chosen, output: Output, wishes: Wishes) -> OutFile:
    """README.md."""
    measurement = chosen.measurement
    metrics = measurement.metrics
    figures = list(_figures(chosen))
    text = render(
        "README.md.j2",
        title=wishes.title,
        emulated_note=EMULATED_NOTE if measurement.emulated else "",
        trial=chosen.trial.number,
        study=chosen.study,
        rule=chosen.rule,
        measured_on=f"{chosen.trial.ended_at:%Y-%m-%d}" if chosen.trial.ended_at else "on an unknown day",
        missed=_missed(chosen),
        configuration=candidate_text(chosen.candidate),
        load=str(chosen.load),
        workload=workload_text(chosen.problem.workload),
        engine=measurement.environment.get("engine_version", chosen.config.engine),
        devices=_devices(chosen),
        hardware=[
            (_HARDWARE[key], measurement.environment[key]) for key in _HARDWARE if key in measurement.environment
        ],
        figures=figures,
        has_intervals=any(figure.interval for figure in figures),
        requests=metrics.requests,
        errors=metrics.errors,
        lateness=number(measurement.client_lateness_ms),
        start=output.start,
        endpoint=output.endpoint,
        model_name=chosen.problem.model.name,
        notes=(*output.notes, _key_note(chosen)),
        bench=shlex.join(["tuner", "bench", BENCHMARK_FILE, "--url", output.endpoint]),
        differences=[(part.name, part.differences) for part in output.parts if part.differences],
        platform_notes=output.platform_notes,
    )
    return OutFile(path="README.md", text=text)


def _key_note(chosen: Chosen) -> str:
    """How to ask clients for a key: by the variables through which the measured processes got theirs."""
    redacted = {key for p in chosen.processes.values() for key, value in p.env.items() if value == REDACTED}
    names = " and ".join(sorted({API_KEY_VARIABLE, *redacted}))
    return (
        f"No API key is written here. Clients must send one as a bearer token where {names} hold it in the environment "
        f"of the processes (in containers, from a secret of yours); the benchmark takes it from {API_KEY_VARIABLE}."
    )


def _figures(chosen: Chosen) -> Iterator[Figure]:
    problem = chosen.problem
    asked = (*(o.metric for o in problem.objectives), *(slo.metric for slo in problem.slos))
    flat = chosen.measurement.metrics.flat()
    for name in dict.fromkeys((*asked, *_FIGURES)):
        if name in flat:
            interval = chosen.intervals.get(name)
            text = "" if interval is None else _interval(interval)
            yield Figure(name=name, value=number(flat[name]), unit=METRICS[name].unit, interval=text)


def _interval(interval: Interval) -> str:
    """The ends, and what they rest on."""
    basis = f"{interval.runs} runs" if interval.basis is Basis.REPEATS else f"{interval.basis}, {interval.runs} run"
    return f"{number(interval.low)} to {number(interval.high)} ({basis})"


def _missed(chosen: Chosen) -> str:
    flat = chosen.measurement.metrics.flat()
    return ", ".join(
        f"{slo.metric}={number(flat[slo.metric])} (SLO {number(slo.threshold)})"
        for slo in chosen.problem.slos
        if slo.metric in flat and slo.violation(flat[slo.metric]) > 0
    )


def workload_text(workload: Workload) -> str:
    """Lengths, and where the requests come from."""
    trace, talk = workload.trace, workload.conversation
    if trace is not None:
        return (
            f"{trace.requests} requests of the trace {Path(trace.file).name}, about {workload.isl.mean} tokens in each"
        )
    if talk is not None:
        turns = f"conversations of {_length(talk.turns)} turns, {talk.think_time_s:g} s between them"
        return f"{turns}; {_length(talk.new_isl)} new tokens in, {_length(talk.osl)} out, {workload.arrival}"
    shared = f", {workload.shared_prefix:.0%} of the input shared" if workload.shared_prefix else ""
    return f"{_length(workload.isl)} tokens in, {_length(workload.osl)} out, {workload.arrival}{shared}"


def _length(length: Length) -> str:
    return str(length.mean) if length.spread == 0 else f"{length.shortest} to {length.longest}"


def _devices(chosen: Chosen) -> str:
    pools = chosen.config.pools
    problem = chosen.problem
    return " + ".join(
        f"{pool.devices} x {problem.node_pool(pool.node_pool).device.name} ({pool.role}, node pool {pool.node_pool})"
        for pool in pools
    )
