"""Files for Kubernetes: a Deployment with its Service for each replica, or LeaderWorkerSets.

Every replica has a name of its own in the cluster's DNS, as the router spreads and pairs requests itself, as measured.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Protocol

from cluster.engines.base import NeedsSharedFolder
from cluster.placement import HOST_CPUS_PER_GPU, ROUTER_CPUS
from search_spaces.errors import InvalidValueError
from search_spaces.outcome import LaunchedProcess
from tuner.deploy.chosen import Chosen
from tuner.deploy.images import dockerfile
from tuner.deploy.layout import ROUTER, Part, Place, PlaceOf, in_container, parts_of
from tuner.deploy.machines import Output, Wishes, images_of, model_path, part_image, uses_gpus
from tuner.deploy.render import POD_IP, OutFile, render

ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - a pod's own network
FILES, SHARED = "/etc/tuner", "/shared"
SHARED_VOLUME, MODEL_VOLUME = "shared", "model"
STARTUP_PERIOD_S = 5
GPU_PRODUCT_LABEL = "nvidia.com/gpu.product"
"""Label of NVIDIA's GPU feature discovery: the product name with dashes for spaces."""
ENGINES_THAT_TELL_THEIR_ADDRESS = ("vllm", "sglang", "trtllm")
"""They hand the address that they listen on to their peers, so it must be the pod's own."""


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod as the templates show it.

    `mounts` are (volume, path), those of `claims` are shared by pods; `files` are the texts of its ConfigMap by name.
    """

    name: str
    part_name: str
    argv: tuple[str, ...]
    environment: dict[str, str]
    port: int
    ready_path: str
    image: str
    cpus: str
    gpus: int
    mounts: tuple[tuple[str, str], ...]
    claims: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    large_shared_memory: bool = False
    node_selector: dict[str, str] = field(default_factory=dict)
    replicas: int = 1

    @property
    def group(self) -> str:
        """The replica that it is, or is a part of."""
        return self.part_name.partition(".")[0]

    @property
    def leads(self) -> bool:
        """False for the part of a replica that serves no HTTP."""
        return self.part_name.partition(".")[2] in {"", "0"}

    @property
    def knows_its_address(self) -> bool:
        """True where the command names the pod's address."""
        return any(POD_IP in text for text in (*self.argv, *self.environment.values()))

    @property
    def volumes(self) -> tuple[str, ...]:
        """Names of the volumes that are claimed or made for it."""
        return tuple(dict.fromkeys(name for name, _ in self.mounts))


class Addressing(Protocol):
    """From the name of a process to its name in the cluster's DNS."""

    def __call__(self, name: str, /) -> str:
        """The host name."""
        ...


def kubernetes(chosen: Chosen, wishes: Wishes) -> Output:
    """`kubernetes.yaml`: Deployments and Services; raises `InvalidValueError` for replicas that span nodes."""
    if any(process.part is not None for process in chosen.measurement.processes):
        raise InvalidValueError(
            f"trial {chosen.trial.number} has replicas that span nodes, and Deployments hold none; choose lws or shell"
        )
    return _output(chosen, wishes, "kubernetes.yaml", lambda name: f"{wishes.name}-{name}")


def leader_worker_sets(chosen: Chosen, wishes: Wishes) -> Output:
    """`lws.yaml`: a LeaderWorkerSet for each replica, and the router as a Deployment.

    The pod of a group's leader is called <set>-0, that of its worker <set>-0-1, and the set makes a headless Service of
    its own name. Raises `InvalidValueError` for a replica on more than two nodes: all workers of a set have one
    command, and ours name their rank.
    """
    if any(process.part is not None and len(process.part.hosts) > 2 for process in chosen.measurement.processes):
        raise InvalidValueError(
            f"trial {chosen.trial.number} has replicas on more than two nodes, whose workers differ in their commands, "
            "and a LeaderWorkerSet has one command for all workers; choose shell"
        )
    return _output(chosen, wishes, "lws.yaml", lambda name: _in_group(name, wishes.name))


def _in_group(name: str, app: str) -> str:
    """The host name of a process in a LeaderWorkerSet; of the router, the name of its Service."""
    base, _, rank = name.partition(".")
    if name == ROUTER:
        return f"{app}-{name}"
    worker = "" if rank in {"", "0"} else f"-{rank}"
    return f"{app}-{base}-0{worker}.{app}-{base}"


def _output(chosen: Chosen, wishes: Wishes, file: str, address: Addressing) -> Output:
    parts = parts_of(chosen, _in_pods(chosen, wishes, address))
    pods = [_pod(part, chosen, wishes) for part in parts]
    leaders = [pod for pod in pods if pod.leads]
    text = render(
        f"{file}.j2",
        title=wishes.title,
        file=file,
        name=wishes.name,
        pods=leaders,
        workers={pod.group: pod for pod in pods if not pod.leads},
        entry=next((pod for pod in pods if pod.part_name == ROUTER), leaders[0]),
        claims=claims_of(pods),
        start_failures=max(1, round(chosen.file.limits.start_s) // STARTUP_PERIOD_S),
        start_period_s=STARTUP_PERIOD_S,
    )
    return Output(
        files=(OutFile(path=file, text=text), *dockerfile(chosen, images_of(parts, chosen, wishes))),
        parts=parts,
        endpoint=f"http://{wishes.name}:{wishes.port}",
        start=(f"kubectl apply -f {file}",),
        notes=tuple(_claim_notes(claims_of(pods), wishes)),
    )


def _in_pods(chosen: Chosen, wishes: Wishes, address: Addressing) -> PlaceOf:
    own_address = chosen.config.engine in ENGINES_THAT_TELL_THEIR_ADDRESS
    source = model_path(chosen, wishes)
    if wishes.model is not None:
        source = f"/{wishes.model}"

    def place(process: LaunchedProcess) -> Place:
        return Place(
            host=POD_IP if own_address and process.name != ROUTER else ANY_ADDRESS,
            port=wishes.port,
            url=f"http://{address(process.name)}:{wishes.port}",
            device_ids=(),  # the scheduler of the cluster gives devices
            work_dir=FILES,
            shared_dir=SHARED,
            model_source=None if process.model_source is None else source,
        )

    return place


def pod_of(part: Part, chosen: Chosen, wishes: Wishes, *, argv: tuple[str, ...], image: str) -> Pod:
    """The pod of a process that runs `argv`."""
    mounts = tuple(_mounts(part))
    gpus = len(part.measured.device_ids) if part.pool is not None and uses_gpus(part.pool, chosen) else 0
    cpus = gpus * HOST_CPUS_PER_GPU if gpus else _cpus(part, chosen)
    return Pod(
        name=f"{wishes.name}-{part.name.replace('.', '-')}",
        part_name=part.name,
        argv=argv,
        environment=dict(sorted(part.command.env.items())),
        port=part.place.port,
        ready_path=part.command.ready_path,
        image=image,
        cpus=f"{round(1000 * cpus)}m",
        gpus=gpus,
        mounts=mounts,
        claims=tuple(name for name, _ in mounts if name == MODEL_VOLUME or hands_over_files(chosen)),
        files={PurePosixPath(path).name: text for path, text in part.command.files.items()},
        large_shared_memory=gpus > 0,
        node_selector=_node_selector(chosen) if gpus else {},
    )


def _pod(part: Part, chosen: Chosen, wishes: Wishes) -> Pod:
    argv = listening_everywhere(in_container(part.command).argv)
    return pod_of(part, chosen, wishes, argv=argv, image=part_image(part, chosen, wishes))


def listening_everywhere(argv: tuple[str, ...]) -> tuple[str, ...]:
    """`argv` that listens on every address of its pod: what looks for it on the loopback address finds it too."""
    pairs = zip(("", *argv), argv, strict=False)
    return tuple(ANY_ADDRESS if (before, word) == ("--host", POD_IP) else word for before, word in pairs)


def _cpus(part: Part, chosen: Chosen) -> float:
    if part.pool is None or chosen.backend.emulated:
        return ROUTER_CPUS
    return float(part.pool.devices_per_replica)


def _node_selector(chosen: Chosen) -> dict[str, str]:
    """The GPU that was measured, where there was one kind; the label is that of GPU feature discovery."""
    models = chosen.measurement.environment.get("gpu_model", "").split("; ")
    return {GPU_PRODUCT_LABEL: models[0].replace(" ", "-")} if len(models) == 1 and models[0] else {}


def _mounts(part: Part) -> list[tuple[str, str]]:
    mounts = []
    if part.uses_shared_dir:
        mounts.append((SHARED_VOLUME, SHARED))
    source = part.place.model_source
    if source is not None and source.startswith("/"):
        folder = source if PurePosixPath(source).suffix == "" else str(PurePosixPath(source).parent)
        mounts.append((MODEL_VOLUME, folder))
    return mounts


def claims_of(pods: Sequence[Pod]) -> tuple[str, ...]:
    """Volumes that the pods claim together."""
    return tuple(dict.fromkeys(name for pod in pods for name in pod.claims))


def hands_over_files(chosen: Chosen) -> bool:
    """True where pods must see one folder: KV caches are handed over through files."""
    backend = chosen.backend
    return isinstance(backend, NeedsSharedFolder) and backend.needs_shared_folder(chosen.config)


def _claim_notes(claims: Sequence[str], wishes: Wishes) -> list[str]:
    notes = []
    if MODEL_VOLUME in claims:
        what = f"the file {wishes.model}" if wishes.model is not None else "the model's files"
        notes.append(f"Copy {what} into the volume of the claim {wishes.name}-model before the pods start.")
    if SHARED_VOLUME in claims:
        notes.append(
            f"The claim {wishes.name}-shared carries KV caches between pods: its storage class must allow "
            "ReadWriteMany, and its speed is part of every TTFT."
        )
    return notes


def dns_name(text: str, limit: int = 40) -> str:
    """`text` as a DNS label; one that loses characters gets a key of the whole, so that different texts differ."""
    tame = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if tame == text and len(tame) <= limit and tame[:1].isalpha():
        return tame
    key = hashlib.sha256(text.encode()).hexdigest()[:6]
    start = tame[: limit - len(key) - 3].strip("-")
    return f"t-{start}-{key}" if start else f"t-{key}"
