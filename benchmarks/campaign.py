"""Twelve small studies on one budget: a campaign against the same studies alone with equal shares.

    python benchmarks/campaign.py [--seeds 3] [--hours 7 10 14 20 28 40] [--kills 5] [--searches 1] [--jobs 2]
                                  [--only transfer] [--json]

EMULATED: no figure says anything of a GPU. What is real: campaign file, slices, storage, leases, the search with its
model, screen and NSGA-II, what earlier studies teach, and kill -9. What is not: a trial takes no time. Its outcome, and
the device-hours that it costs, follow from a hidden formula (benchmarks/campaigns/world.py); each seed draws another
world. Three models, two kinds of users and two kinds of nodes make twelve studies whose trials differ in cost by a
factor of ten. Hypervolume is that of the measured candidates without noise, relative to the study's true front.

Each campaign is run to the first budget of `--hours`, then goes on with the next one, and so do the studies alone. The
gain is judged at the last one. Its default, 40 device-hours, is what the studies would take by default: 32 trials each
(`budget.trials` of a study) at 0.106 device-hours, the median over the twelve of what a trial of theirs costs at the
median (0.106, 0.109 and 0.092 in the first three worlds), times twelve is 40.7.

Printed for each world and as medians over worlds:

- the budget: what a campaign spent, relative to it. One that ended before because nothing was left to gain, as it is
  meant to, counts as having met it;
- the gain: mean hypervolume of the twelve after the same device-hours, and the device-hours after which the campaign
  held what the studies alone held then (so many times more hypervolume per device-hour). A second figure is against
  studies alone that end by the rule by which the campaign closes them; by default a study has no such rule;
- the kills, in the first world with the first budget: a campaign killed with -9 again and again, against one that was
  not;
- transfer: measurements to 95% of the final hypervolume for six new studies, with the twelve of the campaign in their
  storage, as they are after the last budget, and without. Final is the larger of the two ends, each after `--trials`
  measurements. Each is searched `--searches` times, with seeds of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process per core
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.campaigns.arms import (
    campaign_arm,
    equal_shares,
    judged_campaign,
    path_of,
    place_at,
    run_alone,
    run_campaign_here,
)
from benchmarks.campaigns.world import Yardstick, campaign_text, keep_models, yardstick
from tuner.campaigns.campaign import load_campaign
from tuner.campaigns.run import NOTHING_LEFT
from tuner.study_schema import StudyFile

TARGET_GAIN, TARGET_TRANSFER, TARGET_BUDGET = 1.5, 0.5, 0.02
HOURS = (7.0, 10.0, 14.0, 20.0, 28.0, 40.0)
ENOUGH = 0.95
"""Share of the final hypervolume that counts as found."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run in one world with one budget."""

    seed: int
    hours: float
    trials: int
    kills: int
    folder: str
    searches: int = 1
    only_transfer: bool = False

    @property
    def home(self) -> Path:
        """Where the world's storages lie."""
        return Path(self.folder) / str(self.seed)

    def file(self, name: str = "twelve", users: Sequence[str] = ("chat", "rag")) -> Path:
        """The campaign file."""
        self.home.mkdir(parents=True, exist_ok=True)
        path = self.home / f"{name}.yaml"
        path.write_text(campaign_text(self.seed, self.hours, name=name, users=users), encoding="utf-8")
        return path


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A campaign and the studies alone in one world.

    `alone_share` is what the studies alone held after `alone_spent`, the last moment at which they had taken no more
    than the campaign: each of twelve studies ends somewhat beyond its share of the budget, and `alone_end` tells of
    that end. `hours_to_closed` and `closed_spent` compare with studies alone that end by the campaign's rule.
    """

    seed: int
    budget: float
    spent: float
    reason: str
    trials: int
    share: float
    alone_spent: float
    alone_share: float
    hours_to_alone: float | None
    alone_end_spent: float
    alone_end_share: float
    alone_end_trials: int
    closed_spent: float
    closed_share: float
    hours_to_closed: float | None

    @property
    def off_budget(self) -> float:
        """How far it ended from its budget, relative to it; an end before, with nothing left to gain, is on it."""
        off = self.spent / self.budget - 1.0
        return max(off, 0.0) if self.reason == NOTHING_LEFT else off

    @property
    def against_closed(self) -> float:
        """As `at_the_same`, against studies alone that end by the campaign's rule."""
        return 0.0 if self.hours_to_closed is None else self.closed_spent / self.hours_to_closed

    @property
    def at_the_end(self) -> float:
        """Hypervolume per device-hour at the end, relative to that of the studies alone."""
        return (self.share / self.spent) / (self.alone_share / self.alone_spent)

    @property
    def at_the_same(self) -> float:
        """Hypervolume per device-hour at the hypervolume that the studies alone held; 0 where it was not met."""
        return 0.0 if self.hours_to_alone is None else self.alone_spent / self.hours_to_alone


@dataclass(frozen=True, kw_only=True)
class Killed:
    """A campaign that was killed, and the same one that was not."""

    seed: int
    kills: int
    over_budget: float
    reason: str
    share: float
    share_of_other: float
    trials: int
    trials_of_other: int
    measured_twice: int
    left_open: int
    same_studies: bool


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A study with earlier ones in its storage, and without: measurements to 95% of the larger end.

    None where it was not there after all `trials` measurements.
    """

    seed: int
    study: str
    trials: int
    taught: int | None
    alone: int | None
    taught_share: float
    alone_share: float
    search: int = 0

    @property
    def ratio(self) -> float:
        """Measurements needed, relative to those without; who was never there counts with one more than were made."""
        return (self.taught or self.trials + 1) / (self.alone or self.trials + 1)


def rods_of(file: Path, seed: int) -> dict[str, Yardstick]:
    """The yardsticks of a campaign's studies."""
    campaign, _ = load_campaign(file)
    return {cell.name: yardstick(cell.study, seed) for cell in campaign.cells}


def gain(plan: Plan) -> Gain:
    """Both ways of spending the budget."""
    file = plan.file()
    rods = rods_of(file, plan.seed)
    ours = campaign_arm(file, plan.home / "campaign", plan.seed, rods)
    alone, closed = equal_shares(file, plan.home / "alone", plan.seed, rods)
    then, by_rule = alone.by(ours.device_hours), closed.by(ours.device_hours)
    return Gain(
        seed=plan.seed,
        budget=plan.hours,
        spent=ours.device_hours,
        reason=ours.reason,
        trials=ours.trials,
        share=ours.share,
        alone_spent=then.device_hours,
        alone_share=then.share,
        hours_to_alone=ours.hours_to(then.share),
        alone_end_spent=alone.device_hours,
        alone_end_share=alone.share,
        alone_end_trials=alone.trials,
        closed_spent=by_rule.device_hours,
        closed_share=by_rule.share,
        hours_to_closed=ours.hours_to(by_rule.share),
    )


def killed(plan: Plan) -> Killed:
    """The campaign of `gain` again, in processes that are killed at random moments, each after some trials."""
    file = plan.file()
    rods = rods_of(file, plan.seed)
    other = judged_campaign(file, plan.home / "campaign", rods, reason="")
    folder = plan.home / "killed"
    log = plan.home / "killed.log"
    rng, done = random.Random(plan.seed), 0
    marks = sorted(rng.sample(range(5, max(11, other.trials - 5)), plan.kills))
    for mark in marks:
        done += _kill_after(file, folder, plan.seed, log, mark)
    reason = run_campaign_here(file, folder, plan.seed, log)
    arm = judged_campaign(file, folder, rods, reason=reason or "")
    return Killed(
        seed=plan.seed,
        kills=done,
        over_budget=arm.device_hours / plan.hours - 1.0,
        reason=arm.reason,
        share=arm.share,
        share_of_other=other.share,
        trials=arm.trials,
        trials_of_other=other.trials,
        measured_twice=arm.measured_twice,
        left_open=arm.left_open,
        same_studies=arm.shares.keys() == other.shares.keys(),
    )


def _kill_after(file: Path, folder: Path, seed: int, log: Path, trials: int) -> int:
    """Run the campaign in a process until `trials` trials have ended in all, and kill it; 1 where it was killed."""
    command = [sys.executable, __file__, "--one", str(file), str(folder), str(seed), str(log)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if log.exists() and log.read_text(encoding="utf-8").count(" ended\n") >= trials:
                break
            time.sleep(0.02)
        still = process.poll() is None
        if still:
            os.kill(process.pid, signal.SIGKILL)
        return int(still)
    finally:
        process.wait(60)


def transfer(plan: Plan) -> list[Transfer]:
    """Six studies of users that the campaign did not have, alone, and each where the campaign's twelve are."""
    if not (plan.home / "campaign").exists():
        run_campaign_here(plan.file(), plan.home / "campaign", plan.seed)
    campaign, _ = load_campaign(plan.file("late", ("code",)))
    return [_transferred(plan, cell.study, search) for cell in campaign.cells for search in range(plan.searches)]


def _transferred(plan: Plan, late: StudyFile, search: int) -> Transfer:
    """One of the six; the first search has the world's number for its seed, as the campaign has."""
    rod = yardstick(late, plan.seed)
    paths = {}
    for earlier in ("none", "related"):
        folder = plan.home / f"late-{late.name}-{search}-{earlier}"
        if earlier == "related" and not folder.exists():
            part = plan.home / f"{folder.name}.part"
            ignored = shutil.ignore_patterns("artifacts", "reports", "predictions", "work")
            shutil.copytree(plan.home / "campaign", part, ignore=ignored, dirs_exist_ok=True)
            part.rename(folder)
        limits = late.budget.model_copy(update={"trials": plan.trials})
        own = {"budget": limits, "earlier_studies": earlier, "seed": late.seed + 100 * search}
        study = late.model_copy(update=own)
        run_alone(study, place_at(folder), plan.seed)
        paths[earlier] = path_of(study.name, place_at(folder), rod)
    best = max(path[-1].share for path in paths.values())
    needed = {
        name: next((n for n, step in enumerate(path, start=1) if step.share >= ENOUGH * best), None)
        for name, path in paths.items()
    }
    return Transfer(
        seed=plan.seed,
        study=late.name,
        trials=plan.trials,
        taught=needed["related"],
        alone=needed["none"],
        taught_share=paths["related"][-1].share,
        alone_share=paths["none"][-1].share,
        search=search,
    )


def world(plans: Sequence[Plan]) -> dict[str, Any]:
    """Everything in one world, whose plans have growing budgets, or of the transfer alone."""
    first, last = plans[0], plans[-1]
    found: dict[str, Any] = {"gain": [], "killed": []}
    for plan in () if last.only_transfer else plans:
        found["gain"] += kept(plan, "gain", partial(_one_gain, plan), Gain)
        if plan is first and plan.kills and plan.seed == 0:
            found["killed"] = kept(plan, "killed", lambda: [killed(first)], Killed)
    return {**found, "transfer": kept(last, "transfer", lambda: transfer(last), Transfer)}


def _one_gain(plan: Plan) -> list[Gain]:
    return [gain(plan)]


def kept(plan: Plan, name: str, make: Callable[[], list[Any]], kind: type[Any]) -> list[Any]:
    """A part of the answer: as an earlier run left it in the world's folder, else made now and left there."""
    path = plan.home / f"{name}-{plan.hours:g}.json"
    if path.exists():
        return [kind(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    found = make()
    path.write_text(json.dumps([asdict(row) for row in found]), encoding="utf-8")
    return found


# ----------------------------------------------------------------------------------------------------------- the answer


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def answer(worlds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All figures that were taken, and whether each target of theirs was met."""
    gains: list[Gain] = [each for found in worlds for each in found["gain"]]
    kills: list[Killed] = [each for found in worlds for each in found["killed"]]
    transfers: list[Transfer] = [each for found in worlds for each in found["transfer"]]
    ratios = [each.ratio for each in transfers]
    medians = {**(_medians(gains, kills) if gains else {}), "transfer": spread(ratios)}
    return {
        "emulated": True,
        "gains": [_with_ratios(each) for each in gains],
        "killed": [asdict(each) for each in kills],
        "transfer": [{**asdict(each), "ratio": each.ratio} for each in transfers],
        "medians": medians,
        "met": {
            **(_met(medians, kills, max(each.budget for each in gains)) if gains else {}),
            "transfer halves the measurements": statistics.median(ratios) <= TARGET_TRANSFER,
        },
    }


def _with_ratios(each: Gain) -> dict[str, Any]:
    names = ("at_the_end", "at_the_same", "against_closed", "off_budget")
    return {**asdict(each), **{name: getattr(each, name) for name in names}}


def _medians(gains: Sequence[Gain], kills: Sequence[Killed]) -> dict[str, dict[str, float]]:
    """Over the worlds: the gain with each budget, and how budgets were met, over all of both."""
    budgets = sorted({each.budget for each in gains})
    found = {}
    for budget in budgets:
        there = [each for each in gains if each.budget == budget]
        for name in ("at_the_same", "against_closed", "at_the_end", "share", "alone_share"):
            found[f"{name}, {budget:g} device-hours"] = spread([getattr(each, name) for each in there])
    off = [*(abs(each.off_budget) for each in gains), *(abs(each.over_budget) for each in kills)]
    return {**found, "off_budget": spread(off)}


def _met(medians: dict[str, dict[str, float]], kills: Sequence[Killed], budget: float) -> dict[str, bool]:
    sound = all(not k.measured_twice and not k.left_open and k.same_studies for k in kills)
    return {
        "within 2% of the budget": medians["off_budget"]["greatest"] <= TARGET_BUDGET,
        "1.5 x hypervolume per device-hour": medians[f"at_the_same, {budget:g} device-hours"]["median"] >= TARGET_GAIN,
        "killed, and nothing lost or repeated": sound,
    }


def print_answer(found: dict[str, Any], out: TextIO) -> None:
    """For people."""
    print("EMULATED: no figure says anything of a GPU", file=out)
    head = ("world", "spent", "of", "trials", "hypervolume", "alone", "spent", "hours to it", "x per hour", "closed")
    if found["gains"]:
        print(("{:>6}{:>8}{:>7}{:>8}{:>13}{:>8}{:>8}{:>13}{:>12}{:>8}  ended").format(*head), file=out)
    for row in found["gains"]:
        hours = row["hours_to_alone"]
        print(
            f"{row['seed']:>6}{row['spent']:>8.2f}{row['budget']:>7.1f}{row['trials']:>8}{row['share']:>13.1%}"
            f"{row['alone_share']:>8.1%}{row['alone_spent']:>8.2f}"
            f"{'never' if hours is None else f'{hours:.2f}':>13}{row['at_the_same']:>12.2f}"
            f"{row['against_closed']:>8.2f}  {row['reason']}",
            file=out,
        )
    for row in found["killed"]:
        print(
            f"world {row['seed']}: killed {row['kills']} times; {row['over_budget']:+.1%} of the budget, hypervolume "
            f"{row['share']:.1%} (not killed {row['share_of_other']:.1%}), {row['trials']} candidates "
            f"({row['trials_of_other']}), {row['measured_twice']} measured twice, {row['left_open']} left open; "
            f"{row['reason']}",
            file=out,
        )
    for row in found["transfer"]:
        print(
            f"world {row['seed']}, {row['study']}, search {row['search']}: {row['taught']} measurements to 95% with "
            f"earlier studies, {row['alone']} without (ends {row['taught_share']:.1%}, {row['alone_share']:.1%})",
            file=out,
        )
    for name, values in found["medians"].items():
        parts = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
        print(f"{name}: {parts}", file=out)
    for name, met in found["met"].items():
        print(f"{'met' if met else 'MISSED'}: {name}", file=out)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="worlds")
    parser.add_argument(
        "--hours",
        type=float,
        nargs="+",
        default=HOURS,
        help="budgets of a campaign in device-hours, each the last raised",
    )
    parser.add_argument("--trials", type=int, default=14, help="measurements of a study of the transfer")
    parser.add_argument("--searches", type=int, default=1, help="of each study of the transfer")
    parser.add_argument("--only", choices=["transfer"], help="leave out gain and kills")
    parser.add_argument("--kills", type=int, default=5, help="of the first world's campaign; 0 for none")
    parser.add_argument("--jobs", type=int, default=2, help="worlds at once, each in a process")
    parser.add_argument("--keep", type=Path, help="folder of the worlds; a run that was cut off goes on there")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS, metavar=("FILE", "FOLDER", "SEED", "LOG"))
    return parser.parse_args()


def main() -> int:
    """Run, print; 0 where every target was met."""
    options = parse_options()
    keep_models()
    if options.one:
        file, folder, seed, log = options.one
        run_campaign_here(Path(file), Path(folder), int(seed), Path(log))
        return 0
    folder = str(options.keep.resolve()) if options.keep else tempfile.mkdtemp(prefix="campaign-")
    plans = [
        [
            Plan(
                seed=seed,
                hours=hours,
                trials=options.trials,
                kills=options.kills,
                folder=folder,
                searches=options.searches,
                only_transfer=options.only == "transfer",
            )
            for hours in sorted(options.hours)
        ]
        for seed in range(options.seeds)
    ]
    try:
        with ProcessPoolExecutor(options.jobs, initializer=keep_models) as pool:
            found = answer(list(pool.map(world, plans)))
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found, indent=1)) if options.json else print_answer(found, sys.stdout)
    return 0 if all(found["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
