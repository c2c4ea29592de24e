"""From a study file and the layers to one tree, and who set what.

Conditions are asked of the merged tree, and what they let in changes that tree: so layers come and go until nothing
changes any more. None may hold only because of what it sets itself. Layers whose conditions hang on each other in a
circle never settle, and are an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations, groupby
from pathlib import Path

from tuner.layers import KeyPath, Leaf, Node, Section, Tree, clashes, compose, finished, origins, settles
from tuner.layers_context import Condition, Context, context_of
from tuner.layers_file import Layer, LayerError, Part, Stage, ancestors

STUDY_FILE, COMMAND_LINE = "study file", "command line"


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The merged `tree`; the layer that set each value, by key path; and the labels of the layers that count."""

    tree: Tree
    origins: Mapping[KeyPath, str]
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Active:
    """A part of a layer that may count."""

    layer: Layer
    part: Part

    @property
    def group(self) -> tuple[int, int]:
        """Parts of one group must not contradict each other."""
        return self.layer.stage.rank, self.layer.folder


def resolve(user: Section, layers: Mapping[str, Layer], profiles: Sequence[str], directory: Path) -> Resolved:
    """`user` over all `layers` whose conditions hold and over the chosen `profiles`.

    Raises `LayerError` for an unknown or unsuitable profile, layers that contradict each other, and conditions that
    hang on each other in a circle.
    """
    candidates = _candidates(layers, profiles)
    active = _settled(candidates, user, profiles, directory)
    stack = _stacked(active, user)
    tree = finished(stack)
    _check_needs(layers, profiles, context_of(tree, directory, profiles))
    _check_conflicts(active, user, layers)
    labels = dict.fromkeys(item.layer.label for item in active)
    return Resolved(tree=tree, origins=origins(stack), layers=tuple(labels))


def _candidates(layers: Mapping[str, Layer], profiles: Sequence[str]) -> tuple[_Active, ...]:
    """Parts of every layer that may count: those of profiles only where chosen; ancestors stand below heirs."""
    chosen: dict[str, None] = {}
    for name in profiles:
        if name not in layers or layers[name].stage is not Stage.PROFILE:
            known = [layer.name for layer in layers.values() if layer.stage is Stage.PROFILE]
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise LayerError(f"profile {name!r} is unknown; {hint}choose {', '.join(known)}")
        chosen |= dict.fromkeys((*ancestors(name, layers), name))
    wanted = [layer for layer in layers.values() if layer.stage is not Stage.PROFILE or layer.name in chosen]
    wanted.sort(key=lambda item: (item.stage.rank, item.folder, len(ancestors(item.name, layers)), item.name))
    return tuple(_Active(layer=layer, part=part) for layer in wanted for part in layer.parts)


def _settled(
    candidates: Sequence[_Active], user: Section, profiles: Sequence[str], directory: Path
) -> tuple[_Active, ...]:
    """The parts whose conditions hold in the tree that they make, none of them only because of itself."""
    active = _stable(candidates, user, profiles, directory)
    founded = _founded(active, user, profiles, directory)
    if len(founded) == len(active):
        return active
    groundless = [item for item in active if item not in founded]
    left = tuple(item for item in candidates if item not in groundless)
    return _settled(left, user, profiles, directory)


def _stable(
    candidates: Sequence[_Active], user: Section, profiles: Sequence[str], directory: Path
) -> tuple[_Active, ...]:
    active = tuple(item for item in candidates if not _conditions(item))
    seen: list[tuple[_Active, ...]] = []
    while True:
        context = context_of(finished(_stacked(active, user)), directory, profiles)
        holding = tuple(item for item in candidates if _holds(item, context))
        if holding == active:
            return active
        if holding in seen:
            torn = sorted(
                {item.layer.label for item in (*active, *holding) if not (item in active and item in holding)}
            )
            raise LayerError(
                f"the conditions of {', '.join(torn)} hang on what these layers set themselves, and never settle; "
                "change a condition, or set the keys that they ask about in the study file"
            )
        seen.append(active)
        active = holding


def _founded(active: Sequence[_Active], user: Section, profiles: Sequence[str], directory: Path) -> tuple[_Active, ...]:
    """Those of `active` whose conditions hold because of others: without any condition first, then step by step."""
    found = tuple(item for item in active if not _conditions(item))
    while True:
        context = context_of(finished(_stacked(found, user)), directory, profiles)
        more = tuple(item for item in active if item in found or _holds(item, context))
        if more == found:
            return found
        found = more


def _conditions(item: _Active) -> tuple[Condition, ...]:
    """What must hold for a part to count; what a profile needs is checked apart."""
    return item.part.when if item.layer.stage is Stage.PROFILE else (*item.layer.needs, *item.part.when)


def _holds(item: _Active, context: Context) -> bool:
    return all(condition.holds(context) for condition in _conditions(item))


def _stacked(active: Sequence[_Active], user: Section) -> Section:
    stack: Node = Section()
    for patch in (*(item.part.patch for item in active), user):
        stack = compose(stack, patch)
    return stack if isinstance(stack, Section) else Section()


def _check_needs(layers: Mapping[str, Layer], profiles: Sequence[str], context: Context) -> None:
    for name in profiles:
        for layer in (layers[name], *(layers[parent] for parent in ancestors(name, layers))):
            for condition in layer.needs:
                if not condition.holds(context):
                    have = " and ".join(map(str, context.get(condition.field, ()))) or "unknown"
                    raise LayerError(f"profile {layer.name} is for {condition}, here it is {have}; choose another one")


def _check_conflicts(active: Sequence[_Active], user: Section, layers: Mapping[str, Layer]) -> None:
    """Raise where two layers of one stage set one key differently and nothing above settles it."""
    groups = [list(items) for _, items in groupby(active, key=lambda item: item.group)]
    found: list[str] = []
    for position, items in enumerate(groups):
        above = _stacked([item for later in groups[position + 1 :] for item in later], user)
        for one, other in combinations(items, 2):
            if not _related(one.layer, other.layer, layers):
                paths = clashes(one.part.patch, other.part.patch)
                found += [_conflict(one, other, path) for path in paths if not settles(above, path)]
    if found:
        raise LayerError("; ".join(found) + "; set these in the study file, or leave one of the layers out")


def _related(one: Layer, other: Layer, layers: Mapping[str, Layer]) -> bool:
    return one is other or one.name in ancestors(other.name, layers) or other.name in ancestors(one.name, layers)


def _conflict(one: _Active, other: _Active, path: KeyPath) -> str:
    said = [f"{item.layer.label} ({_shown(item.part.patch, path)})" for item in (one, other)]
    return f"{' and '.join(said)} say different things of {'.'.join(path)}"


def _shown(node: Node | None, path: KeyPath) -> str:
    for key in path:
        node = node.children.get(key) if isinstance(node, Section) else None
    if isinstance(node, Section):
        return str(finished(node))
    return repr(node.value) if isinstance(node, Leaf) else type(node).__name__.lower()
