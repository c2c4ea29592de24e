"""What docs/configuration.md, docs/slo.md and docs/capacity.md show is what the product takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tuner.layers_context import FIELDS
from tuner.layers_file import LayerError, ProfileKind, layer_folders, read_layer, read_layers
from tuner.study_file import load_layered

DOCS = Path(__file__).parents[2] / "docs"
CONFIGURATION = (DOCS / "configuration.md").read_text()
BASE = "name: x\nworkload: {isl: 64, osl: 16, concurrency: 1}\n"
CPU_POOL = "node_pools: {local: {cpus_per_node: 2, price_per_hour: 1}}\n"


def blocks(page: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_the_studies_and_the_layer_of_the_page_are_taken(tmp_path: Path) -> None:
    small, profiled, layer = blocks("configuration.md")
    for text in (small, profiled):
        (tmp_path / "study.yaml").write_text(text)
        assert load_layered(tmp_path / "study.yaml").study.objectives
    assert small.splitlines()[0] == "name: ten-lines"
    assert len(small.splitlines()) <= 10
    example = yaml.safe_load((DOCS.parent / "examples" / "ten-lines.yaml").read_text())
    assert yaml.safe_load(small) == example
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "layer.yaml").write_text(layer)
    (tmp_path / "study.yaml").write_text(profiled + "layers: own\n")
    found = load_layered(tmp_path / "study.yaml", ["node_pools={h100: {}}"])
    assert found.study.space.tp == [1, 2, 4]
    assert found.study.space.replicas == [4]


def test_all_profiles_and_fields_are_listed() -> None:
    for kind in ProfileKind:
        (row,) = (line for line in CONFIGURATION.splitlines() if line.startswith(f"| {kind} |"))
        known = {layer.name for layer in read_layers(layer_folders()).values() if layer.kind is kind}
        assert set(re.findall(r"`([a-z0-9_]+)`", row)) == known
    listed = CONFIGURATION.split("Conditions are on these fields")[1].split(". A field")[0]
    assert set(re.findall(r"`([a-z_]+)`", listed)) == set(FIELDS)


def test_the_slos_and_prices_of_the_pages_are_taken(tmp_path: Path) -> None:
    (slos,), (prices,) = blocks("slo.md"), blocks("capacity.md")
    (tmp_path / "slo.yaml").write_text(BASE + CPU_POOL + slos)
    found = load_layered(tmp_path / "slo.yaml").study.slos
    assert {name: slo.kind for name, slo in found.items()} == {
        "ttft_p99_ms": "hard",
        "tpot_p50_ms": "hard",
        "e2e_p95_ms": "soft",
    }
    (tmp_path / "prices.yaml").write_text(BASE + "model: {name: Llama-3.1-8B}\n" + prices)
    study = load_layered(tmp_path / "prices.yaml").study
    assert (study.node_pools["h100"].price, study.budget.cost) == (9, 200)


def test_a_layer_without_a_purpose_is_no_layer(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\nstage: base\nset: {seed: 1}\n")
    with pytest.raises(LayerError, match="about"):
        read_layer(tmp_path / "x.yaml")
