"""One replica of the emulated engine: a real server that computes nothing and takes the time that a model says.

    python -m cluster.engines.emulated_server --spec JSON|FILE

It serves `/v1/completions` (streamed or whole), `/v1/models`, `/health`, `/metrics`, and the slot actions through which
`cluster.router` hands KV caches over. Requests go through a scheduler as engines have it (slots, token budget, chunked
prefill, KV blocks, preemption); only the time of a step comes from a table. Answers are words without meaning, and
always as long as asked for. SIGTERM ends it at once, and so does the end of the process that started it. The variable
TUNER_EMULATED_FAULT of the environment (see `search_spaces.emulation.Fault.parse`) makes it fail.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

from cluster.engines import emulated_faults as faults
from cluster.engines.child_process import API_KEY_VARIABLE, Exit, die_with_owner, fail, read_spec
from cluster.engines.emulated_http import Connection
from cluster.engines.emulated_memory import hold
from cluster.engines.emulated_parts import Followers, follow
from cluster.engines.emulated_replica import EmulatedSpec, Replica
from search_spaces.emulation import Fault

FAULT_VARIABLE = "TUNER_EMULATED_FAULT"


def main() -> None:
    """Serve until a signal ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the caller ends replicas
    spec = _with_fault_of_environment(read_spec(EmulatedSpec, "Serves one replica of the emulated engine."))
    die_with_owner()
    _boot(spec)
    leads = spec.part is None or spec.part.leads
    asyncio.run(_serve(spec) if leads else _take_part(spec))


def _with_fault_of_environment(spec: EmulatedSpec) -> EmulatedSpec:
    text = os.environ.get(FAULT_VARIABLE)
    try:
        return spec if not text else spec.model_copy(update={"fault": Fault.parse(text)})
    except ValueError as error:
        faults.invalid_flags(f"{FAULT_VARIABLE}={text!r}: {error}")


def _boot(spec: EmulatedSpec) -> None:
    """Check what an engine checks when it starts, and take the time that it takes."""
    profile, memory = spec.profile, spec.profile.memory
    share = "" if spec.part is None else f", {spec.part}"
    print(
        f"EMULATED engine: {spec.model_name} on {profile.title}{share}; times: {profile.origin or 'given'}", flush=True
    )
    if spec.fault is not None:
        faults.fail_at_boot(spec.fault, memory, spec.max_model_len)
    if spec.max_num_batched_tokens < spec.max_num_seqs:
        faults.invalid_flags(
            f"max_num_batched_tokens={spec.max_num_batched_tokens} is below max_num_seqs={spec.max_num_seqs}; raise it"
        )
    if not spec.enable_chunked_prefill and spec.max_num_batched_tokens < spec.max_model_len:
        faults.invalid_flags(
            f"max_num_batched_tokens={spec.max_num_batched_tokens} is below max_model_len={spec.max_model_len} and "
            "chunked prefill is off; raise it, or switch chunked prefill on"
        )
    if memory.weight_bytes + memory.fixed_bytes > memory.total_bytes:
        faults.out_of_memory(memory, memory.weight_bytes / 40.0)
    tokens = memory.kv_tokens(spec.gpu_memory_utilization)
    print(f"KV cache of a rank: {tokens} tokens, {tokens / spec.max_model_len:.1f} requests of full length", flush=True)
    if tokens < spec.max_model_len:
        faults.kv_cache_too_small(spec.max_model_len, tokens)
    if spec.ledger is not None:
        hold(spec.ledger, spec.devices, memory.total_bytes * spec.gpu_memory_utilization)
    time.sleep(profile.boot_s)


async def _take_part(spec: EmulatedSpec) -> None:
    """Follow the part that leads; `faults` strike at its requests."""
    if spec.part is None:
        raise AssertionError("a replica that is whole leads")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, os._exit, 0)
    requests = faults.RequestFaults(spec.fault, spec.seed)

    def strike() -> None:
        kind = requests.next()
        if kind is not None:
            faults.fail_under_load(kind, spec.profile.memory)

    await follow(spec.part, os.environ.get(API_KEY_VARIABLE, ""), strike)


async def _serve(spec: EmulatedSpec) -> None:
    loop = asyncio.get_running_loop()
    replica = Replica(spec)
    key = os.environ.get(API_KEY_VARIABLE)
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if spec.part is not None:
        replica.followers = Followers(spec.part, key or "")
        joining = loop.create_task(replica.followers.join())
        await asyncio.wait([joining, stopping := loop.create_task(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            os._exit(0)
    try:
        replica.listener = await loop.create_server(
            lambda: Connection(replica.handle, key, replica.connections), spec.host, spec.port, backlog=1024
        )
    except OSError as error:
        fail(Exit.PORT_IN_USE, f"port {spec.port} of {spec.host} cannot be bound ({error}); choose another")
    print(f"serving {spec.model_name} (EMULATED {spec.profile.title}) on http://{spec.host}:{spec.port}", flush=True)
    await stop.wait()
    os._exit(0)


if __name__ == "__main__":
    main()
