"""How much the load client adds to what it measures.

A server of known timing (a process of its own) records when it read each request and wrote each token. What the client
says beyond that is its error: for TTFT (the client's less the server's) of each request, for ITL of each gap. Both
processes read the same monotonic clock. `--compare` adds a plain aiohttp client with a connection for each request, on
the same server and the same prompts.

    python benchmarks/client_accuracy.py [--json] [--compare] [--concurrency 1 4 16 64] [--requests 128]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.load.client import completion_body
from cluster.load.driver import LoadRun, run_load
from cluster.load.measure import lateness_ms
from cluster.load.prompts import Prompts, ordinary_ids
from cluster.load.timings import Phase
from search_spaces.measuring import MeasurementRule
from search_spaces.workload import Arrival, Length, Load, Workload
from tests.support.timed_server import Behaviour, Truth, timed_server


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Errors in milliseconds (p50 and p99 over requests or gaps), and what the client took to make them.

    `lateness_p99_ms` is what our client reports of itself, None for the other.
    """

    client: str
    concurrency: int
    requests: int
    ttft_truth_p50_ms: float
    ttft_error_p50_ms: float
    ttft_error_p99_ms: float
    itl_truth_p50_ms: float
    itl_error_p50_ms: float
    itl_error_p99_ms: float
    itl_mean_error_percent: float
    lateness_p99_ms: float | None
    client_us_per_token: float


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What a client says of one request, `time.monotonic_ns`."""

    index: int
    sent_ns: int
    token_ns: Sequence[int]


async def _ours(run: LoadRun) -> tuple[list[Stream], float | None]:
    result = await run_load(run)
    start_ns = result.timings.start_monotonic_ns
    streams = [
        Stream(index=t.index, sent_ns=t.sent_ns + start_ns, token_ns=[at + start_ns for at in t.token_ns])
        for t in result.timings.of_phase(Phase.MEASURED)
        if t.completed
    ]
    return streams, lateness_ms(result)


async def _plain_aiohttp(run: LoadRun) -> tuple[list[Stream], float | None]:
    """The shortest honest client: stamp each read, look for events in it."""
    total = run.warm_up_requests + run.rule.requests
    prompts = Prompts(workload=run.workload, vocabulary=ordinary_ids(run.vocab_size), seed=run.seed)
    planned = iter([prompts.request(index) for index in range(total)])
    streams: list[Stream] = []
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=2**20) as session:

        async def slot() -> None:
            for request in planned:
                body = completion_body(run.model_name, request.prompt, request.output_tokens)
                sent_ns, token_ns = time.monotonic_ns(), []
                headers = {"X-Request-Id": f"aiohttp-{request.index}", "Content-Type": "application/json"}
                async with session.post(f"{run.url}/v1/completions", data=body, headers=headers) as reply:
                    while data := await reply.content.readany():
                        now_ns = time.monotonic_ns()
                        events = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
                        token_ns += [now_ns for event in events if any(c["text"] for c in event["choices"])]
                streams.append(Stream(index=request.index, sent_ns=sent_ns, token_ns=token_ns))

        await asyncio.gather(*(slot() for _ in range(run.load.concurrency or 1)))
    return [stream for stream in streams if run.phase(stream.index) is Phase.MEASURED], None


CLIENTS = {"tuner": _ours, "aiohttp": _plain_aiohttp}


def measure(client: str, concurrency: int, requests: int, output_tokens: int, behaviour: Behaviour) -> Accuracy:
    """One closed loop against a fresh server."""
    with timed_server(behaviour) as server, tempfile.TemporaryDirectory() as directory:
        run = LoadRun(
            url=server.url,
            model_name="timed",
            workload=Workload(isl=Length(mean=512), osl=Length(mean=output_tokens)),
            load=Load(arrival=Arrival.CLOSED, value=concurrency),
            vocab_size=32_000,
            seed=concurrency,
            rule=MeasurementRule(requests=max(requests, 2 * concurrency)),
            limit_s=300,
            timings_path=Path(directory) / "unused.parquet",
        )
        cpu_s = time.process_time()
        streams, late_ms = asyncio.run(CLIENTS[client](run))
        cpu_s = time.process_time() - cpu_s
        truths = {int(truth.request_id.rpartition("-")[2]): truth for truth in server.truths()}
    tokens = sum(len(truth.token_ns) for truth in truths.values())
    pairs = [(stream, truths[stream.index]) for stream in streams]
    return _accuracy(client, concurrency, pairs, late_ms, cpu_s / tokens * 1e6)


def _accuracy(
    client: str, concurrency: int, pairs: Sequence[tuple[Stream, Truth]], late_ms: float | None, us_per_token: float
) -> Accuracy:
    ttft_truth = np.array([truth.token_ns[0] - truth.received_ns for _, truth in pairs]) / 1e6
    ttft = np.array([stream.token_ns[0] - stream.sent_ns for stream, _ in pairs]) / 1e6
    itl_truth = np.concatenate([np.diff(truth.token_ns) for _, truth in pairs]) / 1e6
    itl = np.concatenate([np.diff(stream.token_ns) for stream, _ in pairs]) / 1e6
    return Accuracy(
        client=client,
        concurrency=concurrency,
        requests=len(pairs),
        ttft_truth_p50_ms=float(np.median(ttft_truth)),
        ttft_error_p50_ms=float(np.median(ttft - ttft_truth)),
        ttft_error_p99_ms=float(np.percentile(ttft - ttft_truth, 99)),
        itl_truth_p50_ms=float(np.median(itl_truth)),
        itl_error_p50_ms=float(np.median(np.abs(itl - itl_truth))),
        itl_error_p99_ms=float(np.percentile(np.abs(itl - itl_truth), 99)),
        itl_mean_error_percent=float(100 * (itl.mean() / itl_truth.mean() - 1)),
        lateness_p99_ms=late_ms,
        client_us_per_token=us_per_token,
    )


def _show(rows: Sequence[Accuracy]) -> None:
    print("client   concurrency  requests  TTFT error p50 / p99 ms  |ITL error| p50 / p99 ms  ITL mean  client CPU")
    for row in rows:
        print(
            f"{row.client:7s}  {row.concurrency:11d}  {row.requests:8d}"
            f"  {row.ttft_error_p50_ms:13.2f} / {row.ttft_error_p99_ms:7.2f}"
            f"  {row.itl_error_p50_ms:14.3f} / {row.itl_error_p99_ms:7.3f}  {row.itl_mean_error_percent:+7.2f}%"
            f"  {row.client_us_per_token:4.0f} us/token"
        )


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--compare", action="store_true", help="measure a plain aiohttp client too")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=128, help="measured requests (at least 2 x concurrency)")
    parser.add_argument("--output-tokens", type=int, default=50)
    parser.add_argument("--ttft-ms", type=float, default=50.0)
    parser.add_argument("--itl-ms", type=float, default=10.0)
    arguments = parser.parse_args()
    behaviour = Behaviour(ttft_ms=arguments.ttft_ms, itl_ms=arguments.itl_ms, jitter=0.2)
    rows = [
        measure(client, concurrency, arguments.requests, arguments.output_tokens, behaviour)
        for concurrency in arguments.concurrency
        for client in (CLIENTS if arguments.compare else ["tuner"])
    ]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _show(rows)


if __name__ == "__main__":
    main()
