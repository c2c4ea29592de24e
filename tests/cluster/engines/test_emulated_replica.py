"""Real processes of the emulated engine: what they serve, and when."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cluster.engines.emulated_clock import StepClock, StepNoise
from cluster.engines.emulated_scheduler import Limits, Scheduler, Sequence
from search_spaces.emulation import Noise, StepTimes
from search_spaces.serving import Role
from tests.support.emulated import WORKLOAD, backend, flat_times, pool, profile, replica
from tests.support.llamacpp import Answer, ask, ask_all, open_session, request_body

pytestmark = pytest.mark.engine

SLACK_S = 0.4
"""What a busy machine may add to a request."""


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:  # noqa: S310 - a server of the test's own
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {line.partition("{")[0].removeprefix("emulated_"): float(line.rsplit(" ", 1)[1]) for line in lines}


def post(url: str, body: Any) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=10) as response:  # noqa: S310 - likewise
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [seed * 10_000 + n for n in range(tokens)]


def test_a_request_takes_the_time_of_its_steps(tmp_path: Path) -> None:
    """A prompt of 200 tokens: 10 + 200 * 0.05 = 20 ms; then 49 steps of 10 ms."""
    with replica(tmp_path, backend(), pool()) as (url, _):
        asyncio.run(ask_all(url, [request_body(prompt(10), 2)]))  # the first request pays for imports
        began = time.monotonic()
        (answer,) = asyncio.run(ask_all(url, [request_body(prompt(200), 50)]))
        took = time.monotonic() - began
    assert (answer.status, answer.done, len(answer.pieces)) == (200, True, 50)
    assert 0.51 <= took < 0.51 + SLACK_S
    timings = answer.last["timings"]
    assert 20.0 <= timings["prompt_ms"] < 150.0
    assert timings["predicted_ms"] == pytest.approx(490.0, abs=120.0)
    assert answer.last["usage"] == {"prompt_tokens": 200, "completion_tokens": 50, "total_tokens": 250}


def test_requests_are_batched(tmp_path: Path) -> None:
    """16 requests of 30 steps take hardly longer than one; with a single slot they would take 16 times as long."""
    bodies = [request_body(prompt(10, n), 30) for n in range(16)]
    with replica(tmp_path, backend(), pool()) as (url, _):
        began = time.monotonic()
        answers = asyncio.run(ask_all(url, bodies))
        took = time.monotonic() - began
        figures = metrics(url)
    assert all(len(answer.pieces) == 30 for answer in answers)
    assert took < 2.0
    assert figures["output_tokens_total"] == 16 * 30
    assert figures["prompt_tokens_total"] == 16 * 10
    assert figures["steps_total"] < 16 * 30 / 4


def test_requests_beyond_the_slots_wait(tmp_path: Path) -> None:
    bodies = [request_body(prompt(10, n), 10) for n in range(4)]
    with replica(tmp_path, backend(), pool(max_num_seqs=1)) as (url, _):
        began = time.monotonic()
        asyncio.run(ask_all(url, bodies))
        took = time.monotonic() - began
    assert took >= 4 * (10.5 + 9 * 10) / 1e3


def test_a_full_cache_makes_requests_wait_and_lose_their_blocks(tmp_path: Path) -> None:
    """Room for 1,300 tokens: four requests that end at 400 tokens begin together, and do not all fit."""
    bodies = [request_body(prompt(320, n), 80) for n in range(4)]
    with replica(tmp_path, backend(kv_tokens=1300), pool()) as (url, _):
        answers = asyncio.run(ask_all(url, bodies))
        figures = metrics(url)
    assert all(len(answer.pieces) == 80 for answer in answers)
    assert figures["preemptions_total"] >= 1
    assert figures["prompt_tokens_total"] > 4 * 320
    assert figures["kv_cache_usage_ratio"] == 0.0


def test_pipeline_stages_work_on_several_batches_at_once(tmp_path: Path) -> None:
    """A request that comes during the first of the other's steps of 1 s need not wait for its end."""

    def last_token_s(stages: int) -> float:
        times = flat_times(decode_ms=1000.0, token_ms=0.0)
        with replica(tmp_path, backend(times=times, stages=stages), pool()) as (url, _):
            return asyncio.run(staggered(url))

    async def staggered(url: str) -> float:
        async with open_session() as session:
            began = time.monotonic()
            first = asyncio.create_task(ask(session, url, request_body(prompt(10), 2)))
            await asyncio.sleep(0.1)
            await ask(session, url, request_body(prompt(10, 1), 1))
            ended = time.monotonic()
            await first
            return ended - began

    assert last_token_s(stages=2) < 2.0 <= last_token_s(stages=1)


def test_requests_spread_over_ranks_that_schedule_apart(tmp_path: Path) -> None:
    """Four ranks with one slot each serve four requests at once, though all come before the first is queued."""
    bodies = [request_body(prompt(10, n), 60) for n in range(4)]
    with replica(tmp_path, backend(ranks=4, request_ms=50.0), pool(max_num_seqs=1)) as (url, _):
        began = time.monotonic()
        asyncio.run(ask_all(url, bodies))
        took = time.monotonic() - began
    assert took < 1.2


def test_shared_prefixes_are_computed_once(tmp_path: Path) -> None:
    shared = replace(WORKLOAD, shared_prefix=0.5)
    with replica(tmp_path, backend(), pool(), workload=shared) as (url, _):
        for _ in range(2):
            (answer,) = asyncio.run(ask_all(url, [request_body(prompt(160), 2)]))
    assert answer.last["timings"]["cache_n"] == 144
    assert answer.last["timings"]["prompt_n"] == 16


def test_noise_is_seeded(tmp_path: Path) -> None:
    """The same trial meets the same noise, another trial another."""

    def busy(trial: str) -> float:
        noisy = backend(noise=Noise(step=0.2, launch=0.2))
        with replica(tmp_path, noisy, pool(), trial=trial) as (url, _):
            asyncio.run(ask_all(url, [request_body(prompt(10), 20)]))
            return metrics(url)["busy_seconds_total"]

    assert busy("t-1") == busy("t-1") != busy("t-2")


def test_a_hand_over_through_slots(tmp_path: Path) -> None:
    """1,000 tokens of 1 MB each over 50 GB/s take 20 ms, half at either end; one token is computed afterwards."""
    body = request_body(prompt(1000), 20) | {"id_slot": 3}
    with replica(tmp_path, backend(), pool(Role.PREFILL)) as (prefill, _):
        first = {**body, "max_tokens": 1, "stream": False}
        status, answer = post(f"{prefill}/v1/completions", first)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 1)
        assert metrics(prefill)["kv_cache_usage_ratio"] > 0
        status, saved = post(f"{prefill}/slots/3?action=save", {"filename": "kv-1"})
        assert (status, saved["n_saved"], saved["n_written"]) == (200, 1000, 10**9)
        assert saved["timings"]["save_ms"] == pytest.approx(10.0)
        assert metrics(prefill)["kv_cache_usage_ratio"] == 0.0
    with replica(tmp_path, backend(), pool(Role.DECODE)) as (decode, _):
        status, restored = post(f"{decode}/slots/3?action=restore", {"filename": "kv-1"})
        assert (status, restored["n_restored"]) == (200, 1000)
        (decoded,) = asyncio.run(ask_all(decode, [body]))
        assert len(decoded.pieces) == 20
        assert decoded.last["timings"]["prompt_n"] == 1
        assert decoded.last["timings"]["prompt_ms"] < 150.0
        figures = metrics(decode)
    assert figures["prompt_tokens_total"] == 0
    assert figures["kv_cache_usage_ratio"] == 0.0


def test_slots_that_hold_nothing_and_files_that_are_not_there(tmp_path: Path) -> None:
    with replica(tmp_path, backend(), pool(Role.DECODE)) as (url, _):
        assert post(f"{url}/slots/0?action=save", {"filename": "kv"})[0] == 400
        assert post(f"{url}/slots/0?action=restore", {"filename": "absent"})[0] == 400
        assert post(f"{url}/slots/0?action=restore", {"filename": "../absent"})[0] == 400
        assert post(f"{url}/slots/0?action=frobnicate", {"filename": "kv"})[0] == 400
        assert post(f"{url}/slots/0?action=erase", {})[1]["n_erased"] == 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "Invalid JSON"),
        ({"max_tokens": 4}, "prompt"),
        ({"prompt": [], "max_tokens": 4}, "prompt is empty"),
        ({"prompt": [1], "max_tokens": 0}, "max_tokens"),
        ({"prompt": [1] * 1200, "max_tokens": 400}, "max_model_len=1280"),
        ({"prompt": [1], "n": 2}, "n"),
    ],
)
def test_bad_requests_are_refused_with_the_cause(body: object, said: str, tmp_path: Path) -> None:
    with replica(tmp_path, backend(), pool()) as (url, _):
        status, answer = post(f"{url}/v1/completions", body)
    assert status == 400
    assert said in answer["error"]["message"]


def test_a_client_that_leaves_takes_its_request_along(tmp_path: Path) -> None:
    async def leave(url: str) -> None:
        async with open_session() as session:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await ask(session, url, request_body(prompt(10), 256))

    with replica(tmp_path, backend(), pool()) as (url, _):
        asyncio.run(leave(url))
        deadline = time.monotonic() + 5.0
        while (figures := metrics(url))["requests_running"] > 0:
            assert time.monotonic() < deadline
        assert figures["kv_cache_usage_ratio"] == 0.0
        assert figures["output_tokens_total"] < 100


def test_the_api_key_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_API_KEY", "secret")

    async def with_key(url: str) -> Answer:
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer secret"}) as session:
            return await ask(session, url, request_body(prompt(10), 2))

    with replica(tmp_path, backend(), pool()) as (url, _):
        assert post(f"{url}/v1/completions", request_body(prompt(10), 2))[0] == 401
        assert asyncio.run(with_key(url)).done


def test_a_start_takes_little(tmp_path: Path) -> None:
    """Dozens of them run in a test session: half a second on an idle machine, with room for a busy one."""
    began = time.monotonic()
    with replica(tmp_path, backend(), pool()):
        took = time.monotonic() - began
    assert took < 3.0


def test_the_log_and_the_health_say_that_nothing_is_real(tmp_path: Path) -> None:
    with replica(tmp_path, backend(), pool()) as (url, process):
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:  # noqa: S310 - the test's own server
            assert json.load(response)["emulated"] is True
        assert process.log.startswith("EMULATED engine: big on 1 x h100_sxm")


def test_lockstep_ranks_take_as_long_as_the_slowest() -> None:
    """A unit test of the clock: two ranks, one with a prompt, end their step together."""

    async def times() -> list[float]:
        limits = Limits(sequences=4, step_tokens=1000, blocks=100)
        ranks = [Scheduler(limits), Scheduler(limits)]
        loop = asyncio.get_running_loop()
        told: list[float] = []
        clock = StepClock(
            ranks,
            flat_times(),
            StepNoise(Noise(step=0.0, launch=0.0), "seed"),
            stages=1,
            told=lambda sequences: told.extend([loop.time() - began] * len(sequences)),
        )
        ranks[0].add(Sequence(prompt=tuple(range(400)), wanted=1))
        ranks[1].add(Sequence(prompt=tuple(range(10)), wanted=1))
        began = loop.time()
        clock.wake()
        await asyncio.sleep(0.1)
        return told

    first, second = asyncio.run(times())
    assert first == pytest.approx(second, abs=1e-3)
    assert first >= 0.030


def test_profiles_name_their_hardware() -> None:
    times: StepTimes = profile().times
    assert times.step_ms([], 4, 100.0) == 10.0
    assert profile(gpus=4).title == "4 x h100_sxm"
