"""The hand-over step by step, with stand-ins for replicas that the test can hold at every step."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from aiohttp import web

from cluster.router.app import make_runner
from cluster.router.options import RouterOptions
from tests.support.llamacpp import ask, open_session, request_body
from tests.support.web import listening, replica_runner, until

TIMINGS = {"prompt_ms": 1.0, "predicted_n": 2, "predicted_ms": 1.0}


class Held:
    """A step that goes on unless it is held; `entered` counts how often it was reached."""

    def __init__(self) -> None:
        self.entered = 0
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self) -> None:
        self.entered += 1
        await self.open.wait()


@dataclass
class StandIn:
    """Keeps the prompt of each slot as a llama.cpp replica keeps its KV cache, and saves and restores it as a file."""

    slot_dir: Path
    url: str = ""
    slots: dict[int, list[int]] = field(default_factory=dict)
    steps: defaultdict[str, Held] = field(default_factory=lambda: defaultdict(Held))
    log: list[tuple[str, int]] = field(default_factory=list)
    files_while_decoding: int | None = None
    saved_short: bool = False

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        slot, prompt = body["id_slot"], body["prompt"]
        self.log.append(("complete", slot))
        await self.steps["complete"]()
        cached = len(prompt) - 1 if body.get("cache_prompt") and self.slots.get(slot) == prompt else 0
        self.slots[slot] = prompt
        last = {
            "choices": [{"text": ""}],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": 2},
            "timings": TIMINGS | {"cache_n": cached, "prompt_n": len(prompt) - cached},
        }
        if not body["stream"]:
            assert body["max_tokens"] == 1
            return web.json_response(last)
        self.files_while_decoding = len(list(self.slot_dir.iterdir()))
        text = 'data: {"choices":[{"text":" w1"}]}\n\n' + f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"
        return web.Response(text=text, content_type="text/event-stream")

    async def act(self, request: web.Request) -> web.Response:
        slot, action = int(request.match_info["slot"]), request.query["action"]
        self.log.append((action, slot))
        await asyncio.shield(asyncio.ensure_future(self.steps[action]()))
        if action == "erase":
            self.slots.pop(slot, None)
            return web.json_response({"id_slot": slot})
        file = self.slot_dir / (await request.json())["filename"]
        if action == "save":
            file.write_text(json.dumps(self.slots[slot]))
            saved = len(self.slots[slot]) - self.saved_short
            return web.json_response({"n_saved": saved, "n_written": 10, "timings": {"save_ms": 0.1}})
        if not file.exists():
            return web.json_response({"error": {"message": "Unable to restore slot"}}, status=400)
        self.slots[slot] = json.loads(file.read_text())
        count = len(self.slots[slot])
        return web.json_response({"n_restored": count, "n_read": 10, "timings": {"restore_ms": 0.1}})

    def runner(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/slots/{slot}", self.act)
        return replica_runner(app)


@dataclass
class Bench:
    """A router before one stand-in for prefill (`prefill_slots` slots) and one for decode."""

    url: str
    prefill: StandIn
    decode: StandIn
    session: aiohttp.ClientSession
    slot_dir: Path

    def start(self, prompt: list[int]) -> asyncio.Task[object]:
        return asyncio.create_task(ask(self.session, self.url, request_body(prompt, 2)))  # type: ignore[arg-type]

    async def stats(self) -> dict[str, object]:
        async with self.session.get(f"{self.url}/router/stats") as response:
            answer: dict[str, object] = await response.json()
            return answer

    async def until_at_rest(self) -> None:
        for _ in range(500):
            stats = await self.stats()
            pools = stats["slots"]
            assert isinstance(pools, dict)
            if stats["in_flight"] == 0 and all(p["free"] == p["total"] for p in pools.values()):
                assert not list(self.slot_dir.iterdir())
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"not at rest: {await self.stats()}")


@asynccontextmanager
async def bench(slot_dir: Path, prefill_slots: int = 1, decode_slots: int = 1) -> AsyncIterator[Bench]:
    prefill, decode = StandIn(slot_dir), StandIn(slot_dir)
    async with (
        listening(prefill.runner()) as prefill_url,
        listening(decode.runner()) as decode_url,
        open_session() as session,
    ):
        options = RouterOptions(
            host="127.0.0.1",
            port=1,
            prefill_urls=(prefill_url,),
            decode_urls=(decode_url,),
            prefill_slots=prefill_slots,
            decode_slots=decode_slots,
            slot_dir=slot_dir,
        )
        async with listening(make_runner(options)) as url:
            yield Bench(url, prefill, decode, session, slot_dir)


async def test_each_step_names_the_slot_that_the_router_holds(tmp_path: Path) -> None:
    async with bench(tmp_path, prefill_slots=2, decode_slots=3) as b:
        b.decode.steps["complete"].open.clear()
        tasks = [b.start([number] * 5) for number in range(3)]
        await until(lambda: b.decode.steps["complete"].entered == 3)
        b.decode.steps["complete"].open.set()
        await asyncio.gather(*tasks)
        assert sorted(b.decode.log) == sorted((step, slot) for step in ("restore", "complete") for slot in range(3))
        assert {slot for _, slot in b.prefill.log} <= {0, 1}
        stats = await b.stats()
        assert {record["decode_prompt_n"] for record in stats["records"]} == {1}  # type: ignore[attr-defined]
        assert b.decode.files_while_decoding == 0, "a file is deleted once it is restored"
        await b.until_at_rest()


async def test_a_prefill_slot_is_free_while_its_prompt_waits_for_decode(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.decode.steps["complete"].open.clear()
        tasks = [b.start([number] * 5) for number in range(4)]
        await until(lambda: b.prefill.steps["save"].entered == 4)
        await until(lambda: len(list(tmp_path.iterdir())) == 3)
        b.decode.steps["complete"].open.set()
        await asyncio.gather(*tasks)
        await b.until_at_rest()


async def test_a_client_that_leaves_while_it_waits_is_never_computed(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.prefill.steps["complete"].open.clear()
        first = b.start([1] * 5)
        await until(lambda: b.prefill.steps["complete"].entered == 1)
        second = b.start([2] * 5)
        await asyncio.sleep(0.05)
        second.cancel()
        for _ in range(500):
            if (await b.stats())["in_flight"] == 1:
                break
            await asyncio.sleep(0.01)
        b.prefill.steps["complete"].open.set()
        await first
        assert b.prefill.steps["complete"].entered == 1
        await b.until_at_rest()


async def test_a_save_goes_on_to_its_end_when_the_client_leaves_and_its_file_is_deleted(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.prefill.steps["save"].open.clear()
        task = b.start([1] * 5)
        await until(lambda: b.prefill.steps["save"].entered == 1)
        task.cancel()
        await asyncio.sleep(0.1)
        assert (await b.stats())["in_flight"] == 1
        assert ("erase", 0) not in b.prefill.log
        b.prefill.steps["save"].open.set()
        await b.until_at_rest()
        assert b.prefill.log[-1] == ("erase", 0)


async def test_a_slot_whose_client_left_is_erased_before_the_next_request_gets_it(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.decode.steps["complete"].open.clear()
        b.decode.steps["erase"].open.clear()
        task = b.start([1] * 5)
        await until(lambda: b.decode.steps["complete"].entered == 1)
        task.cancel()
        await until(lambda: b.decode.steps["erase"].entered == 1)
        b.decode.steps["complete"].open.set()
        following = b.start([2] * 5)
        await until(lambda: b.prefill.steps["save"].entered == 2)
        await asyncio.sleep(0.05)
        assert b.decode.steps["restore"].entered == 1
        b.decode.steps["erase"].open.set()
        await following
        assert [step for step, _ in b.decode.log] == ["restore", "complete", "erase", "restore", "complete"]


async def test_a_slot_saved_in_part_is_not_decoded(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.prefill.saved_short = True
        answer = await ask(b.session, b.url, request_body([1] * 5, 2))
        assert answer.status == 502
        assert "saved 4 of 5 prompt tokens" in answer.error
        assert not b.decode.log
        await b.until_at_rest()


async def test_a_refused_restore_is_a_fault_of_the_deployment_not_of_the_client(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.decode.slot_dir = tmp_path / "another place"
        answer = await ask(b.session, b.url, request_body([1] * 5, 2))
        assert answer.status == 502
        assert "Unable to restore slot" in answer.error
        await b.until_at_rest()
