"""The emulated engine: what to launch for a replica or a router, and what their ends mean.

The times of its steps are data that someone else computes for each deployment (`ProfileSource`): nothing here knows a
performance model, and what travels to the nodes is plain values.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cluster.device_memory import DeviceMemory
from cluster.engines.base import EngineBackend, HttpCall, LaunchCommand, ReplicaSpec, RouterSpec
from cluster.engines.child_process import Exit
from cluster.engines.emulated_faults import USAGE_ERROR
from cluster.engines.emulated_memory import default_ledger, in_use
from cluster.engines.log_signs import reason_in_log
from search_spaces.emulation import EngineProfile, Fault, FaultPlan, Noise
from search_spaces.engines.emulated import EMULATED
from search_spaces.errors import InvalidValueError
from search_spaces.model import ModelSpec
from search_spaces.outcome import FailureReason
from search_spaces.problem import Problem
from search_spaces.serving import Mode, OptionValue, Pool, Role, ServingConfig

SIGTERM, SIGKILL = -15, -9
_SERVER = "cluster.engines.emulated_server"
_SPEC_OPTIONS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_chunked_prefill",
    "gpu_memory_utilization",
)

ProfileSource = Callable[[ServingConfig, Problem], Mapping[Role, EngineProfile]]
"""Profiles of the replicas of a deployment by role; raises `InvalidValueError` for one that no engine can serve."""


@dataclass(frozen=True, kw_only=True)
class EmulatedBackend:
    """See `cluster.engines.base.EngineBackend`.

    `source` makes the profiles of a deployment and stays with the coordinator; `profiles` and `refusal` are what it
    said for the one at hand. `plan` strikes trials with faults; `fault` strikes every replica, and of one that spans
    nodes the part `fault_rank`. `ledger` is the folder in which a machine's emulated memory is booked.
    """

    source: ProfileSource | None = None
    profiles: Mapping[Role, EngineProfile] = field(default_factory=dict)
    refusal: str | None = None
    noise: Noise = field(default_factory=Noise)
    plan: FaultPlan = field(default_factory=FaultPlan)
    fault: Fault | None = None
    fault_rank: int = 0
    config_key: str = ""
    ledger: Path = field(default_factory=default_ledger)

    name = "emulated"
    emulated = True

    def for_deployment(self, config: ServingConfig, problem: Problem) -> EngineBackend:
        """The backend with the profiles of `config`; one that cannot be served says so when it is launched."""
        if self.source is None:
            return self
        try:
            profiles, refusal = dict(self.source(config, problem)), None
        except InvalidValueError as error:
            profiles, refusal = {}, str(error)
        return replace(self, source=None, profiles=profiles, refusal=refusal, config_key=config.key)

    def prepare(self, model: ModelSpec, directory: Path) -> ModelSpec:
        """The model as it is: no weights are loaded."""
        del directory
        return model

    def reset_calls(self, pool: Pool) -> tuple[HttpCall, ...]:
        """Blocks of earlier prompts are forgotten; without prefix caching there are none."""
        return (HttpCall(path="/reset_prefix_cache"),) if _option(pool, "enable_prefix_caching") else ()

    def replica_command(self, replica: ReplicaSpec) -> LaunchCommand:
        """A process of the emulated engine; raises `InvalidValueError` where there is no profile for its role."""
        if self.refusal is not None:
            raise InvalidValueError(self.refusal)
        role = replica.pool.role
        if role not in self.profiles:
            raise InvalidValueError(
                f"the emulated engine has no profile of a {role} replica; call for_deployment first"
            )
        part = "" if replica.part is None else f".{replica.part.rank}"
        path = replica.work_dir / f"{role}-{replica.index}{part}.spec.json"
        text = json.dumps(self._spec(replica), indent=1)
        return LaunchCommand(argv=(sys.executable, "-m", _SERVER, "--spec", str(path)), files={str(path): text})

    def _spec(self, replica: ReplicaSpec) -> dict[str, object]:
        pool, workload = replica.pool, replica.workload
        fault = self._fault(replica)
        return {
            "model_name": replica.model.name,
            "host": replica.host,
            "port": replica.port,
            "role": str(pool.role),
            "profile": asdict(self.profiles[pool.role]),
            **{name: _option(pool, name) for name in _SPEC_OPTIONS},
            "enable_prefix_caching": bool(_option(pool, "enable_prefix_caching")) and workload.shared_prefix > 0,
            "max_model_len": workload.longest_context,
            "slot_dir": str(replica.shared_dir),
            "noise": asdict(self.noise),
            "seed": f"{self.plan.seed}|{replica.trial}|{pool.role}|{replica.index}",
            "fault": None if fault is None else asdict(fault),
            "part": None if replica.part is None else asdict(replica.part),
            "ledger": str(self.ledger / replica.node) if replica.node else None,
            "devices": replica.device_ids,
        }

    def span_refusal(self, pool: Pool, devices: tuple[int, ...]) -> str | None:
        """Why nodes with so many devices cannot share a replica: a tensor-parallel group stays on one node."""
        tp = pool.parallelism.tp
        split = [count for count in devices if count % tp]
        return f"{split[0]} devices of a node hold no whole groups of tp={tp}" if split else None

    def needs_shared_folder(self, config: ServingConfig) -> bool:
        """True where KV caches are handed over."""
        return config.mode is Mode.DISAGGREGATED

    def device_memory(self, node: str, device_ids: tuple[int, ...]) -> tuple[DeviceMemory, ...]:
        """Memory of emulated GPUs of `node`, by the ledger; none where there is no profile to say their size."""
        sizes = [profile.memory.total_bytes for profile in self.profiles.values()]
        return in_use(self.ledger / node, device_ids, max(sizes)) if sizes else ()

    def _fault(self, replica: ReplicaSpec) -> Fault | None:
        """The fault of this replica: one replica of a trial that is struck has it."""
        if replica.part is not None and replica.part.rank != self.fault_rank:
            return None
        if self.fault is not None:
            return self.fault
        roles = sorted({replica.pool.role, *([replica.peer.role] if replica.peer else [])})
        struck = random.Random(f"{self.plan.seed}|{replica.trial}").choice(roles)  # noqa: S311  no secret
        if replica.index != 0 or replica.pool.role is not struck:
            return None
        return self.plan.draw(config_key=self.config_key, trial=replica.trial)

    def router_command(self, router: RouterSpec) -> LaunchCommand:
        """A process with the router; a slot stands for each sequence that a replica may run."""
        spec = {
            "host": router.host,
            "port": router.port,
            "mixed_urls": router.mixed_urls,
            "prefill_urls": router.prefill_urls,
            "decode_urls": router.decode_urls,
            "prefill_slots": _slots(router.prefill_pool),
            "decode_slots": _slots(router.decode_pool),
            "slot_dir": str(router.shared_dir),
        }
        return LaunchCommand(argv=(sys.executable, "-m", "cluster.router", "--spec", json.dumps(spec)))

    def classify(self, exit_code: int | None, log_tail: str, *, ready: bool) -> FailureReason:
        """Class of a failure. An engine that is killed without a word of its own is its node's fault."""
        if exit_code is None:
            return FailureReason.REQUESTS_FAILED if ready else FailureReason.STARTUP_TIMEOUT
        by_code = {
            SIGKILL: FailureReason.UNHEALTHY_NODE,
            SIGTERM: FailureReason.UNHEALTHY_NODE,
            USAGE_ERROR: FailureReason.INVALID_FLAGS,
            int(Exit.INVALID_OPTIONS): FailureReason.INVALID_FLAGS,
            int(Exit.PORT_IN_USE): FailureReason.TRANSPORT,
            int(Exit.PEER_LOST): FailureReason.TRANSPORT,
            int(Exit.ORPHANED): FailureReason.LOST_COORDINATOR,
        }
        return reason_in_log(log_tail, ready=ready) or by_code.get(exit_code, FailureReason.ENGINE_CRASH)

    def version(self) -> str:
        """Says what it is: nothing of it was measured on the hardware that it names."""
        gpus = sorted({profile.title for profile in self.profiles.values()})
        return f"EMULATED {', '.join(gpus)}" if gpus else "EMULATED"


def _option(pool: Pool, name: str) -> OptionValue:
    return pool.option(name, EMULATED.parameter(name).default)


def _slots(pool: Pool | None) -> int:
    return 0 if pool is None else int(_option(pool, "max_num_seqs")) * pool.parallelism.dp
