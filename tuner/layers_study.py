"""A study file as the topmost layer: the keys that steer layering, and the tree that comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tuner.layers import Below, Gone, KeyPath, Leaf, Node, Section, compose, nested
from tuner.layers_file import CLOSED, LayerError, dotted, layer_folders, read_layers, tree_patch
from tuner.layers_resolve import COMMAND_LINE, STUDY_FILE, Resolved, resolve

LAYERING_KEYS = ("profiles", "layers", "replace", "unset")
"""Keys of a study file for its layers alone: they are used up when the file is resolved, and not stored."""


def resolve_tree(tree: Mapping[str, object], directory: Path, overridden: Sequence[KeyPath] = ()) -> Resolved:
    """The raw `tree` of a study file over the layers that apply to it; `overridden` key paths are the command line's.

    `directory` is where the study file lies: relative paths start there. Raises `LayerError`.
    """
    steering = {key: _names(tree.get(key), key) for key in LAYERING_KEYS}
    own = {key: value for key, value in tree.items() if key not in LAYERING_KEYS}
    folders = [(directory / Path(text).expanduser()).resolve() for text in steering["layers"]]
    layers = read_layers(layer_folders(folders))
    return resolve(_patch(own, steering, overridden), layers, steering["profiles"], directory)


def _names(value: object, key: str) -> list[str]:
    """One text or a list of them."""
    listed = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(listed, list) or not all(isinstance(item, str) and item for item in listed):
        example = {"profiles": "[chat, balanced]", "layers": "my-layers"}.get(key, "[slos]")
        raise LayerError(f"{key}: {value!r:.60} is no list of texts; write such as {key}: {example}")
    return list(dict.fromkeys(listed))


def _patch(tree: Mapping[str, object], steering: Mapping[str, list[str]], overridden: Sequence[KeyPath]) -> Section:
    marks = dict.fromkeys(CLOSED, Below.MEMBERS) | {dotted(key): Below.REPLACE for key in steering["replace"]}
    for key in steering["replace"]:
        if _at(tree, dotted(key)) is None:
            raise LayerError(f"replace: {key!r} is not set in the study file; set it, or unset it")
    node: Node = Section()
    for key in steering["unset"]:
        if _at(tree, dotted(key)) is not None:
            raise LayerError(f"unset: {key!r} is set in the study file itself; keep one of the two")
        node = compose(node, nested(dotted(key), Gone(by=STUDY_FILE)))
    patch = compose(node, tree_patch(tree, STUDY_FILE, marks))
    return _relabelled(patch, overridden, ()) if isinstance(patch, Section) else Section()


def _at(tree: object, path: KeyPath) -> object:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _relabelled(node: Section, overridden: Sequence[KeyPath], at: KeyPath) -> Section:
    """`node` with the values of the command line under its own name."""
    children: dict[str, Node] = {}
    for key, child in node.children.items():
        path = (*at, str(key))
        if isinstance(child, Section):
            children[key] = _relabelled(child, overridden, path)
        elif isinstance(child, Leaf) and any(_touches(path, other) for other in overridden):
            children[key] = replace(child, by=COMMAND_LINE)
        else:
            children[key] = child
    return replace(node, children=children)


def _touches(path: KeyPath, override: KeyPath) -> bool:
    shorter = min(len(path), len(override))
    return path[:shorter] == override[:shorter]
