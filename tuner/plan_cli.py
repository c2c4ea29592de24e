"""`tuner plan`: replicas, nodes and money for a demand, from what a study measured."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from search_spaces.errors import InvalidValueError, TunerError
from search_spaces.metrics import METRICS, Direction
from tuner.cli_options import AsJson, StorageOption

if TYPE_CHECKING:
    from rich.console import RenderableType

    from search_spaces.serving import Candidate
    from search_spaces.slos import Slo
    from studies.records import TrialRecord
    from tuner.plan import Demand, Plan, Stock
    from tuner.plan_units import Offer, Scaling
    from tuner.study_schema import StudyFile

PLACES = {"s": 1.0, "min": 60.0, "h": 3600.0}
NOT_MET = 1
"""Exit code of a plan that does not meet the demand."""


class NothingToPlanError(TunerError):
    """A study has no deployment that a plan could use."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan with what it was made from."""

    study: str
    plan: Plan
    demand: Demand
    offers: Mapping[str, Offer]
    scaling: Scaling
    slos: tuple[Slo, ...]
    pricing: str


def plan_command(  # noqa: PLR0913, PLR0917 - a parameter is an option of the command
    name: Annotated[str, typer.Argument(help="Name of a study.")],
    rate: Annotated[str | None, typer.Option("--rate", help="Requests to serve, such as 120/s or 5000/min.")] = None,
    users: Annotated[float | None, typer.Option("--users", min=0, help="Requests in flight to serve.")] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="Devices that replicas may take; alone: serve the most.")
    ] = None,
    pools: Annotated[
        list[str] | None,
        typer.Option("--pool", help="A node pool to use, with its nodes: h200=10. All, without limit, by default."),
    ] = None,
    headroom: Annotated[float, typer.Option("--headroom", min=0, help="Share on top of the demand.")] = 0.0,
    pricing: Annotated[
        Literal["on_demand", "spot", "reserved"] | None,
        typer.Option("--pricing", help="Which prices of the study file count; its own choice by default."),
    ] = None,
    slos: Annotated[
        list[str] | None, typer.Option("--slo", help="Change an SLO: METRIC=THRESHOLD, METRIC=none.")
    ] = None,
    predicted: Annotated[
        int, typer.Option("--predicted", min=0, help="Configurations of the space to predict beside measured ones.")
    ] = 0,
    storage: StorageOption = None,
    as_json: AsJson = False,
) -> None:
    """Plan capacity from the measured deployments of a study: copies, nodes, cost, headroom and latencies."""
    from tuner.places import existing_place
    from tuner.plan import Demand
    from tuner.score_cli import with_slos
    from tuner.stored import history_of

    place = existing_place(storage)
    history = history_of(place, name)
    file = priced(with_slos(history, place, slos or []), pricing)
    wanted = Demand(rate=parse_rate(rate), users=users, devices=gpus, headroom=headroom)
    made = make_plan(name, file, history.trials(), wanted, pools or [], predicted)
    if as_json:
        print(json.dumps(planned_json(made), indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        console = Console(markup=False, highlight=False)
        for part in shown(made):
            console.print(part)
    if not made.plan.met:
        raise typer.Exit(NOT_MET)


def parse_rate(text: str | None) -> float | None:
    """Requests per second of `text`, such as 120, 120/s, 5000/min or 1e5/h."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(?:/\s*(s|min|h))?\s*", text)
    if found is None:
        raise InvalidValueError(f"--rate {text!r} is no rate; write such as 120/s, 5000/min or 1e5/h")
    return float(found[1]) / PLACES[found[2] or "s"]


def priced(file: StudyFile, pricing: str | None) -> StudyFile:
    """`file` with the prices of `pricing`; raises `InvalidValueError` for a pool that has no such price."""
    if pricing is None:
        return file
    pools = {name: pool.model_copy(update={"pricing": pricing}) for name, pool in file.node_pools.items()}
    missing = [name for name, pool in pools.items() if pool.price is None]
    if missing:
        raise InvalidValueError(
            f"node pool {missing[0]} has no {pricing}_price_per_hour; the study file would have to give it"
        )
    return file.model_copy(update={"node_pools": pools})


def make_plan(
    name: str, file: StudyFile, trials: Sequence[TrialRecord], demand: Demand, pools: Sequence[str], predicted: int
) -> Planned:
    """The plan for `demand`; raises `NothingToPlanError` where no deployment meets the SLOs."""
    from tuner.plan import plan
    from tuner.plan_units import measured_offers, predicted_offers, scaling
    from tuner.wiring import make_problem

    slos = make_problem(file).slos
    offers = measured_offers(trials, slos)
    if predicted:
        offers += predicted_offers(_predictions(file, trials, predicted), slos)
    if not offers:
        raise NothingToPlanError(_nothing(name, trials, slos))
    found = scaling(trials)
    made = plan([o.unit for o in offers], _stocks(file, pools), demand, efficiency=found.efficiency)
    return Planned(
        study=name,
        plan=made,
        demand=demand,
        offers={offer.unit.name: offer for offer in offers},
        scaling=found,
        slos=slos,
        pricing=", ".join(sorted({pool.pricing for pool in file.node_pools.values()})),
    )


def _stocks(file: StudyFile, pools: Sequence[str]) -> list[Stock]:
    """The node pools that `pools` (`name` or `name=nodes`) name; all of the study without limit by default."""
    from tuner.plan import Stock

    limits: dict[str, int | None] = {}
    for text in pools:
        name, equals, nodes = text.partition("=")
        if name not in file.node_pools:
            raise InvalidValueError(f"--pool {text}: {name!r} is no node pool; choose {', '.join(file.node_pools)}")
        if equals and not nodes.isdigit():
            raise InvalidValueError(f"--pool {text}: {nodes!r} is no number of nodes; write such as {name}=10")
        limits[name] = int(nodes) if equals else None
    return [
        Stock(
            pool=name,
            devices_per_node=pool.devices_per_node,
            nodes=limits.get(name),
            price_per_hour=pool.price or 0.0,
        )
        for name, pool in file.node_pools.items()
        if not limits or name in limits
    ]


def _nothing(name: str, trials: Sequence[TrialRecord], slos: Sequence[Slo]) -> str:
    from tuner.plan_units import nearest_miss

    nearest = nearest_miss(trials, slos)
    if nearest is None:
        return f"study {name} has no measured configuration yet; run it first"
    trial, missed = nearest
    by = ", ".join(f"{metric} by {excess:.0%}" for metric, excess in missed.items())
    return (
        f"no measured configuration of study {name} meets its SLOs; nearest is trial {trial.number}, which misses {by}"
        "; search further, or plan under other SLOs with --slo METRIC=THRESHOLD"
    )


def _predictions(
    file: StudyFile, trials: Sequence[TrialRecord], count: int
) -> list[tuple[Candidate, Mapping[str, float]]]:
    """What the study's model, corrected by its measurements, predicts of `count` configurations not yet measured."""
    from search_spaces.rules import infeasibility
    from tuner.prediction import problem_of
    from tuner.wiring import make_predictor, make_space

    problem, _ = problem_of(file)
    space = make_space(file, problem)
    known = [(t.candidate, t.measurement.metrics.flat()) for t in trials if t.candidate and t.measurement]
    seen = {candidate.key for candidate, _ in known}
    rng = random.Random(file.seed)  # noqa: S311 - a sample of configurations, no secret
    drawn = dict.fromkeys(space.sample(rng) for _ in range(count))
    new = [c for c in drawn if c.key not in seen and infeasibility(c, problem) is None]
    answers = make_predictor(problem, file).learned(known).predict(new)
    return [(c, p.metrics) for c, p in zip(new, answers, strict=True) if p.infeasible is None]


def shown(made: Planned) -> list[RenderableType]:
    """The plan for people."""
    from rich.text import Text

    head = [Text(_title(made), style="bold"), _table(made), *map(Text, _totals(made))]
    return [*head, Text("It holds that:"), *(Text(f"  - {line}") for line in assumptions(made))]


def _title(made: Planned) -> str:
    from tuner.wording import number

    demand = made.demand
    asked = [f"{number(demand.rate)} requests/s"] if demand.rate is not None else []
    asked += [f"{number(demand.users)} requests in flight"] if demand.users is not None else []
    asked += ["the most"] if demand.open_ended else []
    within = f" on at most {demand.devices} devices" if demand.devices is not None else ""
    above = f", {demand.headroom:.0%} headroom" if demand.headroom else ""
    verdict = "" if made.plan.met else " - CANNOT BE MET, this is the nearest that can be"
    return f"Plan of {made.study} for {' and '.join(asked)}{within}{above}{verdict}"


def _table(made: Planned) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from tuner.report import metric_heading
    from tuner.wording import candidate_text, number

    table = Table(box=box.SIMPLE_HEAD)
    metrics = told_metrics(made)
    for title in ("part", "copies", "from", "requests/s\neach", *(metric_heading(name, 8) for name in metrics)):
        table.add_column(title, justify="right", overflow="fold")
    for index, (unit, copies) in enumerate(made.plan.copies, start=1):
        figures = (number(unit.metrics[name]) if name in unit.metrics else "-" for name in metrics)
        table.add_row(str(index), str(copies), _source(made.offers[unit.name]), number(unit.rate), *figures)
    offers = [made.offers[unit.name] for unit, _ in made.plan.copies]
    texts = [Text(f"  {i:>4}  {candidate_text(offer.candidate)}") for i, offer in enumerate(offers, start=1)]
    return Group(table, *texts, Text())


def _source(offer: Offer) -> str:
    if offer.unit.predicted:
        return "PREDICTED"
    return f"trial {offer.unit.name}{', EMULATED' if offer.emulated else ''}"


def told_metrics(made: Planned) -> tuple[str, ...]:
    """Latencies to expect: those of the SLOs, then the medians."""
    latencies = [slo.metric for slo in made.slos if slo.metric.split("_")[0] in {"ttft", "tpot", "itl", "e2e"}]
    return tuple(dict.fromkeys((*latencies, "ttft_p50_ms", "tpot_p50_ms")))


def worst(made: Planned) -> dict[str, float]:
    """Of each latency the worst over the parts of the plan: a percentile of them all together is at most that."""
    pick = {Direction.MINIMIZE: max, Direction.MAXIMIZE: min}
    return {
        name: pick[METRICS[name].direction](unit.metrics[name] for unit, _ in made.plan.copies)
        for name in told_metrics(made)
        if made.plan.copies and all(name in unit.metrics for unit, _ in made.plan.copies)
    }


def spare(made: Planned) -> float | None:
    """What the plan serves beyond the demand itself, as a share of it; negative where it falls short."""
    if made.plan.served_share is None:
        return None
    return made.plan.served_share * (1 + made.demand.headroom) - 1


def _totals(made: Planned) -> list[str]:
    from tuner.wording import number

    plan = made.plan
    nodes = ", ".join(f"{count} x {pool}" for pool, count in plan.nodes.items()) or "none"
    cost = "cost unknown: a node pool has no price"
    if plan.cost_per_hour is not None:
        cost = f"${plan.cost_per_hour:,.2f} an hour, ${plan.cost_per_hour * 730:,.0f} a month ({made.pricing})"
    left = spare(made)
    beyond = "" if left is None else f", {abs(left):.0%} {'above' if left >= 0 else 'short of'} the demand"
    latencies = ", ".join(f"{name} at most {number(value)}" for name, value in worst(made).items())
    return [
        f"nodes      {nodes}; replicas take {plan.devices} devices",
        f"serves     {number(plan.rate)} requests/s with {number(plan.users)} in flight{beyond}",
        f"cost       {cost}",
        f"latencies  {latencies or 'unknown'}",
    ]


def assumptions(made: Planned) -> list[str]:
    """What must hold for the plan to come true."""
    plan = made.plan
    if made.scaling.pairs:
        scale = f"each copy counts for {made.scaling.efficiency:.0%} of one alone, as {made.scaling.pairs} measured "
        scale += "pairs of configurations with fewer and more replicas show"
    else:
        scale = "copies scale linearly; the study measured no configuration with more replicas that could say otherwise"
    lines = [
        scale,
        "each copy gets requests in proportion to its rate, so that it runs under the load that it was measured with",
        "nodes are rented whole",
    ]
    counted = [pool for pool, exact in plan.exact_packing.items() if not exact]
    if counted:
        lines.append(
            f"on {', '.join(counted)} devices were counted, not packed into nodes: it may take some more nodes"
        )
    if plan.gap:
        lines.append(f"a plan up to {plan.gap:.2%} better may exist: the solver stopped at its time limit")
    if any(unit.predicted for unit, _ in plan.copies):
        lines.append("PREDICTED parts come true as predicted: measure them before you rely on them")
    if any(made.offers[unit.name].emulated for unit, _ in plan.copies):
        lines.append("EMULATED parts were not measured on the hardware that they name")
    return lines


def planned_json(made: Planned) -> dict[str, object]:
    """The plan for programs."""
    from tuner.wording import candidate_json

    plan = made.plan
    return {
        "study": made.study,
        "met": plan.met,
        "served_share": plan.served_share,
        "demand": {
            "rate": made.demand.rate,
            "users": made.demand.users,
            "devices": made.demand.devices,
            "headroom": made.demand.headroom,
        },
        "nodes": dict(plan.nodes),
        "devices": plan.devices,
        "rate": plan.rate,
        "users": plan.users,
        "cost_per_hour": plan.cost_per_hour,
        "pricing": made.pricing,
        "gap": plan.gap,
        "scaling": {"efficiency": made.scaling.efficiency, "measured_pairs": made.scaling.pairs},
        "latencies_at_most": worst(made),
        "assumptions": assumptions(made),
        "parts": [
            {
                "copies": copies,
                "trial": None if unit.predicted else int(unit.name),
                "predicted": unit.predicted,
                "emulated": made.offers[unit.name].emulated,
                "runs": made.offers[unit.name].runs,
                "rate": unit.rate,
                "users": unit.users,
                "devices": unit.devices,
                "metrics": dict(unit.metrics),
                "configuration": candidate_json(made.offers[unit.name].candidate),
            }
            for unit, copies in plan.copies
        ],
    }
