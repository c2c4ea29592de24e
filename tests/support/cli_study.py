"""A study run by the real command in a process of its own, with real engines on a Ray cluster of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.janitor import tagged_processes

TUNER = [sys.executable, "-m", "tuner.cli"]
STUDY = """
name: {name}
workload: {{isl: 48, osl: 8, concurrency: [1, 2]}}
objectives: [output_tokens_per_s_per_gpu, ttft_p50_ms]
slos: {{ttft_p99_ms: 20000}}
node_pools: {{local: {{cpus_per_node: 2, price_per_hour: 0.1}}}}
engines: {{llamacpp: {{threads: 1, max_num_seqs: [2, 4], batch_size: [128, 2048], ubatch_size: [64, 512],
  kv_cache_dtype: f16, flash_attention: true}}}}
budget: {{trials: {trials}, confirm: 1, control_every: 0}}
measurement: {{requests: 8, lateness_limit_ms: 2000}}
limits: {{start_s: 90, measure_s: 90}}
"""


@dataclass(frozen=True)
class CliStudy:
    """A study file in `folder`; its data go to `folder/tuner-data`."""

    folder: Path
    name: str

    @classmethod
    def create(cls, folder: Path, trials: int) -> CliStudy:
        name = f"test-{uuid.uuid4().hex[:8]}"
        (folder / "study.yaml").write_text(STUDY.format(name=name, trials=trials))
        return cls(folder=folder, name=name)

    @property
    def log(self) -> Path:
        return self.folder / "run.log"

    def call(self, *args: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [*TUNER, *args], cwd=self.folder, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def json(self, *args: str) -> Any:
        done = self.call(*args, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[str]]:
        """`study run` in the background; it is killed at the end of the block if it still runs."""
        with self.log.open("w") as log:
            process = subprocess.Popen(
                [*TUNER, "study", "run", "study.yaml", "--no-progress"],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGKILL)
                process.wait(30)

    def wait_for(self, pattern: str, process: subprocess.Popen[str], limit_s: float = 150) -> None:
        """Wait until the log holds `pattern`."""
        deadline = time.monotonic() + limit_s
        while not re.search(pattern, self.log.read_text()):
            assert process.poll() is None, f"the study ended early:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"{pattern!r} did not come within {limit_s} s:\n{self.log.read_text()}"
            time.sleep(0.1)

    def wait_for_engines(self, limit_s: float = 60) -> list[int]:
        """Process ids of the study's engines, once there are some."""
        return self._wait_for_processes(present=True, limit_s=limit_s)

    def wait_for_silence(self, limit_s: float = 20) -> None:
        """Wait until no process of the study is left; fails where one is."""
        self._wait_for_processes(present=False, limit_s=limit_s)

    def _wait_for_processes(self, *, present: bool, limit_s: float) -> list[int]:
        deadline = time.monotonic() + limit_s
        while bool(found := [process.pid for process in tagged_processes(self.name)]) != present:
            assert time.monotonic() < deadline, f"processes of {self.name} after {limit_s} s: {found}"
            time.sleep(0.2)
        return found
