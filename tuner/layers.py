"""The algebra of layered configuration: patches of a tree of plain data, and what they amount to together.

A patch says for some key paths what shall stand there: a value (`Leaf`), nothing (`Gone`), a list with more items
(`Added`), or a mapping (`Section`) of further patches. `compose` puts one patch over another. It is associative and
total, so a stack of layers means the same however it is bracketed; `finished` gives the tree that a stack yields, and
`origins` the layer of each of its values. Lists are values: a later list replaces an earlier one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

KeyPath = tuple[str, ...]
Tree = dict[str, object]


class Below(StrEnum):
    """What a mapping does with the one that it is put over.

    `MERGE` keeps its other keys. `MEMBERS` decides which keys there are, and merges into those that stay. `REPLACE`
    keeps nothing of it.
    """

    MERGE = "merge"
    MEMBERS = "members"
    REPLACE = "replace"


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A value: a scalar or a list. `by` names the layer that says so."""

    value: object
    by: str


@dataclass(frozen=True, kw_only=True)
class Gone:
    """Nothing: what a lower layer said is taken away."""

    by: str


@dataclass(frozen=True, kw_only=True)
class Added:
    """The list of a lower layer with `items` that it lacks; a lower scalar counts as a list of one."""

    items: tuple[object, ...]
    by: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A mapping of patches. `by` names the layer where it stands empty; otherwise its values name theirs."""

    children: Mapping[str, Node] = field(default_factory=dict)
    below: Below = Below.MERGE
    by: str = field(default="", compare=False)


Node = Leaf | Gone | Added | Section


def section(tree: Mapping[str, object], by: str, marks: Mapping[KeyPath, Below] | None = None) -> Section:
    """The patch that sets every value of `tree`; `marks` says which mappings do more than merge, by key path."""
    return _section(tree, by, marks or {}, ())


def _section(tree: Mapping[str, object], by: str, marks: Mapping[KeyPath, Below], at: KeyPath) -> Section:
    children: dict[str, Node] = {}
    for key, value in tree.items():
        path = (*at, str(key))
        children[key] = _section(value, by, marks, path) if isinstance(value, Mapping) else Leaf(value=value, by=by)
    return Section(children=children, below=marks.get(at, Below.MERGE), by=by)


def nested(path: KeyPath, node: Node) -> Section:
    """The patch that is `node` at `path` and says nothing elsewhere."""
    for key in reversed(path):
        node = Section(children={key: node})
    return node if isinstance(node, Section) else Section()


def compose(lower: Node | None, upper: Node) -> Node:
    """The patch that does what `lower` does, then `upper`; None says nothing."""
    if lower is None or isinstance(upper, Leaf | Gone):
        return upper
    if isinstance(upper, Added):
        return _add(lower, upper)
    if upper.below is Below.REPLACE or not isinstance(lower, Section):
        return _sealed(upper)
    return _compose_sections(lower, upper)


def _compose_sections(lower: Section, upper: Section) -> Section:
    kept = {} if upper.below is Below.MEMBERS else dict(lower.children)
    for key, node in upper.children.items():
        under = lower.children.get(key)
        kept[key] = _sealed(node) if under is None and lower.below is not Below.MERGE else compose(under, node)
    return Section(children=kept, below=max(lower.below, upper.below, key=list(Below).index), by=upper.by or lower.by)


def _sealed(node: Node) -> Node:
    """`node` where nothing of a lower layer may shine through."""
    if isinstance(node, Section):
        sealed = {key: _sealed(child) for key, child in node.children.items()}
        return Section(children=sealed, below=Below.REPLACE, by=node.by)
    return Leaf(value=list(node.items), by=node.by) if isinstance(node, Added) else node


def _add(lower: Node, upper: Added) -> Leaf | Added:
    if isinstance(lower, Added):
        return Added(items=_joined(lower.items, upper.items), by=_names(lower.by, upper.by))
    if isinstance(lower, Leaf) and lower.value is not None:
        first = lower.value if isinstance(lower.value, list) else [lower.value]
        return Leaf(value=list(_joined(tuple(first), upper.items)), by=_names(lower.by, upper.by))
    return Leaf(value=list(upper.items), by=upper.by)


def _joined(first: tuple[object, ...], more: tuple[object, ...]) -> tuple[object, ...]:
    """Both in order; what `more` repeats stands once. True and 1 are different values here."""
    known = [(type(item), item) for item in first]
    joined = list(first)
    for item in more:
        if (type(item), item) not in known:
            known.append((type(item), item))
            joined.append(item)
    return tuple(joined)


def _names(first: str, second: str) -> str:
    """Names of the layers that a list is made by, each once, in order."""
    return " + ".join(dict.fromkeys((*first.split(" + "), *second.split(" + "))))


def finished(node: Section) -> Tree:
    """The tree that `node` yields over nothing: without what is gone, and without mappings that held nothing else."""
    tree: Tree = {}
    for key, child in node.children.items():
        if isinstance(child, Section):
            below = finished(child)
            if below or not child.children:
                tree[key] = below
        elif isinstance(child, Added):
            tree[key] = list(child.items)
        elif isinstance(child, Leaf):
            tree[key] = child.value
    return tree


def origins(node: Section, at: KeyPath = ()) -> dict[KeyPath, str]:
    """The layer that says what stands at each key path with a value, an empty mapping or a deletion."""
    found: dict[KeyPath, str] = {} if node.children or not (node.by and at) else {at: node.by}
    for key, child in node.children.items():
        path = (*at, str(key))
        found |= origins(child, path) if isinstance(child, Section) else {path: child.by}
    return found


def clashes(one: Node, other: Node, at: KeyPath = ()) -> Iterator[KeyPath]:
    """Key paths where the result depends on which of two patches is put over the other."""
    if isinstance(one, Section) and isinstance(other, Section):
        if Below.MERGE is not one.below or Below.MERGE is not other.below:
            if _plain(one) != _plain(other):
                yield at
            return
        for key in sorted(one.children.keys() & other.children.keys(), key=str):
            yield from clashes(one.children[key], other.children[key], (*at, str(key)))
    elif not (isinstance(one, Added) and isinstance(other, Added)) and _plain(one) != _plain(other):
        yield at


def _plain(node: Node) -> object:
    """What `node` says, whoever says it."""
    if isinstance(node, Section):
        return node.below, {key: _plain(child) for key, child in node.children.items()}
    if isinstance(node, Gone):
        return Gone
    return type(node), repr(node.value if isinstance(node, Leaf) else node.items)


def settles(node: Node | None, path: KeyPath) -> bool:
    """True where `node` alone says what stands at `path`, so that nothing below matters there."""
    if node is None or isinstance(node, Added):
        return False
    if isinstance(node, Leaf | Gone) or node.below is Below.REPLACE:
        return True
    if not path:
        return False
    child = node.children.get(path[0])
    return node.below is Below.MEMBERS if child is None else settles(child, path[1:])
