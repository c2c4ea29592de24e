"""Is the model right on this GPU? Runs a small study, holds predictions against measurements, writes a record.

    python benchmarks/gpu_check.py [--vllm PROGRAM] [--python PYTHON] [--device NAME] [--trials 12] [--out DIR] [--cpu]

For one NVIDIA GPU without a network: the model has random weights (the shape of a dense model of 0.6 billion), nothing
is downloaded. What is installed decides the parts, and the record says what was left out and why:

- vLLM (`--vllm`, or `vllm` on the path): a study of it under three loads. Beside each measurement: what was predicted
  before it, and what the model predicts that no measurement corrected.
- torch and transformers in the environment of `--python` (this one by default): single steps, timed without a server.
- torch in this environment: operation tables of the GPU are collected first, and the predictions use them.

Writes DIR/gpu-check-DEVICE.json and .md. `--cpu` takes two cores instead, to try the script where there is no GPU;
its record says so. Exit status 2 where there is neither a GPU nor `--cpu`, or nothing to measure with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import yaml

from perf_model.batch import step_batch
from perf_model.layout import ReplicaLayout
from perf_model.precision import Precision
from perf_model.predictor import Predictor
from perf_model.silicon import ReplicaKey, default_silicon
from search_spaces.errors import TunerError
from search_spaces.hf_config import read_model
from search_spaces.known_gpus import GPUS
from search_spaces.serving import Candidate
from studies.records import TrialRecord
from tuner import Study, load_study_file, run_study
from tuner.collecting import Wanted, collect
from tuner.study_schema import StudyFile
from tuner.table_places import TABLES_VARIABLE
from tuner.wiring import make_problem, uncalibrated

METRICS = ("ttft_p50_ms", "tpot_p50_ms", "output_tokens_per_s")
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "torch_dtype": "bfloat16",
}
SMALL = CONFIG | {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 4096,
    "torch_dtype": "float32",
}
STEPS = Path(__file__).with_name("hf_steps.py")
LIMIT_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the check runs: `device` is a name of the catalogue, or cpu."""

    device: str
    name: str
    driver: str | None

    @property
    def on_gpu(self) -> bool:
        """True for a GPU."""
        return self.device != "cpu"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A metric: measured, and predicted / measured of the model alone and of what was predicted just before."""

    measured: float
    model_alone: float | None
    before_measuring: float | None


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial; `figures` by metric where it was measured, `failure` where it was not."""

    trial: int
    status: str
    load: str
    options: tuple[dict[str, object], ...]
    figures: dict[str, Figure]
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One timed step of `batch` sequences of `isl` tokens; `predicted` / measured where it is modelled."""

    step: str
    batch: int
    isl: int
    ms: float
    predicted: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was found, and what was left out and why."""

    at: str
    tuner: str
    machine: Machine
    left_out: tuple[str, ...]
    serving: tuple[TrialRow, ...]
    errors: dict[str, dict[str, float]]
    timed_with: str
    steps: tuple[StepRow, ...]


def find_machine(device: str | None, *, cpu: bool) -> Machine:
    """This machine's first GPU; raises `TunerError` where there is none, or none that the catalogue knows."""
    if cpu:
        return Machine(device="cpu", name=f"two of {os.cpu_count()} cores", driver=None)
    program = shutil.which("nvidia-smi")
    if program is None:
        raise TunerError("no nvidia-smi is on the path, so no NVIDIA GPU is here; --cpu tries the script on two cores")
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        raise TunerError(f"nvidia-smi finds no GPU ({(done.stderr or done.stdout).strip()}); --cpu takes two cores")
    name, driver = (cell.strip() for cell in done.stdout.splitlines()[0].split(","))
    return Machine(device=device or catalogue_name(name), name=name, driver=driver)


def catalogue_name(name: str) -> str:
    """The catalogue's name for what the driver calls `name`; raises `TunerError` where it has none."""
    words = name.lower().replace("-", " ").split()
    for known in GPUS:
        kind, _, form = known.partition("_")
        if kind in words and ("pcie" not in words or form != "sxm"):
            return known
        if kind == "rtx" and "rtx" in words and form in words:
            return known
    raise TunerError(f"the catalogue has no {name!r}; name the nearest with --device: {', '.join(GPUS)}")


def study_of(machine: Machine, vllm: str, trials: int, folder: Path) -> StudyFile:
    """A study of one replica of vLLM under three loads."""
    pool: dict[str, object] = {"device": machine.device, "engines": {"vllm": vllm}}
    pool |= {"gpus_per_node": 1} if machine.on_gpu else {"cpus_per_node": 2}
    options: dict[str, object] = {"max_num_batched_tokens": [2048, 8192], "enforce_eager": [False, True]}
    if not machine.on_gpu:
        options = {"dtype": ["float32"], "enforce_eager": [True], "cpu_kv_cache_gib": [1], "threads": [2]}
    tree = {
        "name": f"gpu-check-{machine.device}",
        "model": {"config": str(folder / "model")},
        "workload": {
            "isl": {"mean": 1024 if machine.on_gpu else 128, "spread": 0.2},
            "osl": {"mean": 128 if machine.on_gpu else 16, "spread": 0.2},
            "concurrency": [1, 8, 64] if machine.on_gpu else [1, 4],
        },
        "objectives": ["output_tokens_per_s_per_gpu", "ttft_p50_ms", "tpot_p50_ms"],
        "node_pools": {"here": pool},
        "engines": {"vllm": options},
        "space": {"modes": ["aggregated"]},
        "budget": {"trials": trials, "confirm": 2},
        "measurement": {"requests": 256 if machine.on_gpu else 16, "lateness_limit_ms": 100},
        "limits": {"start_s": 900},
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_study_file(file)


def collected(study: StudyFile, folder: Path) -> str | None:
    """Collect operation tables of the GPU for later predictions; why not, where they cannot be."""
    if find_spec("torch") is None:
        return "torch is not installed beside tuner: predictions use public tables or the data sheet's roofline"
    root = folder / "tables"
    os.environ[TABLES_VARIABLE] = str(root)
    try:
        collect(Wanted(study=study, root=root, quick=True), None, say, lambda *_: None)
    except TunerError as error:
        return f"tables were not collected: {error}"
    return None


def say(line: str) -> None:
    """Progress, on standard error."""
    print(line, file=sys.stderr)


def serving_rows(study: Study) -> tuple[TrialRow, ...]:
    """Measured figures of each trial beside both predictions."""
    problem = make_problem(study.file, study.history.node_devices)
    model = uncalibrated(problem, study.file)
    return tuple(_trial_row(model, trial, trial.candidate) for trial in study.trials if trial.candidate is not None)


def _trial_row(model: Predictor, trial: TrialRecord, candidate: Candidate) -> TrialRow:
    measured = {} if trial.measurement is None else trial.measurement.metrics.flat()
    alone = model.predict([candidate])[0].metrics
    before = {} if trial.prediction is None else trial.prediction.metrics
    figures = {
        name: Figure(
            measured=value,
            model_alone=alone[name] / value if name in alone else None,
            before_measuring=before[name] / value if name in before else None,
        )
        for name in METRICS
        if (value := measured.get(name))
    }
    failure = None if trial.failure is None else f"{trial.failure.reason}: {trial.failure.detail}"
    return TrialRow(
        trial=trial.number,
        status=str(trial.status),
        load=str(candidate.load),
        options=tuple(dict(pool.options) for pool in candidate.config.pools),
        figures=figures,
        failure=failure,
    )


def timed_steps(machine: Machine, python: str, config: Path) -> tuple[str, tuple[StepRow, ...]]:
    """Versions, and steps of transformers beside the model's; raises `TunerError` where they cannot be timed."""
    how = ("cuda", "bfloat16") if machine.on_gpu else ("cpu", "float32")
    done = subprocess.run(
        [python, str(STEPS), str(config), *how], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise TunerError(f"{python} timed no steps of transformers: {said}")
    found = json.loads(done.stdout.splitlines()[-1])
    rows = tuple(StepRow(**row) for row in found["rows"])
    if machine.on_gpu:
        rows = tuple(replace(row, predicted=predicted_step_ms(machine, config, row) / row.ms) for row in rows)
    return f"transformers {found['transformers']}, torch {found['torch']}", rows


def predicted_step_ms(machine: Machine, config: Path, row: StepRow) -> float:
    """The model's time of one step on the kernels of vLLM, in milliseconds."""
    key = ReplicaKey(
        model=read_model(config),
        system=machine.device,
        engine="vllm",
        layout=ReplicaLayout(tp=1, dp=1, ep=1),
        precision=Precision(),
    )
    batch, isl = float(row.batch), float(row.isl)
    if row.step == "prefill":
        load = step_batch(prefill_tokens=[batch * isl], prefill_seqs=[batch], prompt=[isl])
    else:
        load = step_batch(decode_seqs=[batch], decode_context=[isl])
    return float(default_silicon().kernels(key).step_ms(load)[0])


def errors_of(rows: Sequence[TrialRow]) -> dict[str, dict[str, float]]:
    """Median of |predicted / measured - 1| by metric, of the model alone and just before each measurement."""
    found: dict[str, dict[str, float]] = {}
    for name in METRICS:
        figures = [row.figures[name] for row in rows if name in row.figures]
        ratios = {
            "model alone": [figure.model_alone for figure in figures if figure.model_alone is not None],
            "before measuring": [f.before_measuring for f in figures if f.before_measuring is not None],
        }
        found[name] = {how: median(abs(ratio - 1.0) for ratio in known) for how, known in ratios.items() if known}
    return {name: errors for name, errors in found.items() if errors}


def markdown(record: Record) -> str:
    """The record for readers."""
    machine = record.machine
    shape = "Random weights of the shape of a dense model of 0.6 billion."
    warning = shape if machine.on_gpu else "Tried on a CPU with a small random model: NO check of a GPU."
    lines = [
        f"# Predictions against measurements on {machine.name}",
        "",
        f"Printed by `python benchmarks/gpu_check.py` on {record.at}; tuner {record.tuner}, driver {machine.driver}.",
        warning,
        "",
        *(f"- Left out: {reason}" for reason in record.left_out),
        "",
    ]
    if record.serving:
        lines += ["## vLLM under load", ""]
        lines += ["| trial | load | metric | measured | model alone | before measuring |", "|---|---|---|---|---|---|"]
        lines += [line for row in record.serving for line in _serving_lines(row)]
        lines += ["", "Ratios are predicted / measured. Median absolute errors:", ""]
        for name, found in record.errors.items():
            lines.append(f"- {name}: " + ", ".join(f"{how} {value:.1%}" for how, value in found.items()))
        lines.append("")
    if record.steps:
        lines += [f"## Single steps ({record.timed_with})", ""]
        lines += ["| step | batch | tokens | measured ms | predicted / measured |", "|---|---|---|---|---|"]
        lines += [
            f"| {row.step} | {row.batch} | {row.isl} | {row.ms:.2f} | {_ratio(row.predicted)} |" for row in record.steps
        ]
    return "\n".join(lines) + "\n"


def _serving_lines(row: TrialRow) -> list[str]:
    start = f"| {row.trial} | {row.load} |"
    if row.failure is not None:
        return [f"{start} failed: {row.failure[:120].replace('|', '/')} | | | |"]
    return [
        f"{start} {name} | {figure.measured:.2f} | {_ratio(figure.model_alone)} | {_ratio(figure.before_measuring)} |"
        for name, figure in row.figures.items()
    ]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def check(options: argparse.Namespace, folder: Path) -> Record:
    """Every part that can be run; raises `TunerError` where none can."""
    machine = find_machine(options.device, cpu=options.cpu)
    config = folder / "model" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(CONFIG if machine.on_gpu else SMALL), encoding="utf-8")
    left_out, serving = served(machine, options, folder)
    timed_with, steps = "", tuple[StepRow, ...]()
    try:
        timed_with, steps = timed_steps(machine, options.python, config)
    except TunerError as error:
        left_out.append(str(error))
    if not serving and not steps:
        raise TunerError("nothing was measured: " + "; ".join(left_out))
    return Record(
        at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        tuner=version("tuner"),
        machine=machine,
        left_out=tuple(left_out),
        serving=serving,
        errors=errors_of(serving),
        timed_with=timed_with,
        steps=steps,
    )


def served(machine: Machine, options: argparse.Namespace, folder: Path) -> tuple[list[str], tuple[TrialRow, ...]]:
    """The study of vLLM: what was left out, and its trials."""
    vllm = shutil.which(options.vllm)
    if vllm is None:
        return [f"{options.vllm} is no program: nothing was served"], ()
    study = study_of(machine, str(Path(vllm).absolute()), options.trials, folder)
    reason = collected(study, folder) if machine.on_gpu else "no operation table is collected with --cpu"
    done = run_study(study, storage=f"sqlite:///{folder}/studies.db")
    return [reason] if reason else [], serving_rows(done)


def main() -> int:
    """Check, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default="vllm", help="vLLM's program")
    parser.add_argument("--python", default=sys.executable, help="a Python with torch and transformers")
    parser.add_argument("--device", choices=sorted(GPUS), help="the GPU's name in the catalogue")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--cpu", action="store_true", help="two cores instead of a GPU")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            record = check(options, Path(folder))
        except TunerError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"gpu-check-{record.machine.device}"
    file.with_suffix(".json").write_text(json.dumps(asdict(record), indent=1, default=str) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
