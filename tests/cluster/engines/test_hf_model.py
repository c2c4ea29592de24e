from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.engines.hf_model import has_weights, loadable_folder
from search_spaces.errors import InvalidValueError
from search_spaces.hf_config import read_model
from search_spaces.known_models import known_model
from search_spaces.model_presets import TINY_MODEL


def test_a_written_folder_reads_back_as_the_same_model(tmp_path: Path) -> None:
    folder = Path(loadable_folder(TINY_MODEL, tmp_path))
    read = read_model(folder, name=TINY_MODEL.name)
    assert replace(read, source=None, architecture="") == TINY_MODEL
    assert loadable_folder(TINY_MODEL, tmp_path) == str(folder)
    assert [path for path in tmp_path.iterdir() if path != folder] == []
    assert not has_weights(str(folder))
    assert loadable_folder(replace(TINY_MODEL, source=str(folder)), tmp_path / "other") == str(folder)


def test_every_token_is_a_word_of_its_own(tmp_path: Path) -> None:
    folder = Path(loadable_folder(TINY_MODEL, tmp_path))
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(TINY_MODEL.vocab_size))


def test_a_folder_with_a_shape_alone_gets_a_tokenizer_and_one_with_weights_is_left(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    written = Path(loadable_folder(TINY_MODEL, tmp_path))
    (bare / "config.json").write_text((written / "config.json").read_text())
    model = replace(TINY_MODEL, source=str(bare))
    folder = Path(loadable_folder(model, tmp_path / "made"))
    assert folder != bare
    assert (folder / "tokenizer.json").is_file()
    (bare / "model.safetensors").touch()
    assert loadable_folder(model, tmp_path / "made") == str(bare)
    assert has_weights(str(bare))


def test_a_name_is_left_to_the_engine(tmp_path: Path) -> None:
    named = replace(TINY_MODEL, source="someone/some-model")
    assert loadable_folder(named, tmp_path) == "someone/some-model"
    assert has_weights("someone/some-model")


def test_a_shape_that_cannot_be_written_asks_for_a_source(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="source"):
        loadable_folder(replace(known_model("Mixtral-8x7B-v0.1"), source=None), tmp_path)
