"""Fuzz `tuner serve` from its own OpenAPI document: no answer of 5xx, and every answer as the document says.

    python benchmarks/service_fuzz.py [--requests 2000] [--seed 0] [--json]

Schemathesis makes the requests: examples of the document, values at and beyond every limit, and random ones, valid and
not. Half of them are about a study that exists; study files are made of a valid one with a random piece in it (see
`service_fuzz_hooks.py`). The service runs in this process on a storage of a study that was measured in memory; studies
that it accepts are started as processes that end at once. Exits with 1 where a check fails, or too few were made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from starlette.types import ASGIApp, Message, Receive, Scope, Send

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.served import WRITE, listening, service, toy_storage
from tuner.serve.app import make_app

ROOT = Path(__file__).parents[1]
ENDS_AT_ONCE = (sys.executable, "-c", "pass")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
)
PHASES = ("examples", "coverage", "fuzzing")
CONFIGURATION = """
[checks]
negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 409, 411, 413, 422, 429]
"""
"""413 is a refusal of what is too long, which Schemathesis does not count as one by itself."""


@dataclass
class Counted:
    """An application whose answers are counted by operation and status."""

    app: ASGIApp
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on, and count."""

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                operation = f"{scope['method']} {getattr(route, 'path', '(none)')}"
                self.answers[operation, message["status"]] += 1
            await send(message)

        await self.app(scope, receive, counting)


def fuzz(requests: int, seed: int, folder: Path, phases: tuple[str, ...] = PHASES) -> tuple[Counted, int, str, float]:
    """About `requests` requests; the answers, the exit code and the report of Schemathesis, and the seconds it took."""
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    with redirect_stdout(sys.stderr):
        served = service(toy_storage(folder), command=ENDS_AT_ONCE)
    app = make_app(served)
    counted = Counted(app)
    operations = sum(len(methods) for methods in app.openapi()["paths"].values())
    began_s = time.monotonic()
    with listening(counted) as base:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{base}/openapi.json"]
        command += ["--header", f"Authorization: Bearer {WRITE}", "--checks", ",".join(CHECKS)]
        command += ["--phases", ",".join(phases), "--max-examples", str(max(1, requests // operations))]
        command += ["--seed", str(seed), "--continue-on-failure", "--no-shrink", "--suppress-health-check", "all"]
        command += ["--request-timeout", "60", "--warnings", "off"]
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.support.fuzz_hooks", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    for run in served.runs.all():
        run.process.wait(60)
    return counted, done.returncode, done.stdout + done.stderr, time.monotonic() - began_s


def main() -> None:
    """Fuzz, and tell what came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with TemporaryDirectory(prefix="tuner-fuzz-") as folder:
        counted, code, said, seconds = fuzz(asked.requests, asked.seed, Path(folder))
    by_status: Counter[int] = Counter()
    for (_, status), count in counted.answers.items():
        by_status[status] += count
    total, faults = sum(by_status.values()), sum(n for status, n in by_status.items() if status >= 500)
    result = {
        "requests": total,
        "answers_5xx": faults,
        "all_checks_pass": code == 0,
        "seconds": round(seconds, 1),
        "by_status": {str(status): count for status, count in sorted(by_status.items())},
    }
    if asked.json:
        print(json.dumps(result, indent=2))
    else:
        print(said)
        for (operation, status), count in sorted(counted.answers.items()):
            print(f"{count:>6}  {status}  {operation}")
        print(result)
    sys.exit(int(code != 0 or faults > 0 or total < asked.requests))


if __name__ == "__main__":
    main()
