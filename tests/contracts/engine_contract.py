"""What every backend of an engine must do: subclass `EngineContract` and give it its fixtures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cluster.engines.base import (
    ChecksCommand,
    EngineBackend,
    HandsOver,
    LaunchCommand,
    ReplicaSpec,
    ResetsCaches,
    RouterSpec,
    SpansNodes,
)
from cluster.router.options import RouterOptions
from search_spaces.engines import EngineParameter, engine_spec
from search_spaces.hardware import DeviceKind
from search_spaces.outcome import FailureReason
from search_spaces.serving import OptionValue, Parallelism, Pool, Role, ServingConfig, make_options

Values = dict[str, OptionValue]


class EngineContract:
    """Subclasses give `engine` (a backend) and `spec` (a replica on devices of a kind, with options)."""

    companions: ClassVar[dict[str, Values]] = {}
    """Options that must be set for one to have an effect, by its name."""
    without_effect: ClassVar[frozenset[tuple[str, OptionValue]]] = frozenset()
    """Values that are what the engine does anyway."""

    @pytest.fixture
    def engine(self) -> EngineBackend:
        raise NotImplementedError

    def spec(self, engine: EngineBackend, directory: Path, pool: Pool, **changes: Any) -> ReplicaSpec:
        raise NotImplementedError

    def command(self, engine: EngineBackend, directory: Path, pool: Pool, **changes: Any) -> LaunchCommand:
        return engine.replica_command(self.spec(engine, directory, pool, **changes))

    def pool(self, engine: EngineBackend, role: Role = Role.MIXED, **options: OptionValue) -> Pool:
        kinds = engine_spec(engine.name).devices
        named = [engine_spec(engine.name).parameter(name) for name in options]
        kind = next(kind for kind in kinds if all(kind in parameter.kinds for parameter in named))
        option = engine_spec(engine.name).devices_per_rank_option
        threads = int(options.get(option or "", 1)) if kind is DeviceKind.CPU else 1
        return Pool(
            role=role,
            node_pool="gpus" if kind is DeviceKind.GPU else "cores",
            parallelism=Parallelism(),
            devices_per_rank=threads,
            options=make_options(dict(options)),
        )

    def test_its_name_and_nature_are_those_of_its_spec(self, engine: EngineBackend) -> None:
        spec = engine_spec(engine.name)
        assert spec.name == engine.name
        assert spec.emulated == engine.emulated
        assert isinstance(engine, ChecksCommand) == spec.apart

    def test_a_command_is_a_pure_function_of_the_replica(self, engine: EngineBackend, tmp_path: Path) -> None:
        pool = self.pool(engine)
        spec = self.spec(engine, tmp_path, pool)
        first = engine.replica_command(spec)
        assert first == engine.replica_command(spec)
        assert first.argv
        assert all(isinstance(word, str) for word in (*first.argv, *first.env, *first.env.values()))
        said = _everything(first)
        assert str(spec.port) in said
        assert spec.host in said
        assert str(engine.replica_command(self.spec(engine, tmp_path, pool, port=8111))) != str(first)
        assert first.ready_path.startswith("/")

    def test_a_key_is_never_an_argument(self, engine: EngineBackend, tmp_path: Path) -> None:
        command = self.command(engine, tmp_path, self.pool(engine), api_key="a-secret-of-the-study")
        assert not any("a-secret-of-the-study" in word for word in command.argv)

    def test_every_value_of_every_option_reaches_the_engine(self, engine: EngineBackend, tmp_path: Path) -> None:
        spec = engine_spec(engine.name)
        for parameter in spec.parameters:
            for value in parameter.choices:
                if value == parameter.default or (parameter.name, value) in self.without_effect:
                    continue
                self._reaches(engine, tmp_path, parameter, value)

    def _reaches(self, engine: EngineBackend, directory: Path, parameter: EngineParameter, value: OptionValue) -> None:
        role = Role.MIXED if Role.MIXED in parameter.roles else Role.DECODE
        options = {**self.companions.get(parameter.name, {}), parameter.name: value}
        with_it, without = (
            self.pool(engine, role, **{**options, parameter.name: v}) for v in (value, parameter.default)
        )
        changed = self.command(engine, directory, with_it, peer=self._peer(with_it))
        left = self.command(engine, directory, without, peer=self._peer(without))
        assert changed != left, f"{parameter.name}={value} changes nothing"

    def _peer(self, pool: Pool) -> Pool | None:
        if pool.role is Role.MIXED:
            return None
        spec_roles = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}
        return Pool(
            role=spec_roles[pool.role],
            node_pool=pool.node_pool,
            devices_per_rank=pool.devices_per_rank,
            options=pool.options,
        )

    def test_shared_options_are_options_of_both_roles(self, engine: EngineBackend) -> None:
        spec = engine_spec(engine.name)
        for name in spec.shared_options:
            assert {Role.PREFILL, Role.DECODE} <= set(spec.parameter(name).roles)

    def test_what_fills_its_steps_are_options_of_its_own(self, engine: EngineBackend) -> None:
        spec = engine_spec(engine.name)
        named = [name for name in asdict(spec.scheduling).values() if name is not None]
        assert spec.scheduling.sequences in named
        assert spec.scheduling.step_tokens in named
        assert all(spec.parameter(name).searched for name in named)

    def test_defaults_are_no_conflict(self, engine: EngineBackend) -> None:
        spec = engine_spec(engine.name)
        for role in Role:
            for kind in spec.devices:
                options = {parameter.name: parameter.default for parameter in spec.parameters_of(role, (kind,))}
                assert spec.conflict(options) is None
                assert spec.repair(options) == options
        assert spec.parallel_conflict(Parallelism(), {}) is None

    def test_routers_understand_their_options(self, engine: EngineBackend, tmp_path: Path) -> None:
        pools = {role: self.pool(engine, role) for role in Role}
        common: dict[str, Any] = {"trial": "t", "host": "127.0.0.1", "port": 9000, "shared_dir": tmp_path}
        common["model"] = self.spec(engine, tmp_path, pools[Role.MIXED]).model
        mixed = RouterSpec(mixed_urls=("http://127.0.0.1:8000", "http://127.0.0.1:8001"), **common)
        apart = RouterSpec(
            prefill_urls=("http://127.0.0.1:8000",),
            decode_urls=("http://127.0.0.1:8001", "http://127.0.0.1:8002"),
            prefill_pool=pools[Role.PREFILL],
            decode_pool=pools[Role.DECODE],
            **common,
        )
        assert _options(engine.router_command(mixed)).urls == mixed.mixed_urls
        options = _options(engine.router_command(apart))
        assert options.is_disaggregated
        assert options.urls == (*apart.prefill_urls, *apart.decode_urls)

    @pytest.mark.parametrize("ready", [False, True])
    def test_ends_are_classified_by_when_and_by_words(self, engine: EngineBackend, ready: bool) -> None:
        alive = FailureReason.REQUESTS_FAILED if ready else FailureReason.STARTUP_TIMEOUT
        memory = FailureReason.OUT_OF_MEMORY_UNDER_LOAD if ready else FailureReason.OUT_OF_MEMORY_AT_BOOT
        assert engine.classify(None, "", ready=ready) is alive
        assert engine.classify(1, "", ready=ready) is FailureReason.ENGINE_CRASH
        assert engine.classify(-11, "Segmentation fault (core dumped)", ready=ready) is FailureReason.ENGINE_CRASH
        assert engine.classify(1, "torch.OutOfMemoryError: CUDA out of memory. Tried", ready=ready) is memory

    def test_a_transport_is_told_where_caches_are_handed_over(self, engine: EngineBackend) -> None:
        pools = {role: self.pool(engine, role) for role in Role}
        if not isinstance(engine, HandsOver):
            return
        assert engine.transport(ServingConfig(engine=engine.name, pools=(pools[Role.MIXED],))) is None
        split = ServingConfig(engine=engine.name, pools=(pools[Role.PREFILL], pools[Role.DECODE]))
        assert engine.transport(split)

    def test_resetting_asks_below_the_base_url(self, engine: EngineBackend) -> None:
        if isinstance(engine, ResetsCaches):
            for call in engine.reset_calls(self.pool(engine)):
                assert call.path.startswith("/")

    def test_equal_shares_of_nodes_can_be_spanned(self, engine: EngineBackend) -> None:
        if isinstance(engine, SpansNodes) and engine_spec(engine.name).apart:
            pool = Pool(role=Role.MIXED, node_pool="gpus", parallelism=Parallelism(tp=4, pp=2))
            assert engine.span_refusal(pool, (4, 4)) is None
            refused = engine.span_refusal(pool, (6, 2))
            assert refused is not None
            assert "(6, 2)" in refused


def _everything(command: LaunchCommand) -> str:
    return "\n".join((*command.argv, *command.env.values(), *command.files.values()))


def _options(command: LaunchCommand) -> RouterOptions:
    assert command.argv[1:3] == ("-m", "cluster.router")
    text = command.argv[command.argv.index("--spec") + 1]
    return RouterOptions.model_validate(
        json.loads(text if text.startswith("{") else next(iter(command.files.values())))
    )
