"""A driver in a process of its own: joins (or starts) Ray, puts a long load on a deployment and waits to be ended.

    python ray_driver.py ADDRESS|local STUDY FOLDER

Writes the process ids of its replicas to FOLDER/pids when the load is on, and "closed" to FOLDER/closed at the end of a
clean stop.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from cluster.engines.llamacpp import LlamaCppBackend
from cluster.ray_runner import RayTrialRunner
from cluster.ray_session import connect
from cluster.runner import Running
from search_spaces.measuring import MeasurementRule
from tests.support.ray_problem import POOL, disaggregated, request


def main(address: str, study: str, folder: Path) -> None:
    rule = MeasurementRule(requests=20_000, lateness_limit_ms=5000.0)
    with (
        connect(None if address == "local" else address, [POOL]) as cluster,
        RayTrialRunner(
            study=study, backends={"llamacpp": LlamaCppBackend()}, cluster=cluster, work_dir=folder
        ) as runner,
    ):
        handle = runner.start(request("long", disaggregated(), folder, rule=rule))
        while isinstance(state := runner.poll(handle), Running):
            if state.phase == "measure" and not (folder / "pids").exists():
                (pids,) = runner.processes().values()
                (folder / "pids.new").write_text(json.dumps(pids))
                (folder / "pids.new").rename(folder / "pids")
            time.sleep(0.05)
        print("the load ended by itself:", state, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run in the background, where it is ignored
    place = Path(sys.argv[3])
    try:
        main(sys.argv[1], sys.argv[2], place)
    except KeyboardInterrupt:
        (place / "closed").write_text("closed")
