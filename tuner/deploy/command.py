"""`tuner deploy STUDY`: files that start a measured configuration; `tuner bench FILE`: the measurement, repeated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search_spaces.errors import TunerError
from tuner.cli_options import AsJson, StorageOption

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuner.deploy.chosen import Chosen
    from tuner.deploy.confirm import Confirmation
    from tuner.deploy.machines import Output, Wishes
    from tuner.deploy.render import OutFile


class Target(StrEnum):
    """What the files are for."""

    SHELL = "shell"
    COMPOSE = "compose"
    KUBERNETES = "kubernetes"
    LWS = "lws"
    RAY_SERVE = "ray-serve"
    DYNAMO = "dynamo"
    LLM_D = "llm-d"


class Client(StrEnum):
    """Which load generator measures."""

    BUILT_IN = "built-in"
    AIPERF = "aiperf"


def deploy(  # noqa: PLR0913, PLR0917 - a parameter is an option of the command
    study: Annotated[str, typer.Argument(help="Name of a study.")],
    target: Annotated[Target, typer.Option("--target", help="What the files are for.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the files; it must be empty or new.")],
    trial: Annotated[str, typer.Option("--trial", help="Number of a measured trial, or best.")] = "best",
    objective: Annotated[
        str | None, typer.Option("--objective", help="What `best` is best in; the first objective by default.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the endpoint.")] = 8000,
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", help="Address of a machine, for each one in turn; those of the measurement by default."),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", help="Container image; the engine's own of the measured version by default."),
    ] = None,
    router_image: Annotated[
        str | None, typer.Option("--router-image", help="Image of the router; that of this package by default.")
    ] = None,
    storage: StorageOption = None,
    as_json: AsJson = False,
) -> None:
    """Write what starts a measured configuration, exactly as it was measured."""
    from tuner.deploy.chosen import choose
    from tuner.places import existing_place
    from tuner.stored import history_of, make_report, stored_file

    place = existing_place(storage)
    history = history_of(place, study)
    file = stored_file(history, place)
    chosen = choose(make_report(history, file), file, trial, objective)
    output, files = deploy_to(
        out, chosen, target, port=port, hosts=tuple(hosts or ()), image=image, router_image=router_image
    )
    if as_json:
        print(json.dumps(_summary(chosen, target, output, files), indent=2))
    else:
        print(f"trial {chosen.trial.number} of {study}, {chosen.rule}, as {target} in {out}:")
        for written in files:
            print(f"  {written.path}")
        print(f"see {out / 'README.md'}")


def bench(
    file: Annotated[Path, typer.Argument(help="The benchmark.json of a deployment.")],
    url: Annotated[str, typer.Option("--url", help="The server's address, such as http://127.0.0.1:8000.")],
    client: Annotated[Client, typer.Option("--with", help="aiperf: both clients in turn, and whether they agree.")] = (
        Client.BUILT_IN
    ),
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Runs of each client, with aiperf.")] = 3,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Other prompts and arrivals; those of the trial by default.")
    ] = None,
    timings: Annotated[Path | None, typer.Option("--timings", help="Keep raw timings in this Parquet file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put the load of a measured trial on a server, and show what comes out beside what was measured."""
    from tempfile import TemporaryDirectory

    from tuner.deploy.bench import load_benchmark
    from tuner.deploy.bench_report import show_bench

    benchmark = load_benchmark(file)
    if client is Client.AIPERF:
        from cluster.load.aiperf import find_aiperf
        from tuner.deploy.confirm import confirm_at

        found = confirm_at(benchmark, url, find_aiperf(), repeats=repeats, configuration=str(benchmark.load))
        _show_confirmations([found], as_json=as_json)
        return
    with TemporaryDirectory(prefix="tuner-bench-") as folder:
        path = timings or Path(folder) / "request_timings.parquet"
        show_bench(benchmark, url, path, seed=seed, as_json=as_json)


def confirm(
    study: Annotated[str, typer.Argument(help="Name of a study that was measured on this machine.")],
    trial: Annotated[
        str | None, typer.Option("--trial", help="One trial, or best; the whole front by default.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Runs of each client.")] = 3,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="First port of the deployments.")] = 8000,
    storage: StorageOption = None,
    as_json: AsJson = False,
) -> None:
    """Deploy the front on this machine, and measure it again with the built-in client and with AIPerf."""
    from cluster.load.aiperf import find_aiperf
    from tuner.deploy.chosen import choose
    from tuner.deploy.confirm import confirm_here
    from tuner.places import existing_place
    from tuner.stored import history_of, make_report, stored_file

    aiperf = find_aiperf()
    place = existing_place(storage)
    history = history_of(place, study)
    file = stored_file(history, place)
    report = make_report(history, file)
    wanted = [trial] if trial is not None else [str(member.number) for member in report.front]
    members = [choose(report, file, name) for name in wanted or ["best"]]
    _show_confirmations([confirm_here(m, aiperf, repeats=repeats, port=port) for m in members], as_json=as_json)


def _show_confirmations(found: list[Confirmation], *, as_json: bool) -> None:
    from rich.console import Console

    from tuner.deploy.confirm import table_of

    if as_json:
        print(json.dumps([confirmation.json() for confirmation in found], indent=2))
        return
    console = Console(markup=False, highlight=False)
    console.print(table_of(found))
    for confirmation in found:
        console.print(f"  {confirmation.trial:>5}  {confirmation.configuration}")


def deploy_to(
    out: Path,
    chosen: Chosen,
    target: Target,
    *,
    port: int = 8000,
    hosts: tuple[str, ...] = (),
    image: str | None = None,
    router_image: str | None = None,
) -> tuple[Output, tuple[OutFile, ...]]:
    """Write the files of `chosen` for `target` to `out`, which is empty or new, and stays empty after an error."""
    _check_empty(out)
    with _cleared_after_errors(out):
        output, files = make_files(chosen, target, out, port=port, hosts=hosts, image=image, router_image=router_image)
        write_files(files, out)
    return output, files


def make_files(
    chosen: Chosen,
    target: Target,
    out: Path,
    *,
    port: int = 8000,
    hosts: tuple[str, ...] = (),
    image: str | None = None,
    router_image: str | None = None,
) -> tuple[Output, tuple[OutFile, ...]]:
    """The files of `chosen` for `target`, to be written below `out`; of a model that the tool makes, the file itself.

    Raises `InvalidValueError` for a target that cannot run it.
    """
    from tuner.deploy.bench import dump_benchmark
    from tuner.deploy.machines import Wishes
    from tuner.deploy.model import ship_model
    from tuner.deploy.pods import dns_name
    from tuner.deploy.readme import BENCHMARK_FILE, benchmark_of, readme
    from tuner.deploy.render import OutFile

    chosen, model = ship_model(chosen, out)
    wishes = Wishes(
        title=f"{chosen.problem.model.name} on {chosen.config.engine}, trial {chosen.trial.number} of {chosen.study}",
        name=dns_name(f"{chosen.study}-{chosen.trial.number}"),
        port=port,
        hosts=hosts,
        image=image,
        router_image=router_image,
        model=model,
    )
    output = _maker(target)(chosen, wishes)
    own = (readme(chosen, output, wishes), OutFile(path=BENCHMARK_FILE, text=dump_benchmark(benchmark_of(chosen))))
    return output, (*output.files, *own)


def _maker(target: Target) -> Callable[[Chosen, Wishes], Output]:
    from tuner.deploy import machines, platforms, pods

    return {
        Target.SHELL: machines.shell,
        Target.COMPOSE: machines.compose,
        Target.KUBERNETES: pods.kubernetes,
        Target.LWS: pods.leader_worker_sets,
        Target.RAY_SERVE: platforms.ray_serve,
        Target.DYNAMO: platforms.dynamo,
        Target.LLM_D: platforms.llm_d,
    }[target]


def write_files(files: tuple[OutFile, ...], out: Path) -> None:
    """Write `files` below `out`."""
    for file in files:
        path = out / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.text, encoding="utf-8")
        if file.executable:
            path.chmod(0o755)


@contextmanager
def _cleared_after_errors(out: Path) -> Iterator[None]:
    """Leave no half of a deployment behind: `out` was empty before."""
    try:
        yield
    except TunerError:
        for path in out.glob("*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _check_empty(out: Path) -> None:
    from search_spaces.errors import InvalidValueError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidValueError(f"--out {out} exists and is no empty folder; give another, nothing is overwritten")


def _summary(chosen: Chosen, target: Target, output: Output, files: tuple[OutFile, ...]) -> dict[str, object]:
    return {
        "study": chosen.study,
        "trial": chosen.trial.number,
        "rule": chosen.rule,
        "target": str(target),
        "endpoint": output.endpoint,
        "start": list(output.start),
        "files": [file.path for file in files],
        "emulated": chosen.measurement.emulated,
        "differences": {part.name: list(part.differences) for part in output.parts},
    }
