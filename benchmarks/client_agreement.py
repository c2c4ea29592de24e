"""Do the built-in load client and AIPerf agree on a server of known timing?

    python benchmarks/client_agreement.py [--aiperf PATH] [--repeats 5] [--json FILE]

Both send the same requests to the same server, in turn; the server's own truth stands beside. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.load.agreement import Agreement, agreements
from cluster.load.aiperf import Aiperf, aiperf_measure, find_aiperf
from cluster.load.driver import LoadRun
from cluster.load.measure import LoadMeasurement, LoadOutcome, measure, without_gate
from search_spaces.measuring import MeasurementRule
from search_spaces.workload import Arrival, Length, Load, Workload
from tests.support.timed_server import Behaviour, timed_server

BEHAVIOUR = Behaviour(ttft_ms=50, itl_ms=10)


def the_run(url: str, folder: Path, load: Load, seed: int, requests: int) -> LoadRun:
    """Requests of 96 to 160 tokens in and 32 out."""
    return LoadRun(
        url=url,
        model_name="timed",
        workload=Workload(isl=Length(mean=128, spread=0.25), osl=Length(mean=32)),
        load=load,
        vocab_size=1000,
        seed=seed,
        rule=MeasurementRule(requests=requests),
        limit_s=300.0,
        timings_path=folder / f"{seed}.parquet",
    )


def figures(outcome: LoadOutcome) -> dict[str, float]:
    """Every metric of a run, and how late its client was."""
    if not isinstance(outcome, LoadMeasurement):
        raise SystemExit(f"no measurement: {outcome.detail}")
    return {**outcome.metrics.flat(), "lateness_ms": outcome.lateness_ms}


def compare(aiperf: Aiperf, load: Load, repeats: int, requests: int) -> dict[str, object]:
    """Runs of both clients in turn under one load."""
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name, timed_server(BEHAVIOUR) as server:
        folder = Path(name)
        for repeat in range(repeats):
            run = the_run(server.url, folder, load, repeat, requests)
            ours.append(figures(measure(without_gate(run), slos=(), devices=1, price_per_hour=0.0)))
            run = replace(run, timings_path=folder / f"{repeat}-aiperf.parquet")
            outcome = aiperf_measure(run, aiperf, folder / str(repeat), slos=(), devices=1, price_per_hour=0.0)
            theirs.append(figures(outcome))
            print(f"{load}: run {repeat + 1} of {repeats}", file=sys.stderr)
    return {
        "load": str(load),
        "runs": repeats,
        "requests": requests,
        "metrics": [asdict(found) | {"within_noise": found.within_noise} for found in agreements(ours, theirs)],
        "lateness_ms": {"built_in": [r["lateness_ms"] for r in ours], "aiperf": [r["lateness_ms"] for r in theirs]},
    }


def table(results: list[dict[str, object]]) -> str:
    """The comparison as a Markdown table."""
    lines = ["| load | metric | built-in | AIPerf | AIPerf / built-in (95%) | |", "|---|---|---|---|---|---|"]
    for result in results:
        for row in result["metrics"]:  # type: ignore[attr-defined]  # the list above
            found = Agreement(**{key: value for key, value in row.items() if key != "within_noise"})
            ends = f"{found.ratio:.3f} ({found.low:.3f} to {found.high:.3f})"
            values = f"{found.first:.4g} | {found.second:.4g}"
            lines.append(f"| {result['load']} | {found.metric} | {values} | {ends} | {found.verdict} |")
    return "\n".join(lines)


def main() -> None:
    """Compare, print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aiperf", default=None, help="AIPerf's program")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--json", type=Path, default=None)
    wanted = parser.parse_args()
    aiperf = find_aiperf(wanted.aiperf)
    loads = [Load(arrival=Arrival.CLOSED, value=1), Load(arrival=Arrival.CLOSED, value=4)]
    loads.append(Load(arrival=Arrival.CONSTANT, value=10.0))
    results = [compare(aiperf, load, wanted.repeats, wanted.requests) for load in loads]
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "aiperf": aiperf.version(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_average_1min": os.getloadavg()[0],
        "server": {"ttft_ms": BEHAVIOUR.ttft_ms, "itl_ms": BEHAVIOUR.itl_ms},
        "results": results,
    }
    if wanted.json is not None:
        wanted.json.parent.mkdir(parents=True, exist_ok=True)
        wanted.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"Server: TTFT {BEHAVIOUR.ttft_ms} ms, ITL {BEHAVIOUR.itl_ms} ms. {record['aiperf']}.\n")
    print(table(results))


if __name__ == "__main__":
    main()
