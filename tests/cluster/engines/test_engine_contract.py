from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cluster.engines.base import EngineBackend, ReplicaSpec
from cluster.engines.emulated import EmulatedBackend
from cluster.engines.installation import Installation, installation_of, missing_program, side_port
from cluster.engines.llamacpp import LlamaCppBackend
from search_spaces.engines import ENGINES
from search_spaces.errors import InvalidValueError
from search_spaces.hardware import DeviceKind
from search_spaces.model_presets import TINY_MODEL
from search_spaces.serving import Pool, Role
from tests.contracts.engine_contract import EngineContract
from tests.support.apart import DRAFT, INSTALLATIONS, MODEL, WORKLOAD, backend, pool, replica
from tests.support.emulated import profile


class TestLlamaCpp(EngineContract):
    @pytest.fixture
    def engine(self) -> EngineBackend:
        return LlamaCppBackend()

    def spec(self, engine: EngineBackend, directory: Path, pool: Pool, **changes: Any) -> ReplicaSpec:
        model = engine.prepare(TINY_MODEL, directory)
        return replica(pool, **{"model": model, "work_dir": directory, "shared_dir": directory, **changes})


class TestEmulated(EngineContract):
    # what decides step times travels in the profile, which the coordinator makes for each configuration
    without_effect: ClassVar = frozenset({("kv_cache_dtype", "fp8")})

    @pytest.fixture
    def engine(self) -> EngineBackend:
        return EmulatedBackend(profiles={role: profile() for role in Role})

    def spec(self, engine: EngineBackend, directory: Path, pool: Pool, **changes: Any) -> ReplicaSpec:
        del engine
        shares = replace(WORKLOAD, shared_prefix=0.5)  # prefixes are cached where a workload has them
        return replica(pool, **{"work_dir": directory, "shared_dir": directory, "workload": shares, **changes})


class Apart(EngineContract):
    """Engines in an environment of their own."""

    name = ""

    @pytest.fixture
    def engine(self) -> EngineBackend:
        found: EngineBackend = backend(self.name)
        return found

    def spec(self, engine: EngineBackend, directory: Path, pool: Pool, **changes: Any) -> ReplicaSpec:
        del engine, directory
        return replica(pool, **changes)

    def test_a_model_without_source_gets_a_folder_that_can_be_loaded(
        self, engine: EngineBackend, tmp_path: Path
    ) -> None:
        prepared = engine.prepare(TINY_MODEL, tmp_path)
        assert engine.prepare(TINY_MODEL, tmp_path) == prepared
        assert (Path(str(prepared.source)) / "config.json").is_file()
        assert (Path(str(prepared.source)) / "tokenizer.json").is_file()
        command = engine.replica_command(replica(pool(), model=prepared))
        assert "dummy" in "\n".join((*command.argv, *command.files.values()))
        real = engine.replica_command(replica(pool()))
        assert "dummy" not in "\n".join((*real.argv, *real.files.values()))
        assert engine.prepare(MODEL, tmp_path) == MODEL

    def test_a_model_that_was_not_prepared_and_an_unknown_pool_are_refused(self, engine: EngineBackend) -> None:
        with pytest.raises(InvalidValueError, match="call prepare"):
            engine.replica_command(replica(pool(), model=TINY_MODEL))
        with pytest.raises(InvalidValueError, match="node pool 'moon'; known are gpus, cores"):
            engine.replica_command(replica(pool(on="moon")))

    def test_the_installation_says_what_is_started_and_with_which_environment(self) -> None:
        own = Installation(device=DeviceKind.GPU, command=("/opt/engine", "start"), env={"SOME": "thing"})
        command = backend(self.name, {"gpus": own}).replica_command(replica(pool()))
        assert command.argv[:2] == ("/opt/engine", "start")
        assert command.env["SOME"] == "thing"


class TestVllm(Apart):
    name = "vllm"
    companions: ClassVar = {
        "speculative_tokens": {"speculative_method": "ngram"},
        "kv_connector": {"enable_chunked_prefill": False},
    }


class TestSglang(Apart):
    name = "sglang"
    companions: ClassVar = {
        "speculative_num_steps": {"speculative_algorithm": "EAGLE3"},
        "kv_transport": {"transfer_backend": "nixl"},
    }


class TestTrtllm(Apart):
    name = "trtllm"
    companions: ClassVar = {"speculative_tokens": {"speculative_method": "MTP"}}


def test_every_engine_has_its_contract() -> None:
    tested = {"llamacpp", "emulated", *(cls.name for cls in (TestVllm, TestSglang, TestTrtllm))}
    assert set(ENGINES) == tested


@pytest.mark.parametrize(("engine", "method"), [("vllm", "eagle3"), ("sglang", "EAGLE3"), ("trtllm", "Eagle3")])
def test_a_second_model_must_be_named(engine: str, method: str) -> None:
    option = "speculative_algorithm" if engine == "sglang" else "speculative_method"
    drafting = pool(**{option: method})
    command = backend(engine).replica_command(replica(drafting))
    assert DRAFT in "\n".join((*command.argv, *command.files.values()))
    bare = {"gpus": Installation(device=DeviceKind.GPU)}
    with pytest.raises(InvalidValueError, match=rf"node_pools.gpus.engines.{engine}.draft_model"):
        backend(engine, bare).replica_command(replica(drafting))


def test_programs_are_looked_for_on_the_path() -> None:
    here = Installation(device=DeviceKind.CPU, command=("python3",))
    assert missing_program("vllm", here) is None
    gone = Installation(device=DeviceKind.CPU, command=("/nowhere/vllm",))
    assert missing_program("vllm", gone) == (
        "the engine vllm is not installed here: /nowhere/vllm is no program that can be run"
    )
    assert installation_of(INSTALLATIONS, pool()).on_gpu


@pytest.mark.parametrize("port", [1024, 8000, 32_767, 32_768, 40_000, 60_999])
def test_a_side_port_is_another_one_that_can_be_used(port: int) -> None:
    assert 1024 <= side_port(port) <= 65_535
    assert side_port(port) != port
