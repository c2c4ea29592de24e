"""A Ray cluster for a study: a local one that ends with the driver, or one that is joined."""

from __future__ import annotations

import logging
import math
import os
import platform
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from cluster.node_facts import usable_cores
from cluster.placement import (
    ACCELERATOR_SHARE,
    CLIENT_CPUS,
    HOST_CPUS_PER_GPU,
    ROUTER_CPUS,
    NodeView,
    PlacementError,
    check_pools,
)
from search_spaces.errors import TunerError
from search_spaces.hardware import DeviceKind, NodePool

INIT_TRIES = 2
TCP_LIMIT_S = 5.0
PROBE_LIMIT_S = 30.0
PROBE_TRIES = 3
PROBE_PAUSE_S = 1.0
LOOK_LIMIT_S = 1.0
_AUTH_MODE, _AUTH_TOKEN, _AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_JOIN_TRIES = "RAY_NUM_REDIS_GET_RETRIES"
_NICENESS = "RAY_worker_niceness"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class ClusterError(TunerError):
    """The Ray cluster cannot be started or joined."""


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A connection to Ray. `warnings` are for the user; `oversubscribed` goes into every record."""

    address: str
    pools: tuple[NodePool, ...]
    local: bool
    trials_at_once: int
    oversubscribed: bool = False
    warnings: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def nodes(self) -> list[NodeView]:
        """The live nodes."""
        return [_node_view(node) for node in _raw_nodes() if node["Alive"]]

    def is_lost(self, node_id: str) -> bool:
        """True where Ray counts the node as dead, or nothing listens any more where its Ray listened."""
        node = next((node for node in _raw_nodes() if node["NodeID"] == node_id and node["Alive"]), None)
        if node is None:
            return True
        try:
            address = (node["NodeManagerAddress"], node["NodeManagerPort"])
            socket.create_connection(address, timeout=LOOK_LIMIT_S).close()
        except OSError:
            return True
        return False

    def run_on_pool(
        self,
        pool: NodePool,
        devices: int,
        limit_s: float,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Call `function` (of an importable module) on a node of `pool` with `devices` reserved; its result is small.

        On a CPU pool it runs pinned to as many cores, the first of the node, as a replica would. Raises `ClusterError`
        where it did not return within `limit_s`, and what `function` raises.
        """
        import ray

        gpus = devices if pool.device.kind is DeviceKind.GPU else 0
        types = (
            {} if pool.accelerator_type is None else {f"accelerator_type:{pool.accelerator_type}": ACCELERATOR_SHARE}
        )
        task: Any = ray.remote(max_calls=1)(_pinned).options(
            num_cpus=gpus * HOST_CPUS_PER_GPU if gpus else devices,
            num_gpus=gpus,
            resources=types,
            label_selector=dict(pool.labels),
            max_retries=0,
        )
        reference = task.remote(0 if gpus else devices, function, args, kwargs)
        try:
            result: Result = ray.get(reference, timeout=limit_s)
        except ray.exceptions.GetTimeoutError as error:
            ray.cancel(reference, force=True)
            raise ClusterError(
                f"{function.__name__} on node pool {pool.name!r} did not end within {limit_s:g} s; is the pool busy?"
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        return result

    def run_on_every_node(
        self, limit_s: float, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> dict[str, Result]:
        """Call `function` on each live node, without reserving anything; results by node id.

        Nodes that did not answer within `limit_s`, or that died, are left out with a warning. Raises what `function`
        raises.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        calls: dict[Any, str] = {}
        for node in self.nodes():
            there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            task: Any = ray.remote(_pinned).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            calls[task.remote(0, function, args, kwargs)] = node.node_id
        done, late = ray.wait(list(calls), num_returns=len(calls), timeout=limit_s)
        for reference in late:
            _log.warning("%s did not answer within %g s on node %s", function.__name__, limit_s, calls[reference])
        answers: dict[str, Result] = {}
        for reference in done:
            try:
                answers[calls[reference]] = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:  # a dead node counts as alive until its heartbeats are missed
                lines = str(error).strip().splitlines()
                _log.warning("%s did not run on node %s: %s", function.__name__, calls[reference], lines[:1])
        return answers

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        import ray

        ray.shutdown()


def keep_ray_quiet() -> None:
    """Set Ray's own options, before it is imported: it prints what it thinks of dead nodes to standard output.

    That is where commands print JSON; what becomes of nodes is told by warnings of our own.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray 2.60 announces this as its coming default


def connect(address: str | None, pools: Sequence[NodePool], *, trials_at_once: int = 1) -> RayCluster:
    """Start Ray on this machine (`address` None) or join it at `address` (host:port or `auto`), and find `pools` there.

    Raises `ClusterError` where Ray cannot be started or joined, `PlacementError` where a declared pool is not there.
    """
    keep_ray_quiet()
    cluster = _start(pools, trials_at_once) if address is None else _join(address, pools, trials_at_once)
    try:
        check_pools(pools, cluster.nodes())
    except PlacementError:
        cluster.close()
        raise
    for warning in cluster.warnings:
        _log.warning(warning)
    return cluster


def _start(pools: Sequence[NodePool], trials_at_once: int) -> RayCluster:
    pool = _only_local_pool(pools)
    on_gpu = pool.device.kind is DeviceKind.GPU
    serving = pool.devices * HOST_CPUS_PER_GPU if on_gpu else float(pool.devices)
    cpus = serving + trials_at_once * (CLIENT_CPUS + ROUTER_CPUS)
    cores = len(usable_cores())
    oversubscribed = serving + CLIENT_CPUS > cores
    warnings = [_oversubscription(pool, serving, cores)] if oversubscribed else []
    os.environ.setdefault(_NICENESS, "0")  # Ray's 15 lets measured engines yield to everything else on the machine
    context = _initialise(
        address="local",  # without it Ray joins whatever cluster was started last on this machine
        include_dashboard=False,
        num_cpus=math.ceil(max(cpus, cores)),
        labels=dict(pool.labels),
        _node_ip_address="127.0.0.1",
    )
    return RayCluster(
        address=context.address_info["address"],
        pools=tuple(pools),
        local=True,
        trials_at_once=trials_at_once,
        oversubscribed=oversubscribed,
        warnings=tuple(warnings),
    )


def _only_local_pool(pools: Sequence[NodePool]) -> NodePool:
    nodes = sum(pool.nodes for pool in pools)
    if len(pools) != 1 or nodes != 1:
        raise ClusterError(
            f"the node pools have {nodes} nodes, and a Ray that is started here has one; join a cluster with --address "
            "(or declare one pool of one node)"
        )
    return pools[0]


def _oversubscription(pool: NodePool, serving: float, cores: int) -> str:
    return (
        f"node pool {pool.name!r} takes {serving:g} cores and the load generator {CLIENT_CPUS:g}, but this machine has "
        f"{cores}: cores are shared, and timings suffer; declare fewer devices per node to measure undisturbed"
    )


def _initialise(**options: Any) -> Any:
    """`ray.init` with little noise; tried again once, as it fails now and then on a loaded machine."""
    import ray

    for last in (False, True):
        try:
            return ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
        except (RuntimeError, ConnectionError, TimeoutError, OSError) as error:
            ray.shutdown()
            if last:
                raise ClusterError(f"Ray could not be started: {error}") from error
            _log.warning("Ray could not be started (%s); trying once more", error)
            time.sleep(1.0)
    raise AssertionError("unreachable")


def _join(address: str, pools: Sequence[NodePool], trials_at_once: int) -> RayCluster:
    _check_reachable(address)
    os.environ.setdefault(_JOIN_TRIES, "5")  # one second each; Ray's own default is 20, and something listens there
    try:
        context = _join_once(address)
    except ClusterError:
        if not _token_unused():
            raise
        _log.warning("Ray at %s was not joined; trying with the token at hand. Set RAY_AUTH_MODE=token", address)
        _use_token()
        context = _join_once(address)
    _check_actors(address)
    return RayCluster(
        address=context.address_info["address"], pools=tuple(pools), local=False, trials_at_once=trials_at_once
    )


def _join_once(address: str) -> Any:
    import ray

    try:
        return ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(_token_help(address, str(error).split(". ")[0])) from error
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(_token_help(address, str(error))) from error


class _Probe:
    """An actor that shows whether actors work, and whether the nodes can import this package."""

    def python(self) -> str:
        """Version of the interpreter on its node."""
        return platform.python_version()


def _check_actors(address: str) -> None:
    """Make an actor and hear from it: a driver may join and run tasks, and yet have none (see `_token_unused`).

    Tried several times: one may have been put on a node that was about to die, or on one that Ray does not know to be
    dead yet.
    """
    import ray

    for tries_left in reversed(range(PROBE_TRIES)):
        probe: Any = ray.remote(_Probe).options(num_cpus=0, max_restarts=0, scheduling_strategy="SPREAD").remote()
        try:
            ray.get(probe.python.remote(), timeout=PROBE_LIMIT_S)
        except ray.exceptions.RayError as error:
            cause = f"an actor does not work there ({type(error).__name__}: {str(error).strip().splitlines()[-1]})"
            if tries_left and not isinstance(error, ray.exceptions.RayTaskError):
                _log.warning("Ray at %s: %s; trying again", address, cause)
                time.sleep(PROBE_PAUSE_S)
                continue
            ray.shutdown()
            help_ = _token_help(address, cause)
            raise ClusterError(f"{help_}; and that its nodes have this package installed") from error
        ray.kill(probe)
        return


def _token_unused() -> bool:
    """True where a token is at hand and nothing says whether to use it.

    With an explicit address Ray (2.60) does not use it by itself. It must not be used untried: in a cluster without
    tokens a driver that wants them joins and runs tasks, but its actors are ended as soon as they are made.
    """
    path = Path(os.environ.get(_AUTH_TOKEN_PATH, Path.home() / ".ray" / "auth_token"))
    return _AUTH_MODE not in os.environ and (_AUTH_TOKEN in os.environ or path.is_file())


def _use_token() -> None:
    os.environ[_AUTH_MODE] = "token"
    from ray._raylet import Config  # type: ignore[attr-defined]  # a compiled module without types

    Config.initialize("")  # the mode is read when ray is imported; nothing public reads it again


def _check_reachable(address: str) -> None:
    """Fail at once where nothing listens: Ray itself tries for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()) or address.startswith("ray://"):
        raise ClusterError(
            f"address={address!r} is no Ray address; give host:port of the head node, such as 10.0.0.1:6379"
        )
    try:
        socket.create_connection((host, int(port)), timeout=TCP_LIMIT_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster listens at {address} ({error}); start one with: ray start --head"
        ) from error


def _token_help(address: str, cause: str) -> str:
    mode = os.environ.get(_AUTH_MODE, "unset")
    return (
        f"Ray at {address} cannot be joined: {cause}. With {_AUTH_MODE}={mode} here: where the cluster wants a token, "
        f"set {_AUTH_MODE}=token and give its token in {_AUTH_TOKEN}, {_AUTH_TOKEN_PATH} or ~/.ray/auth_token; where "
        f"it wants none, set {_AUTH_MODE}=disabled; check too that this Ray and Python have the cluster's versions"
    )


def _raw_nodes() -> list[dict[str, Any]]:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # ray leaves it without types
    return nodes


def _node_view(node: dict[str, Any]) -> NodeView:
    resources: dict[str, float] = node["Resources"]
    prefix = "accelerator_type:"
    return NodeView(
        node_id=node["NodeID"],
        host=node["NodeManagerHostname"],
        ip=node["NodeManagerAddress"],
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        labels=dict(node["Labels"]),
        accelerator_types=frozenset(name.removeprefix(prefix) for name in resources if name.startswith(prefix)),
    )


def _pinned(cores: int, function: Callable[..., Result], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
    """Run `function` on the first `cores` cores (0: on any)."""
    usable = usable_cores()
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, usable[:cores])
    return function(*args, **kwargs)
