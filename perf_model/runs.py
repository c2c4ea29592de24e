"""Measured serving runs from a CSV file, and what is known of how they were made.

The columns are those of the public file of runs (id, model, system, engine, precision, mode, isl, osl, concurrency,
ttft_ms, tpot_ms, parallel sizes, for disaggregated runs by role). Empty cells are allowed; a row that cannot do without
them says so.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perf_model.layout import ReplicaLayout
from perf_model.precision import Precision
from perf_model.tables import default_root
from search_spaces.errors import InvalidValueError
from search_spaces.hf_config import model_from_config
from search_spaces.known_models import known_model
from search_spaces.model import LatentAttention, ModelSpec
from search_spaces.serving import Mode

NEEDED = ("id", "model", "system", "engine", "mode", "isl", "osl", "ttft_ms", "tpot_ms")
ROLES = ("prefill_", "decode_")  # how the columns of a role begin
LENGTH_SHARE = 0.9  # lengths were drawn evenly between 80% and 100% of isl and osl
LARGEST_TP = 16  # tensor-parallel ranks of a replica in any public recipe
BURST_SHARE = 0.1  # a run of ten requests for each user starts with one of each user at once
# Lengths (isl, osl) of InferenceX, whose client draws them; the other public runs keep them equal.
DRAWN_LENGTHS = frozenset({("1024", "1024"), ("1024", "8192"), ("8192", "1024")})
# With equal lengths, engines whose prefill stops decoding keep users in step; the others spread them.
EQUAL_BURST_SHARE = {"sglang": 1.0}
EQUAL_CLIENT_MS = 30.0  # what the client of the runs of equal lengths adds to the time to first token (fitted)
POLLED_STEPS = (10.0, 40.0)  # fitted to SGLang's runs on B200, below and from 16 requests in flight
WORDS_OF_PRECISION = {"nvfp4": "fp4", "fp8": "fp8", "fp8_block": "fp8", "bfloat16": "bf16", "int4_wo": "int4"}


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Speculative decoding of a run: a step checks `drafted` tokens beside the last one and yields `accepted`.

    `accepted` is net of the time that drafting takes.
    """

    drafted: float = 0.0
    accepted: float = 1.0


PLAIN = Speculation()
# Tokens that come of a step with three drafted tokens and with one (fitted to the runs that draft; random prompts).
THREE, ONE = Speculation(drafted=3.0, accepted=2.2), Speculation(drafted=1.0, accepted=1.4)


@dataclass(frozen=True, kw_only=True)
class RunPool:
    """One role of a run: its layout and its replicas."""

    layout: ReplicaLayout
    replicas: int = 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured run. `pools` holds one pool, or the prefill and the decode pool.

    `length_share` is the mean of lengths over `isl` and `osl`, `burst_share` the share of requests that meet as the
    first ones do, `admission_steps` the steps between the scheduler's looks at its queue (0: as its engine does),
    `client_ms` what the client adds to TTFT. `concurrency` counts the requests in flight on all replicas together.
    """

    id: str
    model: ModelSpec
    model_name: str
    system: str
    engine: str
    engine_version: str
    precision: Precision
    mode: Mode
    isl: float
    osl: float
    concurrency: float
    pools: tuple[RunPool, ...]
    stream_tokens: float
    admission_steps: float
    ttft_ms: float
    tpot_ms: float
    length_share: float = LENGTH_SHARE
    burst_share: float = BURST_SHARE
    client_ms: float = 0.0
    speculation: Speculation = PLAIN

    @property
    def rank_users(self) -> float:
        """Requests in flight on an attention rank of the pool that decodes."""
        pool = self.pools[-1]
        return self.concurrency / (pool.layout.dp * pool.layout.pp * pool.replicas)


@dataclass(frozen=True, kw_only=True)
class Unpredictable:
    """A row that cannot be predicted, and why."""

    id: str
    mode: str
    reason: str


def read_runs(path: Path) -> list[Run | Unpredictable]:
    """Every row of `path`, in order; raises `InvalidValueError` for a file without the needed columns."""
    if not path.is_file():
        raise InvalidValueError(f"{path} is no file; give a CSV file of measured runs")
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise InvalidValueError(f"{path} lacks the columns {', '.join(missing)}; needed are {', '.join(NEEDED)}")
        rows = list(reader)
    known = _completely_listed(rows)
    return [_run(_completed(row, known)) for row in rows]


def _completely_listed(rows: Sequence[Mapping[str, str]]) -> dict[tuple[object, ...], dict[str, str]]:
    """Parallel sizes and worker counts of disaggregated runs by what identifies a run, where rows agree on them."""
    found: dict[tuple[object, ...], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        if not _lacks_workers(row):
            sizes = {name: text for name, text in row.items() if name.startswith(ROLES)}
            found[_identity(row)].append(sizes)
    return {identity: sizes[0] for identity, sizes in found.items() if all(each == sizes[0] for each in sizes)}


def _completed(row: Mapping[str, str], known: Mapping[tuple[object, ...], Mapping[str, str]]) -> Mapping[str, str]:
    """`row`, with the sizes of a row that lists the same run completely where this one lacks its worker counts.

    The public file lists 186 runs twice. Rows without worker counts also tell sizes wrongly: attention data-parallel
    replicas stand there as tensor-parallel ones. So nothing but the other row can complete them.
    """
    if not row["mode"].startswith("disagg") or not _lacks_workers(row):
        return row
    return {**row, **known.get(_identity(row), {})}


def _lacks_workers(row: Mapping[str, str]) -> bool:
    return any(math.isnan(_number(row, f"{role}num_workers")) for role in ROLES)


def _identity(row: Mapping[str, str]) -> tuple[object, ...]:
    """What tells a measured run from others: where and how it was made, and what was measured to five digits."""
    words = tuple(row.get(name, "") for name in ("system", "engine", "precision", "isl", "osl", "concurrency"))
    return (*words, f"{_number(row, 'ttft_ms'):.5g}", f"{_number(row, 'tpot_ms'):.5g}")


def _run(row: Mapping[str, str]) -> Run | Unpredictable:
    mode = Mode.DISAGGREGATED if row["mode"].startswith("disagg") else Mode.AGGREGATED
    try:
        model = run_model(row["model"])
        pools = _pools(row, mode)
        precision = run_precision(row, model)
        concurrency = _concurrency(row, mode)
    except InvalidValueError as error:
        return Unpredictable(id=row["id"], mode=mode.value, reason=str(error))
    return Run(
        id=row["id"],
        model=model,
        model_name=row["model"],
        system=row["system"],
        engine=row["engine"],
        engine_version=row.get("engine_version", ""),
        precision=precision,
        mode=mode,
        isl=float(row["isl"]),
        osl=float(row["osl"]),
        concurrency=concurrency,
        pools=pools,
        stream_tokens=_stream_tokens(row, pools[0].layout, mode),
        admission_steps=_admission_steps(row, concurrency),
        ttft_ms=_number(row, "ttft_ms"),
        tpot_ms=_number(row, "tpot_ms"),
        length_share=LENGTH_SHARE if _drawn(row) else 1.0,
        burst_share=BURST_SHARE if _drawn(row) else EQUAL_BURST_SHARE.get(row["engine"], BURST_SHARE),
        client_ms=0.0 if _drawn(row) else EQUAL_CLIENT_MS,
        speculation=_speculation(row, pools[-1].layout),
    )


def run_model(name: str) -> ModelSpec:
    """The model of the catalogue, else that of a config.json beside the public tables; raises `InvalidValueError`."""
    try:
        return known_model(name)
    except InvalidValueError:
        root = default_root()
        file = root.parent / "model_configs" / f"{name.replace('/', '--')}_config.json" if root else None
        if file is None or not file.is_file():
            raise
        return model_from_config(json.loads(file.read_text(encoding="utf-8")), name=name)


def _number(row: Mapping[str, str], name: str) -> float:
    """A number, NaN for an empty cell."""
    text = (row.get(name) or "").strip()
    return float(text) if text else math.nan


def _size(row: Mapping[str, str], name: str) -> int:
    """A parallel size, 1 where the cell is empty or 0."""
    value = _number(row, name)
    return 1 if math.isnan(value) else max(int(value), 1)


def _concurrency(row: Mapping[str, str], mode: Mode) -> float:
    value = _number(row, "concurrency")
    if not math.isnan(value):
        return value
    batch = _number(row, "batch_size")
    if mode is Mode.DISAGGREGATED or math.isnan(batch):
        raise InvalidValueError("concurrency and batch_size are empty; fill one in")
    return batch * _size(row, "attention_dp_size") * _size(row, "pp_size")


def _pools(row: Mapping[str, str], mode: Mode) -> tuple[RunPool, ...]:
    if mode is Mode.AGGREGATED:
        layout = run_layout(row, "")
        _require_one_replica(layout)
        return (RunPool(layout=layout, replicas=_replicas(row)),)
    pools = []
    for role in ROLES:
        workers = _number(row, f"{role}num_workers")
        if math.isnan(workers) or workers < 1:
            raise InvalidValueError(f"{role}num_workers is empty; fill it in")
        pools.append(RunPool(layout=run_layout(row, role), replicas=int(workers)))
    return tuple(pools)


def _require_one_replica(layout: ReplicaLayout) -> None:
    """Refuse GPU totals of several pools.

    The public file lists some thirty runs of prefill and decode pools as aggregated ones. Their tensor-parallel sizes
    are 12 to 72, with experts cut as finely, and most divide no model.
    """
    if layout.tp > LARGEST_TP and layout.ep == layout.dp == 1:
        raise InvalidValueError(
            f"tp={layout.tp} of an aggregated run counts the GPUs of several pools; give the sizes of each"
        )


def _replicas(row: Mapping[str, str]) -> int:
    """Replicas of an aggregated run: `batch_size` counts the requests of a rank, concurrency those of all replicas."""
    batch, users = _number(row, "batch_size"), _number(row, "concurrency")
    if math.isnan(batch) or math.isnan(users) or batch < 1:
        return 1
    return max(round(users / (batch * _size(row, "attention_dp_size") * _size(row, "pp_size"))), 1)


def _speculation(row: Mapping[str, str], layout: ReplicaLayout) -> Speculation:
    """Speculative decoding, which no column tells, where the public recipe of a run drafts.

    The image of TensorRT-LLM 1.2.0rc6.post3 is that of the recipes dsr1-fp4-b200-trt-mtp and dsr1-fp8-b200-trt-mtp
    alone: three drafted tokens, one where attention is data-parallel.
    """
    if row["engine"] == "trtllm" and row.get("engine_version") == "1.2.0rc6.post3":
        return THREE if layout.dp == 1 else ONE
    return PLAIN


def run_layout(row: Mapping[str, str], role: str) -> ReplicaLayout:
    """The layout behind a row's sizes.

    Some rows of the public file hold products in place of sizes: where expert tensor and expert parallel sizes are
    equal and their product is tp * dp, the GPUs are as many as either of them; and tp = dp with ep = tp * dp means
    that many GPUs with tensor and expert parallelism. Rows of the same runs written plainly have the same figures.
    """
    tp, pp, dp = (_size(row, f"{role}{name}") for name in ("tp_size", "pp_size", "attention_dp_size"))
    moe_tp, ep = (_size(row, f"{role}{name}") for name in ("moe_tp_size", "moe_ep_size"))
    ranks = tp * dp
    if moe_tp == ep > 1 and moe_tp * ep == ranks:
        return ReplicaLayout(tp=1 if dp > 1 else ep, pp=pp, dp=ep if dp > 1 else 1, ep=ep)
    if tp == dp > 1 and ep == ranks:
        return ReplicaLayout(tp=tp, pp=pp, dp=1, ep=tp)
    return ReplicaLayout(tp=tp, pp=pp, dp=dp, ep=ep if ranks % ep == 0 else 1)


def run_precision(row: Mapping[str, str], model: ModelSpec) -> Precision:
    """Formats of a run: those of its precision and, where the row is silent, of the usual recipes.

    The cache is fp8 with fp8 and fp4 weights, but bf16 with SGLang on Hopper GPUs and with vLLM on H100, as the
    capacity seen in saturated runs tells.
    """
    word = (row.get("precision") or "").strip()
    word = word or WORDS_OF_PRECISION.get((row.get("gemm_quant_mode") or "").strip(), "bf16")
    formats = _formats(word, model)
    hopper = row["system"].startswith("h")
    plain_cache = (row["engine"] == "sglang" and hopper) or (row["engine"] == "vllm" and row["system"] == "h100_sxm")
    return replace(formats, cache="bfloat16") if plain_cache else formats


def _formats(word: str, model: ModelSpec) -> Precision:
    latent = any(isinstance(group.attention, LatentAttention) for group in model.layers)
    if word == "fp8":
        block = "fp8" if model.quantization in {"", "fp8"} and not model.expert_parameters else "fp8_block"
        return Precision(gemm=block, projections=block, moe=block, cache="fp8")
    if word == "fp4" and model.quantization == "mxfp4":
        return Precision(moe="w4a16_mxfp4", cache="fp8")
    if word == "fp4":
        return Precision(gemm="nvfp4", projections="bfloat16" if latent else "nvfp4", moe="nvfp4", cache="fp8")
    if word == "int4":
        return Precision(moe="int4_wo")
    if word in {"bf16", "fp16"}:
        return Precision()
    raise InvalidValueError(f"precision {word!r} is unknown; choose bf16, fp8, fp4 or int4")


def _admission_steps(row: Mapping[str, str], concurrency: float) -> float:
    """Steps between two looks at the queue, 0 for the engine's own.

    SGLang's public recipes set --scheduler-recv-interval to 10, and to 30 from 16 requests in flight, on Blackwell GPUs
    for every model but GLM-5, and never on Hopper GPUs. First tokens wait longer than that: see `POLLED_STEPS`.
    """
    polled = row["engine"] == "sglang" and not row["system"].startswith("h") and "GLM" not in row["model"]
    if not polled or not _drawn(row):
        return 0.0
    return POLLED_STEPS[0] if concurrency < 16 else POLLED_STEPS[1]


def _stream_tokens(row: Mapping[str, str], layout: ReplicaLayout, mode: Mode) -> float:
    """Tokens in a packet of the answer: 20 in TensorRT-LLM's recipe for Llama 70B at 1024/1024 on fewer than 8 GPUs.

    The TTFT of those runs, and of no others, exceeds that of the same model at other lengths by 20 TPOT at every load.
    """
    dense_recipe = row["engine"] == "trtllm" and row["model"].endswith("Llama-3.1-70B") and mode is Mode.AGGREGATED
    return 20.0 if dense_recipe and (row["isl"], row["osl"]) == ("1024", "1024") and layout.tp < 8 else 1.0


def _drawn(row: Mapping[str, str]) -> bool:
    """True where lengths were drawn from a range; equal lengths keep users in step."""
    return (row["isl"], row["osl"]) in DRAWN_LENGTHS
