"""`tuner campaign`: run campaigns, and look at them and order them about from any machine with their storage."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search_spaces.errors import InvalidValueError
from tuner.cli_options import Address, AsJson, Detach, FileStorageOption, Follow, NoProgress, StorageOption, Tail, WaitS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import RenderableType

    from studies.storage import Storage
    from tuner.campaigns.campaign import Campaign
    from tuner.campaigns.look import View
    from tuner.campaigns.status import CampaignStatus
    from tuner.places import Place

FOLLOW_S = 2.0

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a rule of the campaign: --set budget.device_hours=8.")
]
Name = Annotated[str, typer.Argument(help="Name of a campaign.")]

campaign_app = typer.Typer(help="Run many studies on one budget, for weeks if need be.", no_args_is_help=True)


@campaign_app.command("run")
def run(
    campaign: Annotated[
        str, typer.Argument(help="A campaign file (*.yaml), or the name of a campaign of the storage.")
    ],
    address: Address = None,
    overrides: Overrides = None,
    storage: FileStorageOption = None,
    as_json: AsJson = False,
    no_progress: NoProgress = False,
    detached: Detach = False,
) -> None:
    """Run a campaign; one that was begun before goes on where it stopped. A pause that was ordered stays."""
    asked, place = _asked(campaign, overrides or [], storage)
    _begin(asked, place, detached=detached, address=address, as_json=as_json, no_progress=no_progress)


@campaign_app.command("resume")
def resume(
    name: Name,
    address: Address = None,
    storage: StorageOption = None,
    as_json: AsJson = False,
    no_progress: NoProgress = False,
    detached: Detach = False,
) -> None:
    """Take a pause back; where nobody runs the campaign, go on with it here (or on the cluster: --detach)."""
    from studies.campaign_store import campaign_study
    from studies.lease import is_free, read_lease
    from tuner.campaigns.open import existing

    place, opened = _existing(storage)
    record = existing(opened, name)
    if record.pause() is not None:
        record.order_pause(None)
        print(f"The pause of campaign {name} is over.", file=sys.stderr)
    if not is_free(read_lease(opened, campaign_study(name))):
        print(f"Campaign {name} is run already; follow it with: tuner campaign status {name} --follow", file=sys.stderr)
        return
    campaign = record.campaign()
    _begin(campaign, place, detached=detached, address=address, as_json=as_json, no_progress=no_progress)


@campaign_app.command("list")
def list_campaigns(storage: StorageOption = None, as_json: AsJson = False) -> None:
    """List the campaigns of a storage."""
    from tuner.campaigns.open import begun
    from tuner.campaigns.status import spent_text, status_json

    _, opened = _existing(storage)
    found = [_status(opened, name) for name in begun(opened)]
    if as_json:
        _print([status_json(status) for status in found])
        return
    for status in found:
        closed = sum(not standing.is_open for standing in status.view.standings)
        studies = f"{len(status.view.standings)} studies, {closed} closed"
        print(f"{status.view.campaign.name}: {status.state}, {studies}, {spent_text(status.view)}")
    if not found:
        print("no campaigns")


@campaign_app.command("status")
def status(
    name: Name,
    storage: StorageOption = None,
    as_json: AsJson = False,
    follow: Follow = False,
) -> None:
    """Show how a campaign stands: its studies, pools, spending, best so far and failures."""
    from rich.console import Console
    from rich.live import Live

    from tuner.campaigns.status import State, status_json, status_view, statuses

    if follow and as_json:
        raise InvalidValueError("--follow draws for people, and --json was given too; choose one")
    _, opened = _existing(storage)
    looks = statuses(opened, name)
    found = next(looks)
    if as_json:
        _print(status_json(found))
        return
    console = Console(markup=False, highlight=False)
    if not follow:
        console.print(status_view(found))
        return
    with Live(status_view(found), console=console, refresh_per_second=2) as live:
        try:
            while found.state in (State.RUNNING, State.WAITING, State.STOPPING, State.PAUSED):
                time.sleep(FOLLOW_S)
                found = next(looks)
                live.update(status_view(found))
        except KeyboardInterrupt:
            return


@campaign_app.command("pause")
def pause(name: Name, storage: StorageOption = None) -> None:
    """Let a campaign measure nothing until it is resumed; what is being measured is given back."""
    from tuner.campaigns.open import existing, whoami
    from tuner.campaigns.record import Pause

    _, opened = _existing(storage)
    existing(opened, name).order_pause(Pause(at_s=time.time(), by=whoami()))
    print(f"Campaign {name} is paused; go on with: tuner campaign resume {name}")


@campaign_app.command("stop")
def stop(
    name: Name,
    storage: StorageOption = None,
    wait_s: WaitS = 120.0,
) -> None:
    """Order the runner of a campaign to end, wherever it is; what was measured stays, and a resume goes on."""
    from tuner.campaigns.open import existing, job_of
    from tuner.remote import stop_and_wait

    _, opened = _existing(storage)
    existing(opened, name)
    stop_and_wait(opened, job_of(name), wait_s)


@campaign_app.command("logs")
def logs(
    name: Name,
    storage: StorageOption = None,
    follow: Follow = False,
    tail: Tail = None,
) -> None:
    """Print what the runners of a campaign have written; what its studies say is in their own logs."""
    from tuner.campaigns.open import existing, job_of
    from tuner.remote import print_log

    _, opened = _existing(storage)
    existing(opened, name)
    print_log(opened, job_of(name), follow=follow, tail=tail)


@campaign_app.command("report")
def report(
    name: Name,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File to write; reports/campaign.NAME/report.html beside the storage by default."),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Markdown, on stdout without --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, on stdout without --out.")] = False,
    storage: StorageOption = None,
) -> None:
    """Write the report of a campaign: one HTML file that opens without a network, or Markdown or JSON."""
    from studies.campaign_store import campaign_study
    from tuner.campaigns.report import campaign_json, campaign_markdown, story
    from tuner.campaigns.report_html import write_campaign
    from tuner.report_cli import put

    if as_markdown and as_json:
        raise InvalidValueError("--markdown and --json were given; choose one")
    place, opened = _existing(storage)
    told = story(opened, _status(opened, name))
    if as_markdown or as_json:
        text = campaign_markdown(told) if as_markdown else json.dumps(campaign_json(told), indent=2, ensure_ascii=False)
        put(text.rstrip("\n") + "\n", out)
        return
    print(f"Report: {write_campaign(told, out or place.reports(campaign_study(name)) / 'report.html')}")


# ------------------------------------------------------------------------------------------------------------- helpers


def _asked(campaign: str, overrides: Sequence[str], storage: str | None) -> tuple[Campaign, Place]:
    """The campaign of a file, or the stored one of that name, and where its data lie."""
    from tuner.campaigns.campaign import load_campaign
    from tuner.campaigns.open import existing
    from tuner.places import find_place

    path = Path(campaign)
    if path.suffix in {".yaml", ".yml"}:
        found, named = load_campaign(path, overrides)
        return found, find_place(storage or named)
    if overrides:
        raise InvalidValueError(f"--set changes the rules of a campaign file, and {campaign!r} is none; give *.yaml")
    place, opened = _existing(storage)
    return existing(opened, campaign).campaign(), place


def _begin(
    campaign: Campaign, place: Place, *, detached: bool, address: str | None, as_json: bool, no_progress: bool
) -> None:
    """Run `campaign` here, or give its runner to the cluster at `address`."""
    if detached:
        from tuner.campaigns.start import detach_campaign

        detach_campaign(campaign, place, address)
    else:
        _run(campaign, place, address=address, as_json=as_json, no_progress=no_progress)


def _run(campaign: Campaign, place: Place, *, address: str | None, as_json: bool, no_progress: bool) -> None:
    """Run `campaign`, show how it stands at the end, and exit with 130 or 143 where it was interrupted."""
    from rich.console import Console

    from studies.storage import faults_told, open_storage
    from tuner.campaigns.open import campaign_lease
    from tuner.campaigns.status import status_json, status_view
    from tuner.campaigns.view import CampaignView
    from tuner.log import warnings_to
    from tuner.signals import StopRequest

    stop = StopRequest()
    console = Console(stderr=True, markup=False, highlight=False)
    storage = open_storage(place.url)
    try:
        with faults_told(storage), campaign_lease(storage, campaign.name) as lease:
            draw = _picture(storage) if console.is_terminal and not no_progress else None
            with CampaignView(console, draw, lease.note) as view, warnings_to(view.note), stop:
                from tuner.campaigns.start import run_campaign

                over = run_campaign(
                    campaign, place, storage, lease, address=address, stop_requested=stop, observer=view
                )
    except KeyboardInterrupt:
        print("Interrupted. Nothing that was measured is lost; the same command goes on.", file=sys.stderr)
        raise typer.Exit(130) from None
    found = _status(storage, campaign.name)
    if as_json:
        _print(status_json(found))
    else:
        Console(markup=False, highlight=False).print(status_view(found))
    if over is None:
        print(f"Stopped. Go on with: tuner campaign resume {campaign.name}", file=sys.stderr)
        raise typer.Exit(128 + (stop.signal_number or signal.SIGTERM))
    print(f"The campaign is over: {over}.", file=sys.stderr)


def _picture(storage: Storage) -> Callable[[View], RenderableType]:
    """Draws a view."""
    from tuner.campaigns.status import status_at, status_view

    return lambda view: status_view(status_at(storage, view))


def _status(storage: Storage, name: str) -> CampaignStatus:
    from tuner.campaigns.status import statuses

    return next(statuses(storage, name))


def _existing(storage: str | None) -> tuple[Place, Storage]:
    from studies.storage import open_storage
    from tuner.places import existing_place

    place = existing_place(storage)
    return place, open_storage(place.url)


def _print(tree: object) -> None:
    print(json.dumps(tree, indent=2, ensure_ascii=False))
