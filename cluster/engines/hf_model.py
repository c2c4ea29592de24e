"""A model's folder as Hugging Face has it, written from a `ModelSpec`: its shape and a tokenizer, but no weights.

Engines fill such a model with random weights themselves (`--load-format dummy` of vLLM and SGLang). Every token is a
word of its own, so that each streamed token is a piece of text.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from search_spaces.errors import InvalidValueError, require
from search_spaces.model import Attention, ModelSpec
from search_spaces.serving import canonical_key

FORMAT = 1  # part of a folder's key: raise it when the same ModelSpec is written differently
DTYPES = {16.0: "bfloat16", 32.0: "float32"}
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
_SPECIAL = ("<unk>", "<s>", "</s>")


def has_weights(source: str) -> bool:
    """True where `source` holds weights, or is no folder of this machine: then it names a model that does."""
    folder = Path(source)
    return not folder.is_dir() or any(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))


def loadable_folder(model: ModelSpec, directory: Path) -> str:
    """What an engine loads for `model`: its source, or a folder in `directory` that is written for it.

    A folder is written where `model` has no source, and where its source is a folder without weights and tokenizer.
    Raises `InvalidValueError` for a shape that cannot be written.
    """
    if model.source is None:
        return str(_written(model, _config(model), directory))
    source = Path(model.source)
    if not source.is_dir() or has_weights(model.source) or any((source / name).is_file() for name in TOKENIZER_FILES):
        return model.source
    return str(_written(model, _json(source / "config.json"), directory))


def _json(file: Path) -> dict[str, object]:
    try:
        tree: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidValueError(f"{file} cannot be read ({error}); give a folder with a config.json") from error
    return tree


def _config(model: ModelSpec) -> dict[str, object]:
    """The `config.json` of a dense Llama of the shape of `model`."""
    attention, block = model.plain_layer()
    plain = Attention(heads=attention.heads, kv_heads=attention.kv_heads, head_dim=attention.head_dim)
    require(
        {(group.attention, group.feed_forward) for group in model.layers} == {(plain, block)}
        and model.weight_bits in DTYPES,
        f"model {model.name!r} has layers or weights that no folder can be written for: it takes one shape of plain "
        "grouped-query attention and dense block, of 16 or 32 bits; give model.source",
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": block.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_context,
        "tie_word_embeddings": model.tied_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": DTYPES[model.weight_bits],
    }


def _tokenizer(vocab_size: int) -> dict[str, object]:
    """A `tokenizer.json` in which each of `vocab_size` tokens is a word."""
    words = [*_SPECIAL, *(f"w{number}" for number in range(len(_SPECIAL), vocab_size))]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, word in enumerate(_SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: n for n, w in enumerate(words)}, "unk_token": _SPECIAL[0]},
    }


def _tokenizer_config(model: ModelSpec) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": _SPECIAL[0],
        "bos_token": _SPECIAL[1],
        "eos_token": _SPECIAL[2],
        "model_max_length": model.max_context,
        "clean_up_tokenization_spaces": False,
    }


def _written(model: ModelSpec, config: dict[str, object], directory: Path) -> Path:
    """The folder, which appears by an atomic rename: several processes may write it at once."""
    vocab_size = int(str(config.get("vocab_size", model.vocab_size)))
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer.json": _tokenizer(vocab_size),
        "tokenizer_config.json": _tokenizer_config(model),
    }
    folder = directory / f"random-{canonical_key({'format': FORMAT, 'files': files})}"
    if folder.is_dir():
        return folder.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=directory, prefix=f"{folder.name}-"))
    for name, tree in files.items():
        (partial / name).write_text(json.dumps(tree), encoding="utf-8")
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial)
        if not folder.is_dir():
            raise
    return folder.resolve()
