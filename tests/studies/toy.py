"""A small problem with a known surface: what the tests of studies search, by formula instead of an engine."""

from __future__ import annotations

from pathlib import Path

from search_spaces.hardware import Device, DeviceKind, NodePool
from search_spaces.metrics import Percentiles, ServingMetrics
from search_spaces.model import Attention, DenseFeedForward, LayerGroup, ModelSpec
from search_spaces.outcome import Measurement, Prediction
from search_spaces.problem import Objective, Problem, Slo
from search_spaces.serving import Candidate, Mode, OptionValue
from search_spaces.space import Space, build_space
from search_spaces.workload import Length, Workload
from studies.screen import Predict
from studies.study import StudySetup

SMALL: dict[str, tuple[OptionValue, ...]] = {
    "max_num_seqs": (1, 4),
    "batch_size": (512,),
    "ubatch_size": (512,),
    "kv_cache_dtype": ("f16",),
    "flash_attention": (True,),
    "threads": (1, 2),
}
WIDE: dict[str, tuple[OptionValue, ...]] = {
    "max_num_seqs": (1, 2, 4, 8),
    "batch_size": (64, 512, 2048),
    "ubatch_size": (64, 512),
    "kv_cache_dtype": ("f16", "q8_0"),
    "flash_attention": (True, False),
    "threads": (1, 2, 4),
}


def toy_problem(slos: tuple[Slo, ...] = ()) -> Problem:
    core = Device(
        name="core",
        kind=DeviceKind.CPU,
        memory_bytes=4e9,
        memory_bandwidth=1e10,
        flops={"fp32": 1e10},
        link_bandwidth=1e9,
        network_bandwidth=1e9,
    )
    layers = LayerGroup(
        count=2,
        attention=Attention(heads=4, kv_heads=2, head_dim=16),
        feed_forward=DenseFeedForward(intermediate_size=128),
    )
    return Problem(
        model=ModelSpec(name="toy", hidden_size=64, vocab_size=512, layers=(layers,)),
        workload=Workload(isl=Length(mean=64), osl=Length(mean=16)),
        node_pools=(NodePool(name="here", device=core, nodes=1, devices_per_node=4, price_per_hour=1.0),),
        objectives=(Objective(metric="output_tokens_per_s"), Objective(metric="ttft_p50_ms")),
        slos=slos,
    )


def small_space(problem: Problem) -> Space:
    """12 genotypes in one mode, fewer candidates."""
    return build_space(problem, engines={"llamacpp": SMALL}, loads=(1.0, 2.0, 4.0), modes=(Mode.AGGREGATED,))


def wide_space(problem: Problem) -> Space:
    """Both modes, thousands of candidates; some ask for more cores than there are."""
    return build_space(problem, engines={"llamacpp": WIDE}, loads=(1.0, 2.0, 4.0, 8.0))


def surface(candidate: Candidate) -> tuple[float, float]:
    """Output tokens/s and TTFT in ms: more slots and load give throughput, at the price of waiting.

    Every option has an effect, so that different candidates seldom tie.
    """
    pools = candidate.config.pools
    slots = sum(int(pool.option("max_num_seqs")) for pool in pools)
    threads = sum(int(pool.option("threads")) for pool in pools)
    chunk = sum(int(pool.option("batch_size")) + 0.3 * int(pool.option("ubatch_size")) for pool in pools) / len(pools)
    fused = sum(bool(pool.option("flash_attention")) for pool in pools) / len(pools)
    packed = sum(pool.option("kv_cache_dtype") == "q8_0" for pool in pools) / len(pools)
    load = candidate.load.value
    rate = 40.0 * threads**0.8 * min(load, slots) ** 0.7 * (1 + 0.1 * fused - 0.07 * packed + 1e-5 * chunk)
    wait = 20.0 / threads + 15.0 * max(0.0, load - slots) + 0.01 * chunk + 2.0 * load + 3.0 * packed - 2.0 * fused
    return rate, wait * (0.7 if candidate.config.mode is Mode.DISAGGREGATED else 1.0)


def latency(value: float) -> Percentiles:
    return Percentiles(mean=value, p50=value, p90=1.2 * value, p95=1.3 * value, p99=1.5 * value)


def measure(candidate: Candidate, artifacts: dict[str, str] | None = None) -> Measurement:
    """The measurement of `candidate` on the known surface."""
    rate, wait = surface(candidate)
    metrics = ServingMetrics(
        ttft_ms=latency(wait),
        tpot_ms=latency(1000.0 * candidate.load.value / rate),
        itl_ms=latency(1000.0 * candidate.load.value / rate),
        e2e_ms=latency(wait + 16_000.0 / rate),
        output_tokens_per_s=rate,
        input_tokens_per_s=4 * rate,
        requests_per_s=rate / 16,
        goodput_rps=rate / 16,
        requests=64,
        errors=0,
        duration_s=1.0,
        devices=candidate.config.devices,
        price_per_hour=1.0,
    )
    return Measurement(
        metrics=metrics,
        client_lateness_ms=0.5,
        timings_s={"start": 2.0, "warm_up": 0.1, "measure": 1024 / rate},
        environment={"engine": "formula"},
        artifacts=artifacts or {},
    )


def biased_model(factor: float = 1.3) -> Predict:
    """A model that is wrong by a factor, and knows of no candidate that cannot run."""

    def predict(candidates: object) -> list[Prediction]:
        assert isinstance(candidates, list | tuple)
        return [
            Prediction(metrics={name: factor * value for name, value in measure(c).metrics.flat().items()})
            for c in candidates
        ]

    return predict


def toy_setup(
    directory: Path, *, space: Space | None = None, predict: Predict | None = None, **kwargs: object
) -> StudySetup:
    problem = space.problem if space else toy_problem()
    values: dict[str, object] = {
        "name": "toy",
        "problem": problem,
        "space": space or small_space(problem),
        "study_file": "model: toy\nbudget: 12\n",
        "directory": directory,
        "seed": 1,
        "budget_trials": 12,
        "predict": predict,
    }
    return StudySetup(**(values | kwargs))  # type: ignore[arg-type] # test convenience: any field may be overridden
