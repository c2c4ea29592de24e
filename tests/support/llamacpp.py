"""Real llama.cpp replicas and routers for tests, and a plain streaming client."""

from __future__ import annotations

import asyncio
import json
import random
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from cluster.engines.base import ReplicaSpec, RouterSpec
from cluster.engines.gguf_model import FIRST_WORD_TOKEN
from cluster.engines.llamacpp import LlamaCppBackend
from search_spaces.model import Attention, DenseFeedForward, LayerGroup, ModelSpec
from search_spaces.serving import Pool, Role, make_options
from search_spaces.workload import Length, Workload
from tests.support.processes import Child, child, free_port, wait_until_healthy

EXACT_OPTIONS = {"kv_cache_dtype": "f32", "flash_attention": False}
"""With these and f32 weights, sums hardly depend on what else is in a batch, so greedy answers repeat exactly."""
WORKLOAD = Workload(isl=Length(mean=192), osl=Length(mean=64))
VOCABULARY = 1024

SMALL_MODEL = ModelSpec(
    name="small",
    hidden_size=128,
    vocab_size=VOCABULARY,
    layers=(
        LayerGroup(
            count=3,
            attention=Attention(heads=4, kv_heads=2, head_dim=32),
            feed_forward=DenseFeedForward(intermediate_size=384),
        ),
    ),
    weight_bits=32,
    max_context=2048,
)


def pool(role: Role, slots: int, **options: Any) -> Pool:
    return Pool(role=role, node_pool="local", options=make_options({"max_num_seqs": slots, **options}))


def replica_spec(model: ModelSpec, directory: Path, own: Pool, peer: Pool | None = None, **changes: Any) -> ReplicaSpec:
    values: dict[str, Any] = {
        "trial": "test",
        "pool": own,
        "peer": peer,
        "index": 0,
        "host": "127.0.0.1",
        "port": free_port(),
        "model": model,
        "workload": WORKLOAD,
        "device_ids": (),
        "work_dir": directory,
        "shared_dir": directory,
    }
    return ReplicaSpec(**values | changes)


@dataclass
class Deployment:
    """Base URLs and processes of a running deployment; `url` is the router's."""

    url: str = ""
    shared_dir: Path = Path()
    replicas: dict[str, Child] = field(default_factory=dict)

    def stats(self, **query: int) -> dict[str, Any]:
        return get_json(f"{self.url}/router/stats?" + "&".join(f"{name}={value}" for name, value in query.items()))

    def is_at_rest(self) -> bool:
        """True where nothing is in flight, every slot is free and no hand-over file is left."""
        stats = self.stats(last=0)
        slots_free = all(kind["free"] == kind["total"] for kind in stats.get("slots", {}).values())
        return stats["in_flight"] == 0 and slots_free and not list(self.shared_dir.glob("kv-*"))


@contextmanager
def deployed(
    model: ModelSpec, directory: Path, pools: Mapping[Pool, int], env: Mapping[str, str] | None = None
) -> Iterator[Deployment]:
    """A router before as many replicas of each pool as `pools` says, all healthy."""
    backend = LlamaCppBackend()
    directory.mkdir(parents=True, exist_ok=True)
    urls: dict[Role, list[str]] = {role: [] for role in Role}
    running = Deployment(shared_dir=directory)
    with ExitStack() as stack:
        for own, count in pools.items():
            peer = next((other for other in pools if other is not own), None)
            for index in range(count):
                spec = replica_spec(model, directory, own, peer, index=index)
                url = f"http://127.0.0.1:{spec.port}"
                log = directory / f"{own.role}-{index}.log"
                running.replicas[url] = stack.enter_context(child(backend.replica_command(spec).argv, log, env))
                urls[own.role].append(url)
        for url, replica in running.replicas.items():
            wait_until_healthy(url, replica)
        by_role = {own.role: own for own in pools}
        router = RouterSpec(
            trial="test",
            host="127.0.0.1",
            port=free_port(),
            model=model,
            mixed_urls=tuple(urls[Role.MIXED]),
            prefill_urls=tuple(urls[Role.PREFILL]),
            decode_urls=tuple(urls[Role.DECODE]),
            prefill_pool=by_role.get(Role.PREFILL),
            decode_pool=by_role.get(Role.DECODE),
            shared_dir=directory,
        )
        command = backend.router_command(router)
        running.url = f"http://127.0.0.1:{router.port}"
        process = stack.enter_context(child(command.argv, directory / "router.log", env))
        wait_until_healthy(running.url, process)
        yield running


@dataclass(frozen=True)
class Answer:
    """A streamed answer: its pieces of text, the last chunk, and whether `[DONE]` came."""

    status: int
    pieces: tuple[str, ...] = ()
    last: dict[str, Any] = field(default_factory=dict)
    done: bool = False
    error: str = ""


def prompts(count: int, *, seed: int, longest: int = 192) -> list[list[int]]:
    """Prompts of random word tokens, between half of `longest` and `longest` tokens."""
    rng = random.Random(seed)
    return [
        [rng.randrange(FIRST_WORD_TOKEN, VOCABULARY) for _ in range(rng.randint(longest // 2, longest))]
        for _ in range(count)
    ]


def request_body(prompt: list[int], tokens: int) -> dict[str, Any]:
    """What the load client sends."""
    return {
        "model": "m",
        "prompt": prompt,
        "max_tokens": tokens,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }


async def ask(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> Answer:
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            return Answer(response.status, error=await response.text())
        pieces, last, done, error = [], {}, False, ""
        async for line in response.content:
            data = line.removeprefix(b"data: ").strip()
            if not data:
                continue
            if data == b"[DONE]":
                done = True
                continue
            last = json.loads(data)
            if "error" in last:
                error = json.dumps(last["error"])
            pieces += [choice["text"] for choice in last.get("choices", []) if choice["text"]]
        return Answer(response.status, tuple(pieces), last, done, error)


async def ask_all(url: str, bodies: Iterable[Mapping[str, Any]]) -> list[Answer]:
    """The answers to `bodies`, sent at once."""
    async with open_session() as session:
        return await asyncio.gather(*(ask(session, url, body) for body in bodies))


async def ask_in_turn(url: str, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """The answers to `bodies`, each sent after the one before has ended."""
    async with open_session() as session:
        return [await ask(session, url, body) for body in bodies]


def open_session(**options: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True), **options)


def get_json(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - a server of the test's own
        answer: dict[str, Any] = json.load(response)
    return answer


def metric(url: str, name: str) -> float:
    """Counter or gauge `name` of a replica's /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:  # noqa: S310 - a server of the test's own
        for line in response.read().decode().splitlines():
            if line.startswith(f"llamacpp:{name} "):
                return float(line.split()[1])
    raise AssertionError(f"{url} has no metric {name}")
