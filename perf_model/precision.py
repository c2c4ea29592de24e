"""Number formats: what a weight or a cache element takes, and at which rate it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.errors import InvalidValueError
from search_spaces.model import LatentAttention, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Format:
    """`weight_bytes` per weight, `activation_bytes` per activation, `compute` the FLOP/s that it runs at."""

    weight_bytes: float
    activation_bytes: float
    compute: str


FORMATS: dict[str, Format] = {
    "bfloat16": Format(weight_bytes=2.0, activation_bytes=2.0, compute="bf16"),
    "fp8": Format(weight_bytes=1.0, activation_bytes=1.0, compute="fp8"),
    "fp8_block": Format(weight_bytes=1.0, activation_bytes=1.0, compute="fp8"),
    "nvfp4": Format(weight_bytes=9 / 16, activation_bytes=9 / 16, compute="fp4"),
    "int4_wo": Format(weight_bytes=0.5, activation_bytes=2.0, compute="bf16"),
    "int8_wo": Format(weight_bytes=1.0, activation_bytes=2.0, compute="bf16"),
    "w4a16_mxfp4": Format(weight_bytes=0.53125, activation_bytes=2.0, compute="bf16"),
    "w4a8_mxfp4_mxfp8": Format(weight_bytes=0.53125, activation_bytes=1.0, compute="fp8"),
}

CACHE_BYTES = {"bfloat16": 2.0, "fp8": 1.0}

# Where no table holds a format, the next one of its list stands in, scaled by the speed of light.
SUBSTITUTES: dict[str, tuple[str, ...]] = {
    "bfloat16": ("fp8", "fp8_block"),
    "fp8": ("fp8_block", "bfloat16"),
    "fp8_block": ("fp8", "bfloat16"),
    "nvfp4": ("w4a8_mxfp4_mxfp8", "fp8", "fp8_block", "bfloat16"),
    "int4_wo": ("w4a16_mxfp4", "bfloat16", "fp8_block"),
    "int8_wo": ("fp8", "bfloat16"),
    "w4a16_mxfp4": ("w4a8_mxfp4_mxfp8", "int4_wo", "bfloat16"),
    "w4a8_mxfp4_mxfp8": ("w4a16_mxfp4", "nvfp4", "fp8", "bfloat16"),
}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Formats of a deployment: matrix products, attention projections, experts, KV cache and attention arithmetic."""

    gemm: str = "bfloat16"
    projections: str = "bfloat16"
    moe: str = "bfloat16"
    cache: str = "bfloat16"
    attention: str = "bfloat16"

    def __post_init__(self) -> None:
        for label in ("gemm", "projections", "moe"):
            _known(label, getattr(self, label), FORMATS)
        for label in ("cache", "attention"):
            _known(label, getattr(self, label), CACHE_BYTES)


def _known(label: str, value: str, table: dict[str, Format] | dict[str, float]) -> None:
    if value not in table:
        raise InvalidValueError(f"{label} format {value!r} is unknown; choose {', '.join(table)}")


_CHECKPOINTS = {
    "": ("bfloat16", "bfloat16"),
    "fp8": ("fp8", "fp8"),
    "fp8_block": ("fp8_block", "fp8_block"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "mxfp4": ("bfloat16", "w4a16_mxfp4"),
    "int4": ("int4_wo", "int4_wo"),
    "int8": ("int8_wo", "bfloat16"),
}


def checkpoint_precision(model: ModelSpec, *, cache: str = "bfloat16") -> Precision:
    """The formats that serving `model`'s checkpoint uses.

    NVFP4 and INT4 checkpoints of latent-attention models leave the attention block in bf16.
    """
    gemm, moe = _CHECKPOINTS[model.quantization]
    latent = any(isinstance(group.attention, LatentAttention) for group in model.layers)
    untouched = latent and model.quantization in {"nvfp4", "int4"}
    return Precision(gemm=gemm, moe=moe, projections="bfloat16" if untouched else gemm, cache=cache)
