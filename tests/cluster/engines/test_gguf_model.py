"""GGUF files written from a ModelSpec, and ModelSpecs read from GGUF files."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.engines.gguf_header import read_model
from cluster.engines.gguf_model import EOS_TOKEN, FIRST_WORD_TOKEN, write_model
from search_spaces.errors import InvalidValueError
from search_spaces.model import Attention, DenseFeedForward, LayerGroup, ModelSpec
from search_spaces.model_presets import TINY_MODEL
from tests.support.llamacpp import SMALL_MODEL


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 3))
    layers = LayerGroup(
        count=draw(st.integers(1, 3)),
        attention=Attention(
            heads=kv_heads * draw(st.integers(1, 3)), kv_heads=kv_heads, head_dim=draw(st.sampled_from([16, 32]))
        ),
        feed_forward=DenseFeedForward(intermediate_size=32 * draw(st.integers(1, 4))),
    )
    return ModelSpec(
        name=draw(st.text("abc-1", min_size=1, max_size=8)),
        hidden_size=32 * draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(512, 700)),
        layers=(layers,),
        tied_embeddings=draw(st.booleans()),
        weight_bits=draw(st.sampled_from([16.0, 32.0])),
        max_context=draw(st.integers(64, 5000)),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=models())
def test_a_written_model_is_read_back_as_it_was(model: ModelSpec, tmp_path: Path) -> None:
    path = write_model(model, tmp_path)
    assert read_model(path) == replace(model, source=str(path))


def test_the_same_model_is_written_once_and_another_elsewhere(tmp_path: Path) -> None:
    path = write_model(SMALL_MODEL, tmp_path)
    written = path.stat().st_mtime_ns
    content = path.read_bytes()
    assert write_model(replace(SMALL_MODEL, source="elsewhere"), tmp_path) == path
    assert path.stat().st_mtime_ns == written
    assert write_model(SMALL_MODEL, tmp_path, seed=1) != path
    assert write_model(replace(SMALL_MODEL, tied_embeddings=True), tmp_path) != path
    path.unlink()
    assert write_model(SMALL_MODEL, tmp_path).read_bytes() == content


def test_processes_that_race_agree_on_one_whole_file(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        paths = pool.starmap(write_model, [(TINY_MODEL, tmp_path)] * 4)
    assert [path.name for path in tmp_path.iterdir()] == [paths[0].name]
    assert len(set(paths)) == 1
    assert read_model(paths[0]).parameters == TINY_MODEL.parameters


def test_word_tokens_are_distinct_plain_words_and_alone_can_be_generated(tmp_path: Path) -> None:
    reader = GGUFReader(write_model(SMALL_MODEL, tmp_path))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    words = [token.replace("\u2581", " ") for token in tokens[FIRST_WORD_TOKEN:]]
    assert len(tokens) == SMALL_MODEL.vocab_size
    assert len(set(words)) == len(words)
    assert all(word.isascii() and word.startswith(" w") for word in words)
    head = next(np.asarray(t.data) for t in reader.tensors if t.name == "output.weight")
    assert not head[:FIRST_WORD_TOKEN].any()
    assert head[FIRST_WORD_TOKEN:].any(axis=1).all()
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == EOS_TOKEN


LAYER = SMALL_MODEL.layers[0]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (replace(SMALL_MODEL, weight_bits=8.0), "weight_bits=8.0"),
        (replace(SMALL_MODEL, vocab_size=100), "vocab_size=100"),
        (
            replace(SMALL_MODEL, layers=(LAYER, replace(LAYER, feed_forward=DenseFeedForward(intermediate_size=64)))),
            "one shape",
        ),
        (
            replace(SMALL_MODEL, layers=(replace(LAYER, attention=replace(LAYER.attention, window=64)),)),
            "without a window",
        ),
    ],
)
def test_models_that_cannot_be_written_are_refused(model: ModelSpec, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=words):
        write_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


def write_foreign(path: Path, **changes: object) -> Path:
    """A file as converters of other families write it: layers that differ, quantised weights, few keys."""
    writer = GGUFWriter(path, "qwen2")
    values: dict[str, object] = {
        "context_length": 8192,
        "embedding_length": 64,
        "block_count": 3,
        "attention.head_count": 4,
        "attention.head_count_kv": [2, 2, 1],
        "feed_forward_length": [128, 128, 96],
        **changes,
    }
    for name, value in values.items():
        if isinstance(value, list):
            writer.add_array(f"qwen2.{name}", value)
        elif value is not None:
            writer.add_uint32(f"qwen2.{name}", int(str(value)))
    blocks = np.zeros((512, 68), dtype=np.uint8)  # 64 weights a row: two blocks of 34 bytes
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_another_family_with_uneven_quantised_layers_is_read(tmp_path: Path) -> None:
    model = read_model(write_foreign(tmp_path / "other.gguf"))
    attention = Attention(heads=4, kv_heads=2, head_dim=16)
    assert model.layers == (
        LayerGroup(count=2, attention=attention, feed_forward=DenseFeedForward(intermediate_size=128)),
        LayerGroup(
            count=1, attention=replace(attention, kv_heads=1), feed_forward=DenseFeedForward(intermediate_size=96)
        ),
    )
    assert model.weight_bits == 8.5
    assert model.tied_embeddings
    assert (model.name, model.vocab_size, model.max_context) == ("other", 512, 8192)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"feed_forward_length": None}, "has no qwen2.feed_forward_length"),
        ({"expert_count": 8}, "8 experts"),
        ({"attention.key_length": 32, "attention.value_length": 16}, "differ in width"),
    ],
)
def test_models_of_other_kinds_are_refused(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=words):
        read_model(write_foreign(tmp_path / "other.gguf", **changes))


def test_what_is_no_whole_gguf_is_refused(tmp_path: Path) -> None:
    whole = write_model(SMALL_MODEL, tmp_path)
    cut, other = tmp_path / "cut.gguf", tmp_path / "other.gguf"
    cut.write_bytes(whole.read_bytes()[:200_000])
    other.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(InvalidValueError, match="is damaged"):
        read_model(cut)
    with pytest.raises(InvalidValueError, match="not b'GGUF'"):
        read_model(other)
    with pytest.raises(InvalidValueError, match="does not exist"):
        read_model(tmp_path / "none.gguf")
