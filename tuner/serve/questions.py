"""Study files and settings that come over the network: what they may say, and what they may not reach.

A study file of the command line may name files, folders and programs of its user's machine. One that comes over the
network may not: what it says itself is held against `_FORBIDDEN` before anything is opened. The layers of the operator
(TUNER_LAYERS) may say all of it, and a study may choose their profiles by name, so that what is read and run was
allowed by somebody with an account on the machine.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import yaml

from search_spaces.errors import InvalidValueError, TunerError, require
from tuner.study_file import CALIBRATIONS, load_study_file
from tuner.study_schema import StudyFile

LARGEST_NUMBER = 10_000_000
_SIZES = re.compile(r"space\.(\w+\.)?(replicas|tp|pp|dp|ep)")
_LARGEST = ((re.compile(r"workload\.turns.*"), 1_000), (_SIZES, 4_096), (re.compile(r"node_pools\..*"), 100_000))
LONGEST_LIST = 256
LONGEST_CHOICE = 32
MOST_KEYS = 64
DEEPEST = 24
"""What a question may hold, so that answering it takes seconds: the model's work grows with some of its figures.

`_LARGEST` figures are by key path, and `LONGEST_CHOICE` values may stand for one of the `_SIZES`.
"""
LONGEST_TEXT = 64 * 1024
_SETTING = re.compile(
    r"(load|(mixed|prefill|decode)\.\w+"
    r"|workload\.(isl|osl|turns|arrival|concurrency|request_rate|shared_prefix|think_time)(\.\w+)?"
    r"|node_pools\.[\w-]+\.(device|nodes|gpus_per_node|cpus_per_node|pricing|\w*price_per_hour)"
    r")\s*=[^&*]{1,100}"
)
_OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""A model of a hub: OWNER/NAME. An absolute path, and one with `..`, is none."""
_FORBIDDEN: tuple[tuple[str, str], ...] = (
    ("layers", "names folders of the server"),
    ("experiments", "are several studies; send each as a study of its own"),
    ("experiment", "picks one of several studies; send that one"),
    ("storage", "names another storage; this service has its own"),
    ("model.gguf", "names a file of the server"),
    ("model.config", "names a file of the server"),
    ("model.source", "may be OWNER/NAME of a model hub here, no path"),
    ("workload.trace", "names a file of the server"),
    ("calibration", "names a file of the server; choose shipped or none"),
    ("node_pools.*.engines", "says how programs are started on the nodes"),
)
"""Key paths, and why a study that comes over the network may not set them."""


def study_of(text: str) -> StudyFile:
    """The study in `text` over the product's and the operator's layers.

    Raises `TunerError` for one that cannot be used, and, before anything is opened, where `text` itself names
    anything of the server.
    """
    tree = read_yaml(text, "the study")
    named = [f"{key} {why}" for key, why in _FORBIDDEN for value in _at(tree, key) if not _allowed(key, value)]
    if named:
        raise InvalidValueError(
            f"{'; '.join(named)}; leave it out: the command on the server may say it, and so may its operator's "
            "profiles (TUNER_LAYERS), which a study may choose"
        )
    require_modest(tree, "")
    with tempfile.TemporaryDirectory(prefix="tuner-serve-") as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return load_study_file(path)
        except TunerError as error:
            raise InvalidValueError(str(error).replace(str(path), "study").replace(folder, "")) from error


def _at(tree: object, key: str) -> list[object]:
    """What `tree` says at the key path `key`, in which `*` stands for every key; nothing where it says null."""
    found = [tree]
    for word in key.split("."):
        below = [each for each in found if isinstance(each, dict)]
        found = [value for each in below for name, value in each.items() if word in ("*", name)]
    return [value for value in found if value is not None]


def _allowed(key: str, value: object) -> bool:
    if key == "calibration":
        return value in CALIBRATIONS
    return key == "model.source" and isinstance(value, str) and _HUB_NAME.fullmatch(value) is not None


def require_setting(setting: str) -> None:
    """Raise `InvalidValueError` for a setting of a what-if that reaches a file, or takes very long."""
    if not _SETTING.fullmatch(setting):
        raise InvalidValueError(
            f"{setting!r} cannot be asked here; change load, ROLE.OPTION, workload.KEY or node_pools.POOL.KEY"
        )
    key, _, value = setting.partition("=")
    require_modest(read_yaml(value, setting), key.strip())


def read_yaml(text: str, name: str) -> object:
    """The tree of `text`. Aliases are refused, by which a short text becomes a huge tree, and so is deep nesting."""
    depth = 0
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            _require_plain(token, depth, name)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidValueError(f"{name} is no valid YAML: {error}") from error
    except ValueError as error:
        if isinstance(error, TunerError):
            raise
        raise InvalidValueError(f"{name} is no valid YAML: {error}") from error


def _require_plain(token: yaml.Token, depth: int, name: str) -> None:
    require(not isinstance(token, yaml.AliasToken), f"{name} has aliases (*word); write their values out")
    require(depth <= DEEPEST, f"{name} is nested more than {DEEPEST} deep; no study file is")


def require_modest(tree: object, path: str) -> None:
    """Raise for a figure, a list or a mapping of a question that would take the model very long."""
    limit = next((limit for pattern, limit in _LARGEST if pattern.fullmatch(path)), LARGEST_NUMBER)
    if isinstance(tree, int | float) and not abs(tree) <= limit:
        raise InvalidValueError(f"{path}: {tree} is beyond what this service computes; give at most {limit}")
    longest = LONGEST_CHOICE if _SIZES.fullmatch(path) else LONGEST_LIST
    most = MOST_KEYS if isinstance(tree, dict) else longest
    if isinstance(tree, list | dict) and len(tree) > most:
        raise InvalidValueError(f"{path}: {len(tree)} values are more than this service takes; give {most}")
    if isinstance(tree, list):
        for value in tree:
            require_modest(value, path)
    if isinstance(tree, dict):
        for key, value in tree.items():
            require_modest(value, f"{path}.{key}".strip("."))
