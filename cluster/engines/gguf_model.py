"""A small random-weight GGUF file, written from a `ModelSpec`.

The vocabulary of a written model is made for measuring. Every word token is a plain ASCII word of its own (" w0",
" w1", ...), so that a streamed token is always one whole piece of text. The byte tokens below them let any text be
tokenised. Special and byte tokens have output rows of zeros: their logit is 0, which the largest of some hundred
random logits always exceeds, so greedy decoding never yields one, and no answer ends early.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from search_spaces.errors import require
from search_spaces.model import Attention, DenseFeedForward, ModelSpec
from search_spaces.serving import canonical_key

if TYPE_CHECKING:
    from gguf import GGUFWriter

    Matrix = np.ndarray[tuple[int, ...], np.dtype[np.floating]]

BOS_TOKEN = 1
EOS_TOKEN = 2
FIRST_BYTE_TOKEN = 3
FIRST_WORD_TOKEN = FIRST_BYTE_TOKEN + 256
SMALLEST_VOCABULARY = 512
_WEIGHT_TYPES: dict[float, type[np.floating]] = {16.0: np.float16, 32.0: np.float32}
_FILE_TYPES = {16.0: 1, 32.0: 0}  # llama.cpp's numbers for "mostly f16" and "all f32"
_REMEDY = "give a GGUF file as the model's source"
FORMAT = 1  # part of a file's key: raise it when the same ModelSpec is written differently


def write_model(model: ModelSpec, directory: Path, *, seed: int = 0) -> Path:
    """Path of a random-weight GGUF of `model` in `directory`, written unless it is there.

    The file name holds a key of everything that decides its content. The file appears by an atomic rename, so several
    processes may call this at once. Raises `InvalidValueError` for a model that llama.cpp's `llama` architecture
    cannot hold.
    """
    _check_writable(model)
    path = directory / f"random-{_content_key(model, seed)}.gguf"
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=directory, prefix=path.name, suffix=".partial")
    os.close(descriptor)
    try:
        _write(model, Path(partial), seed)
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def _content_key(model: ModelSpec, seed: int) -> str:
    attention, block = _layer(model)
    return canonical_key(
        {
            "format": FORMAT,
            "seed": seed,
            "name": model.name,
            "layers": [model.num_layers, attention.heads, attention.kv_heads, attention.head_dim],
            "sizes": [model.hidden_size, block.intermediate_size, model.vocab_size, model.max_context],
            "weights": [model.weight_bits, model.tied_embeddings],
        }
    )


def _layer(model: ModelSpec) -> tuple[Attention, DenseFeedForward]:
    """The one layer shape of `model`; raises `InvalidValueError` where it has several or another kind."""
    attention, block = model.plain_layer()
    plain = Attention(heads=attention.heads, kv_heads=attention.kv_heads, head_dim=attention.head_dim)
    require(
        {(group.attention, group.feed_forward) for group in model.layers} == {(plain, block)},
        f"model {model.name!r} has layers that a random-weight GGUF cannot hold: it takes one shape of plain "
        f"grouped-query attention without a window and a dense block; {_REMEDY}",
    )
    return attention, block


def _check_writable(model: ModelSpec) -> None:
    require(
        model.weight_bits in _WEIGHT_TYPES,
        f"weight_bits={model.weight_bits} of model {model.name!r}: a random-weight GGUF holds 16 or 32 bits: "
        f"set one of them or {_REMEDY}",
    )
    require(
        model.vocab_size >= SMALLEST_VOCABULARY,
        f"vocab_size={model.vocab_size} of model {model.name!r} must be at least {SMALLEST_VOCABULARY} "
        f"for a random-weight GGUF",
    )


def _write(model: ModelSpec, path: Path, seed: int) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    _add_shape(writer, model)
    _add_vocabulary(writer, model.vocab_size)
    for name, tensor in _tensors(model, np.random.default_rng(seed)):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: GGUFWriter, model: ModelSpec) -> None:
    attention, block = _layer(model)
    writer.add_name(model.name)
    writer.add_file_type(_FILE_TYPES[model.weight_bits])
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_context)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(block.intermediate_size)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)


def _add_vocabulary(writer: GGUFWriter, size: int) -> None:
    """A SentencePiece vocabulary: 3 special tokens, 256 bytes, and words.

    The first word is the stem of all others: the tokeniser reaches " w123" by joining " w", " w1", " w12".
    """
    from gguf import TokenType

    words = ["\u2581w"] + [f"\u2581w{number}" for number in range(size - FIRST_WORD_TOKEN - 1)]
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + words
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    kinds += [TokenType.NORMAL] * len(words)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * FIRST_WORD_TOKEN + [-float(rank) for rank in range(len(words))])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(BOS_TOKEN)
    writer.add_eos_token_id(EOS_TOKEN)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def _tensors(model: ModelSpec, random: np.random.Generator) -> Iterator[tuple[str, Matrix]]:
    """Name and weights of every tensor; matrices are [outputs, inputs], normal with variance 1 / inputs."""
    norm = np.ones(model.hidden_size, dtype=np.float32)
    dtype = _WEIGHT_TYPES[model.weight_bits]
    for name, matrix in _embeddings(model, random):
        yield name, matrix.astype(dtype)
    yield "output_norm.weight", norm
    shapes = _layer_shapes(model)
    for index in range(model.num_layers):
        yield f"blk.{index}.attn_norm.weight", norm
        yield f"blk.{index}.ffn_norm.weight", norm
        for name, shape in shapes.items():
            yield f"blk.{index}.{name}.weight", _normal(random, shape).astype(dtype)


def _layer_shapes(model: ModelSpec) -> dict[str, tuple[int, int]]:
    attention, block = _layer(model)
    hidden, inner = model.hidden_size, block.intermediate_size
    query, key = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    return {
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }


def _embeddings(model: ModelSpec, random: np.random.Generator) -> Iterator[tuple[str, Matrix]]:
    shape = (model.vocab_size, model.hidden_size)
    head = _normal(random, shape)
    head[:FIRST_WORD_TOKEN] = 0
    if model.tied_embeddings:
        yield "token_embd.weight", head
        return
    yield "token_embd.weight", _normal(random, shape)
    yield "output.weight", head


def _normal(random: np.random.Generator, shape: tuple[int, int]) -> Matrix:
    return random.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[1]))
