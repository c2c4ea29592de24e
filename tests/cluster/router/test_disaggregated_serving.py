"""Prefill and decode in different processes, against the same model in one."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from cluster.engines.llamacpp import LlamaCppBackend
from search_spaces.model import ModelSpec
from search_spaces.serving import Role
from tests.support.llamacpp import (
    EXACT_OPTIONS,
    SMALL_MODEL,
    Deployment,
    ask,
    ask_all,
    ask_in_turn,
    deployed,
    metric,
    open_session,
    pool,
    prompts,
    request_body,
)

pytestmark = pytest.mark.engine

PREFILL = pool(Role.PREFILL, 2, **EXACT_OPTIONS)
DECODE = pool(Role.DECODE, 4, batch_size=256, ubatch_size=128, **EXACT_OPTIONS)
MIXED = pool(Role.MIXED, 4, **EXACT_OPTIONS)
DECODE_SLOTS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return LlamaCppBackend().prepare(SMALL_MODEL, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def aggregated(model: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(model, tmp_path_factory.mktemp("aggregated"), {MIXED: 1}) as running:
        yield running


@pytest.fixture(scope="module")
def split(model: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(model, tmp_path_factory.mktemp("split"), {PREFILL: 2, DECODE: 2}) as running:
        yield running


@pytest.fixture
async def at_rest(split: Deployment) -> AsyncIterator[Deployment]:
    """The deployment; after the test every slot must come free again and no file be left."""
    yield split
    deadline = time.monotonic() + 10
    while not split.is_at_rest():
        assert time.monotonic() < deadline, f"not at rest: {split.stats(last=3)}, {list(split.shared_dir.glob('kv-*'))}"
        await asyncio.sleep(0.02)


async def test_tokens_equal_aggregated_ones_and_nothing_is_prefilled_twice(
    aggregated: Deployment, at_rest: Deployment
) -> None:
    asked = prompts(24, seed=1)
    bodies = [request_body(prompt, 32) for prompt in asked]
    decode_urls = [url for url, replica in at_rest.replicas.items() if "decode" in replica.log_path.name]
    prefilled_before = sum(metric(url, "prompt_tokens_total") for url in decode_urls)
    since = time.time_ns()

    alone = await ask_in_turn(aggregated.url, bodies)
    together = await ask_all(at_rest.url, bodies)

    assert len({answer.pieces for answer in alone}) == len(asked), "the model must answer each prompt in its own way"
    for prompt, one, other in zip(asked, alone, together, strict=True):
        assert len(one.pieces) == 32
        assert other.pieces == one.pieces
        assert other.done
        assert other.last["usage"]["prompt_tokens"] == len(prompt)
        assert other.last["timings"]["prompt_n"] == 1
        assert other.last["timings"]["cache_n"] == len(prompt) - 1
    assert sum(metric(url, "prompt_tokens_total") for url in decode_urls) - prefilled_before == len(asked)
    records = at_rest.stats(since_ns=since)["records"]
    assert sorted(record["prompt_tokens"] for record in records) == sorted(len(prompt) for prompt in asked)
    assert {record["decode_prompt_n"] for record in records} == {1}


async def test_stats_account_for_the_hand_over(at_rest: Deployment) -> None:
    since = time.time_ns()
    (answer,) = await ask_all(at_rest.url, [request_body(prompts(1, seed=2)[0], 8)])
    stats = at_rest.stats(since_ns=since)
    (record,) = stats["records"]
    assert stats["mode"] == "disaggregated"
    assert record["ending"] == "completed"
    tokens = record["prompt_tokens"]
    kv_bytes = tokens * 3 * 2 * 2 * 32 * 4  # layers, keys and values, KV heads, head size, f32
    assert kv_bytes < record["kv_bytes"] < 1.1 * kv_bytes + 4096
    assert 0 < record["save_engine_ms"] < record["save_ms"]
    assert 0 < record["restore_engine_ms"] < record["restore_ms"]
    assert record["hand_over_ms"] == pytest.approx(record["save_ms"] + record["restore_ms"])
    parts = ("prefill_queue_ms", "prefill_ms", "hand_over_ms", "decode_queue_ms", "first_chunk_ms")
    assert sum(record[part] for part in parts) <= record["total_ms"]
    assert stats["summary"]["kv_bytes"]["count"] == 1
    assert answer.last["usage"]["completion_tokens"] == 8


async def test_a_storm_of_four_times_the_slots_completes(at_rest: Deployment) -> None:
    since = time.time_ns()
    asked = prompts(4 * DECODE_SLOTS, seed=3, longest=96)
    answers = await ask_all(at_rest.url, [request_body(prompt, 24) for prompt in asked])
    assert [(len(answer.pieces), answer.done) for answer in answers] == [(24, True)] * len(asked)
    records = at_rest.stats(since_ns=since)["records"]
    assert max(record["prefill_queue_ms"] for record in records) > 0.5
    used = {record["replica"] for record in records}
    assert len(used) == 2, "both decode replicas take part"


async def test_clients_that_go_away_leave_no_slot_and_no_file_behind(
    aggregated: Deployment, at_rest: Deployment
) -> None:
    rng = random.Random(4)
    asked = prompts(24, seed=4)
    async with open_session() as session:
        tasks = [asyncio.create_task(ask(session, at_rest.url, request_body(prompt, 64))) for prompt in asked]
        for task in tasks[::2]:
            await asyncio.sleep(rng.uniform(0, 0.04))
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    stayed = answers[1::2]
    assert all(not isinstance(answer, BaseException) and len(answer.pieces) == 64 for answer in stayed)
    assert any(isinstance(answer, asyncio.CancelledError) for answer in answers)
    bodies = [request_body(prompt, 16) for prompt in prompts(8, seed=5)]
    alone, after = await ask_in_turn(aggregated.url, bodies), await ask_all(at_rest.url, bodies)
    assert [answer.pieces for answer in after] == [answer.pieces for answer in alone]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"prompt": [300] * 1500}, "exceeds the available context size"),
        ({"prompt": [10**6]}, "invalid tokens"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": [[300, 301], [302]]}, "prompt must be"),
        ({"n": 2}, "n=2"),
        ({"max_tokens": "many"}, "max_tokens"),
    ],
)
async def test_what_cannot_be_answered_is_refused_with_its_cause(
    at_rest: Deployment, change: dict[str, object], cause: str
) -> None:
    (answer,) = await ask_all(at_rest.url, [request_body([300, 301], 4) | change])
    assert answer.status == 400
    assert cause in answer.error


async def test_text_prompts_and_whole_answers_are_served_too(aggregated: Deployment, at_rest: Deployment) -> None:
    body = {"prompt": "w7 w8 w9 and other words", "max_tokens": 6, "temperature": 0}
    texts = []
    async with open_session() as session:
        for url in (aggregated.url, at_rest.url):
            async with session.post(f"{url}/v1/completions", json=body) as response:
                assert response.status == 200
                texts.append((await response.json())["choices"][0]["text"])
    assert texts[0] == texts[1]
    assert len(texts[0].split()) == 6


async def test_a_dead_decode_replica_is_told_of_and_leaks_nothing(model: ModelSpec, tmp_path: Path) -> None:
    with deployed(model, tmp_path, {PREFILL: 1, DECODE: 1}) as running:
        decode = next(replica for replica in running.replicas.values() if "decode" in replica.log_path.name)
        asked = [request_body(prompt, 400) for prompt in prompts(6, seed=6)]
        storm = asyncio.create_task(ask_all(running.url, asked))
        while not is_decoding(running):  # noqa: ASYNC110 - the event happens in another process
            await asyncio.sleep(0.01)
        decode.process.kill()
        answers = await storm
        assert not any(answer.done for answer in answers)
        assert {answer.status for answer in answers} <= {200, 502}
        assert all("broke off" in answer.error or "not reached" in answer.error for answer in answers)
        assert running.stats(last=0)["endings"] == {"completed": 0, "failed": 6, "cancelled": 0}
        async with open_session() as session, session.get(f"{running.url}/health") as response:
            assert response.status == 503
        deadline = time.monotonic() + 10
        while not running.is_at_rest():
            assert time.monotonic() < deadline, running.stats(last=0)
            await asyncio.sleep(0.02)


def is_decoding(running: Deployment) -> bool:
    slots = running.stats(last=0)["slots"]["decode"]
    return int(slots["free"]) < int(slots["total"])


async def test_an_api_key_is_asked_for_where_one_is_set(
    model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_API_KEY", "secret")
    with deployed(model, tmp_path, {PREFILL: 1, DECODE: 1}) as running:
        body = request_body([300, 301, 302], 4)
        async with open_session() as session:
            assert (await ask(session, running.url, body)).status == 401
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer secret"}) as session:
            assert len((await ask(session, running.url, body)).pieces) == 4
        for url in running.replicas:
            async with open_session() as session:
                assert (await ask(session, url, body)).status == 401
