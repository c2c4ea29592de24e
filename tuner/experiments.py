"""`experiments:` of a study file: several studies of one file, each a layer over what they have in common.

    experiments:
      agg: {space: {modes: [aggregated]}}
      disagg: {space: {modes: [disaggregated]}}

Each is a study of its own, called NAME.experiment. It is put over the common part as layers are (mappings merge, lists
and what `engines` or `node_pools` hold are replaced); `profiles`, `layers`, `replace` and `unset` of an experiment come
after the common ones. The command line (`--set`) overrules both, and `--set experiment=agg` picks one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import yaml

from tuner.layers import Below, Gone, Node, Section, compose, finished, nested
from tuner.layers_file import CLOSED, LayerError, dotted, tree_patch
from tuner.layers_study import LAYERING_KEYS

EXPERIMENTS, EXPERIMENT = "experiments", "experiment"
"""Keys of a study file: its experiments, and the one that is meant."""


def names_in(tree: Mapping[str, object]) -> tuple[str, ...]:
    """Names of the experiments of the raw `tree` of a study file; raises `LayerError` where they are none."""
    found = tree.get(EXPERIMENTS)
    if found is None:
        return ()
    if not isinstance(found, Mapping) or not found:
        raise LayerError("experiments: give a mapping of names to what differs, such as {agg: {space: {modes: ...}}}")
    for name, own in found.items():
        if not isinstance(name, str) or not isinstance(own, Mapping | None):
            raise LayerError(f"experiments.{name}: {own!r:.60} is no mapping of keys; write what differs in it")
        wrong = {"name", EXPERIMENTS, EXPERIMENT} & (own or {}).keys()
        if wrong:
            raise LayerError(f"experiments.{name}.{min(wrong)}: an experiment has no such key; leave it out")
    return tuple(found)


def chosen(tree: Mapping[str, object], overrides: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """The raw tree of the experiment that `overrides` or the file picks, and the overrides that are left.

    A file without experiments stays as it is. Raises `LayerError` where none is picked, or one that is not there.
    """
    names, rest = names_in(tree), [text for text in overrides if not _picks(text)]
    picked = next((_picked(text) for text in reversed(overrides) if _picks(text)), tree.get(EXPERIMENT))
    common = {key: value for key, value in tree.items() if key not in (EXPERIMENTS, EXPERIMENT)}
    if picked is None and not names:
        return common, rest
    if picked is None:
        raise LayerError(f"the file holds {len(names)} experiments; pick one with --set experiment={names[0]}")
    if picked not in names:
        near = get_close_matches(str(picked), names, n=1)
        known = f"choose {', '.join(names)}" if names else "the file holds no experiments"
        raise LayerError(f"experiment {picked!r} is unknown; {f'did you mean {near[0]}? ' if near else ''}{known}")
    held = tree[EXPERIMENTS]
    own = held[picked] if isinstance(held, Mapping) else None
    return merged(common, own or {}, str(picked)), rest


def _picks(override: str) -> bool:
    return override.partition("=")[0].strip() == EXPERIMENT


def _picked(override: str) -> object:
    return yaml.safe_load(override.partition("=")[2])


def merged(common: Mapping[str, object], own: Mapping[str, object], name: str) -> dict[str, object]:
    """`own` over `common`, with the name of the experiment, and the steering keys of both."""
    steering = {key: _joined(common.get(key), own.get(key)) for key in LAYERING_KEYS}
    layers = [{k: v for k, v in tree.items() if k not in LAYERING_KEYS} for tree in (common, own)]
    replaced = dict.fromkeys(map(dotted, _listed(own.get("replace"))), Below.REPLACE)
    node: Node = tree_patch(layers[0], "common")
    for key in _listed(own.get("unset")):
        node = compose(node, nested(dotted(key), Gone(by=name)))
    node = compose(node, tree_patch(layers[1], name, dict.fromkeys(CLOSED, Below.MEMBERS) | replaced))
    tree = finished(node) if isinstance(node, Section) else {}
    if "name" in common:
        tree["name"] = f"{common['name']}.{name}"
    return tree | {key: value for key, value in steering.items() if value}


def _joined(common: object, own: object) -> list[object]:
    return list(dict.fromkeys([*_listed(common), *_listed(own)]))


def _listed(value: object) -> list[str]:
    return [value] if isinstance(value, str) else list(value) if isinstance(value, list) else []
