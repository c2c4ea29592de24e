"""The processes of a measured trial, made again for other places by the engine's own function.

Nothing is replaced in a recorded command line. The engine's backend makes each command anew from the configuration:
first for the place where it was measured, which must give exactly what was recorded; then for the place where it is to
run. What then differs comes from the place alone, and is listed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from cluster.engines.base import LaunchCommand, ReplicaPart, ReplicaSpec, RouterSpec
from cluster.launched import REDACTED
from cluster.placement import needs_router
from search_spaces.errors import InvalidValueError
from search_spaces.outcome import LaunchedProcess
from search_spaces.serving import Pool, Role
from tuner.deploy.chosen import Chosen

ROUTER = "router"
ONLY_TO_MEASURE = ("VLLM_SERVER_DEV_MODE",)
"""Variables that open an engine's door for resetting its caches between runs; users have no business there."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process is to run: it listens on `host` and `port`, and others reach it at `url`."""

    host: str
    port: int
    url: str
    device_ids: tuple[int, ...] = ()
    work_dir: str
    shared_dir: str
    model_source: str | None = None
    cluster_node: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A process of the deployment in its new place. `pool` is None for the router."""

    name: str
    pool: Pool | None
    index: int
    place: Place
    command: LaunchCommand
    measured: LaunchedProcess

    @property
    def uses_shared_dir(self) -> bool:
        """True where the process hands something over through files."""
        texts = (*self.command.argv, *self.command.env.values(), *self.command.files.values())
        return any(self.place.shared_dir in text for text in texts)

    @property
    def differences(self) -> tuple[str, ...]:
        """What differs from the measured process, as `what: measured -> deployed`."""
        return tuple(_differences(self.measured, self.command))


class CommandChangedError(InvalidValueError):
    """The engine's backend no longer makes the command that was measured."""


PlaceOf = Callable[[LaunchedProcess], Place]
Places = Mapping[str, Place]
"""The places of all processes, by name."""


def parts_of(chosen: Chosen, place_of: PlaceOf) -> tuple[Part, ...]:
    """The replicas and the router of `chosen` where `place_of` puts them; a replica that spans nodes has several.

    Raises `CommandChangedError` where a measured command cannot be made again: the deployed one would not be what was
    measured.
    """
    here = {name: place_of(process) for name, process in chosen.processes.items()}
    before = {name: _where(process) for name, process in chosen.processes.items()}
    return (*_replicas(chosen, before, here), *_router(chosen, before, here))


def _replicas(chosen: Chosen, before: Places, here: Places) -> Iterator[Part]:
    for pool in chosen.config.pools:
        for index in range(pool.replicas):
            for measured in _processes_of(chosen, pool, index):
                spec, place = _spec(chosen, pool, index, measured), here[measured.name]
                same = _moved(spec, before[measured.name], spec.part, key=REDACTED)
                _check(measured, _command(chosen, same, measured, measured.model_source))
                moved = _moved(spec, place, _moved_part(chosen, spec, here))
                command = _for_production(_command(chosen, moved, measured, place.model_source))
                yield Part(name=measured.name, pool=pool, index=index, place=place, command=command, measured=measured)


def _for_production(command: LaunchCommand) -> LaunchCommand:
    """`command` without what only measuring needs."""
    return replace(command, env={key: value for key, value in command.env.items() if key not in ONLY_TO_MEASURE})


def _router(chosen: Chosen, before: Places, here: Places) -> Iterator[Part]:
    if not needs_router(chosen.config):
        return
    measured = chosen.processes.get(ROUTER)
    if measured is None:
        raise InvalidValueError(f"trial {chosen.trial.number} has no record of its router; measure it again")
    _check(measured, _router_command(chosen, measured, before, key=REDACTED))
    command = _router_command(chosen, measured, here)
    yield Part(name=ROUTER, pool=None, index=0, place=here[ROUTER], command=command, measured=measured)


def _processes_of(chosen: Chosen, pool: Pool, index: int) -> list[LaunchedProcess]:
    """The processes of a replica: one, or one for each of its nodes, the leader first."""
    name = f"{pool.role}-{index}"
    found = [p for p in chosen.processes.values() if p.name == name or p.name.startswith(f"{name}.")]
    if not found:
        known = ", ".join(chosen.processes)
        raise InvalidValueError(f"trial {chosen.trial.number} has no record of {name} (it has {known}); measure again")
    return sorted(found, key=lambda process: process.part.rank if process.part else 0)


def _where(process: LaunchedProcess) -> Place:
    """The place where `process` was measured."""
    return Place(
        host=process.host,
        port=process.port,
        url=f"http://{process.host}:{process.port}",
        device_ids=process.device_ids,
        work_dir=process.work_dir,
        shared_dir=process.shared_dir,
        model_source=process.model_source,
        cluster_node=process.cluster_node,
    )


def _spec(chosen: Chosen, pool: Pool, index: int, measured: LaunchedProcess) -> ReplicaSpec:
    """The replica where it was measured."""
    return ReplicaSpec(
        trial=measured.trial,
        pool=pool,
        index=index,
        host=measured.host,
        port=measured.port,
        model=replace(chosen.problem.model, source=chosen.local_model or measured.model_source),
        workload=chosen.problem.workload,
        device_ids=measured.device_ids,
        work_dir=Path(measured.work_dir),
        shared_dir=Path(measured.shared_dir),
        peer=next((other for other in chosen.config.pools if other.role is not pool.role), None),
        part=None if measured.part is None else ReplicaPart(**asdict(measured.part)),
    )


def _moved(spec: ReplicaSpec, place: Place, part: ReplicaPart | None, key: str | None = None) -> ReplicaSpec:
    """The replica in another place."""
    return replace(
        spec,
        host=place.host,
        port=place.port,
        device_ids=place.device_ids,
        work_dir=Path(place.work_dir),
        shared_dir=Path(place.shared_dir),
        part=part,
        api_key=key,
        node=place.cluster_node,
    )


def _command(chosen: Chosen, spec: ReplicaSpec, measured: LaunchedProcess, source: str | None) -> LaunchCommand:
    """The process of `spec`, which loads its model from `source`.

    Backends may look at the model's folder, which is not there under its later path: they are given one that is, and
    the path is then exchanged.
    """
    command = _as_measured(chosen.backend.replica_command(spec), measured)
    made_from = spec.model.source
    if made_from is None or source is None or made_from == source:
        return command
    forms = ((made_from, source), (json.dumps(made_from)[1:-1], json.dumps(source)[1:-1]))

    def moved(text: str) -> str:
        for old, new in forms:
            text = text.replace(old, new)
        return text

    return replace(
        command,
        argv=tuple(map(moved, command.argv)),
        env={key: moved(value) for key, value in command.env.items()},
        files={path: moved(text) for path, text in command.files.items()},
    )


def _moved_part(chosen: Chosen, spec: ReplicaSpec, places: Places) -> ReplicaPart | None:
    """The part with the addresses of its replica's new places; a port that serves no HTTP is where they meet."""
    if spec.part is None:
        return None
    of_replica = [places[process.name] for process in _processes_of(chosen, spec.pool, spec.index)]
    leader, follower = of_replica[0], of_replica[1]
    hosts = tuple(address_of(place.url)[0] for place in of_replica)
    meeting = follower.port if follower.port != leader.port else leader.port + 1
    return replace(spec.part, hosts=hosts, rendezvous_port=meeting)


def _router_command(chosen: Chosen, measured: LaunchedProcess, places: Places, key: str | None = None) -> LaunchCommand:
    urls: dict[Role, tuple[str, ...]] = {
        pool.role: tuple(places[_processes_of(chosen, pool, index)[0].name].url for index in range(pool.replicas))
        for pool in chosen.config.pools
    }
    pools = {pool.role: pool for pool in chosen.config.pools}
    own = places[ROUTER]
    spec = RouterSpec(
        trial=measured.trial,
        host=own.host,
        port=own.port,
        model=chosen.problem.model,
        prefill_urls=urls.get(Role.PREFILL, ()),
        decode_urls=urls.get(Role.DECODE, ()),
        mixed_urls=urls.get(Role.MIXED, ()),
        prefill_pool=pools.get(Role.PREFILL),
        decode_pool=pools.get(Role.DECODE),
        shared_dir=Path(own.shared_dir),
        api_key=key,
    )
    return _as_measured(chosen.backend.router_command(spec), measured)


def _as_measured(command: LaunchCommand, measured: LaunchedProcess) -> LaunchCommand:
    """`command` with the interpreter that was measured: this one may be of another machine or folder."""
    program = measured.argv[0] if command.argv[0] == sys.executable else command.argv[0]
    return replace(command, argv=(program, *command.argv[1:]))


def _check(measured: LaunchedProcess, command: LaunchCommand) -> None:
    """Raise unless `command`, made for the place of the measurement, is the process that was measured."""
    unlike = list(_differences(measured, command))
    if unlike:
        raise CommandChangedError(
            f"this version of tuner would start {measured.name} otherwise than it was measured: {'; '.join(unlike)}; "
            "deploy with the version, the study file and the operation tables of the measurement, or measure it again"
        )


def _differences(measured: LaunchedProcess, command: LaunchCommand) -> Iterator[str]:
    if len(measured.argv) != len(command.argv):
        yield f"argv: {list(measured.argv)} -> {list(command.argv)}"
    else:
        flags = ("", *measured.argv)
        for flag, old, new in zip(flags, measured.argv, command.argv, strict=False):
            yield from _word_differences(flag, old, new)
    for key in sorted({*measured.env, *command.env}):
        old_value, new_value = measured.env.get(key), command.env.get(key)
        if old_value != new_value and REDACTED not in (old_value, new_value):
            yield f"{key}: {_or_not_set(old_value)} -> {_or_not_set(new_value)}"
    yield from _file_differences(measured, command)


def _or_not_set(value: object) -> object:
    return "not set" if value is None else value


def _word_differences(flag: str, old: str, new: str) -> Iterator[str]:
    """Differences of two arguments; JSON objects are compared key by key."""
    if old == new:
        return
    before, after = _object(old), _object(new)
    if before is None or after is None:
        yield f"{flag} {old} -> {new}" if flag.startswith("--") else f"{old} -> {new}"
        return
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            yield f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"


def _file_differences(measured: LaunchedProcess, command: LaunchCommand) -> Iterator[str]:
    """Files of another content, by their names: their folders belong to the place."""
    digests = {Path(path).name: hashlib.sha256(text.encode()).hexdigest() for path, text in command.files.items()}
    before = {Path(path).name: digest for path, digest in measured.files.items()}
    for name in sorted({*digests, *before}):
        if digests.get(name) != before.get(name):
            yield f"content of {name}"


def _object(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def in_container(command: LaunchCommand) -> LaunchCommand:
    """`command` where an image brings the program: it is found by its name there."""
    return replace(command, argv=(PurePosixPath(command.argv[0]).name, *command.argv[1:]))


def address_of(url: str) -> tuple[str, int]:
    """Host and port of an HTTP URL that names both."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 80
