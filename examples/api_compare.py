"""Compare stored studies, and rank the first one under a tighter SLO.

python examples/api_compare.py STUDY STUDY [...]
"""

from __future__ import annotations

import sys

from tuner import compare, load_study


def main(*names: str) -> None:
    """Print each study's share of the joint hypervolume, who is best in what, and the best under a tighter SLO."""
    studies = [load_study(name) for name in names]
    found = compare(*studies)
    for name, volume in found.volumes.items():
        print(f"{name}: {volume.share:.0%} of the joint hypervolume, {volume.joint} members of the joint front")
    for best in found.best:
        print(f"best {best.metric} under {best.condition}: {best.winner}")

    slo = studies[0].file.slos
    tighter = [f"{metric}={0.8 * section.threshold}" for metric, section in slo.items()]
    for scored in studies[0].rescore(slos=tighter)[:3]:
        print(f"rank {scored.rank}: trial {scored.trial.number}, score {scored.score:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
