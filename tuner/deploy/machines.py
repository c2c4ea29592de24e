"""Files for plain machines: a shell script, or a Compose file, for each node of the measurement."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from search_spaces.hardware import DeviceKind
from search_spaces.serving import Pool
from tuner.deploy.chosen import Chosen
from tuner.deploy.images import dockerfile, image_of, our_image
from tuner.deploy.layout import ROUTER, Part, Place, address_of, in_container, parts_of
from tuner.deploy.nodes import Folders, Node, measured_nodes, on_nodes
from tuner.deploy.render import OutFile, render

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
WORK, SHARED, MODELS = "work", "shared", "models"


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a target makes.

    `endpoint` is where the deployment answers, `start` are the commands that start it, `notes` say what else they need,
    and `platform_notes` what the platform itself changes.
    """

    files: tuple[OutFile, ...]
    parts: tuple[Part, ...]
    endpoint: str
    start: tuple[str, ...]
    notes: tuple[str, ...] = ()
    platform_notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user may ask of a target.

    `image` and `router_image` are None for those of the engine and of this package; `model` is a file below the output
    folder that the tool wrote, None where the model is found elsewhere.
    """

    title: str
    name: str
    port: int
    hosts: tuple[str, ...] = ()
    image: str | None = None
    router_image: str | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A process as the templates show it."""

    name: str
    argv: tuple[str, ...]
    environment: tuple[str, ...]
    host: str
    port: int
    ready_path: str


def uses_gpus(pool: Pool | None, chosen: Chosen) -> bool:
    """True where the processes of `pool` really run on GPUs."""
    if pool is None or chosen.backend.emulated:
        return False
    return chosen.problem.node_pool(pool.node_pool).device.kind is DeviceKind.GPU


def model_path(chosen: Chosen, wishes: Wishes) -> str | None:
    """The model as a process on a machine names it: the file beside the script, else what was measured."""
    if wishes.model is not None:
        return wishes.model
    return next((p.model_source for p in chosen.processes.values() if p.model_source is not None), None)


def shell(chosen: Chosen, wishes: Wishes) -> Output:
    """`start.sh`, or `start-<node>.sh` for each node where there are several."""
    folders = Folders(work=WORK, shared=SHARED, model=model_path(chosen, wishes))
    parts = parts_of(chosen, on_nodes(chosen, folders, base_port=wishes.port, hosts=wishes.hosts))
    nodes = measured_nodes(chosen)
    names = file_names(nodes, "start", ".sh")
    files = [
        OutFile(path=name, text=_script(chosen, wishes, node, parts), executable=True)
        for name, node in zip(names, nodes, strict=True)
    ]
    return Output(
        files=(*files, *command_files(parts)),
        parts=parts,
        endpoint=endpoint_of(parts),
        start=tuple(f"./{name}" for name in names),
    )


def _script(chosen: Chosen, wishes: Wishes, node: Node, parts: Sequence[Part]) -> str:
    """The script of `node`. The router's node waits for the replicas of the others."""
    replicas = [part for part in parts if part.name != ROUTER]
    router = next((part for part in parts if part.name == ROUTER and part.measured.node == node[0]), None)
    here = [part for part in replicas if part.measured.node == node[0]]
    endpoint = endpoint_of(parts) if router or parts == tuple(here) else None
    return render(
        "start.sh.j2",
        title=wishes.title,
        node=node[0],
        folders=(WORK, SHARED),
        start_limit_s=round(chosen.file.limits.start_s),
        replicas=[_shown(part, chosen) for part in here],
        awaited=[_shown(part, chosen) for part in (replicas if router else here)],
        router=None if router is None else _shown(router, chosen),
        endpoint=endpoint,
        model_name=chosen.problem.model.name,
    )


def _shown(part: Part, chosen: Chosen) -> _Shown:
    gpus = {GPU_VARIABLE: ",".join(map(str, part.place.device_ids))} if uses_gpus(part.pool, chosen) else {}
    host, port = address_of(part.place.url)
    return _Shown(
        name=part.name,
        argv=part.command.argv,
        environment=tuple(f"{key}={value}" for key, value in sorted({**gpus, **part.command.env}.items())),
        host=host,
        port=port,
        ready_path=part.command.ready_path,
    )


def _renumbered(place: Place, chosen: Chosen) -> Place:
    """A container sees the GPUs that it is given under the numbers from 0 on, but the cores under their own."""
    if not uses_gpus(chosen.config.pools[0], chosen):
        return place
    return replace(place, device_ids=tuple(range(len(place.device_ids))))


@dataclass(frozen=True, kw_only=True)
class _Service:
    """A service of a Compose file. `mounts` are (source, target, ro or rw)."""

    name: str
    image: str
    argv: tuple[str, ...]
    environment: dict[str, str]
    mounts: tuple[tuple[str, str, str], ...]
    after: tuple[str, ...]
    gpus: tuple[int, ...]


def compose(chosen: Chosen, wishes: Wishes) -> Output:
    """`compose.yaml`, or `compose-<node>.yaml` for each node where there are several."""
    found = model_path(chosen, wishes)
    folders = Folders(work=f"/{WORK}", shared=f"/{SHARED}", model=found if wishes.model is None else f"/{wishes.model}")
    places = on_nodes(chosen, folders, base_port=wishes.port, hosts=wishes.hosts)
    parts = parts_of(chosen, lambda process: _renumbered(places(process), chosen))
    nodes = measured_nodes(chosen)
    names = file_names(nodes, "compose", ".yaml")
    files = [
        OutFile(path=name, text=_compose_file(chosen, wishes, node, name, parts))
        for name, node in zip(names, nodes, strict=True)
    ]
    return Output(
        files=(*files, *command_files(parts), *dockerfile(chosen, images_of(parts, chosen, wishes))),
        parts=parts,
        endpoint=endpoint_of(parts),
        start=tuple(f"docker compose -f {name} up -d" for name in names),
    )


def _compose_file(chosen: Chosen, wishes: Wishes, node: Node, file: str, parts: Sequence[Part]) -> str:
    services = [_service(part, chosen, wishes, parts) for part in parts if part.measured.node == node[0]]
    return render(
        "compose.yaml.j2",
        title=wishes.title,
        node=node[0],
        file=file,
        project=wishes.name,
        our_image=our_image(),
        parts=services,
    )


def _service(part: Part, chosen: Chosen, wishes: Wishes, parts: Sequence[Part]) -> _Service:
    replicas_here = [p.name for p in parts if p.measured.node == part.measured.node and p.name != ROUTER]
    return _Service(
        name=part.name,
        image=part_image(part, chosen, wishes),
        argv=in_container(part.command).argv,
        environment=dict(sorted(part.command.env.items())),
        mounts=tuple(_mounts(part, wishes)),
        after=tuple(replicas_here) if part.name == ROUTER else (),
        gpus=part.measured.device_ids if uses_gpus(part.pool, chosen) else (),
    )


def _mounts(part: Part, wishes: Wishes) -> Iterator[tuple[str, str, str]]:
    """Folders that a process in a container sees: its files, what is handed over, and its weights."""
    if part.command.files:
        yield f"./{WORK}", f"/{WORK}", "ro"
    if part.uses_shared_dir:
        yield f"./{SHARED}", f"/{SHARED}", "rw"
    source = part.place.model_source
    if source is None or not source.startswith("/"):  # nothing is loaded, or it is a name that the engine fetches
        return
    if wishes.model is not None:
        yield f"./{MODELS}", f"/{MODELS}", "ro"
    else:
        folder = source if PurePosixPath(source).suffix == "" else str(PurePosixPath(source).parent)
        yield folder, folder, "ro"


def part_image(part: Part, chosen: Chosen, wishes: Wishes) -> str:
    """The image of a process: the router's is that of this package."""
    if part.name == ROUTER:
        return wishes.router_image or our_image()
    return image_of(chosen, wishes.image)


def images_of(parts: Sequence[Part], chosen: Chosen, wishes: Wishes) -> set[str]:
    """All images of a deployment."""
    return {part_image(part, chosen, wishes) for part in parts}


def endpoint_of(parts: Sequence[Part]) -> str:
    """URL at which the deployment answers: the router's, else that of the only replica."""
    return next((part for part in parts if part.name == ROUTER), parts[0]).place.url


def command_files(parts: Sequence[Part]) -> tuple[OutFile, ...]:
    """The files that the commands name, below the output folder."""
    return tuple(
        OutFile(path=path.lstrip("/"), text=text) for part in parts for path, text in part.command.files.items()
    )


def file_names(nodes: Sequence[Node], stem: str, suffix: str) -> list[str]:
    """A file name for each node, none alike; the plain one where there is one node only."""
    if len(nodes) == 1:
        return [f"{stem}{suffix}"]
    tame = [re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-") for name, _ in nodes]
    unique = len(set(tame)) == len(tame) and all(tame)
    return [f"{stem}-{name if unique else number}{suffix}" for number, name in enumerate(tame)]
