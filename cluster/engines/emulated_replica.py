"""The emulated engine behind its endpoints: requests, slots through which KV caches are handed over, metrics."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from cluster.engines import emulated_faults as faults
from cluster.engines.emulated_clock import Link, StepClock, StepNoise
from cluster.engines.emulated_http import TEXT, Connection, RefusedError, Reply, Request
from cluster.engines.emulated_parts import Followers, PartSpec
from cluster.engines.emulated_scheduler import BLOCK_TOKENS, Limits, Scheduler, Sequence
from search_spaces.emulation import EngineProfile, Fault, FaultKind, Noise

WORDS = tuple(f" w{number:03d}" for number in range(256))
DROPPED_AFTER_TOKENS = 2

Body = TypeVar("Body", bound=BaseModel)


class EmulatedSpec(BaseModel, frozen=True, extra="forbid"):
    """Everything that decides how a replica behaves; options are named as in `search_spaces.engines.emulated`.

    `max_model_len` is the longest request in tokens, `slot_dir` the folder through which KV caches are handed over, and
    `seed` that of the noise and of faults. `part` is the share of this process in a replica that spans nodes, and the
    memory of `devices` is booked in the folder `ledger`.
    """

    model_name: str
    host: str
    port: int = Field(ge=1, le=65535)
    role: Literal["mixed", "prefill", "decode"]
    profile: EngineProfile
    max_num_seqs: int = Field(ge=1)
    max_num_batched_tokens: int = Field(ge=1)
    enable_chunked_prefill: bool
    enable_prefix_caching: bool
    gpu_memory_utilization: float = Field(gt=0, le=1)
    max_model_len: int = Field(ge=2)
    slot_dir: Path
    noise: Noise = Noise()
    seed: str = "0"
    fault: Fault | None = None
    part: PartSpec | None = None
    ledger: Path | None = None
    devices: tuple[int, ...] = ()

    def limits(self) -> Limits:
        """What a rank may do at once."""
        tokens = self.profile.memory.kv_tokens(self.gpu_memory_utilization)
        return Limits(
            sequences=self.max_num_seqs,
            step_tokens=self.max_num_batched_tokens,
            blocks=max(1, tokens // BLOCK_TOKENS),
            chunked=self.enable_chunked_prefill,
            reuses_prefixes=self.enable_prefix_caching,
        )


class CompletionRequest(BaseModel, frozen=True):
    """A body of `POST /v1/completions`, as far as it is heeded; an answer is always `max_tokens` long."""

    prompt: list[int] | str
    max_tokens: int = Field(default=16, ge=1)
    stream: bool = False
    n: Literal[1] = 1
    id_slot: int | None = Field(default=None, ge=0)

    def tokens(self) -> tuple[int, ...]:
        """The prompt's tokens; those of a text are its words."""
        words = self.prompt if isinstance(self.prompt, list) else [hash(word) for word in self.prompt.split()]
        if not words:
            raise RefusedError(400, "prompt is empty; give a text or a list of token ids")
        return tuple(words)


class HandOverFile(BaseModel, frozen=True):
    """What stands for a KV cache on its way: how many tokens and bytes it has."""

    tokens: int = Field(ge=1)
    bytes: int = Field(ge=0)


@dataclass(eq=False, kw_only=True)
class _Job:
    """A request that is being answered; times are those of the loop, in seconds."""

    sequence: Sequence
    rank: Scheduler
    reply: Reply
    head: bytes
    stream: bool
    drops: bool
    began_s: float
    done: asyncio.Event = field(default_factory=asyncio.Event)
    first_s: float = 0.0
    last_s: float = 0.0

    def told(self, now_s: float) -> None:
        """A new token is known at `now_s`."""
        produced = self.sequence.produced
        self.first_s = self.first_s or now_s
        self.last_s = now_s
        if self.stream:
            end = b'"length"' if self.sequence.ended else b"null"
            word = WORDS[(len(self.sequence.prompt) * 31 + produced * 7) % len(WORDS)].encode()
            self.reply.write(b'%b"%b","logprobs":null,"finish_reason":%b}]}\n\n' % (self.head, word, end))
        if self.drops and produced >= DROPPED_AFTER_TOKENS:
            self.reply.abort()
        elif self.sequence.ended:
            self.done.set()

    def usage(self) -> dict[str, object]:
        """Token counts, and the times as llama.cpp's server gives them."""
        sequence = self.sequence
        return {
            "usage": {
                "prompt_tokens": len(sequence.prompt),
                "completion_tokens": sequence.produced,
                "total_tokens": len(sequence.prompt) + sequence.produced,
            },
            "timings": {
                "cache_n": sequence.reused,
                "prompt_n": len(sequence.prompt) - sequence.reused,
                "prompt_ms": 1e3 * (self.first_s - self.began_s),
                "predicted_n": sequence.produced,
                "predicted_ms": 1e3 * (self.last_s - self.first_s),
            },
        }


class Replica:
    """The engine behind the endpoints."""

    def __init__(self, spec: EmulatedSpec) -> None:
        self._spec = spec
        self._faults = faults.RequestFaults(spec.fault, spec.seed)
        self._ranks = [Scheduler(spec.limits()) for _ in range(spec.profile.ranks)]
        groups = [self._ranks] if spec.profile.lockstep else [[rank] for rank in self._ranks]
        self._clocks = [
            StepClock(
                group,
                spec.profile.times,
                StepNoise(spec.noise, spec.seed if index == 0 else f"{spec.seed}/{index}"),
                stages=spec.profile.stages,
                told=self._told,
            )
            for index, group in enumerate(groups)
        ]
        self._clock_of = {rank: clock for clock in self._clocks for rank in clock.ranks}
        self._jobs: dict[Sequence, _Job] = {}
        self._assigned: Counter[Scheduler] = Counter()
        self._slots: dict[int, tuple[Scheduler, Sequence]] = {}
        self._sending, self._receiving = Link(), Link()
        self._freed = asyncio.Event()
        self._requests = 0
        self.connections: set[Connection] = set()
        self.listener: asyncio.Server | None = None
        self.followers: Followers | None = None

    async def handle(self, request: Request, reply: Reply) -> None:
        """Answer `request`; raises `RefusedError` for one that cannot be answered."""
        match (request.method, request.path):
            case ("POST", "/v1/completions"):
                await self._complete(_parsed(CompletionRequest, request.body), reply)
            case ("GET", "/health"):
                reply.send_json(200, {"status": "ok", "emulated": True})
            case ("GET", "/metrics"):
                reply.send(200, self._metrics().encode(), TEXT)
            case ("GET", "/v1/models"):
                model = {"id": self._spec.model_name, "object": "model", "owned_by": "emulated"}
                reply.send_json(200, {"object": "list", "data": [model]})
            case ("POST", "/reset_prefix_cache"):
                for rank in self._ranks:
                    rank.forget_prefixes()
                reply.send_json(200, {"reset": True})
            case ("POST", path) if path.startswith("/slots/"):
                await self._act_on_slot(request, reply)
            case _:
                raise RefusedError(404, f"{request.method} {request.path} is not served here")

    # completions

    async def _complete(self, asked: CompletionRequest, reply: Reply) -> None:
        self._requests += 1
        if self.followers is not None:
            self.followers.tell_request()
        struck = self._faults.next()
        if struck is not None:
            self._fail_under_load(struck)
        if struck is FaultKind.GARBAGE:
            reply.begin()
            reply.write(b"data: \xff\xfe<<< not what you asked for >>>\n\n")
            reply.end()
            return
        rank, sequence = self._sequence(asked)
        job = _Job(
            sequence=sequence,
            rank=rank,
            reply=reply,
            head=_event_head(self._spec.model_name, self._requests),
            stream=asked.stream,
            drops=struck is FaultKind.DROP_STREAMS,
            began_s=asyncio.get_running_loop().time(),
        )
        await self._compute(job)
        if sequence.keeps_cache and asked.id_slot is not None:
            self._slots[asked.id_slot] = (rank, sequence)
        self._close(job)

    async def _compute(self, job: _Job) -> None:
        """Wait until every token of `job` has been told; a client that leaves takes it off its rank."""
        self._jobs[job.sequence] = job
        self._assigned[job.rank] += 1
        try:
            if job.stream:
                job.reply.begin()
            await asyncio.sleep(self._spec.profile.request_ms / 1e3)
            job.rank.add(job.sequence)
            self._clock_of[job.rank].wake()
            await job.done.wait()
        except asyncio.CancelledError:
            job.rank.abort(job.sequence)
            self._free()
            raise
        finally:
            del self._jobs[job.sequence]
            self._assigned[job.rank] -= 1

    def _sequence(self, asked: CompletionRequest) -> tuple[Scheduler, Sequence]:
        """The request as its rank will see it; one in a slot goes on from what was restored there."""
        prompt = asked.tokens()
        longest = self._spec.max_model_len
        if len(prompt) + asked.max_tokens > longest:
            raise RefusedError(
                400,
                f"prompt of {len(prompt)} tokens and max_tokens={asked.max_tokens} are above max_model_len={longest}",
            )
        kept = self._slots.pop(asked.id_slot, None) if asked.id_slot is not None else None
        sequence = Sequence(
            prompt=prompt,
            wanted=asked.max_tokens,
            keeps_cache=asked.id_slot is not None and self._spec.role == "prefill",
        )
        if kept is None:
            return min(self._ranks, key=lambda rank: self._assigned[rank]), sequence
        rank, restored = kept
        if self._spec.role == "prefill":
            rank.release(restored)
        else:
            sequence.computed = sequence.reused = min(restored.computed, len(prompt) - 1)
            sequence.blocks, restored.blocks = restored.blocks, 0
        return rank, sequence

    def _told(self, sequences: Items[Sequence]) -> None:
        now_s = asyncio.get_running_loop().time()
        ended = False
        for sequence in sequences:
            job = self._jobs.get(sequence)
            if job is not None:
                job.told(now_s)
            ended = ended or sequence.ended
        if ended:
            self._free()

    def _close(self, job: _Job) -> None:
        """The end of an answer: token counts, and the whole text where it was not streamed."""
        if job.stream:
            last = {"id": f"emu-{self._requests}", "object": "text_completion", "choices": [], **job.usage()}
            job.reply.write(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode())
            job.reply.end()
            return
        text = "".join(WORDS[number % len(WORDS)] for number in range(job.sequence.produced))
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
        model = self._spec.model_name
        job.reply.send_json(200, {"object": "text_completion", "model": model, "choices": [choice], **job.usage()})

    def _fail_under_load(self, kind: FaultKind) -> None:
        faults.fail_under_load(kind, self._spec.profile.memory)
        match kind:
            case FaultKind.HANG_UNDER_LOAD:
                for clock in self._clocks:
                    clock.hung = True
            case FaultKind.STOP_LISTENING if self.listener is not None:
                self.listener.close()
                for connection in tuple(self.connections):
                    connection.abort_when_idle()
            case _:
                return

    # slots

    async def _act_on_slot(self, request: Request, reply: Reply) -> None:
        number = request.path.removeprefix("/slots/")
        if not number.isdigit():
            raise RefusedError(404, f"{request.path} is no slot")
        match request.query.get("action"):
            case "save":
                reply.send_json(200, await self._save(int(number), self._file(request)))
            case "restore":
                reply.send_json(200, await self._restore(int(number), self._file(request)))
            case "erase":
                rank, sequence = self._slots.pop(int(number), (self._ranks[0], None))
                if sequence is not None:
                    rank.release(sequence)
                    self._free()
                reply.send_json(200, {"id_slot": int(number), "n_erased": 0 if sequence is None else sequence.computed})
            case other:
                raise RefusedError(400, f"action={other} is unknown; choose save, restore or erase")

    def _file(self, request: Request) -> Path:
        name = _parsed(_FileName, request.body).filename
        if Path(name).name != name:
            raise RefusedError(400, f"filename={name!r} must be a plain name")
        return self._spec.slot_dir / name

    async def _save(self, number: int, file: Path) -> dict[str, object]:
        if number not in self._slots:
            raise RefusedError(400, f"slot {number} holds nothing that could be saved")
        rank, sequence = self._slots[number]
        tokens = len(sequence.prompt)
        half_ms, size = self._half_ms(tokens)
        await self._sending.carry(half_ms / 1e3)
        _write(file, HandOverFile(tokens=tokens, bytes=size))
        self._slots.pop(number, None)
        rank.release(sequence)
        self._free()
        return {"id_slot": number, "n_saved": tokens, "n_written": size, "timings": {"save_ms": half_ms}}

    async def _restore(self, number: int, file: Path) -> dict[str, object]:
        held = _read(file)
        earlier = self._slots.pop(number, None)
        if earlier is not None:
            earlier[0].release(earlier[1])
        sequence = Sequence(prompt=(), wanted=1, computed=held.tokens)
        rank = await self._reserve(sequence, held.tokens + 1)
        half_ms, size = self._half_ms(held.tokens)
        try:
            await self._receiving.carry(half_ms / 1e3)
        except asyncio.CancelledError:
            rank.release(sequence)
            raise
        self._slots[number] = (rank, sequence)
        return {"id_slot": number, "n_restored": held.tokens, "n_read": size, "timings": {"restore_ms": half_ms}}

    def _half_ms(self, tokens: int) -> tuple[float, int]:
        """Milliseconds at one end of a hand-over of `tokens` tokens, and its bytes."""
        hand_over = self._spec.profile.hand_over
        if hand_over is None:
            raise RefusedError(400, "this replica hands no KV cache over: its profile has no link")
        return hand_over.half_ms(tokens), int(tokens * hand_over.bytes_per_token)

    async def _reserve(self, sequence: Sequence, tokens: int) -> Scheduler:
        """The rank that has the blocks of `tokens` tokens free, the least busy first; waits until there is one."""
        if not self._ranks[0].holds(tokens):
            raise RefusedError(400, f"a KV cache of {tokens} tokens is larger than that of a whole rank")
        while True:
            for rank in sorted(self._ranks, key=lambda rank: (self._assigned[rank], rank.used_share)):
                if rank.reserve(sequence, tokens):
                    return rank
            await self._freed.wait()

    def _free(self) -> None:
        """Tell those who wait that blocks may be free, and the clocks that a waiting request may fit."""
        self._freed.set()
        self._freed = asyncio.Event()
        asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        for clock in self._clocks:
            clock.wake()

    # what it says of itself

    def _metrics(self) -> str:
        counters = [clock.counters for clock in self._clocks]
        steps = sum(c.steps for c in counters)
        figures = {
            "requests_running": sum(len(rank.running) for rank in self._ranks),
            "requests_waiting": sum(len(rank.waiting) for rank in self._ranks),
            "kv_cache_usage_ratio": sum(rank.used_share for rank in self._ranks) / len(self._ranks),
            "requests_total": self._requests,
            "preemptions_total": sum(rank.preemptions for rank in self._ranks),
            "prompt_tokens_total": sum(c.prompt_tokens for c in counters),
            "output_tokens_total": sum(c.output_tokens for c in counters),
            "steps_total": steps,
            "busy_seconds_total": sum(c.busy_s for c in counters),
            "lateness_mean_ms": sum(c.late_ms for c in counters) / max(steps, 1),
            "lateness_max_ms": max(c.latest_ms for c in counters),
        }
        labels = f'{{model_name="{_escaped(self._spec.model_name)}",gpu="{_escaped(self._spec.profile.gpu)}"}}'
        lines = []
        for name, value in figures.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# TYPE emulated_{name} {kind}", f"emulated_{name}{labels} {value:g}"]
        return "\n".join(lines) + "\n"


def _write(file: Path, held: HandOverFile) -> None:
    file.write_text(held.model_dump_json(), encoding="utf-8")


def _read(file: Path) -> HandOverFile:
    try:
        return HandOverFile.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise RefusedError(400, f"{file.name} holds no KV cache: {error}") from error


class _FileName(BaseModel, frozen=True):
    filename: str


def _parsed(kind: type[Body], text: bytes) -> Body:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise RefusedError(400, f"{name}: {first['msg']}" if name else str(first["msg"])) from error


def _event_head(model_name: str, number: int) -> bytes:
    """The beginning of each event of an answer, up to the text."""
    tree = {"id": f"emu-{number}", "object": "text_completion", "created": int(time.time()), "model": model_name}
    return b"data: " + json.dumps(tree)[:-1].encode() + b',"choices":[{"index":0,"text":'


def _escaped(text: str) -> str:
    """A label's value in Prometheus text."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
