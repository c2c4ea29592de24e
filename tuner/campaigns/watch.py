"""When the ground moves: what was measured with another engine, driver or node, and nodes that differ from the others.

The best configuration of a study is measured once more where a later trial shows another engine version, driver or kind
of node than the one it was measured with, or where that is asked for every so often. Its new figures are compared with
the old ones by the study's own noise (`studies.noise`): within it nothing changes; beyond it the cell gets a new study,
a generation later, since figures of before and after do not compare.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from search_spaces.outcome import Outcome
from studies.noise import Noise, noise_of
from studies.records import TrialRecord, TrialStatus
from studies.repeats import Runs, control_of, runs_by_key
from tuner.campaigns.standing import Standing

LEVEL, NODE_LEVEL = 0.95, 0.99
"""Confidence of a verdict on a study, and on a node, over all metrics that it looks at together."""
UNKNOWN_NOISE = Noise(log_stddev=0.05, degrees=30)
"""Stands for the noise of a study that has measured nothing twice; whoever uses it says so."""
FACTS = ("engine_version", "gpu_driver", "gpu_model", "cpu_model")
"""What of a trial's environment must be the same for figures to compare."""
NEW_NODES = 3
"""Trials in a row on none of the nodes of before, from which on the nodes count as others."""
LEAST_RUNS = 2
"""Control measurements on a node before anything is said of it."""
LEAST_CHANGE = 0.02
"""Nodes that differ by less than this (logarithm) serve alike, however sure one is that they differ."""
NODE_METRICS = {"tpot_p50_ms": 1, "output_tokens_per_s": -1}
"""By which nodes are compared, and whether more of it is slower (1) or faster (-1)."""


@dataclass(frozen=True, kw_only=True)
class Due:
    """The trial of a study's best configuration that is to be measured again, how many runs it has then, and why."""

    trial: int
    runs: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A metric of a configuration before and after, by how much it differs, and by how much chance alone would."""

    metric: str
    before: float
    after: float
    limit: float
    assumed: bool

    @property
    def change(self) -> float:
        """Relative change."""
        return self.after / self.before - 1.0

    @property
    def is_clear(self) -> bool:
        """True where it is beyond the noise."""
        return abs(math.log(self.after / self.before)) > self.limit

    def __str__(self) -> str:
        noise = "a noise of 5% that was assumed, nothing was repeated" if self.assumed else "the study's noise"
        verdict = "beyond" if self.is_clear else "within"
        return f"{self.metric} {self.change:+.1%}, {verdict} {noise} (±{math.expm1(self.limit):.1%})"


@dataclass(frozen=True, kw_only=True)
class Odd:
    """A node of a pool whose control measurements differ from the others'."""

    host: str
    pool: str
    why: str


def due(standing: Standing, later: Sequence[TrialRecord], *, every_s: float | None, now_s: float) -> Due | None:
    """The check that a study needs; `later` are trials of all studies on its engine and nodes, its own included.

    None where nothing has changed since the last run of its best configuration.
    """
    best = standing.best
    if best is None:
        return None
    runs = [t for t in standing.trials if t.key == best.key and t.status is TrialStatus.MEASURED]
    asked = sum(t.key == best.key and t.retry_of is None for t in standing.trials)
    last = max(runs, key=_end_s)
    changes = changes_since(last, later)
    if changes:
        return Due(trial=best.number, runs=asked + 1, why="; ".join(changes))
    if every_s is not None and now_s - _end_s(last) >= every_s:
        return Due(
            trial=best.number, runs=asked + 1, why=f"it was measured last {(now_s - _end_s(last)) / 3600:.0f} h ago"
        )
    return None


def changes_since(trial: TrialRecord, later: Iterable[TrialRecord]) -> list[str]:
    """What later trials show to be other than when `trial` was measured, as `what: before -> now`."""
    if trial.outcome is None:
        return []
    after = sorted((t for t in later if _end_s(t) > _end_s(trial) and t.outcome and t.outcome.environment), key=_end_s)
    if not after or after[-1].outcome is None:
        return []
    then, now = trial.outcome.environment, after[-1].outcome.environment
    found = [f"{name}: {then[name]} -> {now[name]}" for name in FACTS if _differs(then, now, name)]
    hosts = hosts_of(trial.outcome)
    recent = [hosts_of(t.outcome) for t in after[-NEW_NODES:] if t.outcome]
    if hosts and len(recent) == NEW_NODES and all(seen and not seen & hosts for seen in recent):
        found.append(f"node: {', '.join(sorted(hosts))} -> {', '.join(sorted(recent[-1]))}")
    return found


def _differs(then: Mapping[str, str], now: Mapping[str, str], name: str) -> bool:
    """True where both say it and say other things; of joined lists what is only in one does not count."""
    if name not in then or name not in now:
        return False
    return not set(then[name].split("; ")) & set(now[name].split("; "))


def hosts_of(outcome: Outcome) -> frozenset[str]:
    """Hosts that held replicas of a trial."""
    aside = ("node.router", "node.client")
    found = outcome.environment.items()
    return frozenset(host for name, host in found if name.startswith("node.") and name not in aside)


def verdict(standing: Standing, trial: int) -> tuple[Moved, ...]:
    """How the last run of the candidate of `trial` differs from those before, in every objective.

    The confidence of all together is `LEVEL` (Bonferroni): each is judged by a t test with the study's pooled noise.
    """
    key = standing.trials[trial].key
    runs = sorted((t for t in standing.trials if t.key == key and t.status is TrialStatus.MEASURED), key=_end_s)
    if len(runs) < 2:
        return ()
    before, last = runs[:-1], runs[-1]
    known = runs_by_key([t for t in standing.trials if t.number != last.number]).values()
    metrics = [objective.metric for objective in standing.problem.objectives]
    moved = []
    for metric in metrics:
        old, new = _values(before, metric), _values([last], metric)
        if old and new and min(old) > 0 and new[0] > 0:
            noise = noise_of(known, metric)
            wide = _wide(noise or UNKNOWN_NOISE, LEVEL, len(metrics)) * math.sqrt(1 + 1 / len(old))
            moved.append(
                Moved(metric=metric, before=statistics.fmean(old), after=new[0], limit=wide, assumed=noise is None)
            )
    return tuple(moved)


def odd_nodes(standing: Standing, since_s: float = 0.0) -> tuple[Odd, ...]:
    """Nodes on which the last control measurements of a study differ from those on the others beyond the noise.

    The oddest is named first, and the others are compared without it: beside a slow node every other one would seem
    fast. Of two nodes the slower one is named. Only measurements after `since_s` count, and a control that needs
    several node pools tells of none.
    """
    control, runs = control_of(standing.trials), runs_by_key(standing.trials)
    if control is None or control.candidate is None or control.key is None or control.key not in runs:
        return ()
    pools = {pool.node_pool for pool in control.candidate.config.pools}
    placed = [pair for pair in _placed(runs[control.key].measured) if _end_s(pair[1]) > since_s]
    found: list[Odd] = []
    while len(pools) == 1 and (oddest := _oddest(placed, runs.values())) is not None:
        found.append(Odd(host=oddest.host, pool=min(pools), why=oddest.why))
        placed = [(host, trial) for host, trial in placed if host != oddest.host]
    return tuple(found)


def _placed(controls: Iterable[TrialRecord]) -> list[tuple[str, TrialRecord]]:
    """Controls that ran on one node alone, with its host, in the order of their ends."""
    found = ((hosts_of(trial.outcome), trial) for trial in sorted(controls, key=_end_s) if trial.outcome)
    return [(min(hosts), trial) for hosts, trial in found if len(hosts) == 1]


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """How much slower (logarithm) the last controls on a node are than those on the other nodes, in words too."""

    host: str
    slowness: float
    why: str


def _oddest(placed: Sequence[tuple[str, TrialRecord]], runs: Iterable[Runs]) -> _Difference | None:
    hosts = sorted({host for host, _ in placed})
    clear = [found for host in hosts if (found := _difference(host, placed, runs)) is not None]
    if len(hosts) == 2:
        return max(clear, key=lambda found: found.slowness, default=None)
    return max(clear, key=lambda found: abs(found.slowness), default=None)


def _difference(host: str, placed: Sequence[tuple[str, TrialRecord]], runs: Iterable[Runs]) -> _Difference | None:
    """How the node differs; None where it does not beyond the noise."""
    own = [(name, trial) for name, trial in placed if name == host][-LEAST_RUNS:]
    rest = [(name, trial) for name, trial in placed if name != host]
    for metric, slower in NODE_METRICS.items():
        ours, theirs = (_values([trial for _, trial in group], metric) for group in (own, rest))
        noise = _within([*own, *rest], metric) or noise_of(runs, metric)
        if noise is None or min(len(ours), len(theirs)) < LEAST_RUNS or min(*ours, *theirs) <= 0:
            continue
        change = statistics.fmean(map(math.log, ours)) - statistics.fmean(map(math.log, theirs))
        limit = _wide(noise, NODE_LEVEL, len(NODE_METRICS)) * math.sqrt(1 / len(ours) + 1 / len(theirs))
        if abs(change) > max(limit, LEAST_CHANGE):
            chance = f"by chance ±{math.expm1(limit):.1%}"
            why = f"{metric} of its last controls is {math.expm1(change):+.1%} of the other nodes' ({chance})"
            return _Difference(host=host, slowness=slower * change, why=why)
    return None


def _within(placed: Sequence[tuple[str, TrialRecord]], metric: str) -> Noise | None:
    """Noise of controls on one and the same node, pooled: differences between nodes are not in it."""
    squares, degrees = 0.0, 0
    for host in {name for name, _ in placed}:
        values = _values([trial for name, trial in placed if name == host], metric)
        if len(values) > 1 and min(values) > 0:
            squares += (len(values) - 1) * statistics.variance([math.log(value) for value in values])
            degrees += len(values) - 1
    return Noise(log_stddev=math.sqrt(squares / degrees), degrees=degrees) if degrees else None


def _wide(noise: Noise, level: float, comparisons: int) -> float:
    """Half-width of the difference of single runs: t (two-sided, for so many comparisons) times the noise."""
    t = float(stdtrit(noise.degrees, 1 - (1 - level) / 2 / comparisons))
    return t * noise.log_stddev


def _values(trials: Sequence[TrialRecord], metric: str) -> list[float]:
    flats = (trial.measurement.metrics.flat() for trial in trials if trial.measurement is not None)
    return [flat[metric] for flat in flats if metric in flat]


def _end_s(trial: TrialRecord) -> float:
    return trial.ended_at.timestamp() if trial.ended_at is not None else 0.0
