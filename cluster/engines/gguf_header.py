"""The `ModelSpec` of a GGUF file, read from its header."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from search_spaces.errors import InvalidValueError, require
from search_spaces.model import Attention, DenseFeedForward, LayerGroup, ModelSpec

if TYPE_CHECKING:
    from gguf import GGUFReader


def read_model(path: Path) -> ModelSpec:
    """The model that the GGUF file at `path` holds, with `source` set; only its header is read.

    `weight_bits` is the mean over all matrices, so a mixed quantisation comes out as a fraction. Sliding windows are
    not told apart by layer in GGUF metadata: every layer is taken for one of full attention, which is what llama.cpp
    reserves at most. Raises `InvalidValueError` for a file that is no GGUF, is one part of several, or holds a model
    that is no dense decoder-only transformer.
    """
    from gguf import GGUFReader

    check_is_gguf(path)
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise InvalidValueError(f"the model file {path} is damaged ({error}); fetch it again") from error
    header = _Header(reader, path)
    _check_readable(header)
    hidden = header.number("embedding_length")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise InvalidValueError(f"the model file {path} has no token embedding; give a whole model")
    return ModelSpec(
        name=header.text("general.name") or path.stem,
        hidden_size=hidden,
        vocab_size=int(embedding.shape[1]),
        layers=_layer_groups(header, hidden),
        tied_embeddings="output.weight" not in tensors,
        weight_bits=_bits_per_weight(reader),
        max_context=header.number("context_length"),
        source=str(path.resolve()),
    )


def check_is_gguf(path: Path) -> None:
    """Raise `InvalidValueError` unless `path` is a file that begins as GGUF does."""
    require(path.is_file(), f"the model file {path} does not exist; give a GGUF file, or none for random weights")
    with path.open("rb") as file:
        magic = file.read(4)
    require(magic == b"GGUF", f"the model file {path} starts with {magic!r}, not b'GGUF'; give a GGUF file")


class _Header:
    """The metadata of a GGUF file; names are relative to the file's architecture unless they start with another."""

    def __init__(self, reader: GGUFReader, path: Path) -> None:
        self._fields, self.path = reader.fields, path
        self.architecture = self.text("general.architecture") or "unknown"

    def text(self, name: str) -> str | None:
        """The text called `name`, a full name."""
        field = self._fields.get(name)
        return None if field is None else str(field.contents())

    def numbers(self, name: str, default: int | None = None) -> list[int]:
        """The number or numbers (one for each layer) called `name`; raises `InvalidValueError` for what is missing."""
        full = name if name.startswith(("general.", "split.")) else f"{self.architecture}.{name}"
        field = self._fields.get(full)
        if field is None and default is None:
            raise InvalidValueError(
                f"the model file {self.path} ({self.architecture}) has no {full}; give a dense decoder-only model"
            )
        value = default if field is None else field.contents()
        return [int(item) for item in value] if isinstance(value, list) else [int(str(value))]

    def number(self, name: str, default: int | None = None) -> int:
        """The first of `numbers`."""
        return self.numbers(name, default)[0]


def _check_readable(header: _Header) -> None:
    parts, experts = header.number("split.count", 1), header.number("expert_count", 0)
    require(parts <= 1, f"the model file {header.path} is one of {parts} parts; merge them with llama-gguf-split first")
    require(experts == 0, f"the model file {header.path} has {experts} experts a layer; give a dense model")
    hidden, heads = header.number("embedding_length"), header.number("attention.head_count")
    key = header.number("attention.key_length", hidden // heads)
    value = header.number("attention.value_length", key)
    require(
        key == value,
        f"keys ({key}) and values ({value}) of {header.path} differ in width; give a model where they agree",
    )


def _layer_groups(header: _Header, hidden: int) -> tuple[LayerGroup, ...]:
    count = header.number("block_count")
    heads = _per_layer(header.numbers("attention.head_count"), count)
    kv_heads = _per_layer(header.numbers("attention.head_count_kv", heads[0]), count)
    inner = _per_layer(header.numbers("feed_forward_length"), count)
    head_dim = header.number("attention.key_length", hidden // heads[0])
    return tuple(
        LayerGroup(
            count=len(list(same)),
            attention=Attention(heads=shape[0], kv_heads=shape[1], head_dim=head_dim),
            feed_forward=DenseFeedForward(intermediate_size=shape[2]),
        )
        for shape, same in groupby(zip(heads, kv_heads, inner, strict=True))
    )


def _per_layer(values: list[int], count: int) -> list[int]:
    return values * count if len(values) == 1 else values


def _bits_per_weight(reader: GGUFReader) -> float:
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) > 1]
    return 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)
