"""Pages of the reference, made from the code when the site is built: a hook of MkDocs (see mkdocs.yml).

Commands come from the command line's own definition, keys from the schema of study files, metrics, devices and engine
options from the catalogues that the product uses, benchmarks from the text of each module.
"""  # noqa: INP001 - a script that MkDocs loads by its path, no package

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from search_spaces.engines import ENGINES, EngineSpec
from search_spaces.metrics import METRICS
from tuner.campaigns.schema import CampaignFile
from tuner.cli import app
from tuner.study_schema import StudyFile

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Schema = Mapping[str, Any]  # JSON schema, as pydantic writes it

_OPTIONS_INTRODUCTION = """# Engine options

An option that a study file does not name is searched over its values, or keeps its default where it is marked *kept*.
Of numbers anything between the least and the greatest value can be named. Options that change what the model answers
are marked *numerics*: they have one value in a study, unless `space.compare_numerics` is true."""
_KEYS_INTRODUCTION = """`tuner config show FILE` prints the value of every key and what set it
([layers and profiles](../configuration.md)). A key that is *needed* is given by the file or by a layer."""
_CAMPAIGN_INTRODUCTION = """[Campaigns](../campaigns.md) explains them. While one goes on, all may change but
`study`, `common`, `matrix` and `leave_out`."""
_BENCHMARKS_INTRODUCTION = """# Benchmarks

These programs print the figures that this documentation states; where a page names a test instead, the test holds the
figure. They run from a checkout with the developers' packages (`make .venv/.installed-dev`), with `.venv/bin/python`.
Figures of emulated or simulated hardware say so."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site (MkDocs calls this)."""
    for name, text in pages().items():
        files.append(File.generated(config, f"reference/{name}", content=text))
    return files


def pages() -> dict[str, str]:
    """Every generated page: Markdown by file name."""
    return {
        "commands.md": commands(),
        "study-file.md": study_file(),
        "campaign-file.md": campaign_file(),
        "metrics.md": metrics(),
        "engine-options.md": engine_options(),
        "benchmarks.md": benchmarks(),
    }


def commands() -> str:
    """Every command with its arguments and options."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="tuner")
    return get_docs_for_click(obj=command, ctx=context, name="tuner", title="Commands")


def metrics() -> str:
    """Every metric with its unit, better direction and meaning."""
    rows = [(f"`{name}`", info.unit, str(info.direction), info.meaning) for name, info in METRICS.items()]
    return (
        "# Metrics\n\nWhat objectives and SLOs of a study file can name. SLOs can also be on other percentiles of a "
        "latency, such as `ttft_p75_ms` or `e2e_p999_ms`.\n\n" + _table(("metric", "unit", "better", "meaning"), rows)
    )


def engine_options() -> str:
    """The options of each engine."""
    return "\n\n".join([_OPTIONS_INTRODUCTION, *(_engine(spec) for spec in ENGINES.values())]) + "\n"


def _engine(spec: EngineSpec) -> str:
    rows = [
        (
            f"`{option.name}`",
            ", ".join(_value(choice) for choice in option.choices),
            _value(option.default),
            option.unit,
            ", ".join(str(role) for role in option.roles) if set(option.roles) != set(spec.roles) else "all",
            option.meaning + ("" if option.searched else " *(kept)*") + (" *(numerics)*" if option.numerics else ""),
        )
        for option in spec.parameters
    ]
    kinds = " and ".join(str(kind) for kind in spec.devices)
    heading = f"## {spec.name}\n\nRuns on: {kinds}.\n\n"
    return heading + _table(("option", "values", "default", "unit", "roles", "meaning"), rows)


def study_file() -> str:
    """Every key of a study file, section by section."""
    return _file_page(StudyFile.model_json_schema(), "# Keys of a study file", _KEYS_INTRODUCTION, "## The study")


def campaign_file() -> str:
    """Every key of a campaign file, section by section."""
    schema = CampaignFile.model_json_schema()
    return _file_page(schema, "# Keys of a campaign file", _CAMPAIGN_INTRODUCTION, "## The campaign")


def _file_page(schema: Schema, title: str, introduction: str, top: str) -> str:
    definitions = schema["$defs"]
    parts = [title, introduction, top, _keys(schema)]
    for path, name in _sections(schema, definitions, ""):
        section = definitions[name]
        parts += [f"## `{path}`", section.get("description", ""), _keys(section)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _keys(section: Schema) -> str:
    needed = section.get("required", [])
    rows = [
        (
            f"`{name}`",
            _type(key),
            "**needed**" if name in needed else _default(key),
            key.get("description", ""),
            " ".join(f"`{example}`" for example in key.get("examples", [])),
        )
        for name, key in section["properties"].items()
    ]
    return _table(("key", "what", "default", "meaning", "example"), rows)


def _sections(section: Schema, definitions: Schema, path: str) -> Iterator[tuple[str, str]]:
    """The sections below `section`, parents first: path and name of the definition."""
    for name, key in section["properties"].items():
        for step, reference in _references(key):
            below = f"{path}{name}{step}"
            yield below, reference
            yield from _sections(definitions[reference], definitions, f"{below}.")


def _references(key: Schema) -> Iterator[tuple[str, str]]:
    """Definitions that `key` refers to, with what is added to its path: `.NAME` for a mapping, `[]` for a list."""
    for part in (key, *key.get("anyOf", ())):
        if "$ref" in part:
            yield "", part["$ref"].rpartition("/")[2]
        if "$ref" in part.get("items", {}):
            yield "[]", part["items"]["$ref"].rpartition("/")[2]
        values = part.get("additionalProperties")
        if isinstance(values, dict) and "$ref" in values:
            yield ".NAME", values["$ref"].rpartition("/")[2]


def _type(key: Schema) -> str:
    """What a key takes, in words, with its limits."""
    if "$ref" in key:
        return "section"
    if "anyOf" in key:
        return " or ".join(dict.fromkeys(_type(part) for part in key["anyOf"] if part.get("type") != "null"))
    if "enum" in key or "const" in key:
        return ", ".join(_value(choice) for choice in key.get("enum", [key.get("const")]))
    if key.get("type") == "array":
        return f"list of {_type(key.get('items', {}))}"
    if key.get("type") == "object":
        return "sections by name" if any(_references(key)) else "mapping"
    words = {"string": "text", "boolean": "true or false", "integer": "whole number", "number": "number"}
    return words.get(key.get("type", ""), "value") + _limits(key)


def _limits(key: Schema) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    found = [f"{sign} {key[name]:g}" for name, sign in signs.items() if name in key]
    return f" {', '.join(found)}" if found else ""


def _default(key: Schema) -> str:
    if "default" not in key:
        return "see its section" if any(_references(key)) else "none"
    value = key["default"]
    return "none" if value is None else _value(value)


def benchmarks() -> str:
    """What each program of `benchmarks/` measures and how it is run again, from its own text."""
    parts = [_BENCHMARKS_INTRODUCTION]
    for path in sorted(BENCHMARKS.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text:
            parts.append(f"## {path.name}\n\n{_listed(text)}")
    return "\n\n".join(parts) + "\n"


def _listed(text: str) -> str:
    """`text` with an empty line before each list, which Markdown wants."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("- ") and lines and lines[-1].strip() and not lines[-1].startswith(("- ", "  ")):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _value(value: object) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    lines += [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return "\n".join(lines)
