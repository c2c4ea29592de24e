"""Step times of one rank from the operations of a replica: sums of curves and surfaces."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from perf_model.batch import StepBatch
from perf_model.borrowed import BorrowedCosts
from perf_model.costs import OperationCosts
from perf_model.curves import Curve, DenseCurve, DenseSurface, Origin, dense, dense_surface, total
from perf_model.layout import StepPlan
from perf_model.numeric import BoolArray, FloatArray, floats
from perf_model.operations import (
    AttentionOperation,
    Concurrent,
    Gemm,
    LatentKernel,
    LatentModule,
    LinearKernel,
    Operation,
    SelfAttention,
    SparseModule,
    TokenOperation,
)

_ATTENTION = (SelfAttention, LatentKernel, LatentModule, SparseModule, LinearKernel)
_SHORT = 1.0  # context at which a decode module's time is that of its projections


@dataclass(frozen=True)
class _Phase:
    """Operations of one kind of step, sorted by what their time depends on."""

    tokens: tuple[TokenOperation | Concurrent, ...]
    outputs: tuple[Gemm, ...]
    attention: tuple[AttentionOperation, ...]


def _phase(operations: tuple[Operation, ...]) -> _Phase:
    attention = tuple(op for op in operations if isinstance(op, _ATTENTION))
    outputs = tuple(op for op in operations if isinstance(op, Gemm) and op.outputs_only)
    tokens = tuple(op for op in operations if not isinstance(op, _ATTENTION) and op not in outputs)
    return _Phase(tokens=tokens, outputs=outputs, attention=attention)


@dataclass(frozen=True)
class TableSteps:
    """Step times from operation tables: what `phases.StepTimes` asks for, with the origin of each share."""

    plan: StepPlan
    costs: OperationCosts | BorrowedCosts

    @cached_property
    def _prefill(self) -> _Phase:
        return _phase(self.plan.prefill)

    @cached_property
    def _decode(self) -> _Phase:
        return _phase(self.plan.decode)

    @cached_property
    def _prefill_tokens(self) -> list[tuple[str, Curve]]:
        return [(op.name, self.costs.token_curve(op)) for op in self._prefill.tokens]

    @cached_property
    def _decode_tokens(self) -> list[tuple[str, Curve]]:
        return [(op.name, self.costs.token_curve(op)) for op in self._decode.tokens]

    @cached_property
    def _outputs(self) -> list[tuple[str, Curve]]:
        return [(op.name, self.costs.token_curve(op)) for op in self._decode.outputs]

    @cached_property
    def _curves(self) -> dict[str, DenseCurve]:
        parts = {"prefill tokens": self._prefill_tokens, "decode tokens": self._decode_tokens, "outputs": self._outputs}
        return {name: dense(total([curve for _, curve in curves])) for name, curves in parts.items()}

    @cached_property
    def _prefill_surfaces(self) -> list[tuple[AttentionOperation, DenseSurface]]:
        return [(op, dense_surface(self.costs.surface(op, decode=False))) for op in self._prefill.attention]

    @cached_property
    def _decode_surfaces(self) -> list[tuple[AttentionOperation, DenseSurface]]:
        return [(op, dense_surface(self.costs.surface(op, decode=True))) for op in self._decode.attention]

    def step_ms(self, batch: StepBatch) -> FloatArray:
        """Duration of each step, in milliseconds; nothing to do takes no time."""
        mixed = batch.prefill_tokens > 0
        time = self._curves["outputs"](batch.outputs)
        if np.all(mixed):
            time = time + self._curves["prefill tokens"](batch.tokens) + self._prefill_attention(batch)
        elif not np.any(mixed):
            time = time + self._curves["decode tokens"](batch.tokens)
        else:
            with_prompt = self._curves["prefill tokens"](batch.tokens) + self._prefill_attention(batch)
            time = time + np.where(mixed, with_prompt, self._curves["decode tokens"](batch.tokens))
        if np.any(batch.decode_seqs > 0):
            time = time + self._decode_attention(batch, mixed)
        return np.where(batch.tokens > 0, time, 0.0)

    def _prefill_attention(self, batch: StepBatch) -> FloatArray:
        parts = [op.count * prefill_time(op, surface, batch) for op, surface in self._prefill_surfaces]
        return floats(np.sum(parts, axis=0))

    def _decode_attention(self, batch: StepBatch, mixed: BoolArray) -> FloatArray:
        parts = [op.count * decode_time(op, surface, batch, mixed) for op, surface in self._decode_surfaces]
        return floats(np.sum(parts, axis=0) * (batch.decode_seqs > 0))

    def breakdown_ms(self, batch: StepBatch) -> dict[str, FloatArray]:
        """Milliseconds by operation; they add up to `step_ms`."""
        parts: dict[str, FloatArray] = defaultdict(lambda: np.zeros(batch.tokens.shape))
        mixed = batch.prefill_tokens > 0
        busy = batch.tokens > 0
        for curves, chosen in ((self._prefill_tokens, mixed), (self._decode_tokens, ~mixed)):
            computed = chosen * busy
            some = bool(computed.any())
            for name, curve in curves:
                parts[name] += computed * curve(batch.tokens) if some else 0.0
        for name, curve in self._outputs:
            parts[name] += busy * curve(batch.outputs)
        for op, surface in self._prefill_surfaces:
            parts[f"prefill {op.name}"] += mixed * op.count * prefill_time(op, surface, batch)
        for op, surface in self._decode_surfaces:
            time = op.count * decode_time(op, surface, batch, mixed)
            parts[f"decode {op.name}"] += time * (batch.decode_seqs > 0)
        return dict(parts)

    def origins(self, batch: StepBatch) -> dict[Origin, float]:
        """Share of the time of a single step (arrays of one element) by where it comes from."""
        mixed = batch.prefill_tokens > 0
        parts = self._token_origins(batch)
        for op, surface in self._prefill_surfaces if mixed.flat[0] else ():
            time = float(op.count * prefill_time(op, surface, batch).flat[0])
            origin = surface.sparse.origin_at(float(batch.prefill_seqs.flat[0]), float(batch.prompt.flat[0]))
            parts.append((origin, time))
        for op, surface in self._decode_surfaces if batch.decode_seqs.flat[0] > 0 else ():
            time = float(op.count * decode_time(op, surface, batch, mixed).flat[0])
            origin = surface.sparse.origin_at(float(batch.decode_seqs.flat[0]), float(batch.decode_context.flat[0]))
            parts.append((origin, time))
        whole = sum(time for _, time in parts)
        return {origin: sum(time for found, time in parts if found is origin) / whole for origin in Origin}

    def _token_origins(self, batch: StepBatch) -> list[tuple[Origin, float]]:
        curves = self._prefill_tokens if batch.prefill_tokens.flat[0] > 0 else self._decode_tokens
        tokens, outputs = float(batch.tokens.flat[0]), float(batch.outputs.flat[0])
        found = [(curve, tokens) for _, curve in curves] + [(curve, outputs) for _, curve in self._outputs]
        return [(curve.origin_at(at), float(curve(np.array(at)))) for curve, at in found]


def prefill_time(op: AttentionOperation, surface: DenseSurface, batch: StepBatch) -> FloatArray:
    """One layer's attention to the step's prompt tokens.

    The surface knows whole prompts. Of a prompt with `cached` tokens, what remains is 1 - (cached / prompt)^2 of the
    query-key pairs (a linear share where projections or linear attention dominate), and a step of a chunked prefill
    computes its share of that.
    """
    alone = bool(np.all(batch.prefill_seqs <= 1.0))
    whole = surface.one(batch.prompt) if alone else surface(np.maximum(batch.prefill_seqs, 1.0), batch.prompt)
    if np.any(batch.cached > 0):
        remaining = batch.cached / np.maximum(batch.prompt, 1.0)
        whole = whole * (1.0 - (remaining**2 if isinstance(op, SelfAttention | LatentKernel) else remaining))
    return whole * batch.prompt_share


def decode_time(
    op: AttentionOperation,
    surface: DenseSurface,
    batch: StepBatch,
    mixed: BoolArray,
) -> FloatArray:
    """One layer's attention of the decoding sequences.

    In a step with prompt tokens the projections of a module are computed with the prompt's, so only what grows with the
    context counts there.
    """
    time = surface(batch.decode_seqs, batch.decode_context)
    if isinstance(op, LatentModule | SparseModule) and np.any(mixed):
        projections = surface(batch.decode_seqs, np.full_like(batch.decode_context, _SHORT))
        time = np.where(mixed, np.maximum(time - projections, 0.0), time)
    return time
