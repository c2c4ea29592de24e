"""Layers as files: YAML, the folders that hold them, and what each may say.

A layer is plain data. `set` merges, `only` decides which members a mapping has, `replace` puts a whole value, `append`
lengthens lists and `unset` deletes; `when` holds them back until the study is such; `parts` gives one layer several of
these. Profiles are layers of the stage `profile`, which a study chooses by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from search_spaces.errors import InvalidValueError, TunerError
from tuner.layers import Added, Below, Gone, KeyPath, Leaf, Node, Section, clashes, compose, nested, section
from tuner.layers_context import Condition, Scalar

PRODUCT_FOLDER = Path(__file__).parent / "data" / "layers"
FOLDERS_VARIABLE = "TUNER_LAYERS"
"""Folders of a user's own layers, separated as in PATH."""
CLOSED: tuple[KeyPath, ...] = (("engines",), ("node_pools",))
"""Mappings of a study file that say which members there are, rather than add to those of lower layers."""
ONE_OF: tuple[tuple[KeyPath, tuple[tuple[str, ...], ...]], ...] = (
    (("model",), (("preset",), ("gguf",), ("name",), ("config",))),
    (("workload",), (("concurrency",), ("request_rate",), ("rate_search",))),
    (("workload",), (("trace",), ("isl", "osl", "concurrency", "request_rate", "rate_search", "turns", "think_time"))),
    (("node_pools", "*"), (("cpus_per_node",), ("gpus_per_node",))),
)
"""Alternatives in a section, by their keys: giving a key of one takes those of the others of lower layers away."""


class LayerError(TunerError):
    """A layer, or how layers go together, is wrong."""


class Stage(StrEnum):
    """Where a layer stands in the order; a study file and the command line come after all of them."""

    BASE = "base"
    MODE = "mode"
    ENGINE = "engine"
    HARDWARE = "hardware"
    MODEL = "model"
    PROFILE = "profile"

    @property
    def rank(self) -> int:
        """Position in the order."""
        return list(Stage).index(self)


class ProfileKind(StrEnum):
    """What a profile is about."""

    QUANTISATION = "quantisation"
    SLO = "slo"
    HARDWARE = "hardware"
    WORKLOAD = "workload"
    MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A patch that counts where all of `when` hold."""

    when: tuple[Condition, ...]
    patch: Section


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A named layer. `folder` counts the folders from the product's own (0) on; later ones stand above earlier ones.

    `needs` must hold where a study chooses the profile; for other layers it is part of each part's condition.
    """

    name: str
    stage: Stage
    about: str
    parts: tuple[Part, ...]
    source: str = ""
    kind: ProfileKind | None = None
    extends: tuple[str, ...] = ()
    needs: tuple[Condition, ...] = ()
    path: Path
    folder: int = 0

    @property
    def label(self) -> str:
        """How the layer is named where it set a value."""
        return f"{self.stage}/{self.name}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | int | float | bool) else value


_Scalars = Annotated[list[Scalar], BeforeValidator(_as_list), Field(default_factory=list)]


class _Wanted(_Strict):
    any: _Scalars
    every: _Scalars
    none: _Scalars
    at_least: float | None = None
    at_most: float | None = None


def _as_wanted(value: object) -> object:
    return {"any": value} if isinstance(value, str | int | float | bool | list) else value


_When = dict[str, Annotated[_Wanted, BeforeValidator(_as_wanted)]]
_Tree = dict[str, Any]


class _PartFile(_Strict):
    when: _When = Field(default_factory=dict)
    set: _Tree = Field(default_factory=dict)
    only: _Tree = Field(default_factory=dict)
    replace: dict[str, Any] = Field(default_factory=dict)
    append: dict[str, list[Any]] = Field(default_factory=dict)
    unset: list[str] = Field(default_factory=list)


class _LayerFile(_PartFile):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    stage: Literal["base", "mode", "engine", "hardware", "model", "profile"]
    about: str = Field(min_length=1)
    source: str = ""
    kind: Literal["quantisation", "slo", "hardware", "workload", "model"] | None = None
    extends: list[str] = Field(default_factory=list)
    parts: list[_PartFile] = Field(default_factory=list)


def read_layer(path: Path, folder: int = 0) -> Layer:
    """The layer in the file at `path`; raises `LayerError` that names the file and every problem."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LayerError(f"layer {path} cannot be read ({error}); give a YAML file") from error
    except yaml.YAMLError as error:
        raise LayerError(f"layer {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise LayerError(
            f"layer {path} is no mapping; start with name: my-layer, stage: base and about: what it is for"
        )
    try:
        return _layer(_LayerFile.model_validate(raw), path, folder)
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']} (it is {e['input']!r:.60})" for e in error.errors()]
        raise LayerError("\n".join([f"layer {path}:", *dict.fromkeys(problems)])) from error
    except InvalidValueError as error:
        raise LayerError(f"layer {path}: {error}") from error


def _layer(file: _LayerFile, path: Path, folder: int) -> Layer:
    stage = Stage(file.stage)
    label = f"{stage}/{file.name}"
    if (file.kind is not None) != (stage is Stage.PROFILE):
        raise LayerError(f"layer {path}: kind goes with stage: profile, and every profile has one")
    needs = _conditions(file.when)
    own = [file] if _says_something(file) else []
    if not own and not file.parts:
        raise LayerError(f"layer {path} says nothing; give set, only, replace, append, unset or parts")
    return Layer(
        name=file.name,
        stage=stage,
        about=file.about,
        source=file.source,
        kind=ProfileKind(file.kind) if file.kind else None,
        extends=tuple(file.extends),
        needs=needs,
        parts=tuple(
            Part(when=() if part is file else _conditions(part.when), patch=_patch(part, label, path))
            for part in (*own, *file.parts)
        ),
        path=path,
        folder=folder,
    )


def _says_something(part: _PartFile) -> bool:
    return bool(part.set or part.only or part.replace or part.append or part.unset)


def _conditions(when: _When) -> tuple[Condition, ...]:
    return tuple(
        Condition(
            field=name,
            any_of=tuple(wanted.any),
            every_of=tuple(wanted.every),
            none_of=tuple(wanted.none),
            at_least=wanted.at_least,
            at_most=wanted.at_most,
        )
        for name, wanted in when.items()
    )


def _patch(part: _PartFile, label: str, path: Path) -> Section:
    """One patch of all that `part` says; raises `LayerError` where it says two things of one key."""
    only: dict[KeyPath, Below] = {(key,): Below.MEMBERS for key in part.only}
    pieces: list[Section] = [tree_patch(part.set, label), tree_patch(part.only, label, only)]
    pieces += [nested(dotted(key), _whole(value, label)) for key, value in part.replace.items()]
    pieces += [nested(dotted(key), Added(items=tuple(items), by=label)) for key, items in part.append.items()]
    pieces += [nested(dotted(key), Gone(by=label)) for key in part.unset]
    merged: Node = Section()
    for piece in pieces:
        twice = [".".join(at) for at in clashes(merged, piece)]
        if twice:
            raise LayerError(f"layer {path} says two things of {', '.join(twice)}; keep one")
        merged = compose(merged, piece)
    return merged if isinstance(merged, Section) else Section()


def _whole(value: object, label: str) -> Node:
    if isinstance(value, Mapping):
        return section(value, label, {(): Below.REPLACE})
    return Leaf(value=value, by=label)


def dotted(text: str) -> KeyPath:
    """The key path that `text`, such as `budget.trials`, stands for."""
    keys = tuple(text.split("."))
    if not all(keys):
        raise LayerError(f"{text!r} is no key path; write such as budget.trials")
    return keys


def tree_patch(tree: Mapping[str, object], by: str, marks: Mapping[KeyPath, Below] | None = None) -> Section:
    """The patch that sets `tree`, part of a study file, whichever of its short forms it is written in."""
    plain, lengths = canonical(tree)
    node: Node = section(plain, by, {**lengths, **(marks or {})})
    for path, keys in _given_groups(plain):
        for key in keys:
            node = compose(nested((*path, key), Gone(by=by)), node)
    return node if isinstance(node, Section) else Section()


def _given_groups(tree: Mapping[str, object]) -> Iterator[tuple[KeyPath, tuple[str, ...]]]:
    """Sections of `tree` that give a key of a group, with the keys of those alternatives that they do not give."""
    for pattern, alternatives in ONE_OF:
        for path, value in _matching(tree, pattern, ()):
            others = [keys for keys in alternatives if not any(key in value for key in keys)]
            if len(others) < len(alternatives):
                yield path, tuple(key for keys in others for key in keys)


def _matching(value: object, pattern: KeyPath, at: KeyPath) -> Iterator[tuple[KeyPath, Mapping[str, object]]]:
    if not isinstance(value, Mapping):
        return
    if not pattern:
        yield at, value
        return
    keys = [str(key) for key in value] if pattern[0] == "*" else [pattern[0]]
    for key in keys:
        yield from _matching(value.get(key), pattern[1:], (*at, key))


def canonical(tree: Mapping[str, object]) -> tuple[dict[str, object], dict[KeyPath, Below]]:
    """`tree` with short forms written out, so that layers meet at the same keys; with the marks that this needs.

    `engines: [a]` is `engines: {a: {}}`. `isl: 128` is `isl: {mean: 128}` and replaces a lower `spread` too; so with
    SLOs and their `threshold`.
    """
    plain, marks = dict(tree), dict[KeyPath, Below]()
    engines = plain.get("engines")
    names = [engines] if isinstance(engines, str) else engines
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        plain["engines"] = {name: {} for name in names}
    elif isinstance(names, Mapping):
        plain["engines"] = {name: {} if options is None else options for name, options in names.items()}
    workload = plain.get("workload")
    if isinstance(workload, Mapping):
        plain["workload"] = workload = dict(workload)
        for key in ("isl", "osl"):
            if _is_number(workload.get(key)):
                workload[key] = {"mean": workload[key]}
                marks["workload", key] = Below.REPLACE
    slos = plain.get("slos")
    if isinstance(slos, Mapping):
        plain["slos"] = {name: {"threshold": slo} if _is_number(slo) else slo for name, slo in slos.items()}
        marks |= {("slos", str(name)): Below.REPLACE for name, slo in slos.items() if _is_number(slo)}
    return plain, marks


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def layer_folders(named: Sequence[Path] = ()) -> tuple[Path, ...]:
    """The product's folder, then those of TUNER_LAYERS, then `named` ones; raises `LayerError` for one that is none."""
    from_environment = [Path(text) for text in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if text]
    folders = (PRODUCT_FOLDER, *from_environment, *named)
    for folder in folders:
        if not folder.is_dir():
            raise LayerError(f"folder of layers {str(folder)!r} is none; give a folder with YAML files")
    return tuple(dict.fromkeys(folder.resolve() for folder in folders))


def read_layers(folders: Sequence[Path]) -> dict[str, Layer]:
    """All layers in `folders` by name, in order of rank; one of a later folder takes the place of its namesake.

    Raises `LayerError` for two of one name in a folder, and for layers that extend each other in a circle.
    """
    layers: dict[str, Layer] = {}
    for position, folder in enumerate(folders):
        here: dict[str, Layer] = {}
        for path in sorted(folder.rglob("*.yaml")):
            layer = read_layer(path, position)
            if layer.name in here:
                raise LayerError(f"layer {layer.name!r} stands in {here[layer.name].path} and in {path}; rename one")
            here[layer.name] = layer
        layers |= here
    for name in layers:
        ancestors(name, layers)
    ordered = sorted(layers.values(), key=lambda layer: (layer.stage.rank, layer.folder, layer.name))
    return {layer.name: layer for layer in ordered}


def ancestors(name: str, layers: Mapping[str, Layer], below: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Layers that `name` extends, directly or not, lowest first."""
    if name in below:
        circle = " -> ".join((*below[below.index(name) :], name))
        raise LayerError(f"layers extend each other in a circle: {circle}; take one `extends` away")
    found: list[str] = []
    for parent in layers[name].extends:
        if parent not in layers:
            raise LayerError(f"layer {name!r} extends {parent!r}, which is no layer; correct the name")
        if layers[parent].stage is not layers[name].stage:
            raise LayerError(
                f"layer {name!r} extends {parent!r} of stage {layers[parent].stage}; extend within a stage"
            )
        found += [*ancestors(parent, layers, (*below, name)), parent]
    return tuple(dict.fromkeys(found))
