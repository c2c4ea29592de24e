"""The language model to serve: what the performance model and the engines need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.errors import InvalidValueError, require


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention of one layer.

    `window` is the sliding window in tokens, None for full attention. `qk_norm` normalises queries and keys;
    `output_gate` gates the heads' output, which makes the query projection twice as wide.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    qk_norm: bool = False
    output_gate: bool = False

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
        queries = 2 if self.output_gate else 1
        return hidden_size * self.head_dim * ((queries + 1) * self.heads + 2 * self.kv_heads)


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek): queries and keys go through low-rank projections.

    The cache holds `kv_rank` compressed and `rope_dim` positional elements per token, whatever the number of heads.
    Where `index_topk` is given, an indexer of `index_heads` heads picks that many tokens to attend to.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    index_topk: int | None = None
    index_heads: int = 0
    index_dim: int = 0

    def __post_init__(self) -> None:
        for label in ("heads", "kv_rank", "nope_dim", "rope_dim", "v_dim"):
            require(getattr(self, label) >= 1, f"{label}={getattr(self, label)} must be at least 1")

    @property
    def window(self) -> None:
        """No sliding window."""
        return

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of the compressed cache per token and layer, the indexer's keys included."""
        return self.kv_rank + self.rope_dim + (self.index_dim if self.index_topk else 0)

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * (self.nope_dim + self.rope_dim)

    def parameters(self, hidden_size: int) -> int:
        """Weights of all projections."""
        query = self.query_width * (self.q_rank or hidden_size) + hidden_size * (self.q_rank or 0)
        keys = hidden_size * (self.kv_rank + self.rope_dim) + self.kv_rank * self.heads * (self.nope_dim + self.v_dim)
        index = self.index_heads * self.index_dim * (self.q_rank or hidden_size)
        index += hidden_size * (self.index_dim + self.index_heads)
        return query + keys + self.heads * self.v_dim * hidden_size + (index if self.index_topk else 0)


@dataclass(frozen=True, kw_only=True)
class LinearAttention:
    """Gated delta-rule attention: a state of constant size for each sequence in place of a cache."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int = 4

    def __post_init__(self) -> None:
        for label in ("key_heads", "value_heads", "key_dim", "value_dim", "conv_kernel"):
            require(getattr(self, label) >= 1, f"{label}={getattr(self, label)} must be at least 1")

    @property
    def heads(self) -> int:
        """Heads that tensor parallelism divides."""
        return self.value_heads

    @property
    def window(self) -> None:
        """No sliding window."""
        return

    @property
    def kv_elements_per_token(self) -> int:
        """None: the state does not grow."""
        return 0

    @property
    def conv_channels(self) -> int:
        """Channels of the short convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state_elements(self) -> int:
        """Elements of recurrent and convolution state per sequence and layer."""
        return self.value_heads * self.key_dim * self.value_dim + self.conv_channels * (self.conv_kernel - 1)

    def parameters(self, hidden_size: int) -> int:
        """Weights of the input projections (queries, keys, values, gate, decay and rate), convolution and output."""
        values = self.value_heads * self.value_dim
        inputs = hidden_size * (self.conv_channels + values + 2 * self.value_heads)
        return inputs + self.conv_channels * self.conv_kernel + values * hidden_size


AnyAttention = Attention | LatentAttention | LinearAttention


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
class MoeFeedForward:
    """Mixture of `experts` gated blocks of `intermediate_size`, of which a token visits `active`.

    `shared_intermediate_size` is the width of what every token visits besides, 0 for none.
    """

    experts: int
    active: int
    intermediate_size: int
    shared_intermediate_size: int = 0

    def __post_init__(self) -> None:
        require(
            1 <= self.active <= self.experts,
            f"active={self.active} experts must be between 1 and the {self.experts} that there are",
        )
        require(self.intermediate_size >= 1, f"intermediate_size={self.intermediate_size} must be at least 1")

    def expert_parameters(self, hidden_size: int) -> int:
        """Weights of all routed experts."""
        return 3 * hidden_size * self.intermediate_size * self.experts

    def parameters(self, hidden_size: int) -> int:
        """Weights of router, routed experts and shared expert."""
        shared = 3 * hidden_size * self.shared_intermediate_size
        return hidden_size * self.experts + self.expert_parameters(hidden_size) + shared

    def active_parameters(self, hidden_size: int) -> int:
        """Weights that one token visits."""
        idle = (self.experts - self.active) * 3 * hidden_size * self.intermediate_size
        return self.parameters(hidden_size) - idle


AnyFeedForward = DenseFeedForward | MoeFeedForward


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """`count` identical decoder layers."""

    count: int
    attention: AnyAttention
    feed_forward: AnyFeedForward


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    `source` is what an engine loads: a path or a hub name; None means that a random-weight model is written.
    `architecture` and `quantization` are the checkpoint's own words for them, empty where unknown.
    """

    name: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerGroup, ...]
    tied_embeddings: bool = False
    weight_bits: float = 16.0
    max_context: int = 4096
    source: str | None = None
    architecture: str = ""
    quantization: str = ""

    def __post_init__(self) -> None:
        require(self.hidden_size >= 1, f"hidden_size={self.hidden_size} must be at least 1")
        require(self.vocab_size >= 2, f"vocab_size={self.vocab_size} must be at least 2")
        require(bool(self.layers), f"model {self.name!r} has no layers; give at least one")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return sum(group.count for group in self.layers)

    def plain_layer(self) -> tuple[Attention, DenseFeedForward]:
        """Attention and feed-forward block of the first layer, where they are grouped-query and dense.

        Raises `InvalidValueError` for other kinds of layer.
        """
        attention, block = self.layers[0].attention, self.layers[0].feed_forward
        if isinstance(attention, Attention) and isinstance(block, DenseFeedForward):
            return attention, block
        raise InvalidValueError(
            f"model {self.name!r} has {type(attention).__name__} and {type(block).__name__} layers where grouped-query "
            "attention and a dense block are needed; give a model file that the engine loads as the model's source"
        )

    @property
    def parameters(self) -> int:
        """Number of weights, norms left out."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + sum(
            g.count * (g.attention.parameters(self.hidden_size) + g.feed_forward.parameters(self.hidden_size))
            for g in self.layers
        )

    @property
    def active_parameters(self) -> int:
        """Weights that one token visits, embeddings included."""
        idle = 0
        for group in self.layers:
            if isinstance(group.feed_forward, MoeFeedForward):
                block = group.feed_forward
                idle += group.count * (block.parameters(self.hidden_size) - block.active_parameters(self.hidden_size))
        return self.parameters - idle

    @property
    def expert_parameters(self) -> int:
        """Weights of all routed experts."""
        return sum(
            g.count * g.feed_forward.expert_parameters(self.hidden_size)
            for g in self.layers
            if isinstance(g.feed_forward, MoeFeedForward)
        )

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights at `weight_bits`."""
        return self.parameters * self.weight_bits / 8

    def kv_bytes_per_token(self, bytes_per_element: float = 2.0) -> float:
        """Bytes of key and value cache per token of context, all layers; windows and constant states left out."""
        return bytes_per_element * sum(g.count * g.attention.kv_elements_per_token for g in self.layers)
