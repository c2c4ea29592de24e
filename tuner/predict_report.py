"""How predictions are shown: as text with tables, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from tuner.wording import candidate_json, candidate_text, metric_label, number

if TYPE_CHECKING:
    from rich.console import Console

    from perf_model.accounts import Account, RoleAccount
    from search_spaces.outcome import Prediction
    from tuner.prediction import Forecast, Outlook

GIB = 2.0**30
STATISTICS = ("mean", "p50", "p90", "p99")
OPERATIONS = 12
"""Operations shown by name; the shortest ones are added up."""


def show(outlook: Outlook, console: Console) -> None:
    """Print `outlook`."""
    problem = outlook.problem
    workload = problem.workload
    nodes = ", ".join(
        f"{pool.name}: {pool.nodes} x {pool.devices_per_node} {pool.device.name}" for pool in problem.node_pools
    )
    console.print(f"PREDICTED, nothing was measured: {problem.model.name} on {nodes}")
    console.print(f"  ISL {workload.isl.mean}, OSL {workload.osl.mean} tokens, {workload.arrival} arrivals")
    for note in outlook.notes:
        console.print(f"  {note}", soft_wrap=True)
    for forecast in outlook.defaults:
        _show_forecast(forecast, console)
    if outlook.best:
        _show_best(outlook, console)
        _show_forecast(outlook.best[0], console)
    elif outlook.sampled:
        console.print(
            f"\nOf {outlook.sampled:,} configurations predicted, {outlook.runnable:,} fit and none is predicted to "
            "meet the SLOs; loosen them, lower the load or give more devices."
        )


def _show_forecast(forecast: Forecast, console: Console) -> None:
    console.print(f"\n{forecast.title}: {candidate_text(forecast.candidate)}", soft_wrap=True)
    for tp, reason in forecast.too_small.items():
        console.print(f"  tp={tp} does not fit: {reason}", soft_wrap=True)
    if forecast.account is None:
        console.print(f"  DOES NOT FIT: {forecast.prediction.infeasible}", soft_wrap=True)
        return
    console.print(_latencies(forecast.prediction))
    for line in _figures(forecast):
        console.print(f"  {line}", soft_wrap=True)
    for role in forecast.account.roles:
        console.print(f"  {_memory(role)}", soft_wrap=True)
    for role in forecast.account.roles:
        console.print(_operations(role))
        console.print(f"  {_origins(role)}", soft_wrap=True)
    console.print(f"  {forecast.account.sentence}", soft_wrap=True)


def _latencies(prediction: Prediction) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 2))
    table.add_column("predicted")
    for column in (*STATISTICS, "+-"):
        table.add_column(column, justify="right")
    for name in ("ttft", "tpot", "e2e"):
        values = [f"{number(prediction.metrics[f'{name}_{s}_ms'])} ms" for s in STATISTICS]
        table.add_row(name.upper(), *values, _doubt(prediction, f"{name}_mean_ms"))
    return table


def _doubt(prediction: Prediction, metric: str) -> str:
    """One standard deviation of the logarithm, as the share by which the figure may be above."""
    return f"{math.expm1(prediction.log_stddev.get(metric, 0.0)):.0%}"


def _figures(forecast: Forecast) -> list[str]:
    prediction, values = forecast.prediction, forecast.prediction.metrics
    rate = "output_tokens_per_s_per_gpu"
    lines = [f"throughput {number(values[rate])} tokens/s per device (+- {_doubt(prediction, rate)})"]
    lines[0] += f", {number(values['requests_per_s'])} requests/s on {number(values['devices'])} devices"
    cost = values.get("cost_per_million_output_tokens")
    priced = "unknown: the node pools have no price_per_hour" if cost is None else f"${number(cost)}"
    lines.append(f"cost of a million output tokens {priced}")
    lines.append(f"predicted {'to meet' if forecast.meets_slos else 'NOT to meet'} every hard SLO of the study")
    return lines


def _memory(role: RoleAccount) -> str:
    free = role.capacity_bytes - role.weight_bytes - role.kv_bytes - role.activation_bytes - role.reserve_bytes
    return (
        f"memory of a {role.role} rank: weights {_gib(role.weight_bytes)}, KV cache {_gib(role.kv_bytes)}, activations "
        f"{_gib(role.activation_bytes)}, reserve {_gib(role.reserve_bytes)}, free {_gib(free)} of "
        f"{_gib(role.capacity_bytes)} GiB; {role.most_sequences:,.0f} sequences of full length fit"
    )


def _gib(size: float) -> str:
    return number(size / GIB)


def _operations(role: RoleAccount) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 2))
    table.add_column(f"operation ({role.role})")
    steps = {"a prompt's prefill step": role.prefill_ms, f"decode step of {role.decode_seqs:.0f}": role.decode_ms}
    shown = {title: parts for title, parts in steps.items() if parts}
    for title in shown:
        table.add_column(title, justify="right")
    totals = {title: sum(parts.values()) for title, parts in shown.items()}
    names = _longest({name for parts in shown.values() for name in parts}, shown, totals)
    for name in names:
        table.add_row(name, *(_part(parts.get(name), totals[title]) for title, parts in shown.items()))
    rest = {title: sum(ms for name, ms in parts.items() if name not in names) for title, parts in shown.items()}
    if any(rest.values()):
        table.add_row("others", *(_part(rest[title], totals[title]) for title in shown))
    table.add_row("whole step", *(f"{number(total)} ms" for total in totals.values()))
    return table


def _longest(names: set[str], steps: Mapping[str, Mapping[str, float]], totals: Mapping[str, float]) -> list[str]:
    def share(name: str) -> float:
        return sum(parts.get(name, 0.0) / totals[title] for title, parts in steps.items())

    return sorted(names, key=share, reverse=True)[:OPERATIONS]


def _part(ms: float | None, total: float) -> str:
    return "" if ms is None else f"{_signed(ms)} ms {ms / total:4.0%}"


def _signed(ms: float) -> str:
    return f"-{number(-ms)}" if ms < 0 else number(ms)


def _origins(role: RoleAccount) -> str:
    shares = ", ".join(f"{share:.0%} {origin}" for origin, share in role.origins.items())
    return f"time of the {role.role} steps: {shares}"


def _show_best(outlook: Outlook, console: Console) -> None:
    count = len(outlook.best)
    console.print(
        f"\nBest {count} of {outlook.sampled:,} configurations predicted ({outlook.runnable:,} fit), on the predicted "
        f"front, by {metric_label(outlook.problem.objectives[0].metric)}:"
    )
    table = Table(box=None, padding=(0, 2, 0, 2))
    objectives = [objective.metric for objective in outlook.problem.objectives]
    table.add_column("#", justify="right")
    for metric in objectives:
        table.add_column(metric, justify="right", no_wrap=True)
    for rank, forecast in enumerate(outlook.best, start=1):
        values = forecast.prediction.metrics
        table.add_row(str(rank), *(f"{number(values[m])} +-{_doubt(forecast.prediction, m)}" for m in objectives))
    console.print(table)
    for rank, forecast in enumerate(outlook.best, start=1):
        engine, what = forecast.candidate.config.engine, candidate_text(forecast.candidate)
        console.print(f"  {rank}: {engine} {what}", soft_wrap=True)


def outlook_json(outlook: Outlook) -> dict[str, object]:
    """`outlook` as plain JSON."""
    return {
        "predicted": True,
        "study": outlook.study,
        "model": outlook.problem.model.name,
        "calibration": outlook.calibration,
        "notes": list(outlook.notes),
        "configurations_predicted": outlook.sampled,
        "configurations_that_fit": outlook.runnable,
        "defaults": [forecast_json(forecast) for forecast in outlook.defaults],
        "best": [forecast_json(forecast) for forecast in outlook.best],
    }


def forecast_json(forecast: Forecast) -> dict[str, object]:
    """One forecast as plain JSON."""
    prediction = forecast.prediction
    return {
        "title": forecast.title,
        "candidate": candidate_json(forecast.candidate),
        "fits": prediction.infeasible is None,
        "does_not_fit": prediction.infeasible,
        "too_small": {f"tp={tp}": reason for tp, reason in forecast.too_small.items()},
        "meets_slos": forecast.meets_slos,
        "metrics": dict(prediction.metrics),
        "log_stddev": dict(prediction.log_stddev),
        "bottleneck": None if forecast.account is None else str(forecast.account.bottleneck),
        "sentence": None if forecast.account is None else forecast.account.sentence,
        "roles": [] if forecast.account is None else _roles_json(forecast.account),
    }


def _roles_json(account: Account) -> list[dict[str, object]]:
    return [
        {
            "role": str(role.role),
            "prefill_step_ms": dict(role.prefill_ms),
            "decode_step_ms": dict(role.decode_ms),
            "decode_sequences": role.decode_seqs,
            "time_from": {str(origin): share for origin, share in role.origins.items()},
            "memory_bytes": {
                "weights": role.weight_bytes,
                "kv_cache": role.kv_bytes,
                "activations": role.activation_bytes,
                "reserve": role.reserve_bytes,
                "capacity": role.capacity_bytes,
            },
            "most_sequences": role.most_sequences,
        }
        for role in account.roles
    ]
