"""Opening a campaign: the record in its storage, made or found, and what may have changed since."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from search_spaces.errors import TunerError
from studies.campaign_store import CampaignStore, campaign_names, campaign_study, create_campaign
from studies.errors import StudyBusyError, StudyNotFoundError
from studies.lease import Lease, take_lease
from studies.storage import Storage
from tuner.campaigns.campaign import Campaign, check_same_cells, dump_rules
from tuner.campaigns.record import Record
from tuner.campaigns.run import BUDGET_USED
from tuner.remote import Job
from tuner.session import lease_times, lease_wait_s


class CampaignBusyError(TunerError):
    """Another live process runs the campaign."""


@contextmanager
def campaign_lease(storage: Storage, name: str) -> Iterator[Lease]:
    """The right to run campaign `name`; raises `CampaignBusyError` where another process has it."""
    try:
        lease = take_lease(storage, campaign_study(name), lease_times(), wait_s=lease_wait_s())
    except StudyBusyError as error:
        raise CampaignBusyError(
            f"campaign {name!r} is run already: {error.holder or error}. Follow it with: tuner campaign status {name}; "
            f"end it with: tuner campaign stop {name}"
        ) from error
    with lease:
        yield lease


def job_of(name: str) -> Job:
    """Campaign `name`, as what follows and stops runners takes it."""
    return Job(kind="campaign", name=name, lease=campaign_study(name))


def begin(storage: Storage, campaign: Campaign) -> Record:
    """The record of `campaign`, written where it is new; its lease is the caller's.

    Raises `CampaignChangedError` where it was begun with other studies. Where its rules have changed since, or it has
    new studies, a campaign that was over goes on: studies that had been closed for want of budget are open again.
    """
    record = Record(create_campaign(storage, campaign.name))
    if not record.is_begun:
        record.begin(campaign)
        return record
    stored = record.cells()
    check_same_cells(stored, campaign)
    before = record.campaign()
    same = dump_rules(before.rules) == dump_rules(campaign.rules) and len(stored) == len(campaign.cells)
    if not same:
        record.begin(campaign)
        reopen(record)
    return record


def reopen(record: Record) -> None:
    """Let a campaign that was over go on, with the studies that had been closed for want of budget."""
    memory = record.memory()
    for cell in memory.cells.values():
        if cell.closed == BUDGET_USED:
            record.note_cell(replace(cell, closed=None, closed_s=None))
    if memory.ended is not None:
        record.note_end(None)


def begun(storage: Storage) -> tuple[str, ...]:
    """Names of the campaigns of `storage`, but for those that are only just being made."""
    return tuple(name for name in campaign_names(storage) if Record(CampaignStore(storage, name)).is_begun)


def existing(storage: Storage, name: str) -> Record:
    """The record of a campaign that was begun; raises `StudyNotFoundError`."""
    record = Record(CampaignStore(storage, name))
    if not record.is_begun:
        raise StudyNotFoundError(f"campaign {name!r} is being made, or its making was cut off; run its file again")
    return record


def whoami() -> str:
    """Who gives an order: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
