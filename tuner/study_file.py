"""Reading study files: YAML, overrides, checking, and the resolved form that is stored and hashed."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tuner.experiments import chosen
from tuner.layers import KeyPath
from tuner.layers_file import LayerError
from tuner.layers_resolve import Resolved
from tuner.layers_study import resolve_tree
from tuner.study_errors import StudyFileError, describe
from tuner.study_schema import NodePoolSection, StudyFile

Tree = dict[str, Any]  # raw YAML before it is checked: the only untyped value of the package
NOT_STORED = ("storage",)
CALIBRATIONS = ("shipped", "none")
"""Words for the model's corrections; anything else is the path of a file."""


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A parsed YAML text: its tree and the line of every key path."""

    tree: Tree
    lines: Mapping[KeyPath, int]


@dataclass(frozen=True, kw_only=True)
class LayeredStudy:
    """A checked study file, how its layers were put together, and the lines of its own keys."""

    study: StudyFile
    resolved: Resolved
    lines: Mapping[KeyPath, int]


def load_study_file(path: Path, overrides: Sequence[str] = ()) -> StudyFile:
    """The checked study file at `path` over the layers that apply to it, after `overrides` (`a.b=c`, `c` in YAML).

    Raises `StudyFileError`, which lists every problem, for a file that cannot be read or used.
    """
    return load_layered(path, overrides).study


def load_layered(path: Path, overrides: Sequence[str] = ()) -> LayeredStudy:
    """Like `load_study_file`, with the layer that set each value."""
    parsed = _parse_yaml(_read(path), str(path))
    return _layered(parsed, path.resolve().parent, overrides, name=str(path))


def study_of_tree(tree: Tree, directory: Path, overrides: Sequence[str] = (), *, name: str) -> StudyFile:
    """The checked study file of the raw `tree`, whose paths start in `directory`, over the layers that apply to it.

    `name` stands in messages. Raises `StudyFileError`.
    """
    return _layered(_Text(tree=tree, lines={}), directory, overrides, name=name).study


def _layered(parsed: _Text, directory: Path, overrides: Sequence[str], *, name: str) -> LayeredStudy:
    try:
        chosen_tree, rest = chosen(parsed.tree, overrides)
        tree = overridden(chosen_tree, rest)
        resolved = resolve_tree(tree, directory, [_override_path(text) for text in rest])
    except LayerError as error:
        raise _error(name, [str(error)]) from error
    study = _checked(resolved.tree, parsed.lines, name, resolved.origins)
    return LayeredStudy(study=_absolute_paths(study, directory, name=name), resolved=resolved, lines=parsed.lines)


def raw_tree(path: Path) -> Tree:
    """The YAML of the study file at `path`, unchecked; raises `StudyFileError` for what is none."""
    return _parse_yaml(_read(path), str(path)).tree


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise StudyFileError(
            f"study file {path} cannot be read ({error.strerror}); give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise StudyFileError(f"study file {path} is no UTF-8 text (byte {error.start}); save it as UTF-8") from error


def parse_study(text: str, overrides: Sequence[str] = (), *, name: str = "study file") -> StudyFile:
    """The checked study file in `text`, a resolved one: no layer is put below it. Raises `StudyFileError`.

    `name` stands in messages.
    """
    parsed = _parse_yaml(text, name)
    return _checked(overridden(parsed.tree, overrides), parsed.lines, name)


def overridden(tree: Tree, overrides: Sequence[str]) -> Tree:
    """A copy of `tree` after `overrides` (`key.path=value`); raises `StudyFileError` for what is none."""
    changed = copy.deepcopy(tree)
    for override in overrides:
        _apply_override(changed, override)
    return changed


def _checked(
    tree: Mapping[str, object], lines: Mapping[KeyPath, int], name: str, origins: Mapping[KeyPath, str] | None = None
) -> StudyFile:
    try:
        return StudyFile.model_validate(tree)
    except ValidationError as error:
        raise _error(name, describe(error, lines, origins or {})) from error


def _error(name: str, problems: Sequence[str]) -> StudyFileError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return StudyFileError("\n".join([f"{name}: {count}", *(f"  {problem}" for problem in problems)]))


def _parse_yaml(text: str, name: str) -> _Text:
    try:
        node, tree = _composed(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise _error(
            name, [f"{where}: no valid YAML: {error.problem}; check indentation, colons and quotes there"]
        ) from error
    except yaml.YAMLError as error:
        raise _error(name, [f"no valid YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(tree, dict):
        kind = "empty" if tree is None else f"a {type(tree).__name__}"
        raise _error(name, [f"it is {kind}, but must be a mapping of keys to values; start with name: my-study"])
    seen: dict[KeyPath, int] = {}
    repeated: list[str] = []
    for path, line in _key_lines(node):
        if path in seen:
            repeated.append(f"{'.'.join(path)} (line {line}): stands in line {seen[path]} already; keep one")
        seen[path] = line
    if repeated:
        raise _error(name, repeated)
    return _Text(tree=tree, lines=seen)


def _composed(text: str) -> tuple[yaml.Node | None, Any]:
    """Node and tree of a YAML text, by libyaml, which is ten times as fast; what it refuses, PyYAML explains better."""
    if yaml.__with_libyaml__:
        try:
            return yaml.compose(text, Loader=yaml.CSafeLoader), yaml.load(text, Loader=yaml.CSafeLoader)
        except yaml.YAMLError:
            pass
    return yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)


def _key_lines(node: yaml.Node | None, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    """Key paths of a YAML document with their line numbers, counted from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            yield path, key.start_mark.line + 1
            yield from _key_lines(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            path = (*prefix, str(position))
            yield path, value.start_mark.line + 1
            yield from _key_lines(value, path)


def _apply_override(tree: Tree, override: str) -> None:
    """Set the key path of `override` in `tree`; sections that are not there yet are made."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise StudyFileError(f"--set {override!r} is no override; write --set key.path=value, such as budget.cost=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise StudyFileError(f"--set {override!r}: {text!r} is no valid YAML value; quote it") from error
    if keys[0] == "engines" and len(keys) > 1 and isinstance(tree.get("engines"), list):
        tree["engines"] = {name: {} for name in tree["engines"]}
    _set(tree, keys, value, override)


def _override_path(override: str) -> KeyPath:
    return tuple(override.partition("=")[0].strip().split("."))


def _set(tree: Tree, keys: Sequence[str], value: object, override: str) -> None:
    section: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(section, list):
            section = _step_into_list(section, key, value if last else None, override, last=last)
            continue
        if not isinstance(section, dict):
            above = ".".join(keys[:depth])
            raise StudyFileError(f"--set {override}: {above} is {section!r} and has no key {key!r}; set {above} itself")
        if last:
            section[key] = value
        elif section.get(key) is None:
            section[key] = {}
        section = section[key]


def _step_into_list(items: list[Any], key: str, value: object, override: str, *, last: bool) -> Any:
    if not key.isdigit() or int(key) >= len(items):
        raise StudyFileError(
            f"--set {override}: {key!r} is no position of a list of {len(items)}; use 0 to {len(items) - 1}, "
            "or set the whole list"
        )
    if last:
        items[int(key)] = value
    return items[int(key)]


def _absolute_paths(study: StudyFile, directory: Path, *, name: str) -> StudyFile:
    """`study` with the paths of model, calibration and trace made absolute; a path is relative to the study file."""
    model: dict[str, str] = {}
    for key, what in (("gguf", "a GGUF file or preset: tiny"), ("config", "a Hugging Face config.json")):
        given = getattr(study.model, key)
        if given is not None:
            path = (directory / Path(given).expanduser()).resolve()
            if not (path.is_file() or (key == "config" and path.is_dir())):
                raise _error(name, [f"model.{key}: {str(path)!r} is no file; give the path of {what}"])
            model[key] = str(path)
    update: dict[str, object] = {
        "model": study.model.model_copy(update=model),
        "node_pools": {key: _absolute_commands(pool, directory) for key, pool in study.node_pools.items()},
    }
    if study.calibration not in CALIBRATIONS:
        path = (directory / Path(study.calibration).expanduser()).resolve()
        if not path.is_file():
            raise _error(name, [f"calibration: {str(path)!r} is no file; give shipped, none or the path of a prior"])
        update["calibration"] = str(path)
    if study.workload.trace is not None:
        path = (directory / Path(study.workload.trace.file).expanduser()).resolve()
        if not path.is_file():
            raise _error(name, [f"workload.trace.file: {str(path)!r} is no file; give the path of a trace"])
        trace = study.workload.trace.model_copy(update={"file": str(path)})
        update["workload"] = study.workload.model_copy(update={"trace": trace})
    return study.model_copy(update=update)


def _absolute_commands(pool: NodePoolSection, directory: Path) -> NodePoolSection:
    """`pool` with the paths of its engines' programs made absolute; one without a slash is found on the node's path."""

    def absolute(word: str) -> str:
        return word if "/" not in word else os.path.normpath(directory / Path(word).expanduser())

    engines = {
        engine: found.model_copy(update={"command": found.command and [absolute(found.command[0]), *found.command[1:]]})
        for engine, found in pool.engines.items()
    }
    return pool.model_copy(update={"engines": engines})


def dump_study(study: StudyFile) -> str:
    """Canonical YAML of `study`: every default filled in, keys sorted, without the storage (it may hold a password).

    Node pools keep their order: the first is the default. `parse_study(dump_study(study))` equals `study` but for its
    storage.
    """
    tree = study.model_dump(mode="json", exclude=set(NOT_STORED), exclude_none=True)
    ordered = _sorted(tree) | {"node_pools": {name: _sorted(pool) for name, pool in tree["node_pools"].items()}}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=120)


def in_order_of(stored: StudyFile, study: StudyFile) -> StudyFile:
    """`study` with its node pools in the order of `stored`, which has the same ones."""
    return study.model_copy(update={"node_pools": {name: study.node_pools[name] for name in stored.node_pools}})


def _sorted(tree: Tree) -> Tree:
    """`tree` with the keys of all its mappings sorted."""
    return {key: _sorted(tree[key]) if isinstance(tree[key], dict) else tree[key] for key in sorted(tree)}


def study_hash(study: StudyFile) -> str:
    """SHA-256 of the canonical YAML, in hexadecimal."""
    return hashlib.sha256(dump_study(study).encode()).hexdigest()


def differences(stored: str, new: str) -> list[str]:
    """`key: old -> new` for every key in which two canonical YAML texts differ."""
    old_keys, new_keys = _flat(_composed(stored)[1]), _flat(_composed(new)[1])
    changed = sorted(key for key in old_keys.keys() | new_keys.keys() if old_keys.get(key) != new_keys.get(key))
    return [f"{key}: {old_keys.get(key, 'not set')} -> {new_keys.get(key, 'not set')}" for key in changed]


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        path: value
        for key, below in tree.items()
        for path, value in _flat(below, f"{prefix}.{key}" if prefix else str(key)).items()
    }
