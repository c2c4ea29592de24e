"""Measures llama.cpp's own steps on the node that it runs on: a replica is started, and prompts are sent to it.

A prompt alone gives the time of its prefill; sequences that decode together give the time of a decode step, from the
gaps between their tokens while all of them decode. What passes outside the engine's steps (HTTP, queueing of one
request) is measured apart. The replica keeps to its cores, the load generator to the others where there are any.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cluster.engines.base import EngineBackend, ReplicaSpec
from cluster.load.client import Answer, Endpoint, StreamingClient, completion_body
from cluster.load.prompts import ordinary_ids
from cluster.node_facts import usable_cores
from cluster.processes import ManagedProcess, free_port, wait_until_answers
from search_spaces.errors import TunerError
from search_spaces.model import ModelSpec
from search_spaces.serving import Pool
from search_spaces.workload import Workload

HOST = "127.0.0.1"
START_LIMIT_S = 120.0
REQUEST_LIMIT_S = 300.0
SCATTER = 0.15
"""Quartiles further apart than this share of the median have a point measured again."""
TRIES = 3
PASSES = 3
"""Passes over all points, of which each point's middle one counts: what disturbs a node lasts longer than a point."""
DECODE_TOKENS = (32, 64, 128, 256)
"""Tokens of each sequence: more of them where requests reach the engine at different times."""
LEAST_GAPS = 12


class StepProbeError(TunerError):
    """The engine did not start, or did not answer."""


@dataclass(frozen=True, kw_only=True)
class StepProbe:
    """Steps to measure of one replica of `pool`.

    `prompts` are lengths of prompts, in tokens; `decodes` are pairs of sequences that decode together and their
    context. `hand_over_tokens` is the length of a prompt whose KV cache is saved and restored, None for none.
    `workload` must be long enough for all. Each point is the median of `repeats`, in the middle one of three passes.
    """

    backend: EngineBackend
    model: ModelSpec
    pool: Pool
    workload: Workload
    model_dir: str
    prompts: tuple[int, ...] = ()
    decodes: tuple[tuple[int, int], ...] = ()
    hand_over_tokens: int | None = None
    repeats: int = 5


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """A measured point: `tokens` of a prompt (`seqs` 1) or the mean context of `seqs` decoding sequences.

    `latency_ms` is the median, `spread` the distance of the quartiles over it, `count` the number of repeats.
    """

    kind: str
    seqs: int
    tokens: int
    latency_ms: float
    spread: float
    count: int


def measure_steps(probe: StepProbe) -> list[StepTiming]:
    """Start a replica here, measure every point of `probe` and end it; raises `StepProbeError`."""
    cores, count = usable_cores(), probe.pool.devices_per_replica
    own, others = cores[:count], cores[count:]
    with tempfile.TemporaryDirectory(prefix="tuner-steps-") as folder:
        model = probe.backend.prepare(probe.model, Path(probe.model_dir))
        port = free_port(HOST)
        spec = ReplicaSpec(
            trial="steps",
            pool=probe.pool,
            index=0,
            host=HOST,
            port=port,
            model=model,
            workload=probe.workload,
            device_ids=own,
            work_dir=Path(folder),
            shared_dir=Path(folder),
        )
        command = probe.backend.replica_command(spec)
        command.write_files()
        process = ManagedProcess(argv=command.argv, env=command.env, log=Path(folder) / "replica.log", cores=own)
        try:
            if not wait_until_answers(process, f"http://{HOST}:{port}{command.ready_path}", START_LIMIT_S):
                raise StepProbeError(f"the engine did not start for the measurement of its steps:\n{process.tail()}")
            if others and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, others)
            return asyncio.run(_Meter(probe, model, port).measure())
        finally:
            process.terminate(5.0)


class _Meter:
    """Sends prompts to a replica that serves."""

    def __init__(self, probe: StepProbe, model: ModelSpec, port: int) -> None:
        self._probe = probe
        self._model = model
        self._port = port
        self._ids = tuple(ordinary_ids(model.vocab_size))
        self._random = random.Random(0)  # noqa: S311 - prompts, no secrets
        self._sent = 0

    async def measure(self) -> list[StepTiming]:
        """All points; the first requests warm the engine up and do not count."""
        client = StreamingClient(Endpoint(base_url=f"http://{HOST}:{self._port}"), REQUEST_LIMIT_S)
        try:
            for _ in range(2):
                await self._complete(client, 16, 4)
            passes = [await self._pass(client) for _ in range(PASSES)]
            return [_middle(found) for found in zip(*passes, strict=True)]
        finally:
            client.close()

    async def _pass(self, client: StreamingClient) -> list[StepTiming]:
        """Every point once."""
        overhead = await self._overhead(client)
        prefills = [await self._prefill(tokens) for tokens in self._probe.prompts]
        decodes = [await self._decode(client, seqs, context) for seqs, context in self._probe.decodes]
        return [overhead, *prefills, *decodes, *self._hand_over()]

    async def _overhead(self, client: StreamingClient) -> StepTiming:
        """Time of a request outside the engine's steps: TTFT less what the engine says its prompt took.

        Pairs of requests, one after the other: what slows the node down slows both.
        """
        size = 16
        outside = [
            await self._first_token_ms(client, size) - self._prompt_ms(size) for _ in range(4 * self._probe.repeats)
        ]
        least = max(median(outside), 0.05)
        return StepTiming(
            kind="request", seqs=1, tokens=size, latency_ms=least, spread=_spread(outside), count=len(outside)
        )

    async def _prefill(self, tokens: int) -> StepTiming:
        async def sample() -> float:
            return self._prompt_ms(tokens)

        return await self._point("prefill", 1, tokens, sample)

    async def _decode(self, client: StreamingClient, seqs: int, context: int) -> StepTiming:
        async def sample() -> float:
            for tokens in DECODE_TOKENS:
                prompt = max(context - tokens // 2, 1)
                answers = await asyncio.gather(*(self._complete(client, prompt, tokens) for _ in range(seqs)))
                gap_ms = _common_gap_ms(answers)
                if gap_ms is not None:
                    return gap_ms
            raise StepProbeError(
                f"{seqs} sequences did not decode together for {LEAST_GAPS} steps within {DECODE_TOKENS[-1]} tokens: "
                "requests reach the engine too late; is the node busy?"
            )

        return await self._point("decode", seqs, context, sample)

    async def _point(self, kind: str, seqs: int, tokens: int, sample: Callable[[], Awaitable[float]]) -> StepTiming:
        """The median of values of `sample`; measured again while they scatter."""
        for _ in range(TRIES):
            values = [await sample() for _ in range(self._probe.repeats)]
            if _spread(values) <= SCATTER:
                break
        return StepTiming(
            kind=kind, seqs=seqs, tokens=tokens, latency_ms=median(values), spread=_spread(values), count=len(values)
        )

    async def _first_token_ms(self, client: StreamingClient, tokens: int) -> float:
        answer = await self._complete(client, tokens, 2)
        return (answer.token_ns[0] - answer.sent_ns) / 1e6

    async def _complete(self, client: StreamingClient, tokens: int, output: int) -> Answer:
        self._sent += 1
        prompt = self._random.choices(self._ids, k=tokens)
        answer = await client.complete(completion_body(self._model.name, prompt, output), self._sent)
        if answer.error is not None:
            raise StepProbeError(f"the engine failed while its steps were measured: {answer.error_text}")
        return answer

    def _hand_over(self) -> list[StepTiming]:
        """What saving the KV cache of a prompt, and restoring it, occupies of the engine."""
        if self._probe.hand_over_tokens is None:
            return []
        tokens = self._probe.hand_over_tokens
        times: dict[str, list[float]] = {"save": [], "restore": []}
        for _ in range(self._probe.repeats):
            self._prompt_ms(tokens, slot=0)
            for action, values in times.items():
                start = time.monotonic()
                self._post(f"/slots/0?action={action}", {"filename": "probe"})
                values.append(1e3 * (time.monotonic() - start))
        return [
            StepTiming(kind=kind, seqs=1, tokens=tokens, latency_ms=median(v), spread=_spread(v), count=len(v))
            for kind, v in times.items()
        ]

    def _prompt_ms(self, tokens: int, slot: int = -1) -> float:
        """What llama.cpp itself says the prompt of a request took."""
        prompt = self._random.choices(self._ids, k=tokens)
        body = {"prompt": prompt, "n_predict": 1, "cache_prompt": slot >= 0, "id_slot": slot}
        timings = self._post("/completion", body)["timings"]
        if not isinstance(timings, dict):
            raise StepProbeError(f"the engine tells no timings, but {timings!r}")
        return float(timings["prompt_ms"])

    def _post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        """Post JSON and return the answer's; raises `StepProbeError` for another status than 200."""
        connection = http.client.HTTPConnection(HOST, self._port, timeout=REQUEST_LIMIT_S)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise StepProbeError(f"{path} answered {answer.status} while steps were measured: {text[:200]!r}")
        return dict(json.loads(text))


def _middle(found: Sequence[StepTiming]) -> StepTiming:
    """The timing of one point in the pass in which it took neither longest nor shortest."""
    return sorted(found, key=lambda timing: timing.latency_ms)[len(found) // 2]


def _common_gap_ms(answers: Iterable[Answer]) -> float | None:
    """Mean gap between tokens, in milliseconds, in the time in which all sequences decode; the median of streams.

    The mean of a stream and no single gap: several tokens may come in one read. None where that time is too short.
    """
    streams = [answer.token_ns for answer in answers]
    start, end = max(stream[0] for stream in streams), min(stream[-1] for stream in streams)
    means: list[float] = []
    for stream in streams:
        inside = [at for at in stream if start <= at <= end]
        if len(inside) > LEAST_GAPS:
            means.append((inside[-1] - inside[0]) / (len(inside) - 1) / 1e6)
    return median(means) if 2 * len(means) > len(streams) else None


def _spread(values: list[float]) -> float:
    """Distance of the quartiles over the median."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return (high - low) / max(median(ordered), 1e-9)
