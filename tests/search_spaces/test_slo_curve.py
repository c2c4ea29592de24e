"""The picture of the penalty in the documentation is the one that its script draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_committed_picture_is_what_the_script_draws(tmp_path: Path) -> None:
    drawn = tmp_path / "curve.svg"
    subprocess.run([sys.executable, ROOT / "benchmarks" / "slo_curve.py", str(drawn)], check=True, timeout=60, cwd=ROOT)
    assert drawn.read_text() == (ROOT / "docs" / "images" / "slo-penalty.svg").read_text()
