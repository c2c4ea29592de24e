"""Raw step latencies beside those of aiconfigurator's engine, on the same tables and without any correction.

    python benchmarks/parity.py [--points 8] [--json]

For dense, mixture and latent-attention models on h100_sxm and h200_sxm with the three engines: prefill of prompts, a
decode step, a mixed step, at random loads. Host constants and mended tables are off. Deviations made on purpose:

- Latent attention in mixed steps: there a step is one prompt and decoding sequences do not attend; here they do and
  prompts keep their lengths.
- DeepSeek's first three layers are dense here, mixtures there.
- vLLM with latent attention: the reference adds two all-reduces a layer to those of its dispatch; here they count once.
- Data-parallel attention over tensor-parallel groups: TensorRT-LLM's exchange is an all-reduce over all ranks there and
  vLLM's reduces over all ranks before it gathers; here scatter and gather, as for SGLang.
- GLM-5: the reference fills gaps of its tables of sparse attention with rows of other engines, and says so; not here.
- Qwen3.5: two all-reduces a layer here, three there with TensorRT-LLM; gates and merges of the shared expert left out.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from perf_model.batch import StepBatch, step_batch
from perf_model.layout import ReplicaLayout
from perf_model.precision import Precision
from perf_model.prior import kind_word
from perf_model.silicon import ReplicaKey, Silicon, default_silicon
from perf_model.steps import TableSteps
from search_spaces.known_models import known_model
from search_spaces.model import ModelSpec, MoeFeedForward

SYSTEMS = ("h100_sxm", "h200_sxm")
ENGINES = ("trtllm", "sglang", "vllm")
PLAIN_LAYOUTS = ((1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1))
EXPERT_LAYOUTS = ((4, 1, 1), (8, 1, 1), (4, 1, 4), (8, 1, 8), (1, 8, 8))
# Model: the name that the reference knows, and the formats to compare.
MODELS = {
    "Qwen3-32B": ("Qwen/Qwen3-32B", ("bfloat16", "fp8", "fp8_block")),
    "Llama-3.1-70B": ("meta-llama/Meta-Llama-3.1-70B", ("bfloat16", "fp8")),
    "Qwen3-235B-A22B": ("Qwen/Qwen3-235B-A22B-FP8", ("fp8_block", "bfloat16")),
    "MiniMax-M2.5": ("MiniMaxAI/MiniMax-M2.5", ("fp8_block",)),
    "gpt-oss-120b": ("openai/gpt-oss-120b", ("bfloat16",)),
    "DeepSeek-V3": ("deepseek-ai/DeepSeek-V3", ("fp8_block",)),
    "Qwen3.5-397B-A17B": ("Qwen/Qwen3.5-397B-A17B", ("bfloat16", "fp8_block")),
    "GLM-5": ("zai-org/GLM-5-FP8", ("fp8_block",)),
}

FAMILIES = {
    "dense and mixture models": ("dense", "experts"),
    "latent and linear attention": ("latent attention", "linear attention"),
}


@dataclass(frozen=True)
class Point:
    """One step of the comparison: the batch, and how to ask the reference for it."""

    kind: str
    batch: StepBatch
    ask: Callable[[object], float]


def random_points(random: np.random.Generator, count: int) -> Iterator[Point]:
    """`count` prefill, decode and mixed steps each."""
    for _ in range(count):
        isl, osl = int(random.choice([256, 512, 1024, 2000, 4096, 8192])), int(random.choice([128, 256, 1000]))
        prompts, decoding = int(random.choice([1, 2, 4])), int(random.choice([1, 4, 16, 50, 128, 256]))
        budget = int(random.choice([2048, 8192]))
        whole = {"prompt": [float(isl)]}
        generating = {"decode_seqs": [float(decoding)], "decode_context": [float(isl + osl // 2 + 1)]}
        yield Point(
            "prefill",
            step_batch(prefill_tokens=[float(prompts * isl)], prefill_seqs=[float(prompts)], **whole),
            lambda engine, b=prompts, i=isl: engine.predict_prefill_latency(b, i),  # type: ignore[misc]
        )
        yield Point(
            "decode",
            step_batch(**generating),
            lambda engine, n=decoding, i=isl, o=osl: engine.decode_step_latency(n, i, o),  # type: ignore[misc]
        )
        yield Point(
            "mixed",
            step_batch(prefill_tokens=[float(budget)], prefill_seqs=[max(budget / isl, 1.0)], **whole, **generating),
            lambda engine, c=budget, n=decoding, i=isl, o=osl: engine.mixed_step_latency(c, n, i, o),  # type: ignore[misc]
        )


def kernels(
    silicon: Silicon, model: ModelSpec, system: str, engine: str, layout: ReplicaLayout, form: str
) -> TableSteps:
    """Our step times."""
    moe = "w4a16_mxfp4" if model.quantization == "mxfp4" else form
    precision = Precision(gemm=form, projections=form, moe=moe)
    return silicon.kernels(ReplicaKey(model=model, system=system, engine=engine, layout=layout, precision=precision))


def reference(name: str, system: str, engine: str, layout: ReplicaLayout, precision: Precision, *, moe: bool) -> object:
    """The reference's engine; raises what it raises where its tables lack the shape."""
    from aiconfigurator_core.sdk.engine import EngineHandle

    settings: dict[str, object] = {
        "tp_size": layout.tp,
        "attention_dp_size": layout.dp,
        "gemm_quant_mode": precision.gemm,
        "kvcache_quant_mode": "bfloat16",
        "fmha_quant_mode": "bfloat16",
    }
    if moe:
        settings |= {"moe_tp_size": layout.moe_tp, "moe_ep_size": layout.ep, "moe_quant_mode": precision.moe}
    return EngineHandle.compile(name, system, engine, **settings)


def compare(
    points: int, names: Sequence[str] = tuple(MODELS), systems: Sequence[str] = SYSTEMS, seed: int = 0
) -> dict[tuple[str, str, str], list[float]]:
    """Relative differences by model, engine and kind of step; shapes that the reference lacks are left out."""
    silicon = Silicon(default_silicon().root, repair=False)
    random = np.random.default_rng(seed)
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for name in names:
        model, (path, forms) = known_model(name), MODELS[name]
        moe = any(isinstance(group.feed_forward, MoeFeedForward) for group in model.layers)
        for system, engine, form in ((s, e, f) for s in systems for e in ENGINES for f in forms):
            for sizes in EXPERT_LAYOUTS if moe else PLAIN_LAYOUTS:
                layout = ReplicaLayout(tp=sizes[0], dp=sizes[1], ep=sizes[2])
                ours = kernels(silicon, model, system, engine, layout, form)
                precision = Precision(gemm=form, moe="w4a16_mxfp4" if model.quantization == "mxfp4" else form)
                try:
                    theirs = reference(path, system, engine, layout, precision, moe=moe)
                    for point in random_points(random, points):
                        ratio = float(ours.step_ms(point.batch)[0]) / point.ask(theirs) - 1.0
                        found[name, engine, point.kind].append(ratio)
                except (ValueError, RuntimeError, KeyError):
                    continue  # the reference's tables lack this shape; it has no answer to compare with
    return found


def summary(differences: dict[tuple[str, str, str], list[float]]) -> list[dict[str, object]]:
    """Median and 95th percentile of the absolute difference of each group."""
    return [
        {
            "model": model,
            "engine": engine,
            "step": kind,
            "points": len(values),
            "median": float(np.median(np.abs(values))),
            "p95": float(np.quantile(np.abs(values), 0.95)),
        }
        for (model, engine, kind), values in differences.items()
    ]


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    differences = compare(options.points)
    rows = summary(differences)
    wholes = {name: whole(differences, kinds) for name, kinds in FAMILIES.items()}
    if options.json:
        print(json.dumps({"families": wholes, "groups": rows}))
        return
    for row in rows:
        print("{model:18s} {engine:7s} {step:8s} {points:4d} points, median {median:.4f}, p95 {p95:.4f}".format(**row))
    for name, found in wholes.items():
        print("{}: {points} points, median {median:.4f}, p95 {p95:.4f}".format(name, **found))


def whole(differences: dict[tuple[str, str, str], list[float]], kinds: Collection[str]) -> dict[str, float]:
    """Median and 95th percentile of the absolute difference over all models of some kinds."""
    values = [
        each for (name, _, _), found in differences.items() if kind_word(known_model(name)) in kinds for each in found
    ]
    absolute = np.abs(values)
    return {
        "points": len(values),
        "median": float(np.median(absolute)),
        "p95": float(np.quantile(absolute, 0.95)),
    }


if __name__ == "__main__":
    main()
