"""What the conditions of layers may ask of a study, and whether they hold.

The context is read from the merged tree before the schema checks it: what is malformed there is simply unknown, and a
condition on an unknown value does not hold. The schema's own message follows afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from search_spaces.engines import ENGINES
from search_spaces.errors import InvalidValueError, TunerError, require
from search_spaces.hf_config import read_model
from search_spaces.known_gpus import GPUS
from search_spaces.known_models import known_model
from search_spaces.model import LatentAttention, ModelSpec, MoeFeedForward
from search_spaces.model_presets import TINY_MODEL
from search_spaces.workload import Arrival

Scalar = str | int | float | bool
Context = Mapping[str, tuple[Scalar, ...]]
"""Values by field; several where a study has several engines, modes or devices, none where nothing is known."""
DEFAULT_MODES = ("aggregated", "disaggregated")
_FAMILY = re.compile(r"(?:meta-)?(gpt-oss|[a-z]+)")


@dataclass(frozen=True, kw_only=True)
class ContextField:
    """A field that conditions may name. `choices` are all its values, None where there are too many to list."""

    meaning: str
    choices: tuple[str, ...] | None = None
    is_number: bool = False


FIELDS: dict[str, ContextField] = {
    "engine": ContextField(meaning="engines of the study", choices=tuple(ENGINES)),
    "mode": ContextField(meaning="serving modes of the search", choices=DEFAULT_MODES),
    "device": ContextField(meaning="devices of the node pools", choices=("cpu", *GPUS)),
    "device_kind": ContextField(meaning="kinds of those devices", choices=("cpu", "gpu")),
    "gpus_per_node": ContextField(meaning="GPUs of a node, by pool", is_number=True),
    "model": ContextField(meaning="name of the model"),
    "model_family": ContextField(meaning="first word of the model's name, in lower case, such as llama or deepseek"),
    "model_kind": ContextField(meaning="dense, or moe (mixture of experts)", choices=("dense", "moe")),
    "attention": ContextField(meaning="latent (MLA) or grouped (GQA, MHA)", choices=("latent", "grouped")),
    "weights": ContextField(
        meaning="format of the checkpoint's weights",
        choices=("float16", "fp8", "fp8_block", "nvfp4", "mxfp4", "int4", "int8"),
    ),
    "arrival": ContextField(meaning="how requests arrive", choices=tuple(str(a) for a in Arrival)),
    "isl": ContextField(meaning="mean input tokens", is_number=True),
    "osl": ContextField(meaning="mean output tokens", is_number=True),
    "profile": ContextField(meaning="profiles that the study chose"),
}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Holds where one value of `field` is among `any_of`, all are among `every_of`, none among `none_of`, and all lie
    in `at_least..at_most`; what is empty or None asks nothing. With no value known it does not hold.
    """  # noqa: D205 - one sentence

    field: str
    any_of: tuple[Scalar, ...] = ()
    every_of: tuple[Scalar, ...] = ()
    none_of: tuple[Scalar, ...] = ()
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.field not in FIELDS:
            near = get_close_matches(self.field, FIELDS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InvalidValueError(f"condition on unknown field {self.field!r}; {hint}choose {', '.join(FIELDS)}")
        info = FIELDS[self.field]
        for value in (*self.any_of, *self.every_of, *self.none_of):
            require(
                info.choices is None or value in info.choices,
                f"{self.field} is never {value!r}; choose {', '.join(info.choices or ())}",
            )
        bounded = self.at_least is not None or self.at_most is not None
        require(not bounded or info.is_number, f"{self.field} is no number; at_least and at_most do not go with it")

    def holds(self, context: Context) -> bool:
        """True where `context` meets it."""
        values = context.get(self.field, ())
        return bool(values) and all(
            (
                not self.any_of or any(value in self.any_of for value in values),
                not self.every_of or all(value in self.every_of for value in values),
                not any(value in self.none_of for value in values),
                self.at_least is None or all(float(value) >= self.at_least for value in values),
                self.at_most is None or all(float(value) <= self.at_most for value in values),
            )
        )

    def __str__(self) -> str:
        said = [_among(self.any_of), *(f"only {_among(v)}" for v in (self.every_of,) if v)]
        said += [f"not {_among(self.none_of)}" if self.none_of else ""]
        said += [f"at least {self.at_least:g}" if self.at_least is not None else ""]
        said += [f"at most {self.at_most:g}" if self.at_most is not None else ""]
        return f"{self.field}: {', '.join(text for text in said if text)}"


def _among(values: Sequence[Scalar]) -> str:
    return " or ".join(map(str, values))


def context_of(tree: Mapping[str, object], directory: Path, profiles: Sequence[str]) -> dict[str, tuple[Scalar, ...]]:
    """The context of a merged study `tree`; paths of models are relative to `directory`."""
    pools = [pool for pool in _mapping(tree.get("node_pools")).values() if isinstance(pool, Mapping)]
    devices = tuple(dict.fromkeys(str(pool.get("device", "cpu")) for pool in pools))
    workload = _mapping(tree.get("workload"))
    modes = _mapping(tree.get("space")).get("modes", list(DEFAULT_MODES))
    return {
        "engine": tuple(str(name) for name in _mapping(tree.get("engines"))),
        "mode": tuple(str(mode) for mode in (modes if isinstance(modes, list) else [modes])),
        "device": devices,
        "device_kind": tuple(dict.fromkeys("cpu" if name == "cpu" else "gpu" for name in devices)),
        "gpus_per_node": _numbers(pool.get("gpus_per_node") for pool in pools),
        "arrival": (str(workload.get("arrival", "closed")),),
        "isl": _numbers([_mapping(workload.get("isl")).get("mean")]),
        "osl": _numbers([_mapping(workload.get("osl")).get("mean")]),
        "profile": tuple(profiles),
        **_model_fields(_mapping(tree.get("model")), directory),
    }


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _numbers(values: Iterator[object] | Sequence[object]) -> tuple[Scalar, ...]:
    return tuple(value for value in values if isinstance(value, int | float) and not isinstance(value, bool))


def _model_fields(model: Mapping[str, object], directory: Path) -> dict[str, tuple[Scalar, ...]]:
    """What is known of the model without loading weights; a GGUF file is known by its name alone."""
    if isinstance(model.get("gguf"), str):
        name = Path(str(model["gguf"])).stem
        return {"model": (name,), "model_family": _family(name)}
    spec = _read(model, directory)
    if spec is None:
        return {}
    sparse = any(isinstance(group.feed_forward, MoeFeedForward) for group in spec.layers)
    latent = any(isinstance(group.attention, LatentAttention) for group in spec.layers)
    return {
        "model": (spec.name,),
        "model_family": _family(spec.name),
        "model_kind": ("moe" if sparse else "dense",),
        "attention": ("latent" if latent else "grouped",),
        "weights": (spec.quantization or "float16",),
    }


def _family(name: str) -> tuple[str, ...]:
    found = _FAMILY.match(name.rsplit("/", maxsplit=1)[-1].lower())
    return (found[1],) if found else ()


def _read(model: Mapping[str, object], directory: Path) -> ModelSpec | None:
    if not model or model.get("preset") == "tiny":
        return TINY_MODEL
    try:
        if isinstance(model.get("name"), str):
            return known_model(str(model["name"]))
        if isinstance(model.get("config"), str):
            path = directory / Path(str(model["config"])).expanduser()
            return read_model(path, nearest=bool(model.get("nearest_family")))
    except TunerError:
        return None  # the schema, or the reading of the model, says what is wrong
    return None
