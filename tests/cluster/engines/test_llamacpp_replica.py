"""A real llama.cpp replica: what it serves, how it ends, and what its failures are taken for."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.engines.base import LaunchCommand, ReplicaSpec
from cluster.engines.child_process import Exit
from cluster.engines.llamacpp import LlamaCppBackend
from search_spaces.engines.llamacpp import LLAMACPP
from search_spaces.errors import InvalidValueError
from search_spaces.model import ModelSpec
from search_spaces.outcome import FailureReason
from search_spaces.serving import Role, make_options
from search_spaces.workload import Length, Workload
from tests.support.llamacpp import (
    EXACT_OPTIONS,
    SMALL_MODEL,
    ask_all,
    ask_in_turn,
    pool,
    prompts,
    replica_spec,
    request_body,
)
from tests.support.processes import Child, child, free_port, is_alive, wait_until_gone, wait_until_healthy

BACKEND = LlamaCppBackend()
MIXED = pool(Role.MIXED, 2, **EXACT_OPTIONS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return BACKEND.prepare(SMALL_MODEL, tmp_path_factory.mktemp("model"))


@pytest.fixture
def spec(model: ModelSpec, tmp_path: Path) -> ReplicaSpec:
    return replica_spec(model, tmp_path, MIXED)


@pytest.fixture(scope="module")
def served(model: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("served")
    spec = replica_spec(model, directory, MIXED)
    with running(BACKEND.replica_command(spec), spec, directory) as (url, _):
        yield url


class running:  # noqa: N801 - reads as the context manager that it is
    """A healthy replica: its URL and process."""

    def __init__(self, command: LaunchCommand, spec: ReplicaSpec, directory: Path) -> None:
        self._child = child(command.argv, directory / "replica.log", command.env)
        self._url = f"http://127.0.0.1:{spec.port}"

    def __enter__(self) -> tuple[str, Child]:
        process = self._child.__enter__()
        wait_until_healthy(self._url, process)
        return self._url, process

    def __exit__(self, *details: object) -> None:
        self._child.__exit__(None, None, None)


def server_spec(spec: ReplicaSpec) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(BACKEND.replica_command(spec).argv[-1])
    return values


def command_with(spec: ReplicaSpec, **changes: object) -> tuple[str, ...]:
    argv = BACKEND.replica_command(spec).argv
    return (*argv[:-1], json.dumps(server_spec(spec) | changes))


def ended(argv: tuple[str, ...], directory: Path) -> tuple[int, str]:
    """Exit code and log of a replica that does not come up."""
    with child(argv, directory / "replica.log") as process:
        return process.wait(), process.log


@pytest.mark.engine
async def test_every_token_is_one_chunk_and_usage_and_done_end_the_stream(served: str) -> None:
    (prompt,) = prompts(1, seed=1)
    (answer,) = await ask_in_turn(served, [request_body(prompt, 20)])
    assert len(answer.pieces) == 20
    assert all(piece.startswith(" w") and len(piece.split()) == 1 for piece in answer.pieces)
    assert answer.last["usage"]["prompt_tokens"] == len(prompt)
    assert answer.last["usage"]["completion_tokens"] == 20
    assert answer.last["choices"][0]["text"] == ""
    assert answer.done


@pytest.mark.engine
async def test_a_prompt_sent_again_is_computed_again_unless_prefixes_are_shared(
    served: str, model: ModelSpec, tmp_path: Path
) -> None:
    body = request_body(prompts(1, seed=2)[0], 2)
    answers = await ask_in_turn(served, [body, body])
    assert [answer.last["timings"]["cache_n"] for answer in answers] == [0, 0]
    workload = Workload(isl=Length(mean=192), osl=Length(mean=64), shared_prefix=0.5)
    spec = replica_spec(model, tmp_path, MIXED, workload=workload)
    with running(BACKEND.replica_command(spec), spec, tmp_path) as (url, _):
        answers = await ask_in_turn(url, [body, body])
    assert [answer.last["timings"]["cache_n"] for answer in answers] == [0, len(body["prompt"]) - 1]


@pytest.mark.engine
async def test_the_longest_request_fits_and_is_not_cut(served: str) -> None:
    (answer,) = await ask_in_turn(served, [request_body([300] * 192, 64)])
    assert answer.last["usage"] == answer.last["usage"] | {"prompt_tokens": 192, "completion_tokens": 64}


@pytest.mark.engine
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_dtype": "q8_0", "batch_size": 64, "ubatch_size": 32},
        {"flash_attention": False, "max_num_seqs": 32},
    ],
)
async def test_options_are_served(model: ModelSpec, tmp_path: Path, options: dict[str, Any]) -> None:
    own = replace(MIXED, options=make_options(options))
    spec = replica_spec(model, tmp_path, own)
    with running(BACKEND.replica_command(spec), spec, tmp_path) as (url, replica):
        answers = await ask_all(url, [request_body(prompt, 16) for prompt in prompts(6, seed=3)])
        assert [len(answer.pieces) for answer in answers] == [16] * 6
        assert f"n_slots = {options.get('max_num_seqs', 4)}, n_ctx_slot = 256" in replica.log


def test_defaults_are_the_engine_s_own() -> None:
    import xllamacpp

    own, types = xllamacpp.CommonParams(), xllamacpp.ggml_type
    assert LLAMACPP.parameter("batch_size").default == own.n_batch
    assert LLAMACPP.parameter("ubatch_size").default == own.n_ubatch
    assert LLAMACPP.parameter("kv_cache_dtype").default == "f16"
    assert own.cache_type_k == own.cache_type_v == types.GGML_TYPE_F16
    assert own.flash_attn_type == xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO


@pytest.mark.engine
def test_sigterm_ends_a_replica_at_once(spec: ReplicaSpec, tmp_path: Path) -> None:
    with running(BACKEND.replica_command(spec), spec, tmp_path) as (_, replica):
        started = time.monotonic()
        replica.process.terminate()
        assert replica.wait() == -signal.SIGTERM
        assert time.monotonic() - started < 15


@pytest.mark.engine
def test_a_replica_keeps_to_its_cores(spec: ReplicaSpec, tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    command = BACKEND.replica_command(replace(spec, device_ids=(core,)))
    with running(command, spec, tmp_path) as (_, replica):
        for thread in Path(f"/proc/{replica.process.pid}/task").iterdir():
            assert os.sched_getaffinity(int(thread.name)) == {core}


PARENT = """
import os, subprocess, sys, threading, time
from cluster.processes import TAG_OWNER, ProcessId
started = []
def start():
    started.append(subprocess.Popen(sys.argv[1:], env=os.environ | {TAG_OWNER: str(ProcessId.of(os.getpid()))}))
thread = threading.Thread(target=start)
thread.start()
thread.join(30)
print(started[0].pid, flush=True)
time.sleep(120)
"""


def started_by_another(argv: tuple[str, ...], log: Path) -> tuple[subprocess.Popen[str], int]:
    """A process that started `argv` from a thread that has ended, and the id of what it started."""
    with log.open("w") as output:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, *argv], stdout=subprocess.PIPE, stderr=output, text=True
        )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


@pytest.mark.engine
@pytest.mark.parametrize("serving", [True, False], ids=["serving", "loading"])
def test_a_replica_ends_with_the_process_that_started_it(spec: ReplicaSpec, tmp_path: Path, serving: bool) -> None:
    parent, replica = started_by_another(BACKEND.replica_command(spec).argv, tmp_path / "log")
    try:
        if serving:
            wait_until_healthy(f"http://127.0.0.1:{spec.port}", Child(parent, tmp_path / "log"))
        parent.kill()
        parent.wait()
        wait_until_gone(replica, 2.0)
    finally:
        parent.kill()
        if is_alive(replica):
            os.kill(replica, signal.SIGKILL)


@pytest.mark.engine
def test_a_router_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    options = {
        "host": "127.0.0.1",
        "port": free_port(),
        "mixed_urls": ["http://127.0.0.1:9"],
        "slot_dir": str(tmp_path),
    }
    argv = (sys.executable, "-m", "cluster.router", "--spec", json.dumps(options))
    parent, router = started_by_another(argv, tmp_path / "log")
    try:
        deadline = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", int(str(options["port"])))) != 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        parent.kill()
        parent.wait()
        wait_until_gone(router, 2.0)
    finally:
        parent.kill()
        if is_alive(router):
            os.kill(router, signal.SIGKILL)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("changes", "code", "words", "reason"),
    [
        ({"model_path": "/nowhere.gguf"}, Exit.MODEL_NOT_LOADED, "does not exist", FailureReason.INVALID_FLAGS),
        ({"ubatch_size": 512, "batch_size": 64}, Exit.INVALID_OPTIONS, "ubatch_size=512", FailureReason.INVALID_FLAGS),
        ({"kv_cache_dtype": "q8_0"}, Exit.INVALID_OPTIONS, "needs flash_attention", FailureReason.INVALID_FLAGS),
        ({"kv_cache_dtype": "q3"}, Exit.INVALID_OPTIONS, "kv_cache_dtype='q3'", FailureReason.INVALID_FLAGS),
        ({"slots": 0}, Exit.INVALID_OPTIONS, "slots=0", FailureReason.INVALID_FLAGS),
        ({"speed": 11}, Exit.INVALID_OPTIONS, "speed=11", FailureReason.INVALID_FLAGS),
        ({"cores": [4096]}, Exit.INVALID_OPTIONS, "cores=[4096]", FailureReason.INVALID_FLAGS),
        ({"slot_dir": "/nowhere"}, Exit.INVALID_OPTIONS, "slot_dir=/nowhere", FailureReason.INVALID_FLAGS),
        ({"context_per_slot": 4096}, Exit.INVALID_OPTIONS, "the model holds 2048", FailureReason.INVALID_FLAGS),
        (
            {"slots": 256, "context_per_slot": 2**20, "max_context": 2**20, "kv_elements_per_token": 2**20},
            Exit.OUT_OF_MEMORY,
            "out of memory: 256 slots",
            FailureReason.OUT_OF_MEMORY_AT_BOOT,
        ),
    ],
)
def test_a_replica_that_cannot_serve_says_why_in_its_last_line(
    spec: ReplicaSpec, tmp_path: Path, changes: dict[str, object], code: Exit, words: str, reason: FailureReason
) -> None:
    exit_code, log = ended(command_with(spec, **changes), tmp_path)
    assert exit_code == code
    last = log.strip().splitlines()[-1]
    assert last.startswith("cannot serve (")
    assert words in last
    assert BACKEND.classify(exit_code, log, ready=False) is reason


@pytest.mark.engine
def test_a_damaged_model_is_an_invalid_one(spec: ReplicaSpec, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(Path(str(spec.model.source)).read_bytes()[:300_000])
    exit_code, log = ended(command_with(spec, model_path=str(damaged)), tmp_path)
    assert exit_code == Exit.MODEL_NOT_LOADED
    assert "corrupted or incomplete" in log
    assert BACKEND.classify(exit_code, log, ready=False) is FailureReason.INVALID_FLAGS


@pytest.mark.engine
def test_memory_that_the_engine_itself_is_refused_is_out_of_memory(spec: ReplicaSpec, tmp_path: Path) -> None:
    """The KV cache passes the check before loading (it is told of too few elements), and llama.cpp's own call fails."""
    argv = command_with(spec, slots=256, context_per_slot=2**15, max_context=2**15, kv_elements_per_token=1)
    limited = ("bash", "-c", f'ulimit -v {4 * 2**20}; exec "$@"', "bash", *argv)
    exit_code, log = ended(limited, tmp_path)
    assert exit_code not in (0, Exit.OUT_OF_MEMORY), log
    assert BACKEND.classify(exit_code, log, ready=False) is FailureReason.OUT_OF_MEMORY_AT_BOOT, log


@pytest.mark.engine
def test_a_port_in_use_is_no_fault_of_the_configuration(spec: ReplicaSpec, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        exit_code, log = ended(command_with(spec, port=holder.getsockname()[1]), tmp_path)
    assert exit_code == Exit.PORT_IN_USE
    assert BACKEND.classify(exit_code, log, ready=False) is FailureReason.TRANSPORT
    assert BACKEND.classify(exit_code, log, ready=False).is_infrastructure


@pytest.mark.engine
@pytest.mark.parametrize(
    ("by", "reason"),
    [
        (signal.SIGKILL, FailureReason.OUT_OF_MEMORY_UNDER_LOAD),
        (signal.SIGABRT, FailureReason.ENGINE_CRASH),
        (signal.SIGSEGV, FailureReason.ENGINE_CRASH),
    ],
)
def test_a_replica_killed_while_serving(
    spec: ReplicaSpec, tmp_path: Path, by: signal.Signals, reason: FailureReason
) -> None:
    with running(BACKEND.replica_command(spec), spec, tmp_path) as (_, replica):
        replica.process.send_signal(by)
        exit_code = replica.wait()
        assert exit_code == -by
        assert BACKEND.classify(exit_code, replica.log, ready=True) is reason


def test_a_replica_that_is_alive_was_too_slow_or_failed_its_requests() -> None:
    assert BACKEND.classify(None, "loading model", ready=False) is FailureReason.STARTUP_TIMEOUT
    assert BACKEND.classify(None, "serving", ready=True) is FailureReason.REQUESTS_FAILED


def test_options_and_roles_decide_the_command(model: ModelSpec, tmp_path: Path) -> None:
    own = pool(Role.PREFILL, 2, batch_size=512, ubatch_size=64)
    peer = pool(Role.DECODE, 8)
    spec = server_spec(replica_spec(model, tmp_path, own, peer, device_ids=(1, 3)))
    assert spec["slots"] == 8, "a slot restores only among replicas with as many slots"
    assert (spec["batch_size"], spec["ubatch_size"], spec["cores"]) == (512, 64, [1, 3])
    assert spec["kv_cache_dtype"] == LLAMACPP.parameter("kv_cache_dtype").default
    assert server_spec(replica_spec(model, tmp_path, MIXED))["slots"] == 2
    two = replace(MIXED, devices_per_rank=2)
    assert server_spec(replica_spec(model, tmp_path, two))["threads"] == 2


def test_commands_that_could_not_work_are_refused(model: ModelSpec, tmp_path: Path) -> None:
    prefill = pool(Role.PREFILL, 2)
    with pytest.raises(InvalidValueError, match=r"call prepare\(\)"):
        BACKEND.replica_command(replica_spec(SMALL_MODEL, tmp_path, MIXED))
    with pytest.raises(InvalidValueError, match=r"set ReplicaSpec\.peer"):
        BACKEND.replica_command(replica_spec(model, tmp_path, prefill))
    for option, value in (("kv_cache_dtype", "f32"), ("flash_attention", False)):
        other = replace(prefill, role=Role.DECODE, options=make_options({"max_num_seqs": 2, option: value}))
        with pytest.raises(InvalidValueError, match=f"{option}=.* differs"):
            BACKEND.replica_command(replica_spec(model, tmp_path, prefill, other))


def test_a_given_model_file_is_checked(tmp_path: Path) -> None:
    text = tmp_path / "model.gguf"
    text.write_text("no model")
    with pytest.raises(InvalidValueError, match="does not exist"):
        BACKEND.prepare(replace(SMALL_MODEL, source=str(tmp_path / "none")), tmp_path)
    with pytest.raises(InvalidValueError, match="not b'GGUF'"):
        BACKEND.prepare(replace(SMALL_MODEL, source=str(text)), tmp_path)
    written = BACKEND.prepare(SMALL_MODEL, tmp_path)
    assert BACKEND.prepare(written, tmp_path / "elsewhere") == written


def test_the_version_is_the_installed_one() -> None:
    assert BACKEND.version() == "xllamacpp 2026.10.11549"
