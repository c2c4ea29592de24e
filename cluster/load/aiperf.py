"""AIPerf as a second load generator: another program, in an environment of its own, sends the very same requests.

    command = find_aiperf()
    outcome = aiperf_measure(run, command, folder, slos=..., devices=..., price_per_hour=...)

AIPerf is given the request bodies that the built-in client would send (its `inputs-json` data set, which it sends word
for word), and its record of every request is summed up by our own formulas: what then differs is the client alone.
Warm-up and measured requests are one phase of AIPerf's, with as many requests after them as the load keeps in flight,
since the load must stand before and after what is measured; between two phases AIPerf lets it drain. Tried with version
0.13.0.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cluster.engines.hf_model import loadable_folder
from cluster.load.client import completion_body
from cluster.load.driver import LoadResult, LoadRun
from cluster.load.measure import LoadMeasurement, judge, without_gate
from cluster.load.prompts import ordinary_ids, sessions_of
from cluster.load.timings import ErrorClass, Phase, RequestTiming, Timings, write_timings
from search_spaces.errors import InvalidValueError, TunerError
from search_spaces.model_presets import TINY_MODEL
from search_spaces.outcome import Failure
from search_spaces.problem import Slo
from search_spaces.workload import Arrival

AIPERF_VARIABLE = "TUNER_AIPERF"
DEFAULT_COMMAND = Path(".venv-aiperf") / "bin" / "aiperf"
START_LIMIT_S = 180.0
"""AIPerf starts some ten processes, which takes a busy machine a while."""
RECORDS = "profile_export.jsonl"
Record: TypeAlias = Mapping[str, object]


class AiperfError(TunerError):
    """AIPerf is not there, or gave no figures."""

    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class Aiperf:
    """AIPerf as installed: the path of its program."""

    program: str

    def version(self) -> str:
        """Its version, such as `aiperf 0.13.0`; raises `AiperfError`."""
        done = subprocess.run([self.program, "--version"], capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            raise AiperfError(f"{self.program} --version failed: {done.stderr.strip()[-500:]}")
        return f"aiperf {done.stdout.strip()}"


def find_aiperf(given: str | None = None) -> Aiperf:
    """AIPerf at `given`, else where the variable TUNER_AIPERF says, else in .venv-aiperf, else on the path."""
    named = given or os.environ.get(AIPERF_VARIABLE)
    candidates = [named] if named else [str(DEFAULT_COMMAND), "aiperf"]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found is not None:
            return Aiperf(program=found)
    raise AiperfError(
        f"{' or '.join(candidates)} is no program; make one with scripts/aiperf_env.sh, or name it with the variable "
        f"{AIPERF_VARIABLE}"
    )


def aiperf_measure(
    run: LoadRun, aiperf: Aiperf, folder: Path, *, slos: Sequence[Slo], devices: int, price_per_hour: float
) -> LoadMeasurement | Failure:
    """Put the load of `run` on with AIPerf, whose files go to `folder`; its punctuality is stated, not judged.

    Raises `InvalidValueError` for a load that it cannot put on, and `AiperfError` where it fails.
    """
    _check(run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "inputs.json").write_text(json.dumps(_inputs(run)), encoding="utf-8")
    argv = _argv(run, aiperf, folder)
    try:
        with tempfile.TemporaryDirectory(prefix="tuner-", ignore_cleanup_errors=True) as scratch:
            done = subprocess.run(
                argv,
                env=_environment(scratch),
                capture_output=True,
                text=True,
                timeout=run.limit_s + START_LIMIT_S,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise AiperfError(
            f"AIPerf had not ended after {run.limit_s + START_LIMIT_S:g} s; measure fewer requests"
        ) from error
    records = folder / "artifacts" / RECORDS
    if done.returncode != 0 or not records.is_file():
        raise AiperfError(f"AIPerf ended with code {done.returncode}: {(done.stdout + done.stderr).strip()[-1500:]}")
    timings = timings_of(records.read_text(encoding="utf-8").splitlines(), run)
    write_timings(timings, run.timings_path)
    result = LoadResult(timings=timings, loop_lag_ns=())
    return judge(without_gate(run), result, slos=slos, devices=devices, price_per_hour=price_per_hour)


def _check(run: LoadRun) -> None:
    if run.api_key is not None:
        raise InvalidValueError("AIPerf takes an API key on its command line alone, for all to see; serve without one")
    talk = run.workload.conversation
    if run.workload.trace is not None or run.load.arrival is Arrival.TRACE:
        raise InvalidValueError("AIPerf replays none of our traces; confirm a load of another arrival with it")
    if talk is not None and talk.think_time_s > 0:
        raise InvalidValueError("AIPerf does not think between the turns that it is given; leave think_time out")


def _environment(scratch: str) -> dict[str, str]:
    """Ours without what makes its tokenizer loader refuse a folder (0.13.0 looks for hub names only when offline).

    AIPerf leaves its sockets and data sets in the folder for temporary files, so it gets `scratch` for that.
    """
    offline = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}
    return {key: value for key, value in os.environ.items() if key not in offline} | {"TMPDIR": scratch}


def _requests_to_send(run: LoadRun) -> int:
    """Warm-up and measured requests, and those that keep up the load until the last of them has ended."""
    after = run.load.concurrency or max(1, run.rule.requests // 10)
    return run.warm_up_requests + run.rule.requests + after


def _inputs(run: LoadRun) -> dict[str, object]:
    sessions = sessions_of(run.workload, ordinary_ids(run.vocab_size), run.seed, run.traced)
    data, count, number = [], 0, 0
    while count < _requests_to_send(run):
        turns = sessions.session(number)
        bodies = [json.loads(completion_body(run.model_name, turn.prompt, turn.output_tokens)) for turn in turns]
        data.append({"session_id": str(number), "payloads": bodies})
        count, number = count + len(turns), number + 1
    return {"data": data}


def _argv(run: LoadRun, aiperf: Aiperf, folder: Path) -> list[str]:
    argv = [aiperf.program, "profile", "--model", run.model_name, "--url", run.url.rstrip("/").removesuffix("/v1")]
    argv += ["--endpoint-type", "completions", "--streaming", "--use-server-token-count"]
    argv += ["--tokenizer", loadable_folder(TINY_MODEL, folder / "tokenizer")]
    argv += ["--input-file", str(folder / "inputs.json"), "--custom-dataset-type", "inputs-json"]
    argv += ["--dataset-sampling-strategy", "sequential", "--random-seed", str(run.seed)]
    argv += ["--request-count", str(_requests_to_send(run)), "--request-timeout-seconds", f"{run.request_limit_s:g}"]
    argv += _load_words(run)
    argv += ["--artifact-dir", str(folder / "artifacts"), "--export-level", "records", "--ui", "none"]
    argv += ["--no-server-metrics", "--no-gpu-telemetry", "--workers-max", "1"]
    return argv


def _load_words(run: LoadRun) -> list[str]:
    if run.load.concurrency is not None:
        return ["--concurrency", str(run.load.concurrency)]
    pattern = "constant" if run.load.arrival is Arrival.CONSTANT else "poisson"
    return ["--request-rate", f"{run.load.value:g}", "--arrival-pattern", pattern]


def timings_of(lines: Sequence[str], run: LoadRun) -> Timings:
    """What AIPerf recorded of each request, in our terms and phases: in the order in which they were sent."""
    records: list[Record] = [json.loads(line) for line in lines if line.strip()]
    ordered = sorted(records, key=lambda record: _metadata(record, "request_start_ns"))
    if not ordered:
        raise AiperfError("AIPerf recorded no request; see its logs in the folder of its artefacts")
    start_ns = min(_metadata(record, "credit_issued_ns") for record in ordered)
    requests = tuple(_timing(record, index, run.phase(index), start_ns) for index, record in enumerate(ordered))
    return Timings(start_epoch_ns=start_ns, start_monotonic_ns=start_ns, requests=requests)


def _timing(record: Record, index: int, phase: Phase, start_ns: int) -> RequestTiming:
    sent_ns = _metadata(record, "request_start_ns") - start_ns
    failed = record.get("error") is not None
    tokens = () if failed else _token_times(record, sent_ns)
    counted = 0 if failed else round(_value(record, "output_sequence_length"))
    return RequestTiming(
        index=index,
        phase=phase,
        scheduled_ns=_metadata(record, "credit_issued_ns") - start_ns,
        sent_ns=sent_ns,
        connect_ns=0 if failed else round(_value(record, "http_req_connecting") * 1e6),
        token_ns=tokens,
        end_ns=_metadata(record, "request_end_ns") - start_ns,
        input_tokens=0 if failed else round(_value(record, "input_sequence_length")),
        planned_tokens=counted,
        output_tokens=counted,
        error=ErrorClass.STATUS if failed else None,
        error_text=str(record.get("error"))[:500] if failed else "",
    )


def _token_times(record: Record, sent_ns: int) -> tuple[int, ...]:
    """When each event with tokens came: TTFT after the send, then the gaps between events."""
    times = [sent_ns + round(_value(record, "time_to_first_token") * 1e6)]
    gaps = _section(_section(record, "metrics"), "inter_chunk_latency").get("value", ())
    if not isinstance(gaps, list):
        raise AiperfError(f"inter_chunk_latency={gaps!r} is no list; use AIPerf 0.13.0")
    for gap in gaps:
        times.append(times[-1] + round(float(gap) * 1e6))
    return tuple(times)


def _section(record: Record, name: str) -> Record:
    found = record.get(name, {})
    return found if isinstance(found, dict) else {}


def _metadata(record: Record, name: str) -> int:
    found = _section(record, "metadata").get(name)
    if not isinstance(found, int):
        raise AiperfError(f"a record of AIPerf has no {name}; use AIPerf 0.13.0")
    return found


def _value(record: Record, name: str) -> float:
    found = _section(_section(record, "metrics"), name).get("value")
    if not isinstance(found, int | float):
        raise AiperfError(f"a record of AIPerf has no {name}; use AIPerf 0.13.0")
    return float(found)
