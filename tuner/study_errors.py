"""The wording of what is wrong with one of our YAML files: key path, value, limit and remedy, every problem at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from search_spaces.errors import TunerError
from tuner.experiments import EXPERIMENTS
from tuner.layers_resolve import COMMAND_LINE, STUDY_FILE
from tuner.layers_study import LAYERING_KEYS
from tuner.study_schema import KeyProblemError, StudyFile

Path = tuple[str, ...]

_WANTED = {
    "int": "a whole number",
    "float": "a number (write 1.0e3 rather than 1e3)",
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "dict": "a mapping of keys to values",
    "model": "a mapping of keys to values",
}
_LIMITS = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_short": "must hold at least {min_length}",
    "too_long": "must hold at most {max_length}",
    "finite_number": "must be finite",
}


class StudyFileError(TunerError):
    """A study file cannot be used; the text lists every problem found."""


def describe(
    error: ValidationError,
    lines: Mapping[Path, int],
    origins: Mapping[Path, str] | None = None,
    *,
    schema: type[BaseModel] = StudyFile,
) -> list[str]:
    """One text for each problem in `error`, which checking a file against `schema` has raised.

    `lines` maps key paths to line numbers of the file, `origins` those of values to the layer that set them.
    """
    texts = []
    for detail in error.errors():
        path, text = _problem(detail, schema)
        where = ".".join(path) or "the file as a whole"
        texts.append(f"{where}{_place(path, lines, origins or {})}: {text}")
    return list(dict.fromkeys(texts))


def _place(path: Path, lines: Mapping[Path, int], origins: Mapping[Path, str]) -> str:
    """Line of the file, or the layer where one set the value."""
    setter = next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), STUDY_FILE)
    if setter not in (STUDY_FILE, COMMAND_LINE):
        return f" (set by {setter})"
    line = _line(path, lines)
    return f" (line {line})" if line else ""


def _line(path: Path, lines: Mapping[Path, int]) -> int | None:
    """Line of the longest part of `path` that stands in the file."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


def _problem(detail: ErrorDetails, schema: type[BaseModel]) -> tuple[Path, str]:
    path = _clean(detail["loc"])
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, KeyProblemError):
        return (*path, *cause.key.split(".")), cause.text
    if cause is not None:
        return path, str(cause)
    word = _WORDINGS.get(detail["type"], _word_type)
    return path, word(path, detail, schema)


def _clean(loc: tuple[int | str, ...]) -> Path:
    """Key path of an error location, without pydantic's own marks of unions, keys and validators."""
    return tuple(
        str(part)
        for part in loc
        if isinstance(part, int) or not (part == "[key]" or "[" in part or part in _UNION_TAGS)
    )


_UNION_TAGS = frozenset({"str", "int", "float", "bool", "list", "dict", "none"})


def _word_extra(path: Path, _detail: ErrorDetails, schema: type[BaseModel]) -> str:
    known = _keys_of(path[:-1], schema)
    near = get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown key; {hint}known keys here are {', '.join(known)}"


def _word_missing(path: Path, _detail: ErrorDetails, schema: type[BaseModel]) -> str:
    return f"missing; {_remedy(path, schema)}"


def _word_literal(_path: Path, detail: ErrorDetails, _schema: type[BaseModel]) -> str:
    expected = detail["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
    near = get_close_matches(str(detail["input"]), expected.split(", "), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{_shown(detail['input'])} is no choice; choose {expected}{hint}"


def _word_limit(path: Path, detail: ErrorDetails, schema: type[BaseModel]) -> str:
    limit = _LIMITS[detail["type"]].format(**detail.get("ctx", {}))
    return f"{_shown(detail['input'])} {limit}; {_remedy(path, schema)}"


def _word_type(path: Path, detail: ErrorDetails, schema: type[BaseModel]) -> str:
    family = detail["type"].split("_")[0]
    wanted = _WANTED.get(family, detail["msg"].removeprefix("Input should be "))
    kind = {"NoneType": "empty", "str": "a text", "dict": "a mapping", "list": "a list"}.get(
        type(detail["input"]).__name__, f"of type {type(detail['input']).__name__}"
    )
    return f"{_shown(detail['input'])} is {kind}, but must be {wanted}; {_remedy(path, schema)}"


_WORDINGS: dict[str, Callable[[Path, ErrorDetails, type[BaseModel]], str]] = {
    "extra_forbidden": _word_extra,
    "missing": _word_missing,
    "literal_error": _word_literal,
    **dict.fromkeys(_LIMITS, _word_limit),
}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _remedy(path: Path, schema: type[BaseModel]) -> str:
    """What to write at `path`, from the description and the example of its field."""
    found = _field(path, schema)
    if found is None:
        return "correct it or leave it out"
    key, field = found
    example = field.examples[0] if field.examples else "..."
    meaning = f" ({field.description})" if field.description else ""
    return f"write such as {key}: {example}{meaning}"


def _field(path: Path, schema: type[BaseModel]) -> tuple[str, FieldInfo] | None:
    """Key and field that `path` leads to; list positions and keys of free mappings belong to the field above them."""
    model: type[BaseModel] | None = schema
    found: tuple[str, FieldInfo] | None = None
    for key in path:
        if model is not None and key in model.model_fields:
            found = key, model.model_fields[key]
            model = _model_in(found[1].annotation)
        elif found is None or (model is not None and get_origin(_bare(found[1].annotation)) is not dict):
            return None
    return found


def _keys_of(path: Path, schema: type[BaseModel]) -> list[str]:
    if not path:
        return [*schema.model_fields, *((*LAYERING_KEYS, EXPERIMENTS) if schema is StudyFile else ())]
    found = _field(path, schema)
    model = _model_in(found[1].annotation) if found else None
    return list(model.model_fields) if model else []


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of type `annotation` holds, directly or as the values of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
