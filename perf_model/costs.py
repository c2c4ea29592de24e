"""Times of operations: tables where they hold the shape, neighbours where they do not, the roofline where none is.

Facts on how the public tables are keyed and which interpolation reproduces held-out rows are in `docs/perf-model.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from perf_model.curves import Curve, Origin, Surface, curve, surface, total
from perf_model.numeric import FloatArray, floats
from perf_model.operations import (
    AttentionOperation,
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
    SelfAttention,
    SparseModule,
    TokenOperation,
)
from perf_model.precision import CACHE_BYTES, FORMATS, SUBSTITUTES
from perf_model.systems import GpuSystem
from perf_model.tables import Table, TableStore, first_rows, load

NEIGHBOURS = 4
LAUNCH_MARGIN = 1.25  # how much slower than the fastest engine's a matrix product may be on the same GPU
ROOFLINE_EFFICIENCY = 0.6  # of the speed of light, where no table of any format or shape helps
MOST_TOKENS = 2.0**21
# Tables of the experts' kernels of wide expert parallelism by engine (and by phase), and the number of expert-parallel
# ranks above which the public recipes balance experts (eplb).
WIDE_TABLES = {"sglang": "wideep_{}_moe_perf", "trtllm": "wideep_moe_perf"}
BALANCED_FROM = 8
BLACKWELL = 100  # compute capability times ten of the first GPUs with units for 4-bit floats
# Attention kernels that an engine picks by the GPU's compute capability, where its table holds several.
PREFERRED_KERNELS = {("sglang", 90): "fa3", ("sglang", 100): "triton", ("sglang", 103): "triton"}


@dataclass(frozen=True)
class OperationCosts:
    """Times of operations on one system with one engine.

    `repair` mends what is known to be wrong in the public tables: matrix products that were timed with their launch
    from the host (CUDA graphs hide it) are held against the other engines' on the same GPU, and of several kernels for
    one shape of experts the fastest counts, as engines tune themselves. Experts in mxfp4 are computed with activations
    in mxfp8 where GPU and engine can. Without it rows are taken as they are.
    """

    store: TableStore
    system: GpuSystem
    repair: bool = True

    @cached_property
    def _curves(self) -> dict[TokenOperation, Curve]:
        return {}

    @cached_property
    def _surfaces(self) -> dict[tuple[AttentionOperation, bool], Surface]:
        return {}

    def token_curve(self, operation: TokenOperation | Concurrent) -> Curve:
        """Milliseconds a step over the rank's tokens (rows of logits for a GEMM of outputs only)."""
        if isinstance(operation, Concurrent):
            first, second = (
                total([self.token_curve(op) for op in group]) for group in (operation.first, operation.second)
            )
            return longest(first, second)
        unit = replace(operation, name="", count=1.0)
        if unit not in self._curves:
            self._curves[unit] = self._token_curve(unit)
        return self._curves[unit].scaled(operation.count)

    def _token_curve(self, operation: TokenOperation) -> Curve:
        match operation:
            case Gemm():
                return self._gemm(operation)
            case Communication():
                return self._communication(operation)
            case Experts():
                return self._experts(operation)
            case LatentProduct():
                return self._latent_product(operation)
            case MemoryMove() | Launches() | Hop():
                return self._simple(operation)

    def _simple(self, operation: MemoryMove | Launches | Hop) -> Curve:
        if isinstance(operation, MemoryMove):
            return _line(self.system.memory_ms(0.0), self.system.memory_ms(operation.bytes_per_token))
        if isinstance(operation, Launches):
            return _line(operation.ms, operation.ms)
        bandwidth = self.system.network_bandwidth if operation.crosses_nodes else self.system.link_bandwidth
        hop = 1e3 * self.system.hop_s
        return _line(hop, hop + 1e3 * operation.bytes_per_token / bandwidth)

    def surface(self, operation: AttentionOperation, *, decode: bool) -> Surface:
        """Milliseconds of one layer over sequences and length (prompt length, or context in decode)."""
        key = (replace(operation, name="", count=1.0), decode)
        if key not in self._surfaces:
            self._surfaces[key] = self._surface(operation, decode=decode)
        return self._surfaces[key]

    def _surface(self, operation: AttentionOperation, *, decode: bool) -> Surface:
        match operation:
            case SelfAttention():
                return self._self_attention(operation, decode=decode)
            case LatentKernel() | LatentModule():
                return self._latent(operation, decode=decode)
            case SparseModule():
                return self._sparse(operation, decode=decode)
            case LinearKernel():
                return self._linear(operation, decode=decode)

    def token_light(self, operation: TokenOperation, tokens: FloatArray) -> FloatArray:
        """Speed of light of a token-wise operation in milliseconds, up to a factor that systems share."""
        match operation:
            case Gemm():
                return self._gemm_light(operation, tokens, operation.n, operation.k)
            case Experts():
                return self._experts_light(operation, tokens * operation.tokens_factor)
            case Communication():
                return np.full_like(tokens, 1.0 / self.system.link_bandwidth)
            case _:
                return np.full_like(tokens, 1.0 / self.system.memory_bandwidth)

    def module_formats(self) -> frozenset[str]:
        """Formats in which latent attention is tabled as a module for prefill and decode alike."""
        tables = [self.store.table("mla", f"mla_{phase}_module_perf") for phase in ("context", "generation")]
        return frozenset.intersection(*(frozenset(table.values("gemm_type")) for table in tables))

    # --- matrix products

    def _gemm_light(self, operation: Gemm, m: FloatArray, n: float, k: float) -> FloatArray:
        form = FORMATS[operation.format]
        traffic = n * k * form.weight_bytes + m * k * form.activation_bytes + m * n * 2.0
        return 1e3 * np.maximum(
            2.0 * m * n * k / self.system.peak(form.compute), traffic / self.system.memory_bandwidth
        )

    def _gemm(self, operation: Gemm) -> Curve:
        own = self._gemm_from(self.store, operation)
        if not self.repair or own.origin is Origin.ROOFLINE:
            return own
        others = [self._gemm_from(store, operation) for store in self._other_stores]
        others = [found for found in others if found.origin is not Origin.ROOFLINE]
        if not others:
            return own
        fastest = np.min([other(own.x) for other in others], axis=0)
        return replace(own, y=np.minimum(own.y, LAUNCH_MARGIN * fastest))

    @cached_property
    def _other_stores(self) -> list[TableStore]:
        gemms = self.store.root / "data" / self.store.system / "gemm"
        engines = sorted(path.name for path in gemms.iterdir() if path.is_dir()) if gemms.is_dir() else []
        return [replace(self.store, engine=engine) for engine in engines if engine != self.store.engine]

    def _gemm_from(self, store: TableStore, operation: Gemm) -> Curve:
        table = store.table("gemm", "gemm_perf")
        for form in (operation.format, *SUBSTITUTES[operation.format]):
            rows = table.where(gemm_dtype=form)
            if len(rows):
                found = self._gemm_in(rows, replace(operation, format=form))
                return found if form == operation.format else self._in_other_format(operation, found, form)
        return self._roofline_curve(lambda m: self._gemm_light(operation, m, operation.n, operation.k))

    def _in_other_format(self, operation: Gemm, found: Curve, form: str) -> Curve:
        """`found`, measured in format `form`, scaled by the speeds of light to the operation's own format."""
        x = found.x[found.x >= 1]
        other = replace(operation, format=form)
        ratio = self._gemm_light(operation, x, operation.n, operation.k)
        ratio /= self._gemm_light(other, x, operation.n, operation.k)
        return Curve(x=x, y=found(x) * ratio, low=found.low, high=found.high, origin=Origin.ROOFLINE)

    def _gemm_in(self, rows: Table, operation: Gemm) -> Curve:
        def light(m: FloatArray) -> FloatArray:
            return self._gemm_light(operation, m, operation.n, operation.k)

        exact = rows.where(n=operation.n, k=operation.k)
        if len(exact):
            slice_ = first_rows(exact, ["m"])
            x, y = slice_.number("m"), slice_.number("latency")
            return curve(x, np.maximum(y, light(x)), light)
        shapes = self._gemm_shapes(rows, operation.format)
        n, k = shapes.number("n"), shapes.number("k")
        distance = np.hypot(np.log2(n / operation.n), np.log2(k / operation.k))
        near = np.argsort(distance, kind="stable")[:NEIGHBOURS]
        slices = [(rows.where(n=int(n[i]), k=int(k[i])), float(distance[i])) for i in near]
        weights = np.array([1.0 / d**2 for _, d in slices])
        x = np.unique(np.concatenate([s.number("m") for s, _ in slices]))
        utilisations = [self._gemm_utilisation(s, operation, x) for s, _ in slices]
        utilisation = floats(np.average(utilisations, axis=0, weights=weights))
        return curve(x, light(x) / utilisation, light, Origin.INTERPOLATED)

    def _gemm_shapes(self, rows: Table, form: str) -> Table:
        key = (rows.origin, form)
        if key not in self._shapes:
            self._shapes[key] = first_rows(rows, ["n", "k"])
        return self._shapes[key]

    @cached_property
    def _shapes(self) -> dict[tuple[str, str], Table]:
        return {}

    def _gemm_utilisation(self, rows: Table, operation: Gemm, x: FloatArray) -> FloatArray:
        slice_ = first_rows(rows, ["m"])
        m = slice_.number("m")
        light = self._gemm_light(operation, m, slice_.number("n")[0], slice_.number("k")[0])
        return np.interp(x, m, np.minimum(light / slice_.number("latency"), 1.0))

    def _roofline_curve(self, light: Callable[[FloatArray], FloatArray]) -> Curve:
        x = floats(2.0 ** np.arange(0, 18))
        return curve(x, light(x) / ROOFLINE_EFFICIENCY, light, Origin.ROOFLINE)

    # --- experts

    def _experts_light(self, operation: Experts, tokens: FloatArray) -> FloatArray:
        form = FORMATS[operation.format]
        width = operation.intermediate_size / operation.tp
        routed = tokens * operation.active / operation.ep
        flop = 2.0 * routed * 3.0 * operation.hidden_size * width
        visited = np.minimum(operation.experts / operation.ep, np.maximum(routed, 1.0))
        traffic = visited * 3.0 * operation.hidden_size * width * form.weight_bytes
        traffic += routed * (operation.hidden_size + width) * 2.0
        return 1e3 * np.maximum(flop / self.system.peak(form.compute), traffic / self.system.memory_bandwidth)

    def _as_computed(self, operation: Experts) -> Experts:
        """Weights in mxfp4 meet activations in mxfp8 on GPUs with units for both, where the engine has such kernels."""
        narrow = replace(operation, format="w4a8_mxfp4_mxfp8")
        able = self.repair and operation.format == "w4a16_mxfp4" and self.system.sm_version >= BLACKWELL
        rows = {"moe_dtype": narrow.format, "hidden_size": operation.hidden_size}
        return narrow if able and len(self.store.table("moe", "moe_perf").where(**rows)) else operation

    def _experts(self, operation: Experts) -> Curve:
        operation = self._as_computed(operation)
        for form in (operation.format, *SUBSTITUTES[operation.format]):
            other = replace(operation, format=form)
            found = self._experts_exact(other) or self._experts_near(other)
            if found is not None and operation.wide and self.repair:
                found = self._faster_wide(other, found)
            if found is None:
                continue
            per_rank = found
            if form != operation.format:
                x = found.x[found.x >= 1]
                ratio = self._experts_light(operation, x) / self._experts_light(other, x)
                per_rank = Curve(x=x, y=found(x) * ratio, low=found.low, high=found.high, origin=Origin.ROOFLINE)
            return _over(per_rank, operation.tokens_factor)
        light = self._roofline_curve(lambda tokens: self._experts_light(operation, tokens))
        return _over(light, operation.tokens_factor)

    def _expert_tables(self) -> Iterator[Table]:
        for file in self.store.files("moe", "moe_perf"):
            yield load(file)

    def _experts_exact(self, operation: Experts) -> Curve | None:
        shape: Mapping[str, object] = {
            "moe_dtype": operation.format,
            "hidden_size": operation.hidden_size,
            "inter_size": operation.intermediate_size,
            "topk": operation.active,
            "num_experts": operation.experts,
            "moe_tp_size": operation.tp,
            "moe_ep_size": operation.ep,
        }
        for table in self._expert_tables():
            rows = table.where(**shape)
            for spread in (operation.distribution, "power_law_1.2", "power_law_1.01", "balanced", "uniform"):
                slice_ = rows.where(distribution=spread)
                slice_ = _fastest_rows(slice_, "num_tokens") if self.repair else _without_minimum_latency(slice_)
                if len(slice_):
                    one = first_rows(slice_, ["num_tokens"])
                    x, y = one.number("num_tokens"), one.number("latency")
                    return curve(x, y, lambda tokens: self._experts_light(operation, tokens))
        return None

    def _faster_wide(self, operation: Experts, found: Curve) -> Curve:
        """`found`, or what the kernels of wide expert parallelism take, whichever is less at each number of tokens.

        Their tables hold few formats and sizes: others take the ratio to the speed of light of the nearest.
        """
        name = WIDE_TABLES.get(self.store.engine, "none").format(operation.wide)
        rows = self.store.table("moe", name).where(
            hidden_size=operation.hidden_size,
            inter_size=operation.intermediate_size,
            topk=operation.active,
            num_experts=operation.experts,
        )
        if not len(rows):
            return found
        form = operation.format if len(rows.where(moe_dtype=operation.format)) else _word_of(rows, "moe_dtype")
        ep = _nearest_words(rows, "moe_ep_size", operation.ep)[0]
        rows = rows.where(moe_dtype=form, moe_ep_size=ep)
        balanced = f"{operation.distribution}_eplb" if operation.ep > BALANCED_FROM else operation.distribution
        rows = _first_match(rows, "distribution", (balanced, operation.distribution))
        one = first_rows(_fastest_rows(rows, "num_tokens"), ["num_tokens"])
        x = one.number("num_tokens")
        light = self._experts_light(operation, x)
        wide = one.number("latency") * light / self._experts_light(replace(operation, format=form, ep=ep), x)
        return curve(x, np.minimum(wide, found(x)), lambda tokens: self._experts_light(operation, tokens))

    def _experts_near(self, operation: Experts) -> Curve | None:
        """Utilisation of the nearest shapes in the same format, by inverse squared distance in log2 of the sizes."""
        table = self.store.table("moe", "moe_perf")
        rows = table.where(moe_dtype=operation.format, distribution=operation.distribution)
        rows = rows if len(rows) else table.where(moe_dtype=operation.format)
        rows = rows if self.repair else _without_minimum_latency(rows)
        if not len(rows):
            return None
        keys = ["hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"]
        shapes = first_rows(rows, keys)
        distance = _shape_distance(shapes, operation)
        near = np.argsort(distance, kind="stable")[:NEIGHBOURS]
        x = floats(2.0 ** np.arange(0, 15))
        light = self._experts_light(operation, x)
        utilisations = []
        for i in near:
            shape = {key: shapes.columns[key][i] for key in keys}
            one = first_rows(_fastest_rows(rows.where(**shape), "num_tokens"), ["num_tokens"])
            other = replace(
                operation,
                hidden_size=int(shape["hidden_size"]),
                intermediate_size=int(shape["inter_size"]),
                active=int(shape["topk"]),
                experts=int(shape["num_experts"]),
                tp=int(shape["moe_tp_size"]),
                ep=int(shape["moe_ep_size"]),
            )
            measured = np.interp(x, one.number("num_tokens"), one.number("latency"))
            utilisations.append(self._experts_light(other, x) / measured)
        weights = 1.0 / np.maximum(distance[near], 0.05) ** 2
        utilisation = np.exp(np.average(np.log(utilisations), axis=0, weights=weights))
        return curve(x, light / utilisation, lambda tokens: self._experts_light(operation, tokens), Origin.EXTRAPOLATED)

    def _latent_product(self, operation: LatentProduct) -> Curve:
        table = self.store.table("mla_bmm", "mla_bmm_perf")
        name = "mla_gen_pre" if operation.before else "mla_gen_post"

        def light(tokens: FloatArray) -> FloatArray:
            weights = operation.heads * 128.0 * 512.0 * 2.0
            traffic = weights + tokens * operation.heads * (128.0 + 512.0) * 2.0
            flop = 2.0 * tokens * operation.heads * 128.0 * 512.0
            return 1e3 * np.maximum(flop / self.system.peak("bf16"), traffic / self.system.memory_bandwidth)

        for form in (operation.format, "bfloat16", "fp8"):
            rows = table.where(op_name=name, bmm_dtype=form, num_heads=operation.heads)
            if len(rows):
                one = first_rows(rows, ["num_tokens"])
                return curve(one.number("num_tokens"), one.number("latency"), light)
        return self._roofline_curve(light)

    # --- communication

    def _communication(self, operation: Communication) -> Curve:
        if operation.ranks == 1:
            return _line(0.0, 0.0)
        rows, ranks = self._communication_rows(operation)
        scale = operation.elements_per_token * operation.tokens_factor

        def light(tokens: FloatArray) -> FloatArray:
            return tokens * scale * 2.0 / self.system.link_bandwidth

        if rows is None:
            return _line(0.01, 0.01 + 1e3 * float(light(np.ones(1))[0]) / ROOFLINE_EFFICIENCY)
        one = first_rows(rows, ["message_size"])
        found = curve(one.number("message_size") / scale, one.number("latency"), light)
        return found.scaled(self._beyond(operation.ranks, ranks))

    def _beyond(self, ranks: int, measured: int) -> float:
        """Slow-down against the measured number of ranks: more steps, and the network where a domain is left."""
        if ranks == measured:
            return 1.0
        steps = ((ranks - 1) / ranks) / ((measured - 1) / measured)
        crosses = ranks > self.system.gpus_per_domain >= measured
        return steps * (self.system.link_bandwidth / self.system.network_bandwidth if crosses else 1.0)

    def _communication_rows(self, operation: Communication) -> tuple[Table | None, int]:
        """Rows for the number of ranks, or for the largest smaller number, and that number."""
        if operation.custom:
            table = self.store.table("comm", "custom_allreduce_perf")
            rows = table
        else:
            table = _nccl_table(self.store, self.system)
            rows = table.where(op_name=operation.kind.value, nccl_dtype="half")
        if not len(rows) and operation.custom:
            rows = _nccl_table(self.store, self.system).where(op_name=Collective.ALL_REDUCE.value, nccl_dtype="half")
        if not len(rows):
            return None, 0
        numbers = np.unique(rows.number("num_gpus"))
        fitting = numbers[numbers <= operation.ranks]
        ranks = int(fitting[-1] if len(fitting) else numbers[0])
        return rows.where(num_gpus=ranks), ranks

    # --- attention

    def _self_attention(self, operation: SelfAttention, *, decode: bool) -> Surface:
        table = self.store.table("attention", f"{'generation' if decode else 'context'}_attention_perf")
        light = _attention_light(self.system, operation, decode=decode)
        rows, shape = _attention_rows(table, operation, decode=decode)
        if rows is None or shape is None:
            return _roofline_surface(light)
        rows = _preferred(rows, PREFERRED_KERNELS.get((self.store.engine, self.system.sm_version)))
        points = _points(rows, decode=decode)
        origin = Origin.INTERPOLATED
        if shape != operation:
            origin = Origin.EXTRAPOLATED
            other = _attention_light(self.system, shape, decode=decode)
            points = (points[0], points[1], points[2] * light(points[0], points[1]) / other(points[0], points[1]))
        points = (points[0], points[1], np.maximum(points[2], light(points[0], points[1])))
        built = surface(points, light, power=1.0 if decode else 0.5, origin=origin)
        return _spread(built) if decode else built

    def _latent(self, operation: LatentKernel | LatentModule, *, decode: bool) -> Surface:
        phase = "generation" if decode else "context"
        if isinstance(operation, LatentModule):
            table = self.store.table("mla", f"mla_{phase}_module_perf").where(gemm_type=operation.format)
        else:
            table = self.store.table("mla", f"{phase}_mla_perf")
        light = _latent_light(self.system, operation, decode=decode)
        for heads in _nearest_words(table, "num_heads", operation.heads):
            rows = table.where(num_heads=heads)
            rows = _first_match(rows, "kv_cache_dtype", (operation.cache, "bfloat16", "fp8"))
            rows = _first_match(rows, "mla_dtype", (operation.attention, "bfloat16", "fp8"))
            points = _points(rows, decode=decode)
            if heads != operation.heads:
                other = _latent_light(self.system, replace(operation, heads=heads), decode=decode)
                points = (points[0], points[1], points[2] * light(points[0], points[1]) / other(points[0], points[1]))
            built = surface(points, light, power=1.0 if decode else 0.5)
            return _spread(built) if decode else built
        return _roofline_surface(light)

    def _sparse(self, operation: SparseModule, *, decode: bool) -> Surface:
        phase = "generation" if decode else "context"
        table = self.store.table("sparse_attention", f"dsa_{phase}_module_perf").where(op_name=f"dsa_{phase}_module")
        table = _first_match(table, "architecture", (operation.architecture, "DeepseekV32ForCausalLM"))
        table = _first_match(table, "gemm_type", (operation.format, *SUBSTITUTES[operation.format]))
        table = _first_match(table, "kv_cache_dtype", (operation.cache, "bfloat16", "fp8"))
        if not decode:
            table = table.where(step=0)
        light = _sparse_light(self.system, operation, decode=decode)
        for heads in _nearest_words(table, "num_heads", operation.heads):
            points = _points(table.where(num_heads=heads), decode=decode)
            return surface(points, light, power=1.0)
        return _roofline_surface(light)

    def _linear(self, operation: LinearKernel, *, decode: bool) -> Surface:
        table = self.store.table("linear_attention", "gdn_perf").where(phase="generation" if decode else "context")
        light = _linear_light(self.system, operation, decode=decode)
        rows = table.where(num_v_heads=operation.value_heads, num_k_heads=operation.key_heads)
        wide = rows.where(d_model=operation.model_width)
        rows = wide if len(wide) else rows
        if not len(rows):
            return _roofline_surface(light)
        return surface(_summed_over_kernels(rows, decode=decode), light)


def _word_of(rows: Table, column: str) -> str:
    """The word of the first row."""
    return rows.words[column][int(rows.number(column)[0])]


def _over(c: Curve, factor: float) -> Curve:
    """A curve over tokens of all attention ranks as one over the tokens of a rank."""
    return (
        c if factor == 1.0 else Curve(x=c.x / factor, y=c.y, low=c.low / factor, high=c.high / factor, origin=c.origin)
    )


def _line(at_zero: float, at_one: float) -> Curve:
    """A straight line over tokens."""
    slope = at_one - at_zero
    x = np.array([0.0, MOST_TOKENS])
    return Curve(x=x, y=at_zero + slope * x, low=0.0, high=MOST_TOKENS, origin=Origin.ROOFLINE)


def longest(first: Curve, second: Curve) -> Curve:
    """The longer of two curves at each point: operations side by side on two streams."""
    knots = np.unique(np.concatenate([first.x, second.x]))
    longer = np.maximum(first(knots), second(knots))
    return Curve(x=knots, y=longer, low=max(first.low, second.low), high=min(first.high, second.high))


def _without_minimum_latency(rows: Table) -> Table:
    """Rows of the ordinary kernels; a table may hold a twin for the smallest batches."""
    if "kernel_source" not in rows.words:
        return rows
    codes = [i for i, word in enumerate(rows.words["kernel_source"]) if word.endswith("min_latency")]
    return rows.take(np.flatnonzero(~np.isin(rows.columns["kernel_source"], codes)))


def _fastest_rows(rows: Table, column: str) -> Table:
    """Rows sorted so that the fastest of equal `column` comes first."""
    return rows.take(np.lexsort((rows.number("latency"), rows.number(column)))) if len(rows) else rows


def _shape_distance(shapes: Table, operation: Experts) -> FloatArray:
    """Distance in log2 of the sizes on one rank."""
    width = shapes.number("inter_size") / shapes.number("moe_tp_size")
    local = shapes.number("num_experts") / shapes.number("moe_ep_size")
    parts = (
        np.log2(shapes.number("hidden_size") / operation.hidden_size),
        np.log2(width * operation.tp / operation.intermediate_size),
        np.log2(local * operation.ep / operation.experts),
        np.log2(shapes.number("topk") / operation.active),
        0.5 * np.log2(shapes.number("moe_ep_size") / operation.ep),
    )
    return np.sqrt(sum((part**2 for part in parts), np.zeros(len(shapes))))


def _nccl_table(store: TableStore, system: GpuSystem) -> Table:
    """NCCL's table of the version that the system names, or of the newest."""
    files = store.files("comm", "nccl_perf")
    named = [file for file in files if file.parent.name == system.nccl_version]
    chosen = named or files
    return load(chosen[0]) if chosen else Table({}, {})


def _first_match(table: Table, column: str, words: tuple[str, ...]) -> Table:
    """Rows with the first of `words` that the column holds; all rows where it holds none."""
    for word in words:
        rows = table.where(**{column: word})
        if len(rows):
            return rows
    return table


def _nearest_words(table: Table, column: str, wanted: int) -> list[int]:
    """The value of `column` nearest to `wanted` (in ratio), as a list of one; empty where the table is."""
    if not len(table):
        return []
    values = np.unique(table.number(column))
    return [int(values[np.argmin(np.abs(np.log(values / wanted)))])]


def _points(rows: Table, *, decode: bool) -> tuple[FloatArray, FloatArray, FloatArray]:
    length = rows.number("isl") + rows.number("step") if decode else rows.number("isl")
    return rows.number("batch_size"), length, rows.number("latency")


def _preferred(rows: Table, kernel: str | None) -> Table:
    """Rows in the order of preference: those of `kernel` first."""
    if kernel is None or "kernel_source" not in rows.columns:
        return rows
    chosen = rows.mask("kernel_source", kernel)
    return rows.take(np.concatenate([np.flatnonzero(chosen), np.flatnonzero(~chosen)]))


def _attention_rows(
    table: Table, operation: SelfAttention, *, decode: bool
) -> tuple[Table | None, SelfAttention | None]:
    """Rows of the operation's shape, or of the nearest shape that the table holds, and that shape."""
    if not len(table):
        return None, None
    if "window_size" not in table.columns:  # tables of older GPUs hold full attention only, and do not say so
        table = replace(table, columns={**table.columns, "window_size": np.zeros(len(table))}, masks={})
    rows = _first_match(table, "kv_cache_dtype", (operation.cache, "bfloat16", "fp8"))
    if not decode:
        rows = _first_match(rows, "attn_dtype", (operation.attention, "bfloat16", "fp8"))
    exact = rows.where(
        num_heads=operation.heads,
        num_key_value_heads=operation.kv_heads,
        head_dim=operation.head_dim,
        window_size=operation.window or 0,
    )
    if len(exact):
        return exact, operation
    shapes = first_rows(rows, ["num_heads", "num_key_value_heads", "head_dim", "window_size"])
    window = shapes.number("window_size")
    wanted = float(operation.window or 0)
    distance = (
        np.abs(np.log2(shapes.number("num_heads") / operation.heads))
        + 2.0 * np.abs(np.log2(shapes.number("num_key_value_heads") / operation.kv_heads))
        + 4.0 * np.abs(np.log2(shapes.number("head_dim") / operation.head_dim))
        + 8.0 * (window != wanted) * (window != 0)
        + 4.0 * (window != wanted) * (window == 0)
    )
    best = int(np.argmin(distance))
    shape = replace(
        operation,
        heads=int(shapes.number("num_heads")[best]),
        kv_heads=int(shapes.number("num_key_value_heads")[best]),
        head_dim=int(shapes.number("head_dim")[best]),
        window=int(window[best]) or None,
    )
    found = rows.where(
        num_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        window_size=shape.window or 0,
    )
    return found, shape


Light = Callable[[FloatArray, FloatArray], FloatArray]


def attention_light(system: GpuSystem, operation: AttentionOperation, *, decode: bool) -> Light:
    """Speed of light of an attention operation over sequences and length, in milliseconds."""
    match operation:
        case SelfAttention():
            return _attention_light(system, operation, decode=decode)
        case LatentKernel() | LatentModule():
            return _latent_light(system, operation, decode=decode)
        case SparseModule():
            return _sparse_light(system, operation, decode=decode)
        case LinearKernel():
            return _linear_light(system, operation, decode=decode)


def _attention_light(system: GpuSystem, operation: SelfAttention, *, decode: bool) -> Light:
    width = operation.heads * operation.head_dim
    kv_bytes = 2.0 * operation.kv_heads * operation.head_dim * CACHE_BYTES[operation.cache]
    window = float(operation.window) if operation.window else 1e12
    peak = system.peak("bf16")

    def prefill(seqs: FloatArray, length: FloatArray) -> FloatArray:
        seen = np.where(length > window, window * (length - window / 2.0), length**2 / 2.0)
        flop = 4.0 * seqs * width * seen
        traffic = seqs * length * (4.0 * width + kv_bytes)
        return 1e3 * np.maximum(flop / peak, traffic / system.memory_bandwidth)

    def one_token(seqs: FloatArray, length: FloatArray) -> FloatArray:
        traffic = seqs * (np.minimum(length, window) * kv_bytes + 4.0 * width)
        return 1e3 * traffic / system.memory_bandwidth

    return one_token if decode else prefill


def _latent_light(system: GpuSystem, operation: LatentKernel | LatentModule, *, decode: bool) -> Light:
    cache = CACHE_BYTES[operation.cache]
    peak = system.peak("bf16")
    projections = 0.0
    if isinstance(operation, LatentModule):
        projections = 7168.0 * 2112.0 + operation.heads * (1536.0 * 192.0 + 512.0 * 256.0 + 7168.0 * 128.0)

    def prefill(seqs: FloatArray, length: FloatArray) -> FloatArray:
        flop = seqs * length * (operation.heads * (192.0 + 128.0) * length + 2.0 * projections)
        traffic = seqs * length * (576.0 * cache + operation.heads * 640.0 * 2.0) + projections
        return 1e3 * np.maximum(flop / peak, traffic / system.memory_bandwidth)

    def one_token(seqs: FloatArray, length: FloatArray) -> FloatArray:
        flop = seqs * 2.0 * (operation.heads * length * (576.0 + 512.0) + projections)
        traffic = seqs * (length * 576.0 * cache + operation.heads * 1088.0 * 2.0) + projections
        return 1e3 * np.maximum(flop / peak, traffic / system.memory_bandwidth)

    return one_token if decode else prefill


def _sparse_light(system: GpuSystem, operation: SparseModule, *, decode: bool) -> Light:
    del operation

    def prefill(seqs: FloatArray, length: FloatArray) -> FloatArray:
        return seqs * length / system.peak("bf16") * 1e12 * (1.0 + length / 65536.0)

    def one_token(seqs: FloatArray, length: FloatArray) -> FloatArray:
        return seqs / system.memory_bandwidth * 1e9 * (1.0 + length / 65536.0)

    return one_token if decode else prefill


def _linear_light(system: GpuSystem, operation: LinearKernel, *, decode: bool) -> Light:
    state = operation.value_heads * operation.key_dim * operation.value_dim
    row = 2.0 * (2 * operation.key_heads * operation.key_dim + 3 * operation.value_heads * operation.value_dim)

    def time(seqs: FloatArray, length: FloatArray) -> FloatArray:
        tokens = seqs if decode else seqs * length
        traffic = tokens * row + seqs * state * 8.0
        return 1e3 * np.maximum(tokens * 6.0 * state / system.peak("bf16"), traffic / system.memory_bandwidth)

    return time


def _roofline_surface(light: Light) -> Surface:
    rows, columns = np.meshgrid(2.0 ** np.arange(0, 11), 2.0 ** np.arange(0, 18), indexing="ij")
    row, column = floats(rows.ravel()), floats(columns.ravel())
    y = light(row, column) / ROOFLINE_EFFICIENCY + 0.005
    return surface((row, column, y), light, origin=Origin.ROOFLINE)


def _summed_over_kernels(rows: Table, *, decode: bool) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(batch, length, milliseconds) with the kernels of a step added up."""
    one = first_rows(rows, ["batch_size", "seq_len", "kernel_source"])
    batch, length = one.number("batch_size"), one.number("seq_len")
    if decode:
        length = np.ones_like(length)
    keys, index = np.unique(np.stack([batch, length]), axis=1, return_inverse=True)
    return floats(keys[0]), floats(keys[1]), floats(np.bincount(index.ravel(), weights=one.number("latency")))


def _spread(decode: Surface) -> Surface:
    """A decode surface averaged over contexts of 0.9 to 1.1 times the mean: sequences of a batch differ in length."""
    columns = np.unique(np.round(np.concatenate([decode.columns, 2.0 ** np.arange(0, 20.01, 0.25)])))
    columns = columns[columns <= decode.columns[-1]]
    grid_rows, grid_columns = np.meshgrid(decode.rows, columns, indexing="ij")
    spread = [decode(grid_rows, grid_columns * factor) for factor in (0.9, 0.95, 1.0, 1.05, 1.1)]
    return Surface(
        rows=decode.rows,
        columns=columns,
        z=np.mean(spread, axis=0),
        power=1.0,
        row_end=decode.row_end,
        column_end=decode.column_end,
        origin=decode.origin,
    )
