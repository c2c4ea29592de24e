"""The public Python API: what the commands do, importable and typed, with the same names.

`from tuner import load_study, predict` and so on. Everything raises `TunerError` (or a kind of it) for what a user can
mend, with the value, the limit and the remedy. Reading a study never changes it: `run_study`, `Study.resume` and
`Study.stop` are the only ones that launch or write to a storage, with `run_campaign`, `Campaign.resume`, `pause` and
`stop`; `Study.deploy`, `write_report` and `Study.confirm` write files or start processes of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, overload

from search_spaces.errors import TunerError
from search_spaces.slos import Slo
from studies.history import StudyHistory, StudySummary, summaries
from studies.lease import order_stop, read_events
from studies.lease_record import Event
from studies.records import TrialRecord
from studies.storage import open_storage
from tuner.api_campaigns import Campaign, list_campaigns, load_campaign, run_campaign
from tuner.campaigns.status import CampaignStatus
from tuner.comparison import Comparison
from tuner.comparison import compare as compare_reports
from tuner.importance import Importance
from tuner.importance import importance as importance_of
from tuner.layers_file import Layer
from tuner.observer import Observer
from tuner.places import Place, existing_place, find_place
from tuner.plan import Demand
from tuner.plan_cli import Planned, make_plan, priced
from tuner.prediction import Outlook, look_out
from tuner.report import StudyReport
from tuner.score import Scored, ranked
from tuner.score_cli import with_slos
from tuner.status import StudyStatus, stored_status
from tuner.stored import history_of, make_report, stored_file
from tuner.study_file import LayeredStudy, load_layered
from tuner.study_file import load_study_file as read_study_file
from tuner.study_schema import StudyFile
from tuner.whatif import WhatIf, what_if
from tuner.wiring import make_problem

if TYPE_CHECKING:
    from cluster.load.measure import LoadMeasurement
    from tuner.deploy.bench import Benchmark
    from tuner.deploy.confirm import Confirmation
else:  # they load the load generator, which most programs do not need

    def __getattr__(name: str) -> object:
        modules = {"LoadMeasurement": "cluster.load.measure", "Benchmark": "tuner.deploy.bench"}
        modules["Confirmation"] = "tuner.deploy.confirm"
        if name not in modules:
            raise AttributeError(f"module 'tuner.api' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(modules[name]), name)


__all__ = [
    "Benchmark",
    "Campaign",
    "CampaignStatus",
    "Comparison",
    "Confirmation",
    "Deployment",
    "Importance",
    "Layer",
    "LayeredStudy",
    "LoadMeasurement",
    "Observer",
    "Outlook",
    "Planned",
    "Scored",
    "Study",
    "StudyFile",
    "StudyReport",
    "StudyStatus",
    "TunerError",
    "WhatIf",
    "bench",
    "compare",
    "config_show",
    "list_campaigns",
    "list_layers",
    "list_profiles",
    "list_studies",
    "load_benchmark",
    "load_campaign",
    "load_study",
    "load_study_file",
    "predict",
    "run_campaign",
    "run_study",
]

TargetName = Literal["shell", "compose", "kubernetes", "lws", "ray-serve", "dynamo", "llm-d"]
ReportFormat = Literal["html", "markdown", "json"]


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Files that start a measured configuration, below `folder`.

    `rule` says how the trial was chosen, `start` are the commands that start it, `endpoint` is where it answers.
    `differences` are those of each process from what was measured, empty where it is the same.
    """

    study: str
    trial: int
    rule: str
    folder: Path
    files: tuple[Path, ...]
    endpoint: str
    start: tuple[str, ...]
    differences: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Study:
    """A stored study, read anew at each question; `load_study` finds one."""

    history: StudyHistory
    place: Place

    @property
    def name(self) -> str:
        """Its name."""
        return self.history.name

    @property
    def file(self) -> StudyFile:
        """The study file that it was made with."""
        return stored_file(self.history, self.place)

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """Every trial, repeats and failures included."""
        return self.history.trials()

    def report(self) -> StudyReport:
        """The study as it stands: candidates with the means of their runs, intervals, noise (`tuner study show`)."""
        return make_report(self.history, self.file)

    def pareto(self) -> tuple[TrialRecord, ...]:
        """The Pareto front, best first in the first objective (`tuner study pareto`)."""
        return self.report().front

    def status(self) -> StudyStatus:
        """Who runs it, its trials and the time left (`tuner study status`)."""
        return stored_status(self.history.storage, self.place, self.name, self.history)

    def logs(self, after: int = 0) -> tuple[Event, ...]:
        """What its coordinators have written behind line `after` (`tuner study logs`)."""
        return tuple(read_events(self.history.storage, self.name, after))

    def stop(self) -> str:
        """Order its coordinator to stop, wherever it runs; returns who that is (`tuner study stop --wait 0`).

        Raises `StudyNotFoundError` where nobody runs it.
        """
        return str(order_stop(self.history.storage, self.name).holder)

    def resume(self, *overrides: str, address: str | None = None, observer: Observer | None = None) -> Study:
        """Go on with it to its end, after `overrides` (`budget.trials=40`), and return it (`tuner study resume`)."""
        file = stored_file(self.history, self.place, overrides)
        return run_study(file, storage=self.place.url, address=address, observer=observer)

    def write_report(self, path: str | Path | None = None, form: ReportFormat = "html") -> Path:
        """Write its report and return the path (`tuner study report`).

        By default that is `reports/NAME/front.html` (`.md`, `.json`) beside the storage.
        """
        from tuner.report_cli import report_text

        endings: dict[ReportFormat, str] = {"html": "html", "markdown": "md", "json": "json"}
        found = Path(path) if path is not None else self.place.reports(self.name) / f"front.{endings[form]}"
        found.parent.mkdir(parents=True, exist_ok=True)
        found.write_text(report_text(self.report(), form, self.place.predictions(self.name)), encoding="utf-8")
        return found

    def plan(  # noqa: PLR0913 - the options of the command
        self,
        *,
        rate: float | None = None,
        users: float | None = None,
        gpus: int | None = None,
        pools: Sequence[str] = (),
        headroom: float = 0.0,
        pricing: Literal["on_demand", "spot", "reserved"] | None = None,
        slos: Sequence[str] = (),
        predicted: int = 0,
    ) -> Planned:
        """Copies, nodes and money for `rate` requests/s, `users` in flight, or all that `gpus` serve (`tuner plan`).

        `planned.plan.met` says whether it can be met; where not, it is the nearest that can. `pools` are `NAME` or
        `NAME=NODES`. Raises `NothingToPlanError` where no deployment meets the SLOs.
        """
        file = priced(with_slos(self.history, self.place, slos), pricing)
        demand = Demand(rate=rate, users=users, devices=gpus, headroom=headroom)
        return make_plan(self.name, file, self.trials, demand, pools, predicted)

    def deploy(  # noqa: PLR0913 - the options of the command
        self,
        target: TargetName,
        out: str | Path,
        *,
        trial: int | Literal["best"] = "best",
        objective: str | None = None,
        port: int = 8000,
        hosts: Sequence[str] = (),
        image: str | None = None,
        router_image: str | None = None,
    ) -> Deployment:
        """Write what starts a measured configuration to the new or empty folder `out` (`tuner deploy`)."""
        from tuner.deploy.chosen import choose
        from tuner.deploy.command import Target, deploy_to

        folder = Path(out)
        chosen = choose(self.report(), self.file, str(trial), objective)
        output, files = deploy_to(
            folder, chosen, Target(target), port=port, hosts=tuple(hosts), image=image, router_image=router_image
        )
        return Deployment(
            study=self.name,
            trial=chosen.trial.number,
            rule=chosen.rule,
            folder=folder,
            files=tuple(folder / file.path for file in files),
            endpoint=output.endpoint,
            start=output.start,
            differences={part.name: tuple(part.differences) for part in output.parts},
        )

    def confirm(
        self, trial: int | Literal["best"] | None = None, *, repeats: int = 3, port: int = 8000
    ) -> tuple[Confirmation, ...]:
        """Deploy `trial`, or the whole front, on this machine and measure it again (`tuner study confirm`).

        Both clients measure, the built-in one and AIPerf, which must be installed (TUNER_AIPERF names it elsewhere).
        """
        from cluster.load.aiperf import find_aiperf
        from tuner.deploy.chosen import choose
        from tuner.deploy.confirm import confirm_here

        aiperf, report = find_aiperf(), self.report()
        wanted = [str(member.number) for member in report.front] if trial is None else [str(trial)]
        members = [choose(report, self.file, name) for name in wanted or ["best"]]
        return tuple(confirm_here(member, aiperf, repeats=repeats, port=port) for member in members)

    def rescore(self, slos: Sequence[str] = (), by: Sequence[str] = ()) -> tuple[Scored, ...]:
        """The measured configurations ranked under changed SLOs (`METRIC=THRESHOLD`, as `tuner study rescore`)."""
        problem = make_problem(with_slos(self.history, self.place, slos))
        objectives = tuple(by) or tuple(objective.metric for objective in problem.objectives)
        return ranked(self.trials, objectives, problem.slos)

    def whatif(self, *settings: str, trial: int | Literal["best"] = "best") -> WhatIf:
        """What the corrected model says with `settings` changed (`KEY=VALUE`, as `tuner whatif`)."""
        return what_if(self.history, self.place, settings, trial=str(trial))

    def importance(self, evaluator: Literal["auto", "fanova", "ped-anova"] = "auto") -> Importance:
        """How much each parameter matters, measured and as the model sees it (`tuner study importance`)."""
        return importance_of(self.history, self.place, evaluator=evaluator)


def load_study(name: str, storage: str | None = None) -> Study:
    """The stored study called `name`; `storage` is a URL, TUNER_STORAGE or ./tuner-data by default.

    Raises `StudyNotFoundError` with the names there are.
    """
    place = existing_place(storage)
    return Study(history_of(place, name), place)


def list_studies(storage: str | None = None) -> tuple[StudySummary, ...]:
    """The studies of a storage (`tuner study list`)."""
    return summaries(open_storage(existing_place(storage).url))


def load_study_file(path: str | Path, *overrides: str) -> StudyFile:
    """The checked study file at `path` over its layers, after `overrides` (`budget.trials=8`).

    Raises `StudyFileError`, which lists every problem at once.
    """
    return read_study_file(Path(path), overrides)


def config_show(path: str | Path, *overrides: str) -> LayeredStudy:
    """The study file at `path` with the layer that set each value (`tuner config show`)."""
    return load_layered(Path(path), overrides)


def list_layers(*folders: str | Path) -> tuple[Layer, ...]:
    """All layers that are not profiles, lowest first, those of `folders` on top (`tuner config layers`)."""
    from tuner.config_cli import known_layers

    return tuple(known_layers([Path(folder) for folder in folders]))


def list_profiles(*folders: str | Path) -> tuple[Layer, ...]:
    """Layers that a study file chooses by name, with what they set and its sources (`tuner profiles list`, `show`)."""
    from tuner.config_cli import known_profiles

    return tuple(known_profiles([Path(folder) for folder in folders]))


def predict(study: StudyFile | str | Path, *overrides: str, top: int = 5) -> Outlook:
    """What the model alone expects of the default configurations and the `top` of a sample (`tuner predict`).

    `overrides` are for a path: a `StudyFile` has had its own.
    """
    if isinstance(study, StudyFile):
        if overrides:
            raise TunerError(f"{overrides[0]}: give overrides to load_study_file, which makes the study file")
        return look_out(study, top=top)
    return look_out(load_study_file(study, *overrides), top=top)


def compare(*studies: Study, objectives: Sequence[str] | None = None, slos: Sequence[Slo] | None = None) -> Comparison:
    """Hold studies against each other by what they measured (`tuner study compare`).

    Objectives and SLOs are those of the first one unless given.
    """
    return compare_reports([study.report() for study in studies], objectives=objectives, slos=slos)


def load_benchmark(path: str | Path) -> Benchmark:
    """The measurement in the `benchmark.json` of a deployment: load, how it is measured, and what it gave."""
    from tuner.deploy import bench as benches

    return benches.load_benchmark(Path(path))


@overload
def bench(
    path: str | Path, url: str, client: Literal["built-in"] = ..., *, seed: int | None = ..., timings: Path | None = ...
) -> LoadMeasurement: ...


@overload
def bench(path: str | Path, url: str, client: Literal["aiperf"], *, repeats: int = ...) -> Confirmation: ...


def bench(
    path: str | Path,
    url: str,
    client: Literal["built-in", "aiperf"] = "built-in",
    *,
    seed: int | None = None,
    timings: Path | None = None,
    repeats: int = 3,
) -> LoadMeasurement | Confirmation:
    """Put the load of a `benchmark.json` on the server at `url` (`tuner bench`); with AIPerf, by both clients in turn.

    Raises `BenchmarkFailedError` where it gives no figures.
    """
    benchmark = load_benchmark(path)
    if client == "aiperf":
        from cluster.load.aiperf import find_aiperf
        from tuner.deploy.confirm import confirm_at

        return confirm_at(benchmark, url, find_aiperf(), repeats=repeats, configuration=str(benchmark.load))
    from tuner.deploy.bench_report import measured_at

    with TemporaryDirectory(prefix="tuner-bench-") as folder:
        return measured_at(benchmark, url, timings or Path(folder) / "request_timings.parquet", seed=seed)


def run_study(
    study: StudyFile | str | Path,
    *,
    storage: str | None = None,
    address: str | None = None,
    observer: Observer | None = None,
) -> Study:
    """Run a study to its end, or go on with one that was begun (`tuner study run`), and return it.

    `address` is that of a Ray cluster, None for this machine. Without an `observer` lines of progress go to stderr.
    """
    from rich.console import Console

    from tuner import session, wiring
    from tuner.progress import LineProgress

    file = study if isinstance(study, StudyFile) else load_study_file(study)
    place = find_place(storage or (file.storage if "storage" in file.model_fields_set else None))
    connect = wiring.connector(address, file)

    def never() -> bool:
        return False

    with LineProgress(Console(stderr=True)) if observer is None else nullcontext(observer) as watching:
        session.run_study(file, place, connect=connect, stop=nullcontext(never), observer=watching)
    return load_study(file.name, place.url)
