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

from cluster.engines.base import EngineBackend, LaunchCommand, ReplicaSpec, RouterSpec
from cluster.engines.child_process import Exit
from cluster.engines.emulated_faults import USAGE_ERROR
from cluster.engines.log_signs import reason_in_log
from search_spaces.emulation import EngineProfile, Fault, FaultPlan, Noise
from search_spaces.engines.emulated import EMULATED
from search_spaces.errors import InvalidValueError
from search_spaces.model import ModelSpec
from search_spaces.outcome import FailureReason
from search_spaces.problem import Problem
from search_spaces.serving import OptionValue, Pool, Role, ServingConfig

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
    said for the one at hand. `plan` strikes trials with faults; `fault` strikes every replica.
    """

    source: ProfileSource | None = None
    profiles: Mapping[Role, EngineProfile] = field(default_factory=dict)
    refusal: str | None = None
    noise: Noise = field(default_factory=Noise)
    plan: FaultPlan = field(default_factory=FaultPlan)
    fault: Fault | None = None
    config_key: str = ""

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

    def replica_command(self, replica: ReplicaSpec) -> LaunchCommand:
        """A process of the emulated engine; raises `InvalidValueError` where there is no profile for its role."""
        if self.refusal is not None:
            raise InvalidValueError(self.refusal)
        role = replica.pool.role
        if role not in self.profiles:
            raise InvalidValueError(
                f"the emulated engine has no profile of a {role} replica; call for_deployment first"
            )
        path = replica.work_dir / f"{role}-{replica.index}.spec.json"
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
        }

    def _fault(self, replica: ReplicaSpec) -> Fault | None:
        """The fault of this replica: one replica of a trial that is struck has it."""
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
