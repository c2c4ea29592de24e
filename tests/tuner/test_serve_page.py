"""The page of `tuner serve` in a real browser: what it shows, to whom, and that a study cannot write into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from tests.support.browser import Browser, find_browser
from tests.support.commands import TEXT
from tests.support.served import READ, WRITE, listening, service, study_text, toy_storage
from tuner.serve.access import Tokens
from tuner.serve.app import make_app

pytestmark = pytest.mark.slow
AXE = Path(__file__).parents[1] / "data" / "axe" / "axe.min.js"
EVIL = "<img src=x onerror=document.title='taken'>"
SHOWN = "document.getElementById('study').dataset.ended === 'true' && document.querySelector('#chart svg')"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study whose node pool is called by a piece of HTML: it stands in the log."""
    find_browser()
    text = TEXT.replace("{local:", f'{{"{EVIL}":')
    assert EVIL in text
    return toy_storage(tmp_path_factory.mktemp("page"), text)


async def serious(browser: Browser) -> list[dict[str, Any]]:
    """What axe finds, in a world of its own: the page's policy lets no other script in."""
    await browser.send("Page.setBypassCSP", enabled=True)
    await browser.run(f"{AXE.read_text()};0")
    found = json.loads(await browser.run("axe.run().then(r => JSON.stringify(r.violations))"))
    return [each for each in found if each["impact"] in {"serious", "critical"}]


async def test_studies_and_a_live_front_at_every_width_and_scheme(url: str, tmp_path: Path) -> None:
    with listening(make_app(service(url, Tokens()))) as base:
        async with Browser(tmp_path) as browser:
            for width in (390, 1280):
                for dark in (False, True):
                    await browser.view(width, dark=dark)
                    await browser.open("about:blank", "true")
                    await browser.open(f"{base}/#study/toy", SHOWN)
                    wide = await browser.run("document.documentElement.scrollWidth")
                    assert wide <= width, "the page scrolls sideways"
                    name = f"{width}-{'dark' if dark else 'light'}.png"
                    assert (await browser.screenshot(tmp_path / name)).stat().st_size > 20_000
                    assert not await serious(browser)
            assert await browser.run("document.querySelector('#studies th').textContent") == "toy"
            assert await browser.run("document.getElementById('state').textContent") == "finished"
            points = await browser.run("document.querySelectorAll('#chart .front-mark').length")
            assert points == await browser.run("document.querySelectorAll('#front tr').length") > 0
            assert await browser.run("document.getElementById('submit-box').hidden"), "without a token nothing is sent"
            await browser.run("document.querySelector('#log-box summary').click()")
            await browser.until(f"document.getElementById('log').textContent.includes({json.dumps(EVIL)})")
            assert await browser.run("document.querySelectorAll('main img').length") == 0, "what a study says is text"
            assert await browser.run("document.title") == "tuner: studies"
            outside = [asked for asked in browser.requested if not asked.startswith((base, "data:", "about:"))]
            assert not outside
            assert not browser.faults


async def test_the_report_opens_and_belongs_to_no_origin(url: str, tmp_path: Path) -> None:
    with listening(make_app(service(url, Tokens()))) as base:
        async with Browser(tmp_path) as browser:
            await browser.view(1280, dark=False)
            drawn = "document.documentElement.dataset.drawn === 'true'"
            await browser.open(f"{base}/api/v1/studies/toy/report", drawn)
            assert await browser.run("self.origin") == "null"
            asked = f"fetch('{base}/api/v1/studies').then(a => a.text()).catch(e => 'refused')"
            assert await browser.run(asked) == "refused"
            assert not browser.faults


@pytest.mark.long
async def test_a_token_opens_it_and_a_study_is_sent(url: str, tmp_path: Path) -> None:
    served = service(url)
    with listening(make_app(served)) as base:
        async with Browser(tmp_path) as browser:
            await browser.view(1280, dark=False)
            await browser.open(base, "!document.getElementById('access').hidden")
            assert await browser.run("document.getElementById('list').hidden")
            await enter(browser, "x" * 32)
            await browser.until("document.getElementById('said').textContent.includes('not one of this service')")
            await enter(browser, READ)
            await browser.until("document.querySelectorAll('#studies tr').length === 1")
            assert (
                await send(browser, study_text("sent"))
                == "the write token is needed; without one the service only reads"
            )
            await browser.run("document.getElementById('forget').click()")
            await enter(browser, WRITE)
            await browser.until("!document.getElementById('list').hidden")
            assert "names a file of the server" in await send(browser, study_text("sent") + "model: {gguf: /x}\n")
            assert "Study sent" in await send(browser, study_text("sent"))
            await browser.until("location.hash === '#study/sent'", timeout_s=240)
            await browser.until(SHOWN, timeout_s=240)
            await browser.until("document.querySelectorAll('#studies tr').length === 2")
            assert WRITE not in await browser.run(
                "document.documentElement.outerHTML + location.href + document.cookie"
            )
            assert not browser.faults


async def enter(browser: Browser, token: str) -> None:
    """Give the page a token as a user does."""
    await browser.run(
        f"document.getElementById('token').value = {json.dumps(token)};document.querySelector('#access button').click()"
    )


async def send(browser: Browser, text: str) -> str:
    """Submit a study on the page; what it says then."""
    await browser.run(
        "document.getElementById('submit-box').open = true;"
        f"document.getElementById('text').value = {json.dumps(text)};"
        "document.querySelector('#submit button').click()"
    )
    said = "document.getElementById('submitted').textContent"
    await browser.until(f"{said} && {said} !== 'Checking.'")
    return str(await browser.run(said))
