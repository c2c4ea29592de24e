"""The operations of an engine step, with their shapes on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Collective(StrEnum):
    """Collective operations; the words are those of the tables."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "alltoall"


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """(tokens, k) x (k, n), `count` times a step. `outputs_only`: rows are those whose logits are computed."""

    name: str
    n: int
    k: int
    count: float
    format: str
    outputs_only: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryMove:
    """A small kernel that moves `bytes_per_token` (norm, activation, embedding), `count` times a step."""

    name: str
    bytes_per_token: float
    count: float


@dataclass(frozen=True, kw_only=True)
class Launches:
    """Kernels whose time is their launch: `ms` each, `count` times a step."""

    name: str
    ms: float
    count: float


@dataclass(frozen=True, kw_only=True)
class Communication:
    """A collective over `ranks` GPUs on `elements_per_token` elements of `tokens_factor` times the rank's tokens.

    `custom` asks for the engine's own all-reduce; the others are NCCL's.
    """

    name: str
    kind: Collective
    elements_per_token: float
    ranks: int
    count: float
    tokens_factor: float = 1.0
    custom: bool = False


@dataclass(frozen=True, kw_only=True)
class Hop:
    """Activations sent to the next pipeline stage; `crosses_nodes` where stages lie on different nodes."""

    name: str
    bytes_per_token: float
    count: float
    crosses_nodes: bool


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Routed experts: tokens of all `tokens_factor` attention ranks, spread over `tp` x `ep` ranks.

    `wide` is "generation" or "context" (the tables' words for decode and prefill) where all ranks have attention and
    experts of their own, for which engines have other kernels; empty elsewhere.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    active: int
    experts: int
    tp: int
    ep: int
    format: str
    distribution: str
    count: float
    tokens_factor: float = 1.0
    wide: str = ""


@dataclass(frozen=True, kw_only=True)
class SelfAttention:
    """Grouped-query attention of `count` layers; heads are those of the rank."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    cache: str
    attention: str
    count: float


@dataclass(frozen=True, kw_only=True)
class LatentKernel:
    """Multi-head latent attention without its projections."""

    name: str
    heads: int
    cache: str
    attention: str
    count: float


@dataclass(frozen=True, kw_only=True)
class LatentModule:
    """Multi-head latent attention with its projections, as one measured module."""

    name: str
    heads: int
    cache: str
    attention: str
    format: str
    count: float


@dataclass(frozen=True, kw_only=True)
class SparseModule:
    """Latent attention with an indexer and its projections, as one measured module."""

    name: str
    heads: int
    architecture: str
    cache: str
    format: str
    count: float


@dataclass(frozen=True, kw_only=True)
class LatentProduct:
    """The batched products that absorb the latent projections in decode; `before` attention or after it."""

    name: str
    heads: int
    format: str
    before: bool
    count: float


@dataclass(frozen=True, kw_only=True)
class LinearKernel:
    """Gated delta-rule attention without its projections: convolution and recurrence."""

    name: str
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    model_width: int
    count: float


@dataclass(frozen=True, kw_only=True)
class Concurrent:
    """Two groups of token-wise operations on two streams: the longer one counts."""

    name: str
    first: tuple[TokenOperation, ...]
    second: tuple[TokenOperation, ...]


TokenOperation = Gemm | MemoryMove | Launches | Communication | Hop | Experts | LatentProduct
AttentionOperation = SelfAttention | LatentKernel | LatentModule | SparseModule | LinearKernel
Operation = TokenOperation | AttentionOperation | Concurrent
