"""When the parts of a hand-over happen on real engines: what `perf_model.disaggregated` takes for granted."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from cluster.engines.llamacpp import LlamaCppBackend
from search_spaces.model import Attention, DenseFeedForward, LayerGroup, ModelSpec
from search_spaces.serving import Role
from search_spaces.workload import Length, Workload
from tests.support.llamacpp import VOCABULARY, ask, deployed, open_session, pool, prompts, request_body
from tests.support.web import until

pytestmark = pytest.mark.engine

PROMPT = 768
MODEL = ModelSpec(
    name="slow",
    hidden_size=512,
    vocab_size=VOCABULARY,
    layers=(
        LayerGroup(
            count=4,
            attention=Attention(heads=8, kv_heads=4, head_dim=64),
            feed_forward=DenseFeedForward(intermediate_size=2048),
        ),
    ),
    max_context=2048,
)


async def test_prompts_that_wait_share_a_step_and_a_save_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts come while a first one is computed: they are computed together, and only then is the first saved."""
    monkeypatch.setattr("tests.support.llamacpp.WORKLOAD", Workload(isl=Length(mean=PROMPT), osl=Length(mean=8)))
    model = LlamaCppBackend().prepare(MODEL, tmp_path)
    bodies = [request_body((2 * prompt)[:PROMPT], 4) for prompt in prompts(3, seed=0, longest=2 * PROMPT)]
    pools = {pool(Role.PREFILL, 4): 1, pool(Role.DECODE, 4): 1}
    with deployed(model, tmp_path / "run", pools) as running:
        async with open_session() as session:
            since = time.time_ns()
            first = asyncio.create_task(ask(session, running.url, bodies[0]))
            await until(lambda: running.stats()["slots"]["prefill"]["free"] < 4)
            await asyncio.sleep(0.05)  # its step has begun, and takes ten times as long
            await asyncio.gather(first, *(ask(session, running.url, body) for body in bodies[1:]))
        one, two, three = sorted(running.stats(since_ns=since)["records"], key=lambda record: record["started_ns"])
    together = two["prefill_engine_ms"]
    assert three["prefill_engine_ms"] == pytest.approx(together, rel=0.2)
    assert together > 1.3 * one["prefill_engine_ms"]
    assert one["save_ms"] > 0.5 * together
    assert max(two["save_ms"], three["save_ms"]) < 0.5 * together
