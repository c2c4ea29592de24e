"""vLLM for real, on a CPU: `make test-vllm`, some ten minutes on four cores and 16 GB.

Skipped unless TUNER_VLLM names vLLM's program, which `scripts/vllm_cpu_env.sh` installs. Nothing is downloaded: the
model's config.json and tokenizer are written, its weights are random.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.engines.base import LaunchCommand
from cluster.engines.flags import known_flags
from cluster.engines.installation import Installation
from cluster.engines.vllm import HELP, VllmBackend
from search_spaces.hardware import DeviceKind
from search_spaces.model_presets import TINY_MODEL
from search_spaces.outcome import Failure, FailureReason, Measurement
from search_spaces.workload import Length, Workload
from studies.history import StudyHistory
from studies.records import TrialStatus
from tests.cluster.engines.test_golden_commands import VLLM
from tests.support.apart import commands, pool, replica
from tests.support.processes import child, free_port
from tuner.places import Place
from tuner.stored import history_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm-cpu.yaml"
PROGRAM = os.environ.get("TUNER_VLLM", "")
START_LIMIT_S = 900
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM, reason="TUNER_VLLM names no vLLM; run make test-vllm"),
    pytest.mark.timeout(3600),
]


def vllm_python() -> str:
    """The Python of vLLM's environment."""
    return str(Path(shutil.which(PROGRAM) or PROGRAM).parent / "python")


def has_nixl() -> bool:
    return subprocess.run([vllm_python(), "-c", "import nixl"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclass(frozen=True)
class Ran:
    """A study that has run."""

    output: str
    history: StudyHistory
    place: Place

    def measured(self) -> list[Measurement]:
        return [trial.measurement for trial in self.history.trials() if trial.measurement is not None]


def run_study(folder: Path, name: str, *overrides: str) -> Ran:
    """The example's study, as a user runs it."""
    url = f"sqlite:///{folder}/studies.db"
    sets = [
        f"name={name}",
        f"node_pools.local.engines.vllm.command={Path(PROGRAM).absolute()}",
        f"limits.start_s={START_LIMIT_S}",
        "measurement.lateness_limit_ms=2000",
        *overrides,
    ]
    words = [word for text in sets for word in ("--set", text)]
    command = [str(Path(sys.executable).parent / "tuner"), "study", "run", str(EXAMPLE), "--storage", url, *words]
    done = subprocess.run([*command, "--no-progress"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    place = Place(url=url, directory=folder)
    return Ran(output=done.stdout + done.stderr, history=history_of(place, name), place=place)


@pytest.fixture(scope="module")
def both_modes(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Six trials: aggregated and 1P1D under two loads, the latter with every connector that is installed."""
    connectors = "[NixlConnector, ExampleConnector]" if has_nixl() else "[ExampleConnector]"
    return run_study(
        tmp_path_factory.mktemp("both"),
        "both-modes",
        "engines.vllm.threads=1",
        "engines.vllm.max_num_batched_tokens=2048",
        "engines.vllm.enable_chunked_prefill=true",
        f"engines.vllm.kv_connector={connectors}",
        f"workload.concurrency={'[1, 4]' if has_nixl() else '[1, 2, 4]'}",
        "budget.trials=6",
        "measurement.requests=12",
    )


def test_at_least_six_trials_are_measured_in_both_modes(both_modes: Ran) -> None:
    found = both_modes.measured()
    assert len(found) >= 6, both_modes.output
    for measurement in found:
        flat = measurement.metrics.flat()
        assert flat["ttft_p50_ms"] > 0
        assert flat["tpot_p50_ms"] > 0
        assert flat["error_rate"] == 0
        assert not measurement.emulated
        assert measurement.environment["engine_version"].startswith("vLLM 0.")
    modes = {
        trial.candidate.config.mode for trial in both_modes.history.trials() if trial.measurement and trial.candidate
    }
    assert len(modes) == 2


def test_kv_caches_were_really_transferred_as_vllm_itself_counts(both_modes: Ran) -> None:
    split = [
        (t, t.measurement) for t in both_modes.history.trials() if t.measurement and "router_stats" in t.artifact_ids
    ]
    transports = {measured.environment["kv_transport"] for _, measured in split}
    assert len(transports) == (2 if has_nixl() else 1)
    for trial, measured in split:
        file = both_modes.place.artifacts / trial.artifact_ids["router_stats"]
        stats = json.loads(file.read_text(encoding="utf-8"))
        answered = stats["summary"]["total_ms"]["count"]
        received = float(measured.environment["kv_tokens_handed_over"])
        assert received >= 256 * answered  # whole blocks of 128 tokens, of prompts of 300
        by_role = {url: figures["kv_tokens_received_total"] for url, figures in stats["engine_metrics"].items()}
        assert sorted(count > 0 for count in by_role.values()) == [False, True]  # the decode replica, and it alone


def test_the_commands_measured_are_recorded(both_modes: Ran) -> None:
    for measured in both_modes.measured():
        replicas = [process for process in measured.processes if process.model_source is not None]
        assert replicas
        for process in replicas:
            assert process.argv[:2] == (str(Path(PROGRAM).absolute()), "serve")
            assert process.engine_version == measured.environment["engine_version"]


def test_the_deployment_of_the_best_trial_starts_and_answers(both_modes: Ran, tmp_path: Path) -> None:
    out, log, port = tmp_path / "deployment", tmp_path / "start.log", free_port()
    tuner = str(Path(sys.executable).parent / "tuner")
    asked = ["deploy", both_modes.history.name, "--target", "shell", "--out", str(out), "--port", str(port)]
    made = subprocess.run(
        [tuner, *asked, "--storage", both_modes.place.url], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    env = {"START_LIMIT_S": str(START_LIMIT_S)}
    with child([str(out / "start.sh")], log, env) as process:
        deadline = time.monotonic() + START_LIMIT_S
        while f"serving tiny on http://127.0.0.1:{port}" not in process.log:
            assert process.process.poll() is None, process.log
            assert time.monotonic() < deadline, process.log
            time.sleep(0.5)
        prompt = list(range(500, 800))
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        question = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(question, timeout=120) as response:  # noqa: S310  a server of the test's own
            answer = json.load(response)
        process.process.terminate()
        process.wait(60.0)  # the script ends its engines first
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["usage"]["prompt_tokens"] == 300


def test_a_configuration_that_vllm_refuses_is_a_failure_with_its_words(tmp_path: Path) -> None:
    """The model has no multi-token head to draft with; vLLM says so when it starts."""
    ran = run_study(
        tmp_path,
        "refused",
        "space.modes=aggregated",
        "engines.vllm.speculative_method=mtp",
        "engines.vllm.threads=1",
        "engines.vllm.max_num_batched_tokens=2048",
        "engines.vllm.enable_chunked_prefill=true",
        "workload.concurrency=1",
        "budget.trials=1",
    )
    (trial,) = (trial for trial in ran.history.trials() if trial.status is TrialStatus.FAILED)
    failure = trial.failure
    assert isinstance(failure, Failure)
    assert failure.reason in {FailureReason.INVALID_FLAGS, FailureReason.ENGINE_CRASH}
    assert "mtp" in (failure.detail + failure.log_tail).lower()


PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
said = {}
for name, words in json.load(sys.stdin).items():
    found = parser.parse_args(words)
    validate_parsed_serve_args(found)
    kv = found.kv_transfer_config is not None
    said[name] = {"seqs": found.max_num_seqs, "tp": found.tensor_parallel_size, "kv": kv}
print(json.dumps(said))
"""


def test_vllms_own_parser_takes_every_reviewed_command(tmp_path: Path) -> None:
    built: dict[str, LaunchCommand] = {
        f"{name}/{part}": command for name, case in VLLM.items() for part, command in commands("vllm", case).items()
    }
    words = {name: command.argv[command.argv.index("serve") + 1 :] for name, command in built.items()}
    asked = subprocess.run(
        [vllm_python(), "-c", PARSE], input=json.dumps(words), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert asked.returncode == 0, asked.stderr[-3000:]
    said: dict[str, dict[str, Any]] = json.loads(asked.stdout.strip().splitlines()[-1])
    assert set(said) == set(built)
    assert all(found["kv"] == name.startswith("disaggregated") for name, found in said.items())
    assert said["tensor-parallel/mixed-0"] == {"seqs": 256, "tp": 8, "kv": False}
    known = known_flags("vllm", [PROGRAM], HELP, {})
    for command in built.values():
        assert known.unknown(command.argv) == ()


@contextmanager
def _ended(command: LaunchCommand, log: Path) -> Iterator[int]:
    with log.open("wb") as sink:
        process = subprocess.Popen(command.argv, env={**os.environ, **command.env}, stdout=sink, stderr=sink)
    try:
        yield process.wait(START_LIMIT_S)
    finally:
        process.kill()


def test_vllms_own_refusal_is_classified(tmp_path: Path) -> None:
    """Whole prompts that are longer than a step: our rules keep a study from it, so it is started by hand."""
    own = {"cores": Installation(device=DeviceKind.CPU, command=(PROGRAM,))}
    engine = VllmBackend(installations=own)
    model = engine.prepare(TINY_MODEL, tmp_path)
    small = pool(
        on="cores", max_num_batched_tokens=512, max_num_seqs=4, enable_chunked_prefill=False, cpu_kv_cache_gib=1
    )
    workload = Workload(isl=Length(mean=1000), osl=Length(mean=32))
    spec = replica(small, model=model, workload=workload, host="127.0.0.1", port=free_port(), device_ids=(0,))
    command = engine.replica_command(spec)
    log = tmp_path / "engine.log"
    with _ended(command, log) as code:
        text = log.read_text(encoding="utf-8", errors="replace")
        assert engine.classify(code, text, ready=False) is FailureReason.INVALID_FLAGS, text[-2000:]


def test_the_tool_never_imports_vllm() -> None:
    assert known_flags("vllm", [PROGRAM], HELP, {}).version.startswith("0.")
    assert "vllm" not in sys.modules
