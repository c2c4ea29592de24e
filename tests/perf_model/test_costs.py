"""Operations from tables of known laws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import yaml

from perf_model.batch import step_batch
from perf_model.costs import LAUNCH_MARGIN, OperationCosts
from perf_model.curves import Origin
from perf_model.layout import PlanContext, ReplicaLayout, plan
from perf_model.operations import (
    Collective,
    Communication,
    Concurrent,
    Experts,
    Gemm,
    Hop,
    MemoryMove,
    SelfAttention,
)
from perf_model.precision import Precision
from perf_model.steps import TableSteps
from perf_model.systems import read_system
from perf_model.tables import TableStore
from search_spaces.errors import InvalidValueError
from search_spaces.model import Attention, DenseFeedForward, LayerGroup, ModelSpec, MoeFeedForward
from tests.perf_model.conftest import SYSTEM, gemm_ms, gemm_rows, write

MODEL = ModelSpec(
    name="small",
    hidden_size=512,
    vocab_size=2048,
    layers=(
        LayerGroup(
            count=4,
            attention=Attention(heads=8, kv_heads=4, head_dim=64),
            feed_forward=DenseFeedForward(intermediate_size=1024),
        ),
    ),
)
GEMM = Gemm(name="g", n=512, k=1024, count=1, format="bfloat16")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))


def costs(tables: Path, engine: str = "vllm", *, repair: bool = True) -> OperationCosts:
    return OperationCosts(TableStore(tables, "test_sxm", engine), read_system(tables, "test_sxm"), repair)


def steps(tables: Path, layout: ReplicaLayout | None = None) -> TableSteps:
    context = PlanContext(
        model=MODEL, layout=layout or ReplicaLayout(), precision=Precision(), engine="vllm", gpus_per_node=8
    )
    return TableSteps(plan(context), costs(tables))


def test_a_measured_shape_is_exact_and_counted(tables: Path) -> None:
    curve = costs(tables).token_curve(replace(GEMM, count=3))
    assert curve(np.array([16.0, 256.0])) == pytest.approx([3 * gemm_ms(16, 512, 1024), 3 * gemm_ms(256, 512, 1024)])
    assert curve.origin_at(16) is Origin.EXACT


def test_an_unknown_shape_takes_the_utilisation_of_its_neighbours(tables: Path) -> None:
    """The tables hold half the speed of light plus 2 us: what lies between follows within a few percent."""
    curve = costs(tables).token_curve(replace(GEMM, n=700, k=900))
    assert curve(np.array([4096.0]))[0] == pytest.approx(gemm_ms(4096, 700, 900), rel=0.05)


def test_beyond_the_last_row_utilisation_is_held(tables: Path) -> None:
    curve = costs(tables).token_curve(GEMM)
    assert curve(np.array([65536.0]))[0] == pytest.approx(gemm_ms(65536, 512, 1024), rel=0.03)


def test_a_format_without_rows_is_scaled_and_says_so(tables: Path) -> None:
    curve = costs(tables).token_curve(replace(GEMM, format="fp8"))
    assert curve.origin_at(16) is Origin.ROOFLINE
    assert curve(np.array([4096.0]))[0] == pytest.approx(gemm_ms(4096, 512, 1024) / 2, rel=0.05)


def test_an_engine_without_tables_falls_back_to_the_roofline(tables: Path) -> None:
    curve = costs(tables, "trtllm").token_curve(GEMM)
    assert curve.origin_at(16) is Origin.ROOFLINE
    light = 1e3 * 2 * 4096 * 512 * 1024 / 1e14
    assert light < curve(np.array([4096.0]))[0] < 3 * light


def test_rows_timed_with_their_launch_are_held_against_another_engine(tables: Path, tmp_path: Path) -> None:
    for name in ("test_sxm.yaml", "query_versions.yaml"):
        (tmp_path / name).write_text((tables / name).read_text(encoding="utf-8"), encoding="utf-8")
    slow = [row | {"latency": float(str(row["latency"])) + 0.1} for row in gemm_rows()]
    write(tmp_path, "gemm/vllm/1.0/gemm_perf.parquet", slow)
    write(tmp_path, "gemm/sglang/1.0/gemm_perf.parquet", gemm_rows())
    at = np.array([16.0])
    mended, plain = costs(tmp_path).token_curve(GEMM)(at), costs(tmp_path, repair=False).token_curve(GEMM)(at)
    assert mended[0] == pytest.approx(LAUNCH_MARGIN * gemm_ms(16, 512, 1024))
    assert plain[0] == pytest.approx(gemm_ms(16, 512, 1024) + 0.1)


def test_small_kernels_and_hops_follow_their_formulas(tables: Path) -> None:
    at = np.array([1000.0])
    move = costs(tables).token_curve(MemoryMove(name="m", bytes_per_token=4096, count=2))
    assert move(at)[0] == pytest.approx(2e3 * (1000 * 4096 / 0.8e12 + 3e-6))
    hop = costs(tables).token_curve(Hop(name="h", bytes_per_token=1024, count=1, crosses_nodes=True))
    assert hop(at)[0] == pytest.approx(1e3 * (1e-5 + 1000 * 1024 / 5e10))


def all_reduce(ranks: int) -> Communication:
    return Communication(
        name="r", kind=Collective.ALL_REDUCE, elements_per_token=512, ranks=ranks, count=1, custom=True
    )


def test_collectives_are_linear_in_elements_and_slow_down_across_nodes(tables: Path) -> None:
    at = np.array([100.0])
    within = costs(tables).token_curve(all_reduce(8))(at)[0]
    assert within == pytest.approx(1e-2 + 1e-8 * 100 * 512 * 8, rel=1e-6)
    across = costs(tables).token_curve(all_reduce(16))(at)[0]
    assert across == pytest.approx(within * (15 / 16) / (7 / 8) * 8, rel=1e-6)  # 4e11 / 5e10 bytes per second


def test_streams_side_by_side_take_as_long_as_the_longer(tables: Path) -> None:
    small, large = replace(GEMM, n=64), replace(GEMM, n=2048)
    both = costs(tables).token_curve(Concurrent(name="c", first=(small,), second=(large,)))
    assert both(np.array([256.0])) == pytest.approx(costs(tables).token_curve(large)(np.array([256.0])))


def test_attention_is_exact_at_rows_and_scaled_for_other_heads(tables: Path) -> None:
    operation = SelfAttention(
        name="a", heads=8, kv_heads=4, head_dim=64, window=None, cache="bfloat16", attention="bfloat16", count=1
    )
    found = costs(tables)
    prefill, decode = found.surface(operation, decode=False), found.surface(operation, decode=True)
    assert prefill(np.array([4.0]), np.array([1024.0]))[0] == pytest.approx(1e-8 * 4 * 1024**2 * 8 + 5e-3)
    context = np.array([1000.0])
    assert decode(np.array([16.0]), context)[0] == pytest.approx(1e-6 * 16 * 1000 * 8 + 5e-3, rel=0.01)
    wide = found.surface(replace(operation, heads=16, kv_heads=8), decode=True)
    assert wide(np.array([64.0]), context)[0] == pytest.approx(2 * decode(np.array([64.0]), context)[0], rel=0.05)
    assert wide.origin_at(16, 1000) is Origin.EXTRAPOLATED


def test_parts_add_up_to_the_step_and_origins_to_one(tables: Path) -> None:
    found = steps(tables, ReplicaLayout(tp=2))
    for batch in (
        step_batch(prefill_tokens=[512.0], prefill_seqs=1.0, prompt=[512.0]),
        step_batch(decode_seqs=[16.0], decode_context=[700.0]),
        step_batch(prefill_tokens=[256.0], prefill_seqs=1.0, prompt=[1024.0], decode_seqs=[7.0], decode_context=300.0),
    ):
        assert sum(part[0] for part in found.breakdown_ms(batch).values()) == pytest.approx(found.step_ms(batch)[0])
        assert sum(found.origins(batch).values()) == pytest.approx(1.0)


def test_chunks_of_a_prompt_cost_its_attention_once(tables: Path) -> None:
    found = steps(tables)
    whole = found.breakdown_ms(step_batch(prefill_tokens=[1024.0], prefill_seqs=1.0, prompt=[1024.0]))
    chunk = found.breakdown_ms(step_batch(prefill_tokens=[256.0], prefill_seqs=1.0, prompt=[1024.0]))
    assert 4 * chunk["prefill attention"][0] == pytest.approx(whole["prefill attention"][0])


def test_a_cached_prefix_saves_its_attention_and_nothing_to_do_takes_no_time(tables: Path) -> None:
    found = steps(tables)
    half = found.breakdown_ms(step_batch(prefill_tokens=[512.0], prefill_seqs=1.0, prompt=[1024.0], cached=[512.0]))
    whole = found.breakdown_ms(step_batch(prefill_tokens=[1024.0], prefill_seqs=1.0, prompt=[1024.0]))
    assert half["prefill attention"][0] == pytest.approx(0.75 * whole["prefill attention"][0])
    assert found.step_ms(step_batch(prefill_tokens=[0.0]))[0] == 0.0


def test_mixed_batches_agree_with_single_ones(tables: Path) -> None:
    found = steps(tables)
    together = step_batch(
        prefill_tokens=[0.0, 256.0, 256.0],
        prefill_seqs=[0.0, 1.0, 1.0],
        prompt=[0.0, 256.0, 256.0],
        decode_seqs=[5.0, 0.0, 5.0],
        decode_context=[100.0, 0.0, 100.0],
    )
    times = found.step_ms(together)
    alone = [
        found.step_ms(step_batch(decode_seqs=[5.0], decode_context=[100.0]))[0],
        found.step_ms(step_batch(prefill_tokens=[256.0], prefill_seqs=1.0, prompt=[256.0]))[0],
    ]
    assert times[:2] == pytest.approx(alone)
    assert times[2] > times[1]


def test_layouts_that_do_not_divide_the_model_are_refused(tables: Path) -> None:
    with pytest.raises(InvalidValueError, match="tp=3 does not divide 8 attention heads"):
        steps(tables, ReplicaLayout(tp=3))
    with pytest.raises(InvalidValueError, match="ep=3"):
        ReplicaLayout(tp=2, ep=3)


EXPERTS = Experts(
    name="experts",
    hidden_size=512,
    intermediate_size=256,
    active=4,
    experts=64,
    tp=1,
    ep=16,
    format="fp8_block",
    distribution="power_law_1.2",
    count=1,
    tokens_factor=16,
)


def expert_rows(latency_ms: float, distribution: str = "power_law_1.2") -> list[dict[str, object]]:
    shape = {
        "moe_dtype": "fp8_block",
        "hidden_size": 512,
        "inter_size": 256,
        "topk": 4,
        "num_experts": 64,
        "moe_tp_size": 1,
        "moe_ep_size": 16,
        "distribution": distribution,
    }
    return [shape | {"num_tokens": tokens, "latency": latency_ms * tokens} for tokens in (16, 1024)]


def expert_tables(tmp_path: Path) -> Path:
    """Experts of two engines; those of wide expert parallelism take half as long, and balanced a quarter."""
    root = tmp_path / "systems"
    (root / "data").mkdir(parents=True)
    (root / "test_sxm.yaml").write_text(yaml.safe_dump(SYSTEM), encoding="utf-8")
    for engine, wide in (("sglang", "wideep_generation_moe_perf"), ("trtllm", "wideep_moe_perf")):
        write(root, f"moe/{engine}/1.0/moe_perf.parquet", expert_rows(4e-3))
        write(root, f"moe/{engine}/1.0/{wide}.parquet", expert_rows(2e-3) + expert_rows(1e-3, "power_law_1.2_eplb"))
    return root


def test_experts_of_their_own_on_every_rank_take_the_kernels_for_that(tmp_path: Path) -> None:
    root = expert_tables(tmp_path)
    tokens = np.array([4.0])  # of a rank: 64 of all
    plain, wide = EXPERTS, replace(EXPERTS, wide="generation")
    assert costs(root, "sglang").token_curve(plain)(tokens)[0] == pytest.approx(64 * 4e-3)
    assert costs(root, "sglang").token_curve(wide)(tokens)[0] == pytest.approx(64 * 1e-3)  # 16 ranks are balanced
    assert costs(root, "trtllm").token_curve(wide)(tokens)[0] == pytest.approx(64 * 1e-3)
    assert costs(root, "sglang", repair=False).token_curve(wide)(tokens)[0] == pytest.approx(64 * 4e-3)
    context = replace(EXPERTS, wide="context")  # which only TensorRT-LLM's table holds here
    assert costs(root, "sglang").token_curve(context)(tokens)[0] == pytest.approx(64 * 4e-3)
    other = replace(wide, ep=8)  # the nearest: twice the experts and tokens on a rank
    assert costs(root, "trtllm").token_curve(other)(tokens)[0] == pytest.approx(2 * 64 * 2e-3, rel=0.01)


@pytest.mark.parametrize(("capability", "latency_ms"), [(90, 4e-3), (100, 1e-3)])
def test_experts_in_mxfp4_meet_activations_in_mxfp8_where_the_gpu_can(
    tmp_path: Path, capability: int, latency_ms: float
) -> None:
    root = expert_tables(tmp_path)
    gpu = {**cast("dict[str, object]", SYSTEM["gpu"]), "sm_version": capability}
    facts = {**SYSTEM, "gpu": gpu}
    (root / "test_sxm.yaml").write_text(yaml.safe_dump(facts), encoding="utf-8")
    formats = {"w4a16_mxfp4": 4e-3, "w4a8_mxfp4_mxfp8": 1e-3}
    rows = [row | {"moe_dtype": form} for form, time in formats.items() for row in expert_rows(time)]
    write(root, "moe/vllm/1.0/moe_perf.parquet", rows)
    operation = replace(EXPERTS, format="w4a16_mxfp4")
    assert costs(root).token_curve(operation)(np.array([4.0]))[0] == pytest.approx(64 * latency_ms)
    assert costs(root, repair=False).token_curve(operation)(np.array([4.0]))[0] == pytest.approx(64 * 4e-3)


def test_tokens_go_to_all_ranks_only_while_these_are_few() -> None:
    """Over 16 ranks a token is sent to the 4 of its experts, over 8 to all."""
    block = MoeFeedForward(experts=64, active=4, intermediate_size=256)
    model = replace(MODEL, layers=(replace(MODEL.layers[0], feed_forward=block),))

    def kinds(ranks: int) -> set[tuple[Collective, float]]:
        layout = ReplicaLayout(dp=ranks, ep=ranks)
        context = PlanContext(model=model, layout=layout, precision=Precision(), engine="sglang", gpus_per_node=72)
        return {(op.kind, op.tokens_factor) for op in plan(context).decode if isinstance(op, Communication)}

    assert kinds(8) == {(Collective.ALL_GATHER, 8.0), (Collective.REDUCE_SCATTER, 8.0)}
    assert kinds(16) == {(Collective.ALL_TO_ALL, 4.0)}
