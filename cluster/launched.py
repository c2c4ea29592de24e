"""The record of a process as it was started: what `tuner deploy` makes the same process from elsewhere."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import asdict, replace
from pathlib import Path

from cluster.engines.base import LaunchCommand, ReplicaSpec, RouterSpec
from search_spaces.outcome import LaunchedPart, LaunchedProcess

REDACTED = "***"
"""Stands for an API key in the record of a process."""


def launched(name: str, command: LaunchCommand, spec: ReplicaSpec | RouterSpec, *, work_dir: Path) -> LaunchedProcess:
    """The record of the process `command`, started on this machine as `spec` says; the API key is not written down."""

    def redacted(text: str) -> str:
        return text.replace(spec.api_key, REDACTED) if spec.api_key else text

    record = LaunchedProcess(
        name=name,
        trial=spec.trial,
        node=socket.gethostname(),
        host=spec.host,
        port=spec.port,
        argv=tuple(map(redacted, command.argv)),
        env={key: redacted(value) for key, value in command.env.items()},
        files={path: hashlib.sha256(redacted(text).encode()).hexdigest() for path, text in command.files.items()},
        work_dir=str(work_dir),
        shared_dir=str(spec.shared_dir),
    )
    if isinstance(spec, RouterSpec):
        return record
    return replace(
        record,
        device_ids=spec.device_ids,
        model_source=spec.model.source,
        cluster_node=spec.node,
        part=None if spec.part is None else LaunchedPart(**asdict(spec.part)),
    )
