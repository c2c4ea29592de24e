"""Laws of whole stacks of layers: the order of files and of profiles is nothing, and a user's value stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.layers import Added, Gone, KeyPath, Node, Section, compose, nested, section
from tuner.layers_context import Condition
from tuner.layers_file import Layer, LayerError, Part, ProfileKind, Stage
from tuner.layers_resolve import STUDY_FILE, Resolved, resolve

HERE = Path()
PATHS: list[KeyPath] = [
    ("seed",),
    ("budget", "trials"),
    ("budget", "patience"),
    ("space", "tp"),
    ("slos", "ttft_p50_ms"),
]
NUMBERS = st.integers(1, 4)
LENGTHS = st.sampled_from([64, 512])
CONDITIONS = st.lists(
    st.builds(Condition, field=st.just("isl"), at_least=st.sampled_from([1.0, 100.0]))
    | st.builds(Condition, field=st.just("engine"), any_of=st.sampled_from([("vllm",), ("sglang",)])),
    max_size=1,
).map(tuple)


@st.composite
def patches(draw: st.DrawFn, label: str) -> Section:
    node: Node = Section()
    for path in draw(st.lists(st.sampled_from(PATHS), min_size=1, max_size=3, unique=True)):
        kind = draw(st.sampled_from(["set", "set", "append", "unset"]))
        if kind == "set":
            node = compose(node, _tree(path, draw(NUMBERS), label))
        elif kind == "append":
            node = compose(node, nested(path, Added(items=(draw(NUMBERS),), by=label)))
        else:
            node = compose(node, nested(path, Gone(by=label)))
    assert isinstance(node, Section)
    return node


def _tree(path: KeyPath, value: object, label: str) -> Section:
    for key in reversed(path):
        value = {key: value}
    assert isinstance(value, dict)
    return section(value, label)


@st.composite
def stacks(draw: st.DrawFn) -> list[Layer]:
    made = []
    for index in range(draw(st.integers(1, 6))):
        stage = draw(st.sampled_from(list(Stage)))
        label = f"{stage}/layer-{index}"
        made.append(
            Layer(
                name=f"layer-{index}",
                stage=stage,
                about="a test",
                parts=(Part(when=draw(CONDITIONS), patch=draw(patches(label))),),
                kind=ProfileKind.SLO if stage is Stage.PROFILE else None,
                path=HERE,
                folder=draw(st.integers(0, 1)),
            )
        )
    return made


@st.composite
def users(draw: st.DrawFn) -> dict[str, Any]:
    tree: dict[str, Any] = {"workload": {"isl": {"mean": draw(LENGTHS)}}, "engines": {"vllm": {}}}
    for path in draw(st.lists(st.sampled_from(PATHS), max_size=3, unique=True)):
        below = tree
        for key in path[:-1]:
            below = below.setdefault(key, {})
        below[path[-1]] = draw(NUMBERS)
    return tree


def outcome(layers: list[Layer], user: dict[str, Any], profiles: list[str]) -> Resolved | str:
    named = {layer.name: layer for layer in layers}
    try:
        return resolve(section(user, STUDY_FILE), named, profiles, HERE)
    except LayerError as error:
        return str(error)


def flat(tree: dict[str, Any], at: KeyPath = ()) -> dict[KeyPath, Any]:
    found: dict[KeyPath, Any] = {}
    for key, value in tree.items():
        found |= flat(value, (*at, key)) if isinstance(value, dict) and value else {(*at, key): value}
    return found


def chosen(layers: list[Layer]) -> list[str]:
    return sorted(layer.name for layer in layers if layer.stage is Stage.PROFILE)


@settings(deadline=None)
@given(layers=stacks(), user=users())
def test_the_order_of_files_and_of_profiles_is_nothing(layers: list[Layer], user: dict[str, Any]) -> None:
    names = chosen(layers)
    one, other = outcome(layers, user, names), outcome(list(reversed(layers)), user, names[::-1])
    assert isinstance(one, str) == isinstance(other, str)
    if isinstance(one, Resolved) and isinstance(other, Resolved):
        assert one.tree == other.tree
        assert one.origins == other.origins


@settings(deadline=None)
@given(layers=stacks(), user=users())
def test_a_user_s_value_stands_under_any_layers(layers: list[Layer], user: dict[str, Any]) -> None:
    found = outcome(layers, user, chosen(layers))
    if isinstance(found, str):
        return
    have = flat(found.tree)
    for path, value in flat(user).items():
        assert have[path] == value
        assert found.origins[path] == STUDY_FILE
    assert all(layer == STUDY_FILE or "/" in layer for layer in found.origins.values())


@settings(deadline=None)
@given(layers=stacks(), user=users())
def test_what_a_user_sets_settles_every_conflict_about_it(layers: list[Layer], user: dict[str, Any]) -> None:
    said = outcome(layers, user, chosen(layers))
    if isinstance(said, str):
        for path in flat(user):
            assert f"different things of {'.'.join(path)};" not in said
            assert f"different things of {'.'.join(path)}" != said.split("; set these")[0].split(" say ")[-1]


@settings(deadline=None)
@given(layers=stacks(), user=users())
def test_a_layer_that_is_listed_as_counting_meets_its_conditions(layers: list[Layer], user: dict[str, Any]) -> None:
    found = outcome(layers, user, chosen(layers))
    if isinstance(found, str):
        return
    length = user["workload"]["isl"]["mean"]
    for layer in layers:
        (part,) = layer.parts
        holds = all(
            (c.at_least is None or length >= c.at_least) and (not c.any_of or c.any_of == ("vllm",)) for c in part.when
        )
        assert (layer.label in found.layers) == holds


def test_a_circle_through_two_layers_never_settles() -> None:
    longer = Part(
        when=(Condition(field="isl", at_most=100.0),),
        patch=section({"workload": {"isl": {"mean": 500}}}, "mode/longer"),
    )
    base = Part(when=(), patch=section({"workload": {"isl": {"mean": 64}}}, "base/start"))
    layers = {
        "start": Layer(name="start", stage=Stage.BASE, about="x", parts=(base,), path=HERE),
        "longer": Layer(name="longer", stage=Stage.MODE, about="x", parts=(longer,), path=HERE),
    }
    with pytest.raises(LayerError, match="mode/longer hang on what these layers set themselves"):
        resolve(Section(), layers, [], HERE)
