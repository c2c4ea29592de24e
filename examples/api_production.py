"""Take a measured study to production: plan capacity, write the deployment and the report.

python examples/api_production.py STUDY FOLDER [REQUESTS_PER_SECOND]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tuner import load_study


def main(name: str, folder: str, rate: str = "100") -> None:
    """Print the plan for `rate` requests per second, and write to `folder` what starts the best configuration."""
    study = load_study(name)
    print("stands:   ", study.status().state)

    planned = study.plan(rate=float(rate), headroom=0.2)
    print("plan:     ", dict(planned.plan.nodes), "met" if planned.plan.met else "cannot be met")
    for unit, copies in planned.plan.copies:
        print(f"part:      {copies} copies of trial {unit.name}, {unit.rate:.3g} requests/s each")

    deployment = study.deploy("shell", Path(folder) / "deployment")
    print("deploy:   ", f"trial {deployment.trial},", deployment.rule)
    print("start:    ", "; ".join(deployment.start), "then answers at", deployment.endpoint)
    print("report:   ", study.write_report(Path(folder) / "report.html"))


if __name__ == "__main__":
    main(*sys.argv[1:])
