"""Which operations a model needs on one rank of a replica, for the two kinds of step."""

from __future__ import annotations

from dataclasses import dataclass

from perf_model.operations import (
    Collective,
    Communication,
    Concurrent,
    Experts,
    Gemm,
    Hop,
    LatentKernel,
    LatentModule,
    LatentProduct,
    Launches,
    LinearKernel,
    MemoryMove,
    Operation,
    SelfAttention,
    SparseModule,
    TokenOperation,
)
from perf_model.precision import Precision
from search_spaces.errors import InvalidValueError, require
from search_spaces.model import (
    Attention,
    DenseFeedForward,
    LatentAttention,
    LayerGroup,
    LinearAttention,
    ModelSpec,
    MoeFeedForward,
)

WIDE_FROM = 8  # ranks up to which tokens go to all ranks, as on one node
BF16_BYTES = 2.0
SMALL_KERNEL_MS = 0.0132  # rotary embedding and cache write of a prefill: four launches of 3 us and a tenth more


@dataclass(frozen=True, kw_only=True)
class ReplicaLayout:
    """Parallel sizes of a replica: attention `tp` x `dp`, experts `moe_tp` x `ep`, `pp` stages.

    `tp * dp` ranks hold a stage, and the experts spread over the same ranks.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for label in ("tp", "pp", "dp", "ep"):
            require(getattr(self, label) >= 1, f"{label}={getattr(self, label)} must be at least 1")
        require(
            (self.tp * self.dp) % self.ep == 0,
            f"ep={self.ep} does not divide tp*dp={self.tp * self.dp}; choose a divisor",
        )

    @property
    def moe_tp(self) -> int:
        """Ranks that share one expert."""
        return self.tp * self.dp // self.ep

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp * self.dp

    @property
    def ranks(self) -> int:
        """Ranks of the replica."""
        return self.stage_ranks * self.pp


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Operations of a step with prompt tokens (`prefill`) and of one without (`decode`)."""

    prefill: tuple[Operation, ...]
    decode: tuple[Operation, ...]


@dataclass(frozen=True, kw_only=True)
class PlanContext:
    """What the operations depend on besides a layer: model, layout, precision, engine and node size.

    `module_formats` are the formats in which the engine's tables hold latent attention as one module.
    """

    model: ModelSpec
    layout: ReplicaLayout
    precision: Precision
    engine: str
    gpus_per_node: int
    module_formats: frozenset[str] = frozenset()

    @property
    def hidden(self) -> int:
        """Hidden size."""
        return self.model.hidden_size


def plan(context: PlanContext) -> StepPlan:
    """Operations of both kinds of step; raises `InvalidValueError` where the layout does not divide the model."""
    for group in context.model.layers:
        _check_divides(group, context)
    return StepPlan(prefill=tuple(_step(context, decode=False)), decode=tuple(_step(context, decode=True)))


def _check_divides(group: LayerGroup, context: PlanContext) -> None:
    heads, tp = group.attention.heads, context.layout.tp
    require(heads % tp == 0, f"tp={tp} does not divide {heads} attention heads; choose a divisor")
    if isinstance(group.feed_forward, MoeFeedForward):
        experts, ep = group.feed_forward.experts, context.layout.ep
        require(ep <= experts, f"ep={ep} is more than the {experts} experts; choose at most {experts}")


def _step(context: PlanContext, *, decode: bool) -> list[Operation]:
    model, layout, hidden = context.model, context.layout, context.hidden
    operations: list[Operation] = [
        MemoryMove(name="embedding", bytes_per_token=hidden * BF16_BYTES, count=1),
        *_all_reduce(context, "embedding all-reduce", 1),
    ]
    for group in model.layers:
        operations += _layer(context, group, decode=decode)
    operations.append(
        Gemm(name="logits", n=model.vocab_size // layout.tp, k=hidden, count=1, format="bfloat16", outputs_only=True)
    )
    if layout.pp > 1:
        crosses = layout.ranks > context.gpus_per_node
        operations.append(
            Hop(name="pipeline hop", bytes_per_token=hidden * BF16_BYTES, count=layout.pp - 1, crosses_nodes=crosses)
        )
    return operations


def _all_reduce(context: PlanContext, name: str, count: float) -> list[Operation]:
    if context.layout.tp == 1:
        return []
    return [
        Communication(
            name=name,
            kind=Collective.ALL_REDUCE,
            elements_per_token=context.hidden,
            ranks=context.layout.tp,
            count=count,
            custom=True,
        )
    ]


def _layer(context: PlanContext, group: LayerGroup, *, decode: bool) -> list[Operation]:
    norm = MemoryMove(name="norms", bytes_per_token=4 * context.hidden * BF16_BYTES, count=2 * group.count)
    attention = group.attention
    if isinstance(attention, Attention):
        block = _grouped_query(context, attention, group.count, decode=decode)
    elif isinstance(attention, LatentAttention):
        block = _latent(context, attention, group.count, decode=decode)
    else:
        block = _linear(context, attention, group.count)
    if isinstance(group.feed_forward, DenseFeedForward):
        return [norm, *block, *_dense_block(context, group.feed_forward, group.count)]
    return [norm, *block, *_mixture_block(context, group.feed_forward, group.count, decode=decode)]


def _grouped_query(context: PlanContext, attention: Attention, count: int, *, decode: bool) -> list[Operation]:
    tp, precision = context.layout.tp, context.precision
    heads, kv_heads = attention.heads // tp, -(-attention.kv_heads // tp)
    width = heads * attention.head_dim
    queries = 2 * width if attention.output_gate else width
    kernel = SelfAttention(
        name="attention",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=attention.head_dim,
        window=attention.window,
        cache=precision.cache,
        attention=precision.attention,
        count=count,
    )
    n = queries + 2 * kv_heads * attention.head_dim
    operations: list[Operation] = [
        Gemm(name="qkv projection", n=n, k=context.hidden, count=count, format=precision.projections),
        kernel,
        Gemm(name="output projection", n=context.hidden, k=width, count=count, format=precision.projections),
    ]
    if not decode:
        kernels = 3 if attention.qk_norm else 1
        operations.append(Launches(name="rotary, cache write", ms=kernels * SMALL_KERNEL_MS, count=count))
    return operations


def _latent(context: PlanContext, attention: LatentAttention, count: int, *, decode: bool) -> list[Operation]:
    precision, heads = context.precision, attention.heads // context.layout.tp
    if attention.index_topk:
        return [
            SparseModule(
                name="sparse attention",
                heads=heads,
                architecture=context.model.architecture,
                cache=precision.cache,
                format=precision.projections,
                count=count,
            )
        ]
    if precision.projections in context.module_formats:
        return [
            LatentModule(
                name="latent attention",
                heads=heads,
                cache=precision.cache,
                attention=precision.attention,
                format=precision.projections,
                count=count,
            )
        ]
    return _latent_parts(context, attention, count, decode=decode)


def _latent_parts(context: PlanContext, attention: LatentAttention, count: int, *, decode: bool) -> list[Operation]:
    precision, heads = context.precision, attention.heads // context.layout.tp
    form = precision.projections
    down = (attention.q_rank or 0) + attention.kv_rank + attention.rope_dim
    query = heads * (attention.nope_dim + attention.rope_dim)
    kernel = LatentKernel(
        name="latent attention", heads=heads, cache=precision.cache, attention=precision.attention, count=count
    )
    operations: list[Operation] = [
        Gemm(name="down projection", n=down, k=context.hidden, count=count, format=form),
        Gemm(name="query projection", n=query, k=attention.q_rank or context.hidden, count=count, format=form),
    ]
    if decode:
        form_of_product = "bfloat16" if form == "bfloat16" else "fp8"
        operations += [
            LatentProduct(name="absorbed keys", heads=heads, format=form_of_product, before=True, count=count),
            kernel,
            LatentProduct(name="absorbed values", heads=heads, format=form_of_product, before=False, count=count),
        ]
    else:
        up = heads * (attention.nope_dim + attention.v_dim)
        operations += [
            Gemm(name="key and value projection", n=up, k=attention.kv_rank, count=count, format=form),
            kernel,
        ]
    output = Gemm(name="output projection", n=context.hidden, k=heads * attention.v_dim, count=count, format=form)
    return [*operations, output]


def _linear(context: PlanContext, attention: LinearAttention, count: int) -> list[Operation]:
    tp, form, hidden = context.layout.tp, context.precision.projections, context.hidden
    values = attention.value_heads * attention.value_dim // tp
    keys = -(-attention.key_heads // tp)
    inputs = 2 * keys * attention.key_dim + 2 * values
    return [
        Gemm(name="linear attention inputs", n=inputs, k=hidden, count=count, format=form),
        Gemm(name="decay and rate", n=2 * attention.value_heads // tp, k=hidden, count=count, format="bfloat16"),
        LinearKernel(
            name="linear attention",
            key_heads=keys,
            value_heads=attention.value_heads // tp,
            key_dim=attention.key_dim,
            value_dim=attention.value_dim,
            conv_kernel=attention.conv_kernel,
            model_width=hidden,
            count=count,
        ),
        Gemm(name="output projection", n=hidden, k=values, count=count, format=form),
    ]


def _dense_block(context: PlanContext, block: DenseFeedForward, count: int) -> list[Operation]:
    width = _share(block.intermediate_size, context.layout.tp)
    return [
        *_gated(context, width, count, "feed-forward"),
        *_all_reduce(context, "all-reduce", 2 * count),
    ]


def _share(width: int, tp: int) -> int:
    """Columns of a sharded matrix on one rank."""
    if width < tp:
        raise InvalidValueError(f"tp={tp} splits a width of {width} into nothing; choose at most {width}")
    return width // tp


def _gated(context: PlanContext, width: int, count: float, name: str) -> list[TokenOperation]:
    form, hidden = context.precision.gemm, context.hidden
    return [
        Gemm(name=f"{name} gate and up", n=2 * width, k=hidden, count=count, format=form),
        MemoryMove(name=f"{name} activation", bytes_per_token=3 * width * BF16_BYTES, count=count),
        Gemm(name=f"{name} down", n=hidden, k=width, count=count, format=form),
    ]


def _mixture_block(context: PlanContext, block: MoeFeedForward, count: int, *, decode: bool) -> list[Operation]:
    layout = context.layout
    before, after = _dispatch(context, count, block.active)
    phase = "generation" if decode else "context"
    routed: list[TokenOperation] = [
        Gemm(name="router", n=block.experts, k=context.hidden, count=count, format="bfloat16"),
        *before,
        Experts(
            name="experts",
            hidden_size=context.hidden,
            intermediate_size=block.intermediate_size,
            active=block.active,
            experts=block.experts,
            tp=layout.moe_tp,
            ep=layout.ep,
            format=context.precision.moe,
            distribution=distribution(context.model),
            count=count,
            tokens_factor=layout.dp,
            wide=phase if layout.tp == 1 and layout.ep == layout.dp > 1 else "",
        ),
        *after,
    ]
    if not block.shared_intermediate_size:
        return list(routed)
    shared = _gated(context, _share(block.shared_intermediate_size, layout.tp), count, "shared expert")
    if decode:
        return [Concurrent(name="experts", first=tuple(routed), second=tuple(shared))]
    return [*shared, *routed]


def distribution(model: ModelSpec) -> str:
    """How unevenly tokens visit the experts: a power law, flatter for models trained with balancing."""
    balanced = any(isinstance(group.attention, LatentAttention) for group in model.layers)
    return "power_law_1.01" if balanced else "power_law_1.2"


def _dispatch(context: PlanContext, count: int, active: int) -> tuple[list[TokenOperation], list[TokenOperation]]:
    """Communication before and after the experts, the reduction after attention included.

    Over more ranks than a token has experts it is sent to those that it needs, else to all.
    """
    layout = context.layout
    if layout.dp == 1:
        reduce = [op for op in _all_reduce(context, "all-reduce", count) if isinstance(op, Communication)]
        return list(reduce), list(reduce)
    if layout.tp == 1 and layout.ep == layout.dp > max(active, WIDE_FROM):
        copies = _exchange(context, Collective.ALL_TO_ALL, layout.stage_ranks, count, active)
        return [copies], [copies]
    gather = _exchange(context, Collective.ALL_GATHER, layout.stage_ranks, count, layout.dp)
    scatter = _exchange(context, Collective.REDUCE_SCATTER, layout.stage_ranks, count, layout.dp)
    if layout.tp == 1:
        return [gather], [scatter]
    inner_scatter = _exchange(context, Collective.REDUCE_SCATTER, layout.tp, count, 1)
    inner_gather = _exchange(context, Collective.ALL_GATHER, layout.tp, count, 1)
    return [inner_scatter, gather], [scatter, inner_gather]


def _exchange(context: PlanContext, kind: Collective, ranks: int, count: int, tokens_factor: float) -> Communication:
    return Communication(
        name=kind.value.replace("_", "-"),
        kind=kind,
        elements_per_token=context.hidden,
        ranks=ranks,
        count=count,
        tokens_factor=tokens_factor,
    )
