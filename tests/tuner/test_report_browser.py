"""The report in a real browser: drawn without a network, at the widths of a phone and a desktop, light and dark."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from studies.records import Origin
from tests.support.browser import Browser, find_browser
from tests.support.reports import a_report
from tuner.report import StudyReport
from tuner.report_html import write_front

pytestmark = pytest.mark.slow
AXE = Path(__file__).parents[1] / "data" / "axe" / "axe.min.js"
DRAWN = "document.documentElement.dataset.drawn === 'true'"
SERIOUS = {"serious", "critical"}


def with_repeats() -> StudyReport:
    """A report with a default, three runs of each member of the front, and a study file."""
    plain = a_report()
    last = plain.trials[-1].number
    first = replace(plain.trials[0], origin=Origin.DEFAULT)
    again = [
        replace(member, number=last + 1 + 2 * index + run, origin=Origin.CONFIRM, repeat_of=member.number)
        for index, member in enumerate(plain.front)
        for run in range(2)
    ]
    return replace(plain, trials=(first, *plain.trials[1:], *again), study_file="name: toy\n")


def predictions(folder: Path) -> Path:
    count = 300
    spread = np.linspace(20.0, 400.0, count)
    columns = {
        "trial": np.arange(count),
        "key": [f"k{index}" for index in range(count)],
        "predicted_output_tokens_per_s_per_gpu": spread,
        "predicted_output_tokens_per_s_per_user": spread[::-1],
    }
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "0000000-0.parquet")
    return folder


async def violations(browser: Browser) -> list[dict[str, Any]]:
    """What axe finds on the page as it is shown, serious and critical alone."""
    await browser.run(f"{AXE.read_text()};0")
    found = await browser.run("axe.run().then(r => JSON.stringify(r.violations))")
    return [each for each in json.loads(found) if each["impact"] in SERIOUS]


async def test_every_width_and_scheme_is_drawn_accessible_and_fetches_nothing(tmp_path: Path) -> None:
    find_browser()
    page = write_front(with_repeats(), tmp_path / "front.html", predictions(tmp_path / "predictions"))
    assert page.stat().st_size < 5_000_000
    grounds = {}
    async with Browser(tmp_path) as browser:
        await browser.send(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        for width in (390, 1440):
            for dark in (False, True):
                await browser.view(width, dark=dark)
                await browser.open(page.as_uri(), DRAWN)
                assert await browser.run("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
                assert not await violations(browser)
                legends = (
                    "[...document.querySelectorAll('.chart .legend, .symbols')].map(l => l.getBoundingClientRect())"
                )
                seen = await browser.run(f"{legends}.filter(box => box.width > 0).length")
                assert seen == 1 if width == 390 else seen > 1, "one legend for a narrow page, one in each chart else"
                grounds[dark] = await browser.run("getComputedStyle(document.body).backgroundColor")
                name = f"{width}-{'dark' if dark else 'light'}.png"
                assert (await browser.screenshot(tmp_path / name)).stat().st_size > 50_000
        assert grounds[False] != grounds[True]
        assert {url for url in browser.requested if not url.startswith("data:")} == {page.as_uri()}
        assert not browser.faults


async def test_points_tell_their_configuration_and_the_cloud_lies_behind(tmp_path: Path) -> None:
    find_browser()
    found = with_repeats()
    page = write_front(found, tmp_path / "front.html", predictions(tmp_path / "predictions"))
    chart = "document.querySelector('#front .chart')"
    async with Browser(tmp_path) as browser:
        await browser.view(1440, dark=False)
        await browser.open(page.as_uri(), DRAWN)
        names = await browser.run(f"{chart}.data.map(trace => trace.name || '').join()")
        assert names.startswith("predicted,misses an SLO,aggregated")
        assert await browser.run(f"{chart}.data[0].x.length") == 300
        rings = await browser.run(f"{chart}.data.find(trace => trace.name === 'Pareto front').x.length")
        assert rings == len(found.front)
        await browser.run(f"Plotly.Fx.hover({chart}, [{{curveNumber: 2, pointNumber: 0}}])")
        await browser.until(f"{chart}.querySelector('.hoverlayer').textContent.includes('ttft_p50_ms')")
        told = await browser.run(f"{chart}.querySelector('.hoverlayer').textContent")
        assert told.startswith(await browser.run(f"{chart}.data[2].text[0].match(/trial \\d+/)[0]"))
        assert "aggregated at concurrency=" in told
        shaded = await browser.run(
            "[...document.querySelectorAll('#front .chart')].some(c => (c.layout.shapes || []).length > 0)"
        )
        assert shaded, "an SLO on TTFT shades a chart over TTFT"
        before = await browser.run(f"{chart}.layout.font.color")
        await browser.view(1440, dark=True)
        await browser.until(f"{chart}.layout.font.color !== '{before}'")
