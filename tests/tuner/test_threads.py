"""The coordinator computes in one thread, beside engines that may need the other cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = (
    "import tuner, numpy, os; square = numpy.ones((400, 400)); square @ square; "
    "print(len(os.listdir('/proc/self/task')))"
)


def threads(**environment: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env=kept | environment, capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux's /proc")
def test_linear_algebra_takes_one_thread_unless_the_user_wants_more() -> None:
    assert threads() == 1
    if (os.cpu_count() or 1) > 1:
        assert threads(OPENBLAS_NUM_THREADS="2") == 2
