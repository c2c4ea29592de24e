"""`tuner config` and `tuner profiles`: what a study file amounts to, and which layer says so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli_options import AsJson, Overrides

if TYPE_CHECKING:
    from tuner.layers import KeyPath
    from tuner.layers_file import Layer
    from tuner.study_file import LayeredStudy

config_app = typer.Typer(help="Show what a study file amounts to, and the layers below it.", no_args_is_help=True)
profiles_app = typer.Typer(help="Layers that a study file chooses by name.", no_args_is_help=True)

SCHEMA = "default"
"""Stands where no layer sets a value: the schema's own default does."""
Folders = Annotated[
    list[Path] | None, typer.Option("--layers", help="A folder of your own layers; TUNER_LAYERS names more.")
]


@config_app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A study file (YAML).")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print every value of FILE with the layer that set it."""
    from tuner.study_file import load_layered

    found = load_layered(file, overrides or [])
    rows = explained(found)
    if as_json:
        tree = [{"key": ".".join(path), "value": value, "layer": layer} for path, value, layer in rows]
        print(json.dumps({"layers": list(found.resolved.layers), "values": tree}, indent=2, ensure_ascii=False))
        return
    width = max(len(".".join(path)) for path, _, _ in rows)
    shown = [json.dumps(value, ensure_ascii=False) for _, value, _ in rows]
    column = min(48, max(map(len, shown)))
    for (path, _, layer), text in zip(rows, shown, strict=True):
        print(f"{'.'.join(path):<{width}}  {text:<{column}}  {_where(layer, _line(path, found.lines))}")
    print(f"\nlayers, lowest first: {', '.join((*found.resolved.layers, 'study file'))}")


def explained(found: LayeredStudy) -> list[tuple[KeyPath, object, str]]:
    """Key path, value and layer of every value of a study, in the schema's order."""
    tree = found.study.model_dump(mode="json", exclude_none=True)
    return [(path, value, _origin(path, found.resolved.origins)) for path, value in _leaves(tree, ())]


def _leaves(value: object, at: KeyPath) -> list[tuple[KeyPath, object]]:
    if isinstance(value, Mapping) and value:
        return [leaf for key, below in value.items() for leaf in _leaves(below, (*at, str(key)))]
    return [(at, value)]


def _origin(path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """The layer of the value at `path`, of the value above it that holds it, or of those below that it stands for."""
    above = (path[:length] for length in range(len(path), 0, -1))
    below = dict.fromkeys(layer for key, layer in origins.items() if key[: len(path)] == path)
    return next((origins[key] for key in above if key in origins), " + ".join(below) or SCHEMA)


def _line(path: KeyPath, lines: Mapping[KeyPath, int]) -> int | None:
    """Line of the study file where the value at `path`, or the one above it that holds it, is written."""
    return next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)


def _where(layer: str, line: int | None) -> str:
    from tuner.layers_resolve import STUDY_FILE

    return f"{layer}, line {line}" if layer == STUDY_FILE and line else layer


@config_app.command("layers")
def layers(folders: Folders = None, as_json: AsJson = False) -> None:
    """List all layers, lowest first, with their conditions."""
    found = known_layers(folders)
    if as_json:
        print(json.dumps([_layer_json(layer) for layer in found], indent=2, ensure_ascii=False))
        return
    for layer in found:
        conditions = "; ".join(map(str, layer.needs)) or "always"
        print(f"{layer.label:<28} {layer.about}\n{'':<28} when {conditions}")
    print("\nThen the profiles that a study file chooses (tuner profiles list), the study file, and --set.")


@config_app.command("fields")
def fields() -> None:
    """List the fields that the conditions of layers may ask about."""
    from tuner.layers_context import FIELDS

    for name, field in FIELDS.items():
        print(f"{name:<14} {field.meaning}{': ' + ', '.join(field.choices) if field.choices else ''}")


@profiles_app.command("list")
def list_profiles(folders: Folders = None, as_json: AsJson = False) -> None:
    """List the profiles by kind."""
    found = known_profiles(folders)
    if as_json:
        print(json.dumps([_layer_json(layer) for layer in found], indent=2, ensure_ascii=False))
        return
    for kind in dict.fromkeys(layer.kind for layer in found):
        print(f"{kind}")
        for layer in found:
            if layer.kind == kind:
                print(f"  {layer.name:<18} {layer.about}")


@profiles_app.command("show")
def show_profile(
    name: Annotated[str, typer.Argument(help="Name of a profile.")], folders: Folders = None, as_json: AsJson = False
) -> None:
    """Print what a profile sets, for what it is, and where its figures come from."""
    from tuner.layers_file import LayerError

    found = {layer.name: layer for layer in known_profiles(folders)}
    if name not in found:
        raise LayerError(f"profile {name!r} is unknown; choose {', '.join(found)}")
    layer = found[name]
    if as_json:
        print(json.dumps(_layer_json(layer), indent=2, ensure_ascii=False))
        return
    print(f"{layer.name} ({layer.kind}): {layer.about}\nsource: {layer.source}\nfile: {layer.path}\n")
    print(layer.path.read_text(encoding="utf-8"), end="")


def _known(folders: Sequence[Path] | None) -> list[Layer]:
    from tuner.layers_file import layer_folders, read_layers

    return list(read_layers(layer_folders(folders or [])).values())


def known_layers(folders: Sequence[Path] | None) -> list[Layer]:
    """All layers but profiles, lowest first."""
    from tuner.layers_file import Stage

    return [layer for layer in _known(folders) if layer.stage is not Stage.PROFILE]


def known_profiles(folders: Sequence[Path] | None) -> list[Layer]:
    """The profiles, by kind."""
    from tuner.layers_file import ProfileKind, Stage

    found = [layer for layer in _known(folders) if layer.stage is Stage.PROFILE and layer.kind is not None]
    return sorted(found, key=lambda layer: (list(ProfileKind).index(layer.kind or ProfileKind.MODEL), layer.name))


def _layer_json(layer: Layer) -> dict[str, object]:
    from tuner.layers import finished

    return {
        "name": layer.name,
        "stage": str(layer.stage),
        "kind": str(layer.kind) if layer.kind else None,
        "about": layer.about,
        "source": layer.source,
        "when": [str(condition) for condition in layer.needs],
        "parts": [
            {"when": [str(condition) for condition in part.when], "sets": finished(part.patch)} for part in layer.parts
        ],
        "file": str(layer.path),
    }
