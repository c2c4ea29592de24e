"""Models read from config.json: sizes against what their makers publish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from search_spaces.errors import InvalidValueError
from search_spaces.hf_config import model_from_config, read_model
from search_spaces.known_models import known_model, known_names
from search_spaces.model import Attention, LatentAttention, LinearAttention, MoeFeedForward

# Parameters in 10^9 as the model cards state them: total and, for mixtures, active per token.
PUBLISHED = {
    "Llama-3.1-8B": (8.03, None),
    "Llama-3.1-70B": (70.6, None),
    "Llama-3.1-405B": (405.9, None),
    "Qwen3-8B": (8.19, None),
    "Qwen3-32B": (32.8, None),
    "Qwen3-30B-A3B": (30.5, 3.3),
    "Qwen3-235B-A22B": (235.0, 22.0),
    "Qwen3-Coder-480B-A35B-Instruct": (480.0, 35.0),
    "Qwen3.5-397B-A17B": (397.0, 17.0),
    "DeepSeek-V3": (671.0, 37.0),
    "DeepSeek-R1": (671.0, 37.0),
    "Kimi-K2-Instruct": (1026.0, 32.0),
    "GLM-5": (744.0, 40.0),
    "gpt-oss-120b": (116.8, 5.1),
    "gpt-oss-20b": (20.9, 3.6),
    "Mixtral-8x7B-v0.1": (46.7, 12.9),
    "Mixtral-8x22B-v0.1": (140.6, 39.1),
    "MiniMax-M2.5": (229.0, 10.0),
}
# Bytes of KV cache per token at 16 bits: 4 * layers * kv heads * head size, or 2 * layers * 576 for latent ones.
KV_BYTES = {
    "Llama-3.1-8B": 131_072,
    "Llama-3.1-70B": 327_680,
    "Qwen3-32B": 262_144,
    "Qwen3-235B-A22B": 192_512,
    "DeepSeek-V3": 70_272,
    "Kimi-K2-Instruct": 70_272,
    "gpt-oss-120b": 73_728,
    "Qwen3.5-397B-A17B": 30_720,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    total, active = PUBLISHED[name]
    model = known_model(name)
    assert model.parameters / 1e9 == pytest.approx(total, rel=0.01)
    if active is not None and "gpt-oss" not in name:  # its card leaves the embeddings out
        assert model.active_parameters / 1e9 == pytest.approx(active, rel=0.12)


@pytest.mark.parametrize("name", KV_BYTES)
def test_cache_bytes_per_token(name: str) -> None:
    assert known_model(name).kv_bytes_per_token() == KV_BYTES[name]


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("DeepSeek-V3", 671), ("gpt-oss-120b", 62), ("Llama-3.1-70B", 141), ("Kimi-K2.5", 577)]
)
def test_weight_bytes_follow_the_checkpoints_format(name: str, gigabytes: float) -> None:
    assert known_model(name).weight_bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_every_shipped_config_reads() -> None:
    assert len(known_names()) >= 20
    for name in known_names():
        assert known_model(name).num_layers > 0


def test_names_are_found_whatever_organisation_and_quantisation_they_carry() -> None:
    plain = known_model("DeepSeek-R1")
    assert known_model("nvidia/DeepSeek-R1-NVFP4").layers == plain.layers
    assert known_model("meta-llama/Meta-Llama-3.1-70B").parameters == known_model("Llama-3.1-70B").parameters
    with pytest.raises(InvalidValueError, match=r"llama-3\.1"):
        known_model("Llama-3.9-70B")


def test_windows_alternate_in_gpt_oss() -> None:
    groups = known_model("gpt-oss-120b").layers
    windows = {g.attention.window: g.count for g in groups if isinstance(g.attention, Attention)}
    assert windows == {128: 18, None: 18}


def test_deepseek_has_three_dense_layers_and_latent_attention() -> None:
    groups = known_model("DeepSeek-V3").layers
    assert [(g.count, isinstance(g.feed_forward, MoeFeedForward)) for g in groups] == [(3, False), (58, True)]
    assert all(isinstance(g.attention, LatentAttention) for g in groups)


def test_hybrid_models_have_three_linear_layers_for_each_full_one() -> None:
    groups = known_model("Qwen3.5-397B-A17B").layers
    counts = {type(g.attention): g.count for g in groups}
    assert counts == {LinearAttention: 45, Attention: 15}


def write(path: Path, **fields: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return path


TINY = {
    "hidden_size": 64,
    "vocab_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def test_a_folder_is_read(tmp_path: Path) -> None:
    model = read_model(write(tmp_path / "m", architectures=["LlamaForCausalLM"], **TINY))
    assert model.name == "m"
    assert model.parameters == 2 * 100 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128)


def test_an_unknown_architecture_is_refused_unless_the_nearest_is_asked_for(tmp_path: Path) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    folder = write(tmp_path / "m", architectures=["MysteryForCausalLM"], **experts, **TINY)
    with pytest.raises(InvalidValueError, match="MysteryForCausalLM"):
        read_model(folder)
    model = read_model(folder, nearest=True)
    assert isinstance(model.layers[0].feed_forward, MoeFeedForward)


def test_missing_files_and_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"config\.json"):
        read_model(tmp_path)
    with pytest.raises(InvalidValueError, match="hidden_size"):
        model_from_config({"architectures": ["LlamaForCausalLM"]}, name="m")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InvalidValueError, match="no JSON"):
        read_model(tmp_path)


def test_quantisation_is_read_from_the_file_beside_the_config(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", architectures=["LlamaForCausalLM"], **TINY)
    beside = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(beside), encoding="utf-8")
    assert read_model(folder).quantization == "fp8"


def test_quantisation_is_read() -> None:
    config = {"architectures": ["LlamaForCausalLM"], **TINY}
    for found, word in (
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ):
        assert model_from_config({**config, "quantization_config": found}, name="m").quantization == word
    with pytest.raises(InvalidValueError, match="wonder"):
        model_from_config({**config, "quantization_config": {"quant_method": "wonder"}}, name="m")
