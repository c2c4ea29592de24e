"""Putting a runner of a campaign together: its slices, here or side by side on a cluster, and who listens."""

from __future__ import annotations

import os
from collections.abc import Callable

from studies.lease import Lease
from studies.storage import Storage, open_storage
from tuner import wiring
from tuner.access import Connect
from tuner.campaigns.campaign import Campaign
from tuner.campaigns.herald import Herald
from tuner.campaigns.open import begin, campaign_lease, job_of
from tuner.campaigns.run import CampaignObserver, CampaignRun
from tuner.campaigns.slices import SliceRunner, SlicesApart, SlicesHere
from tuner.campaigns.webhooks import Post
from tuner.detached import Task, detach, require_address
from tuner.places import Place
from tuner.study_schema import StudyFile

MOST_AT_ONCE = 8
"""Studies side by side where the file leaves their number open: each has a process of this machine."""


def run_campaign(
    campaign: Campaign,
    place: Place,
    storage: Storage,
    lease: Lease,
    *,
    address: str | None,
    stop_requested: Callable[[], bool],
    observer: CampaignObserver,
) -> str | None:
    """Begin `campaign`, or go on with it, and return why it is over; None where it was stopped."""
    record, hooks = begin(storage, campaign), campaign.rules.notify
    herald = Herald(record=record, post=Post(hooks), note=observer.note) if hooks else None
    run = CampaignRun(
        campaign=record.campaign(),
        record=record,
        storage=storage,
        place=place,
        lease=lease,
        slices=_slices(campaign, place, address),
        observer=observer,
        stop_requested=stop_requested,
        listeners=[herald] if herald is not None else [],
    )
    if isinstance(run.slices, SlicesHere):
        run.slices.stop_requested = run.is_halted
    try:
        ended = record.memory().ended
        if ended is None:
            return run.run()
        observer.note(f"the campaign is over already: {ended.reason}; raise its budget to go on")
        return ended.reason
    finally:
        if herald is not None:  # what the runner before could not send leaves even where there is nothing to run
            herald.close()


def detach_campaign(campaign: Campaign, place: Place, address: str | None) -> None:
    """Begin `campaign`, or go on with it, by a runner on the Ray cluster at `address`; return once that has its lease.

    It reads the campaign from the storage, and gets the webhooks' URLs of this process's environment. Raises
    `CampaignBusyError` where it is run already, and `TunerError` where its runner does not begin.
    """
    there, storage = require_address(address), open_storage(place.url)
    with campaign_lease(storage, campaign.name):
        begin(storage, campaign)
    urls = [hook.url_env for hook in campaign.rules.notify if hook.url_env is not None]
    for missing in sorted(set(urls) - os.environ.keys()):
        print(f"The variable {missing} is not set here: its webhook is told only where the runner's node sets it.")
    task = Task(
        job=job_of(campaign.name),
        arguments=("campaign", "run", campaign.name),
        node_pools=tuple(wiring.make_problem(cell.study).node_pools for cell in campaign.cells),
        environment={name: os.environ[name] for name in urls if name in os.environ},
    )
    detach(task, place, storage, there)


def _slices(campaign: Campaign, place: Place, address: str | None) -> SliceRunner:
    """On this machine studies would disturb each other's timings: one at a time. A cluster gives each its nodes."""
    if address is None:
        return SlicesHere(connector=_connector, place=place, stop_requested=lambda: False)
    wanted = campaign.rules.slices.side_by_side
    at_once = min(MOST_AT_ONCE, len(campaign.cells)) if wanted == "auto" else wanted
    folder = place.directory / "work" / f"campaign.{campaign.name}"
    return SlicesApart(address=address, place=place, folder=folder, at_once=at_once)


def _connector(study: StudyFile, avoid: tuple[str, ...]) -> Connect:
    return wiring.connector(None, study, avoid)
