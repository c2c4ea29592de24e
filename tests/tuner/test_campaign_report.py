"""The report of a campaign: Markdown and JSON, and the page in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import Browser, find_browser
from tests.support.commands import commands_in
from tests.tuner.test_campaign_run import CAMPAIGN
from tests.tuner.test_report_browser import DRAWN, violations

pytestmark = pytest.mark.slow


async def test_the_report_tells_the_campaign_and_is_drawn_accessible_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One campaign for all of it: running one is what takes time here."""
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN.replace("name: many", "name: x-y"))
    invoke = commands_in(tmp_path, monkeypatch, capsys)
    assert invoke("campaign", "run", "campaign.yaml", "--set", "budget={device_hours: 0.04}").code == 0
    markdown = invoke("campaign", "report", "x-y", "--markdown").out
    assert "2 of 2 studies have configurations that meet every SLO" in markdown
    assert "the campaign is over: the budget is used" in markdown
    told: Any = json.loads(invoke("campaign", "report", "x-y", "--json").out)
    assert set(told["reports"]) == {"x-y.few", "x-y.many"}
    assert [slice_["study"] for slice_ in told["given_out"]][:2] == ["x-y.few", "x-y.many"]
    assert all(slice_["why"] and slice_["reason"] for slice_ in told["given_out"])
    assert told["learnt_from"]["x-y.many"], "the second study learns from the first"
    done = invoke("campaign", "report", "x-y")
    assert done.code == 0, done.err
    page = tmp_path / "tuner-data" / "reports" / "campaign.x-y" / "report.html"
    assert len(page.read_bytes()) < 5_000_000
    await look_at(page, tmp_path)


async def look_at(page: Path, folder: Path) -> None:
    find_browser()
    async with Browser(folder) as browser:
        await browser.send(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        for width, dark in ((390, True), (1440, False)):
            await browser.view(width, dark=dark)
            await browser.open(page.as_uri(), DRAWN)
            assert await browser.run("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
            assert not await violations(browser)
            drawn = "[...document.querySelectorAll('.chart')].filter(c => c.querySelector('.main-svg')).length"
            assert await browser.run(drawn) == 4, "growth, spending, and a front for each study"
            shot = await browser.screenshot(folder / f"campaign-{width}.png")
            assert shot.stat().st_size > 50_000
        assert {url for url in browser.requested if not url.startswith("data:")} == {page.as_uri()}
        assert not browser.faults
