"""Who sent signal 9, the kernel for want of memory or somebody else: produced for real in a memory group."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.memory_kills import KillCount, kill_count, killed_for_memory

ROOT = Path("/sys/fs/cgroup")
LIMIT_BYTES = 300 * 2**20
GROUPED = """
import json, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text("0")
from tests.support.memory_hog import outcome
print(json.dumps(outcome(Path(sys.argv[2]), sys.argv[3])))
"""


@contextmanager
def memory_group() -> Iterator[Path]:
    """A memory group with a limit, removed at the end; the test is skipped where none can be made."""
    own = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
    if "memory" in own:
        parent, limit = ROOT / "memory" / own["memory"].lstrip("/"), "memory.limit_in_bytes"
    else:
        parent, limit = ROOT / own.get("", "/").lstrip("/"), "memory.max"
    group = parent / f"tuner-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory group can be made here: {error}")
    try:
        try:
            (group / limit).write_text(str(LIMIT_BYTES))
        except OSError as error:
            pytest.skip(f"no memory group can be limited here: {error}")
        yield group
    finally:
        group.rmdir()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("program", "reason", "words"),
    [
        ("hog", "out_of_memory_at_boot", "was ended by signal 9 before it served, by the kernel for want of memory"),
        ("child", "out_of_memory_at_boot", "code 1 before it served, after a process was ended by the kernel for want"),
        ("suicide", "unhealthy_node", "signal 9 before it served, and not by the kernel for want of memory"),
    ],
)
def test_the_kernels_kill_is_told_from_another(program: str, reason: str, words: str, tmp_path: Path) -> None:
    with memory_group() as group:
        command = [sys.executable, "-c", GROUPED, str(group), str(tmp_path), program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["reason"] == reason, found
    assert words in found["detail"]
    assert "loading" in found["log_tail"]


def test_this_kernel_counts() -> None:
    count = kill_count()
    if count is None:
        pytest.skip("this kernel tells nothing of its out-of-memory killer")
    assert count.count >= 0
    assert killed_for_memory(count) in {True, False}


def test_the_group_of_a_process_is_found_in_every_version(tmp_path: Path) -> None:
    both = tmp_path / "cgroup"
    both.write_text("0::/nowhere\n")
    fallback = kill_count(both)
    assert fallback is None or "nowhere" not in fallback.source


@pytest.mark.parametrize(("now", "answer"), [(3, False), (4, True), (None, None)])
def test_a_count_that_grows_tells(now: int | None, answer: bool | None, tmp_path: Path) -> None:
    file = tmp_path / "memory.events"
    if now is not None:
        file.write_text(f"low 0\noom 9\noom_kill {now}\noom_group_kill 0\n")
    assert killed_for_memory(KillCount(source=str(file), count=3)) is answer
    assert killed_for_memory(None) is None
    assert signal.SIGKILL == 9
