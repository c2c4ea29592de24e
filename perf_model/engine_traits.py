"""What the model knows of each engine apart from its options: efficiencies against the device and fixed costs."""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.errors import InvalidValueError


@dataclass(frozen=True, kw_only=True)
class EngineTraits:
    """Roofline efficiencies and overheads of an engine on one kind of device.

    `gemm_efficiency` and `attention_efficiency` are shares of the device's FLOP/s, `memory_efficiency` of
    its bandwidth.
    A step costs `step_ms` besides its operations, and `sequence_ms` for each row of logits (sampling, streaming). A
    call to the engine costs `request_ms` besides what it asks for.
    Matrix products of `half_rate_rows` rows reach half of their rate.
    Work on c cores runs `c ** thread_exponent` times as fast as on one. `reserve_bytes` is what the process takes.
    """

    gemm_efficiency: float
    attention_efficiency: float
    memory_efficiency: float
    step_ms: float
    sequence_ms: float
    request_ms: float
    thread_exponent: float
    half_rate_rows: float
    reserve_bytes: float


# Fitted by hand to runs of llama.cpp (f16 weights, one thread) on a Xeon of 2023 with 24M and 98M parameters: 36-39
# GFLOP/s of prefill where numpy's sgemm does 107, 8.8-9.2 GB/s of weights in decode of one sequence, and 2, 4, 8
# sequences that take 2.2, 3.2, 4.9 times as long as one.
LLAMACPP_ON_CPU = EngineTraits(
    gemm_efficiency=0.36,
    attention_efficiency=0.12,
    memory_efficiency=0.9,
    step_ms=0.4,
    sequence_ms=0.15,
    request_ms=4.0,
    thread_exponent=0.85,
    half_rate_rows=8.0,
    reserve_bytes=120e6,
)

TRAITS: dict[str, EngineTraits] = {"llamacpp": LLAMACPP_ON_CPU}


def engine_traits(engine: str) -> EngineTraits:
    """Traits of `engine`; raises `InvalidValueError` with the known names."""
    if engine not in TRAITS:
        raise InvalidValueError(f"no roofline traits for engine {engine!r}; known are {', '.join(TRAITS)}")
    return TRAITS[engine]
