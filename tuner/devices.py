"""Measured devices of a study's node pools, kept beside the study so that a resume does not measure them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from search_spaces.hardware import Device
from studies.codec import from_json, to_json
from studies.errors import StudyFormatError


def save_devices(path: Path, devices: Mapping[str, Device]) -> None:
    """Write `devices` (by pool name) to `path`; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(to_json(devices), indent=2, sort_keys=True), encoding="utf-8")
    partial.replace(path)


def load_devices(path: Path) -> dict[str, Device]:
    """The devices at `path`; none where there is no file. Raises `StudyFormatError` for a damaged one."""
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyFormatError(f"{path} is no JSON ({error}); delete it, and the nodes are measured anew") from error
    if not isinstance(tree, dict):
        raise StudyFormatError(f"{path} holds no mapping of pools; delete it, and the nodes are measured anew")
    return {str(name): from_json(Device, value) for name, value in tree.items()}
