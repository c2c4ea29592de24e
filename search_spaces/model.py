"""The language model to serve: what the performance model and the engines need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.errors import require


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention of one layer; `window` is the sliding window in tokens, None for full attention."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    def __post_init__(self) -> None:
        require(self.heads >= 1, f"heads={self.heads} must be at least 1")
        require(
            self.kv_heads >= 1 and self.heads % self.kv_heads == 0,
            f"kv_heads={self.kv_heads} does not divide heads={self.heads}; choose a divisor",
        )
        require(self.head_dim >= 1, f"head_dim={self.head_dim} must be at least 1")

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of key and value cache per token and layer."""
        return 2 * self.kv_heads * self.head_dim

    def parameters(self, hidden_size: int) -> int:
        """Weights of the query, key, value and output projections."""
        return hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)


@dataclass(frozen=True, kw_only=True)
class DenseFeedForward:
    """Gated feed-forward block with gate, up and down projections."""

    intermediate_size: int

    def __post_init__(self) -> None:
        require(self.intermediate_size >= 1, f"intermediate_size={self.intermediate_size} must be at least 1")

    def parameters(self, hidden_size: int) -> int:
        """Weights of the gate, up and down projections."""
        return 3 * hidden_size * self.intermediate_size


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """`count` identical decoder layers."""

    count: int
    attention: Attention
    feed_forward: DenseFeedForward


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    `source` is what an engine loads: a path or a hub name; None means that a random-weight model is written.
    """

    name: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerGroup, ...]
    tied_embeddings: bool = False
    weight_bits: float = 16.0
    max_context: int = 4096
    source: str | None = None

    def __post_init__(self) -> None:
        require(self.hidden_size >= 1, f"hidden_size={self.hidden_size} must be at least 1")
        require(self.vocab_size >= 2, f"vocab_size={self.vocab_size} must be at least 2")
        require(bool(self.layers), f"model {self.name!r} has no layers; give at least one")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return sum(group.count for group in self.layers)

    @property
    def parameters(self) -> int:
        """Number of weights, norms left out."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + sum(
            g.count * (g.attention.parameters(self.hidden_size) + g.feed_forward.parameters(self.hidden_size))
            for g in self.layers
        )

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights at `weight_bits`."""
        return self.parameters * self.weight_bits / 8

    def kv_bytes_per_token(self, bytes_per_element: float = 2.0) -> float:
        """Bytes of key and value cache per token of context, all layers."""
        return bytes_per_element * sum(g.count * g.attention.kv_elements_per_token for g in self.layers)
