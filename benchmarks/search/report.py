"""The figures of a benchmark run: medians, what was asked of the search, and tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.search.figures import EARLY, TARGETS, Run
from benchmarks.search.jobs import AT_ONCE, GP, HINDSIGHT, MODEL, NSGA2, OURS, RANDOM, TPE, Result

ORACLE = "perfect model"
"""A search that knows every answer, greedy by hypervolume."""
SAMPLERS = (RANDOM, NSGA2, TPE, GP)


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """What was asked, what was found, and whether it is met: `least` <= `value` <= `limit`."""

    criterion: str
    value: float
    limit: float
    least: float = 0.0

    @property
    def met(self) -> bool:
        """True where it is met."""
        return self.least <= self.value <= self.limit


@dataclass(frozen=True, kw_only=True)
class Medians:
    """Medians over tables and seeds of one searcher; `unreached` is the share of runs that ended before a target."""

    needed: tuple[float, ...]
    early_regret: float
    seeds: int
    seconds: float
    unreached: tuple[float, ...]


def medians(results: Sequence[Result]) -> Medians:
    """Medians of the results of one searcher."""
    runs = [result.run for result in results]
    needed = np.array([run.needed for run in runs], float)
    return Medians(
        needed=tuple(np.median(needed, axis=0).tolist()),
        early_regret=float(np.median([run.early_regret for run in runs])),
        seeds=len({result.seed for result in results}),
        seconds=round(sum(result.seconds for result in results), 1),
        unreached=tuple((1.0 - np.array([run.reached for run in runs]).mean(axis=0)).tolist()),
    )


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that is reported. `facts` are lines that say how it came about."""

    facts: tuple[str, ...]
    sizes: Mapping[str, int]
    results: tuple[Result, ...]

    @property
    def by_searcher(self) -> dict[str, list[Result]]:
        """Results of each searcher, ours first."""
        found: dict[str, list[Result]] = {name: [] for name in (*AT_ONCE, MODEL, *SAMPLERS, HINDSIGHT, ORACLE)}
        for result in self.results:
            found[result.searcher].append(result)
        return {name: results for name, results in found.items() if results}

    @property
    def medians(self) -> dict[str, Medians]:
        """Medians over all tables and seeds, of the searchers that have run on every table."""
        return {name: medians(results) for name, results in self.by_searcher.items() if not self._missing(name)}

    def _missing(self, searcher: str) -> list[str]:
        """Tables on which a searcher has not run."""
        return [table for table in self.sizes if not self.of_table(table, searcher)]

    def of_table(self, table: str, searcher: str) -> list[Result]:
        """Results of a searcher on a table."""
        return [r for r in self.by_searcher.get(searcher, []) if r.table == table]

    def paired(self, target: int) -> dict[str, float]:
        """Median over the tables that both have of (median of ours / median of another searcher) to TARGETS[target]."""
        tables = {name: self._missing(name) for name in self.by_searcher if name != OURS}
        return {
            name: float(np.median([self._ratio(table, name, target) for table in self.sizes if table not in missing]))
            for name, missing in tables.items()
            if not self._missing(OURS)
        }

    def _ratio(self, table: str, other: str, target: int) -> float:
        ours, theirs = (medians(self.of_table(table, name)).needed[target] for name in (OURS, other))
        return ours / theirs

    @property
    def criteria(self) -> list[Criterion]:
        """What the issue asks, and what was found."""
        all_medians = self.medians
        if OURS not in all_medians:
            return []
        mine = all_medians[OURS]
        others = {name: all_medians[name] for name in SAMPLERS if name in all_medians}
        found = []
        if NSGA2 in others:
            ratio = mine.needed[0] / others[NSGA2].needed[0]
            found.append(Criterion(criterion="to 95%: ours / NSGA-II alone", value=ratio, limit=1 / 5))
        for target, limit in ((0, 1 / 2), (1, 1 / 3)) if others else ():
            name = min(others, key=lambda other, at=target: others[other].needed[at])
            ratio = mine.needed[target] / others[name].needed[target]
            text = f"to {TARGETS[target]:.0%}: ours / best other sampler ({name})"
            found.append(Criterion(criterion=text, value=ratio, limit=limit))
        text = f"regret after {EARLY} measurements"
        return [*found, Criterion(criterion=text, value=mine.early_regret, limit=0.05), *self._forecasts()]

    def _forecasts(self) -> list[Criterion]:
        runs: list[Run] = [result.run for result in self.by_searcher[OURS]]
        late = [run.forecasts[EARLY:] for run in runs if len(run.forecasts) > EARLY]
        if not late:
            return []
        errors = np.median([np.median([f.error[:2] for f in run], axis=0) for run in late], axis=0)
        covered = float(np.mean(np.concatenate([f.covered for run in late for f in run])))
        text = f"one-step-ahead error after {EARLY} measurements"
        return [
            Criterion(criterion=f"TPOT, {text}", value=float(errors[1]), limit=0.08),
            Criterion(criterion=f"TTFT, {text}", value=float(errors[0]), limit=0.20),
            Criterion(criterion="coverage of 90% intervals", value=covered, limit=0.95, least=0.85),
        ]

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "facts": list(self.facts),
            "tables": {
                table: {"candidates": size}
                | {name: _needed(medians(found)) for name in self.by_searcher if (found := self.of_table(table, name))}
                for table, size in self.sizes.items()
            },
            "medians": {
                name: _needed(found)
                | {"seeds": found.seeds, "seconds": found.seconds, "ended_early": list(found.unreached)}
                for name, found in self.medians.items()
            },
            "criteria": [
                {"criterion": c.criterion, "value": c.value, "least": c.least, "limit": c.limit, "met": c.met}
                for c in self.criteria
            ],
            "paired": {f"{target:.0%}": self.paired(at) for at, target in enumerate(TARGETS)},
        }

    def show(self, console: Console) -> None:
        """Print the tables for people."""
        for fact in self.facts:
            console.print(f"- {fact}", highlight=False, soft_wrap=True)
        names = list(self.by_searcher)
        title = "Measurements to 95% / 99% of the table's hypervolume (medians over seeds)"
        columns = RichTable("table", "candidates", *names, title=title)
        for table, size in self.sizes.items():
            columns.add_row(table, str(size), *[_cell(self.of_table(table, name)) for name in names])
        whole = self.medians
        columns.add_row("median", "", *[_cell(self.by_searcher[name]) if name in whole else "-" for name in names])
        regrets = [f"{whole[name].early_regret:.1%}" if name in whole else "-" for name in names]
        columns.add_row(f"missed after {EARLY}", "", *regrets)
        columns.add_row("seeds", "", *[str(len({r.seed for r in self.by_searcher[name]})) for name in names])
        console.print(columns)
        verdicts = RichTable("criterion", "value", "asked", "met")
        for item in self.criteria:
            asked = f"{item.least:.2f} to {item.limit:.2f}" if item.least else f"at most {item.limit:.2f}"
            verdicts.add_row(item.criterion, f"{item.value:.3f}", asked, "yes" if item.met else "NO")
        console.print(verdicts)
        for at, target in enumerate(TARGETS):
            ratios = ", ".join(
                f"{name} {value:.2f} ({len(self.sizes) - len(self._missing(name))} tables)"
                for name, value in self.paired(at).items()
            )
            console.print(f"Paired, median over tables of ours / other to {target:.0%}: {ratios}", highlight=False)


def _needed(found: Medians) -> dict[str, object]:
    values = {f"to_{target:.0%}": value for target, value in zip(TARGETS, found.needed, strict=True)}
    return values | {f"missed_after_{EARLY}": found.early_regret}


def _cell(results: Sequence[Result]) -> str:
    if not results:
        return "-"
    found = medians(results)
    return " / ".join(
        f"{'>=' if late >= 0.5 else ''}{value:g}" for value, late in zip(found.needed, found.unreached, strict=True)
    )
