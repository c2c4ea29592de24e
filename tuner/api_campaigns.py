"""Campaigns, as the public API has them: see `tuner.api`."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from studies.campaign_store import campaign_study
from studies.lease import is_free, order_stop, read_events, read_lease
from studies.lease_record import Event
from studies.storage import Storage, faults_told, open_storage
from tuner.campaigns import start
from tuner.campaigns.campaign import Campaign as Asked
from tuner.campaigns.campaign import load_campaign as read_campaign
from tuner.campaigns.open import begun, campaign_lease, existing, whoami
from tuner.campaigns.record import Pause
from tuner.campaigns.report import campaign_json, campaign_markdown, story
from tuner.campaigns.report_html import campaign_html
from tuner.campaigns.run import CampaignObserver
from tuner.campaigns.status import CampaignStatus, statuses
from tuner.campaigns.view import CampaignView
from tuner.places import Place, existing_place, find_place


@dataclass(frozen=True)
class Campaign:
    """A stored campaign, read anew at each question; `load_campaign` finds one."""

    name: str
    place: Place
    storage: Storage

    @property
    def studies(self) -> tuple[str, ...]:
        """Names of its studies that have begun or will, in the order of the matrix; `load_study` opens one."""
        return tuple(standing.record.study for standing in self.status().view.standings)

    def status(self) -> CampaignStatus:
        """How it stands: its studies, spending, pools and who runs it (`tuner campaign status`)."""
        return next(statuses(self.storage, self.name))

    def logs(self, after: int = 0) -> tuple[Event, ...]:
        """What its runners have written behind line `after` (`tuner campaign logs`)."""
        return tuple(read_events(self.storage, campaign_study(self.name), after))

    def pause(self) -> None:
        """Let it measure nothing until it is resumed (`tuner campaign pause`)."""
        existing(self.storage, self.name).order_pause(Pause(at_s=time.time(), by=whoami()))

    def resume(self, *, address: str | None = None, observer: CampaignObserver | None = None) -> Campaign:
        """Take a pause back; where nobody runs it, go on with it to its end (`tuner campaign resume`)."""
        record = existing(self.storage, self.name)
        record.order_pause(None)
        if is_free(read_lease(self.storage, campaign_study(self.name))):
            _run(record.campaign(), self.place, address, observer)
        return self

    def stop(self) -> str:
        """Order its runner to end, wherever it is; returns who that is (`tuner campaign stop --wait 0`).

        Raises `StudyNotFoundError` where nobody runs it.
        """
        return str(order_stop(self.storage, campaign_study(self.name)).holder)

    def write_report(self, path: str | Path | None = None, form: Literal["html", "markdown", "json"] = "html") -> Path:
        """Write its report and return the path (`tuner campaign report`).

        By default that is `reports/campaign.NAME/report.html` (`.md`, `.json`) beside the storage.
        """
        told = story(self.storage, self.status())
        texts = {
            "html": lambda: campaign_html(told),
            "markdown": lambda: campaign_markdown(told),
            "json": lambda: json.dumps(campaign_json(told), indent=2, ensure_ascii=False),
        }
        ending = {"html": "html", "markdown": "md", "json": "json"}[form]
        found = Path(path or self.place.reports(campaign_study(self.name)) / f"report.{ending}")
        found.parent.mkdir(parents=True, exist_ok=True)
        found.write_text(texts[form](), encoding="utf-8")
        return found


def load_campaign(name: str, storage: str | None = None) -> Campaign:
    """The stored campaign called `name`; `storage` is a URL, TUNER_STORAGE or ./tuner-data by default.

    Raises `StudyNotFoundError` with the names there are.
    """
    place = existing_place(storage)
    opened = open_storage(place.url)
    existing(opened, name)
    return Campaign(name, place, opened)


def list_campaigns(storage: str | None = None) -> tuple[str, ...]:
    """Names of the campaigns of a storage (`tuner campaign list`)."""
    return begun(open_storage(existing_place(storage).url))


def run_campaign(
    path: str | Path,
    *overrides: str,
    storage: str | None = None,
    address: str | None = None,
    observer: CampaignObserver | None = None,
) -> Campaign:
    """Run the campaign file at `path` to its end, or go on with it (`tuner campaign run`), and return it.

    `overrides` (`budget.device_hours=8`) are for its rules, `address` is that of a Ray cluster, None for this machine.
    Without an `observer` lines of progress go to stderr.
    """
    asked, named = read_campaign(Path(path), overrides)
    return _run(asked, find_place(storage or named), address, observer)


def _run(asked: Asked, place: Place, address: str | None, observer: CampaignObserver | None) -> Campaign:
    opened = open_storage(place.url)
    with faults_told(opened), campaign_lease(opened, asked.name) as lease:
        view = CampaignView(Console(stderr=True, markup=False, highlight=False), None, lease.note)
        with view if observer is None else nullcontext(observer) as watching:
            start.run_campaign(
                asked, place, opened, lease, address=address, stop_requested=lambda: False, observer=watching
            )
    return Campaign(asked.name, place, opened)
