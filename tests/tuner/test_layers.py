"""The laws of layers: bracketing never matters, order only where it is said to, and a user's value stands."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.layers import (
    Added,
    Below,
    Gone,
    Leaf,
    Node,
    Section,
    clashes,
    compose,
    finished,
    nested,
    origins,
    section,
    settles,
)

KEYS = st.sampled_from(["a", "b", "c"])
SCALARS = st.none() | st.booleans() | st.integers(0, 3)
VALUES = SCALARS | st.lists(SCALARS, max_size=3)
NAMES = st.sampled_from(["one", "two", "three"])
LEAVES = (
    st.builds(Leaf, value=VALUES, by=NAMES)
    | st.builds(Gone, by=NAMES)
    | st.builds(Added, items=st.lists(SCALARS, max_size=3, unique_by=repr).map(tuple), by=NAMES)
)
NODES: st.SearchStrategy[Node] = st.recursive(
    LEAVES,
    lambda inner: st.builds(
        Section, children=st.dictionaries(KEYS, inner, max_size=3), below=st.sampled_from(list(Below))
    ),
    max_leaves=8,
)
SECTIONS = st.builds(Section, children=st.dictionaries(KEYS, NODES, max_size=3), below=st.sampled_from(list(Below)))
TREES = st.dictionaries(
    KEYS, st.recursive(VALUES, lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3), max_leaves=6)
)


def resolved(*nodes: Section) -> dict[str, Any]:
    stack: Node = Section()
    for node in nodes:
        stack = compose(stack, node)
    assert isinstance(stack, Section)
    return finished(stack)


def values_of(tree: dict[str, Any], at: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    found: dict[tuple[str, ...], object] = {}
    for key, value in tree.items():
        found |= values_of(value, (*at, key)) if isinstance(value, dict) and value else {(*at, key): value}
    return found


@settings(max_examples=500, deadline=None)
@given(a=NODES, b=NODES, c=NODES)
def test_bracketing_never_matters(a: Node, b: Node, c: Node) -> None:
    assert compose(compose(a, b), c) == compose(a, compose(b, c))


@settings(deadline=None)
@given(base=SECTIONS, layers=st.lists(SECTIONS, max_size=4))
def test_layers_put_together_first_give_the_same_tree_and_origins(base: Section, layers: list[Section]) -> None:
    one_by_one: Node = base
    together: Node = Section()
    for layer in layers:
        one_by_one, together = compose(one_by_one, layer), compose(together, layer)
    at_once = compose(base, together)
    assert isinstance(one_by_one, Section)
    assert isinstance(at_once, Section)
    assert finished(one_by_one) == finished(at_once)
    assert origins(one_by_one) == origins(at_once)


@settings(deadline=None)
@given(layers=st.lists(SECTIONS, max_size=4), user=TREES)
def test_a_value_of_the_user_is_never_lost(layers: list[Section], user: dict[str, Any]) -> None:
    stack: Node = Section()
    for layer in [*layers, section(user, "user")]:
        stack = compose(stack, layer)
    assert isinstance(stack, Section)
    have, whose = values_of(finished(stack)), origins(stack)
    for path, value in values_of(user).items():
        if value != {}:
            assert repr(have[path]) == repr(value)
            assert whose[path] == "user"


@settings(deadline=None)
@given(base=SECTIONS, one=SECTIONS, other=SECTIONS)
def test_layers_that_do_not_clash_may_stand_in_either_order(base: Section, one: Section, other: Section) -> None:
    if list(clashes(one, other)):
        return
    first, second = values_of(resolved(base, one, other)), values_of(resolved(base, other, one))
    assert first.keys() == second.keys()
    for path, value in first.items():
        assert same(value, second[path])


def same(one: object, other: object) -> bool:
    """Equal, lists in any order: two layers may add to one list in either order."""
    if isinstance(one, list) and isinstance(other, list):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    return repr(one) == repr(other)


@settings(deadline=None)
@given(below=SECTIONS, above=SECTIONS, path=st.lists(KEYS, min_size=1, max_size=3).map(tuple))
def test_what_a_layer_settles_does_not_depend_on_those_below(
    below: Section, above: Section, path: tuple[str, ...]
) -> None:
    if not settles(above, path):
        return
    alone, over = values_of(resolved(above)), values_of(resolved(below, above))
    for known in alone.keys() | over.keys():
        if known[: len(path)] == path:
            assert repr(alone.get(known)) == repr(over.get(known))


def test_lists_are_values_and_grow_only_where_asked() -> None:
    base = section({"a": [1, 2], "b": 3}, "base")
    assert resolved(base, section({"a": [9]}, "x")) == {"a": [9], "b": 3}
    added = nested(("a",), Added(items=(2, 7), by="x"))
    assert resolved(base, added) == {"a": [1, 2, 7], "b": 3}
    assert resolved(base, nested(("b",), Added(items=(4,), by="x"))) == {"a": [1, 2], "b": [3, 4]}
    assert origins(Section(children={"a": compose(base.children["a"], added.children["a"])})) == {("a",): "base + x"}


def test_a_mapping_merges_decides_its_members_or_replaces() -> None:
    base = section({"engines": {"x": {"p": 1, "q": 2}, "y": {"p": 3}}}, "base")
    upper = {"engines": {"x": {"q": 9}, "z": {}}}
    assert resolved(base, section(upper, "u")) == {"engines": {"x": {"p": 1, "q": 9}, "y": {"p": 3}, "z": {}}}
    members = section(upper, "u", {("engines",): Below.MEMBERS})
    assert resolved(base, members) == {"engines": {"x": {"p": 1, "q": 9}, "z": {}}}
    replaced = section(upper, "u", {("engines",): Below.REPLACE})
    assert resolved(base, replaced) == {"engines": {"x": {"q": 9}, "z": {}}}


def test_a_deletion_takes_a_value_or_a_section_away() -> None:
    base = section({"a": {"b": 1, "c": 2}, "d": 3}, "base")
    assert resolved(base, nested(("a", "b"), Gone(by="x"))) == {"a": {"c": 2}, "d": 3}
    assert resolved(base, nested(("a",), Gone(by="x"))) == {"d": 3}
    assert resolved(base, nested(("a",), Gone(by="x")), section({"a": {"e": 4}}, "y")) == {"a": {"e": 4}, "d": 3}


def test_clashes_name_the_key_paths() -> None:
    one = section({"a": {"b": 1, "c": 2}, "d": [1]}, "one")
    other = section({"a": {"b": 1, "c": 3}, "d": [2], "e": 1}, "other")
    assert list(clashes(one, other)) == [("a", "c"), ("d",)]
    assert list(clashes(one, one)) == []
    assert list(clashes(nested(("d",), Added(items=(1,), by="x")), nested(("d",), Added(items=(2,), by="y")))) == []
    assert list(clashes(nested(("d",), Added(items=(1,), by="x")), one)) == [("d",)]
