"""Reads a Hugging Face `config.json` into a `ModelSpec`. Nothing is downloaded: the file must be there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from search_spaces.errors import InvalidValueError
from search_spaces.model import (
    AnyAttention,
    AnyFeedForward,
    Attention,
    DenseFeedForward,
    LatentAttention,
    LayerGroup,
    LinearAttention,
    ModelSpec,
    MoeFeedForward,
)

Config = Mapping[str, Any]

# Architectures whose layers are understood here, by the words of their config; the value says which kind they are.
FAMILIES: dict[str, str] = {
    **dict.fromkeys(
        (
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "PhiForCausalLM",
            "Phi3ForCausalLM",
            "GemmaForCausalLM",
            "Gemma2ForCausalLM",
            "Gemma3ForCausalLM",
            "Gemma3ForConditionalGeneration",
            "MiMoForCausalLM",
            "Qwen3VLForConditionalGeneration",
        ),
        "dense",
    ),
    **dict.fromkeys(
        (
            "MixtralForCausalLM",
            "Qwen2MoeForCausalLM",
            "Qwen3MoeForCausalLM",
            "GptOssForCausalLM",
            "MiniMaxM2ForCausalLM",
            "Glm4MoeForCausalLM",
            "Qwen3VLMoeForConditionalGeneration",
        ),
        "moe",
    ),
    **dict.fromkeys(
        (
            "DeepseekV2ForCausalLM",
            "DeepseekV3ForCausalLM",
            "DeepseekV32ForCausalLM",
            "KimiK2ForCausalLM",
            "KimiK25ForConditionalGeneration",
            "GlmMoeDsaForCausalLM",
        ),
        "latent",
    ),
    **dict.fromkeys(
        (
            "Qwen3NextForCausalLM",
            "Qwen3_5ForConditionalGeneration",
            "Qwen3_5MoeForConditionalGeneration",
            "Qwen3_5ForCausalLM",
            "Qwen3_5MoeForCausalLM",
        ),
        "hybrid",
    ),
}

WEIGHT_BITS = {"": 16.0, "fp8": 8.0, "fp8_block": 8.0, "nvfp4": 4.5, "mxfp4": 4.25, "int4": 4.5, "int8": 8.0}


def read_model(path: Path, *, name: str | None = None, nearest: bool = False) -> ModelSpec:
    """The model of `path`, a `config.json` or a folder that holds one.

    An architecture that is not in `FAMILIES` raises `InvalidValueError`, unless `nearest` asks for the family that its
    fields resemble most. Missing files and fields raise `InvalidValueError` too.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InvalidValueError(f"{file} is no file; give a Hugging Face config.json or a folder that holds one")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InvalidValueError(f"{file} is no JSON: {error}; give a Hugging Face config.json") from error
    raw = {"quantization_config": _beside(file), **raw}
    return model_from_config(raw, name=name or file.parent.name, source=str(file.parent), nearest=nearest)


def _beside(file: Path) -> Config:
    """What `hf_quant_config.json` beside a config says of quantisation; empty where there is none."""
    quantised = file.with_name("hf_quant_config.json")
    if not quantised.is_file():
        return {}
    found: Config = json.loads(quantised.read_text(encoding="utf-8")).get("quantization") or {}
    return found


def model_from_config(
    raw: Config, *, name: str, source: str | None = None, nearest: bool = False, quantization: str | None = None
) -> ModelSpec:
    """The model of a parsed `config.json`; multimodal configs yield their language model."""
    architecture = (raw.get("architectures") or ["unknown"])[0]
    config: Config = raw.get("text_config") or raw
    family = FAMILIES.get(architecture)
    if family is None and not nearest:
        known = ", ".join(sorted(FAMILIES))
        raise InvalidValueError(
            f"architecture {architecture!r} of model {name!r} is unknown; known are {known}; "
            "ask for the nearest family to model it all the same"
        )
    family = family or _resembled(config)
    method = _quantization(raw) if quantization is None else quantization
    return ModelSpec(
        name=name,
        hidden_size=_integer(config, "hidden_size", name),
        vocab_size=_integer(config, "vocab_size", name),
        layers=_layers(config, family, name),
        tied_embeddings=bool(config.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))),
        weight_bits=WEIGHT_BITS[method],
        max_context=int(config.get("max_position_embeddings") or 4096),
        source=source,
        architecture=architecture,
        quantization=method,
    )


def _resembled(config: Config) -> str:
    if "kv_lora_rank" in config:
        return "latent"
    if "linear_num_value_heads" in config:
        return "hybrid"
    return "moe" if _experts(config) else "dense"


def _integer(config: Config, field: str, name: str) -> int:
    value = config.get(field)
    if not isinstance(value, int):
        raise InvalidValueError(f"{field}={value!r} in the config of model {name!r} must be a whole number")
    return value


def _experts(config: Config) -> int:
    for field in ("n_routed_experts", "num_local_experts", "num_experts"):
        if config.get(field):
            return int(config[field])
    return 0


def _layers(config: Config, family: str, name: str) -> tuple[LayerGroup, ...]:
    """Groups of identical consecutive layers, merged where they repeat (only their number matters to cost)."""
    count = _integer(config, "num_hidden_layers", name)
    attention = _ATTENTION[family](config, count, name)
    blocks = _feed_forwards(config, count, name)
    kinds: dict[tuple[AnyAttention, AnyFeedForward], int] = {}
    for kind, run in groupby(zip(attention, blocks, strict=True)):
        kinds[kind] = kinds.get(kind, 0) + len(list(run))
    return tuple(LayerGroup(count=n, attention=a, feed_forward=f) for (a, f), n in kinds.items())


def _grouped_query(config: Config, name: str, window: int | None) -> Attention:
    heads = _integer(config, "num_attention_heads", name)
    full = window is None
    global_heads = config.get("num_global_key_value_heads") if full else None
    kv_heads = global_heads or config.get("num_key_value_heads") or heads
    head_dim = (config.get("global_head_dim") if full else None) or config.get("head_dim")
    model_type = str(config.get("model_type", ""))
    return Attention(
        heads=heads,
        kv_heads=int(kv_heads),
        head_dim=int(head_dim or config["hidden_size"] // heads),
        window=window,
        qk_norm=bool(config.get("use_qk_norm", model_type.startswith(("qwen3", "gemma3", "gemma4")))),
        output_gate=bool(config.get("attn_output_gate", model_type.startswith("qwen3_next"))),
    )


def _plain_attention(config: Config, count: int, name: str) -> list[AnyAttention]:
    return [_grouped_query(config, name, window) for window in _windows(config, count)]


def _windows(config: Config, count: int) -> list[int | None]:
    """Sliding window of each layer, None for full attention."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return [None] * count
    kinds = config.get("layer_types")
    if kinds:
        return [int(window) if kind == "sliding_attention" else None for kind in kinds]
    pattern = config.get("sliding_window_pattern")
    if pattern:
        return [None if (index + 1) % int(pattern) == 0 else int(window) for index in range(count)]
    if str(config.get("model_type")) == "gemma2":
        return [int(window) if index % 2 == 0 else None for index in range(count)]
    return [int(window)] * count


def _latent_attention(config: Config, count: int, name: str) -> list[AnyAttention]:
    topk = config.get("index_topk")
    layer = LatentAttention(
        heads=_integer(config, "num_attention_heads", name),
        q_rank=config.get("q_lora_rank"),
        kv_rank=_integer(config, "kv_lora_rank", name),
        nope_dim=_integer(config, "qk_nope_head_dim", name),
        rope_dim=_integer(config, "qk_rope_head_dim", name),
        v_dim=_integer(config, "v_head_dim", name),
        index_topk=topk,
        index_heads=int(config.get("index_n_heads") or 0),
        index_dim=int(config.get("index_head_dim") or 0),
    )
    return [layer] * count


def _hybrid_attention(config: Config, count: int, name: str) -> list[AnyAttention]:
    linear = LinearAttention(
        key_heads=_integer(config, "linear_num_key_heads", name),
        value_heads=_integer(config, "linear_num_value_heads", name),
        key_dim=_integer(config, "linear_key_head_dim", name),
        value_dim=_integer(config, "linear_value_head_dim", name),
        conv_kernel=int(config.get("linear_conv_kernel_dim") or 4),
    )
    full = _grouped_query(config, name, None)
    kinds = config.get("layer_types")
    if kinds:
        return [linear if kind == "linear_attention" else full for kind in kinds]
    interval = int(config.get("full_attention_interval") or 4)
    return [full if (index + 1) % interval == 0 else linear for index in range(count)]


_ATTENTION: dict[str, Callable[[Config, int, str], list[AnyAttention]]] = {
    "dense": _plain_attention,
    "moe": _plain_attention,
    "latent": _latent_attention,
    "hybrid": _hybrid_attention,
}


def _feed_forwards(config: Config, count: int, name: str) -> list[AnyFeedForward]:
    experts = _experts(config)
    if not experts:
        return [DenseFeedForward(intermediate_size=_integer(config, "intermediate_size", name))] * count
    moe = _mixture(config, experts, name)
    first_dense = int(config.get("first_k_dense_replace") or 0)
    dense_layers = set(range(first_dense)) | {int(index) for index in config.get("mlp_only_layers") or ()}
    step = int(config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1)
    dense_layers |= {index for index in range(count) if (index + 1) % step}
    if not dense_layers:
        return [moe] * count
    dense = DenseFeedForward(intermediate_size=_integer(config, "intermediate_size", name))
    return [dense if index in dense_layers else moe for index in range(count)]


def _mixture(config: Config, experts: int, name: str) -> MoeFeedForward:
    width = config.get("moe_intermediate_size") or _integer(config, "intermediate_size", name)
    shared = config.get("shared_expert_intermediate_size")
    if shared is None:
        shared = int(config.get("n_shared_experts") or 0) * width
    active = config.get("num_experts_per_tok") or config.get("experts_per_token") or config.get("top_k_experts")
    if not active:
        raise InvalidValueError(f"the config of model {name!r} lacks num_experts_per_tok; add it")
    return MoeFeedForward(
        experts=experts, active=int(active), intermediate_size=int(width), shared_intermediate_size=int(shared)
    )


def _quantization(raw: Config) -> str:
    """One word for the checkpoint's quantisation: "", fp8, fp8_block, nvfp4, mxfp4, int4 or int8."""
    found = raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config") or {}
    method = str(found.get("quant_method", "")).lower()
    algorithm = str(found.get("quant_algo", "")).lower()
    if not found:
        return ""
    if "nvfp4" in algorithm or "nvfp4" in json.dumps(found).lower():
        return "nvfp4"
    if method == "mxfp4":
        return "mxfp4"
    if method == "fp8" or "fp8" in algorithm or "float-quantized" in str(found.get("format", "")):
        return "fp8_block" if found.get("weight_block_size") else "fp8"
    if method == "compressed-tensors":
        bits = [g.get("weights", {}).get("num_bits") for g in found.get("config_groups", {}).values()]
        return "int4" if 4 in bits else "int8"
    if method in {"awq", "gptq"}:
        return "int4" if found.get("bits", 4) == 4 else "int8"
    raise InvalidValueError(
        f"quantisation method {method!r} is unknown; known are fp8, modelopt, mxfp4, compressed-tensors, awq and gptq"
    )
