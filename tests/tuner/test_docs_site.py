"""The documentation site builds without a warning, fetches nothing, and its examples are what the product takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from search_spaces.engines import ENGINES
from search_spaces.metrics import METRICS
from tuner.cli import app
from tuner.study_file import load_layered
from tuner.study_schema import StudyFile

pytest.importorskip("material", reason="the documentation's packages are in the dev extra")
ROOT = Path(__file__).parents[2]
PAGES = ("tutorial.md", "tutorial-cluster.md", "howto/study-file.md", "howto/emulate.md")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_document_is_a_page(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), page
    assert not list(site.rglob("*.py"))


def test_no_page_fetches_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        found = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(https?:[^\"'> ]+)", page.read_text())
        assert not found, f"{page}: {found}"


def test_the_reference_has_every_command_key_metric_and_option(site: Path) -> None:
    def text(name: str) -> str:
        return (site / "reference" / name).read_text()

    for words in _commands(get_command(app), ("tuner",))[1:]:
        assert f"<code>{' '.join(words)}</code>" in text("commands.html")
    for key in StudyFile.model_fields:
        assert f"<td><code>{key}</code></td>" in text("study-file.html")
    assert "<code>node_pools.NAME.engines.NAME</code>" in text("study-file.html")
    for metric in METRICS:
        assert f"<code>{metric}</code>" in text("metrics.html")
    for option in (option for spec in ENGINES.values() for option in spec.parameters):
        assert f"<code>{option.name}</code>" in text("engine-options.html")
    for program in (ROOT / "benchmarks").glob("*.py"):
        assert program.name in text("benchmarks.html")


def _commands(command: object, words: tuple[str, ...]) -> list[tuple[str, ...]]:
    below = getattr(command, "commands", {})
    return [words, *(found for name, sub in below.items() for found in _commands(sub, (*words, name)))]


@pytest.mark.parametrize("page", PAGES)
def test_the_studies_of_the_guides_are_taken(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^( *)```yaml\n(.*?)^ *```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    for indent, text in blocks:
        (tmp_path / "study.yaml").write_text("\n".join(line.removeprefix(indent) for line in text.splitlines()))
        assert load_layered(tmp_path / "study.yaml").study.objectives
