"""Values of the language <-> JSON, by their type annotations.

One pair of functions serves every frozen dataclass of `search_spaces`: `to_json` writes plain JSON values, `from_json`
reads them back into the annotated types. A field that is absent takes its default, so that older records stay readable
when a type gains a field; a field that is unknown, or a value of another type, is a `StudyFormatError`.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import StrEnum
from functools import cache

from studies.errors import StudyFormatError

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]
T = typing.TypeVar("T")


def to_json(value: object) -> Json:
    """Plain JSON for dataclasses, enums, mappings with text keys, sequences and primitive values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, StrEnum):
        return value.value
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    raise StudyFormatError(f"{type(value).__name__} {value!r} has no JSON form; store text, numbers or dataclasses")


def from_json(cls: type[T], data: Json) -> T:
    """The value of type `cls` that `to_json` wrote as `data`; raises `StudyFormatError` where it does not fit."""
    return typing.cast("T", _read(cls, data, cls.__name__))


def _read(hint: object, data: Json, where: str) -> object:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _read_union(typing.get_args(hint), data, where)
    if origin is tuple:
        return _read_tuple(typing.get_args(hint), data, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        item = typing.get_args(hint)[1]
        found = _expect(dict, data, where).items()  # thousands of records name the same metrics: one string for each
        return {sys.intern(key): _read(item, value, f"{where}.{key}") for key, value in found}
    if isinstance(hint, type):
        return _read_plain(hint, data, where)
    raise StudyFormatError(f"{where} has the type {hint!r}, which records cannot hold")


def _read_plain(hint: type, data: Json, where: str) -> object:
    if is_dataclass(hint):
        return _read_dataclass(hint, _expect(dict, data, where), where)
    if issubclass(hint, StrEnum):
        return _read_enum(hint, data, where)
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return data  # an integral number given for a float stays as it was written, so that keys stay equal
    return _expect(hint, data, where)


def _read_enum(hint: type[StrEnum], data: Json, where: str) -> StrEnum:
    try:
        return hint(_expect(str, data, where))
    except ValueError as error:
        known = ", ".join(hint)
        raise StudyFormatError(f"{where}={data!r} is none of {known}; was it written by a newer version?") from error


def _read_dataclass(cls: type, data: Mapping[str, Json], where: str) -> object:
    known = _fields_of(cls)
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise StudyFormatError(
            f"{where} has unknown fields {unknown}; it was written by a newer version: upgrade tuner"
        )
    missing = [name for name, (field, _) in known.items() if name not in data and _is_required(field)]
    if missing:
        raise StudyFormatError(f"{where} lacks the fields {missing}; the record is damaged or of another version")
    values = {name: _read(known[name][1], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise StudyFormatError(f"{where} holds an impossible value: {error}") from error


@cache
def _fields_of(cls: type) -> dict[str, tuple[Field[object], object]]:
    hints = typing.get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in fields(cls)}


def _is_required(field: Field[object]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _read_union(options: tuple[object, ...], data: Json, where: str) -> object:
    if data is None and type(None) in options:
        return None
    exact = [option for option in options if option is type(data)]
    others = [option for option in options if option not in exact and option is not type(None)]
    for option in (*exact, *others):
        try:
            return _read(option, data, where)
        except StudyFormatError:
            continue
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise StudyFormatError(f"{where}={data!r} is no {names}; the record is damaged or of another version")


def _read_tuple(items: tuple[object, ...], data: Json, where: str) -> tuple[object, ...]:
    values = _expect(list, data, where)
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_read(items[0], value, f"{where}[{i}]") for i, value in enumerate(values))
    if len(items) != len(values):
        raise StudyFormatError(f"{where} has {len(values)} items where {len(items)} belong")
    return tuple(_read(item, value, f"{where}[{i}]") for i, (item, value) in enumerate(zip(items, values, strict=True)))


def _expect(cls: type[T], data: Json, where: str) -> T:
    if isinstance(data, cls) and not (isinstance(data, bool) and cls is not bool):
        return data
    raise StudyFormatError(f"{where}={data!r} is no {cls.__name__}; the record is damaged or of another version")
