"""How fast a large plan is made: 2,000 GPUs in six pools, a study of hundreds of deployments drawn at random.

    python benchmarks/plan_speed.py [--units 300] [--cases 10] [--json]

Each case asks once for the cheapest plan of a rate and once for the largest rate that the GPUs can serve. Prints the
seconds of both; the deployments are invented, only the time means something.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

from tuner.plan import Demand, Stock, Unit, plan, undominated

POOLS = {"a100": 12.0, "h100": 24.0, "h200": 32.0, "b200": 48.0, "l40s": 8.0, "gb200": 60.0}
SPEED = {"a100": 1.0, "h100": 2.2, "h200": 2.8, "b200": 5.0, "l40s": 0.6, "gb200": 6.0}
GPUS, GPUS_PER_NODE = 2000, 8


def stocks() -> list[Stock]:
    """Six pools of nodes of eight, 2,000 GPUs in all."""
    share, rest = divmod(GPUS // GPUS_PER_NODE, len(POOLS))
    return [
        Stock(pool=name, devices_per_node=GPUS_PER_NODE, nodes=share + (index < rest), price_per_hour=price)
        for index, (name, price) in enumerate(POOLS.items())
    ]


def units(count: int, seed: int) -> list[Unit]:
    """Aggregated and disaggregated deployments with odd and even tensor-parallel sizes, faster ones with more GPUs."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        pools = rng.sample(list(POOLS), rng.choice([1, 1, 2]))
        sizes = {pool: tuple(rng.choice([1, 2, 3, 4, 6, 8]) for _ in range(rng.randint(1, 3))) for pool in pools}
        speed = sum(SPEED[pool] * sum(found) ** 0.9 for pool, found in sizes.items()) * rng.uniform(0.5, 1.5)
        made.append(Unit(name=str(index), rate=speed, users=10 * speed, sizes=sizes))
    return made


def timed(found: list[Unit], demand: Demand) -> tuple[float, float]:
    """Wall seconds of one plan, and how far it may be from the best one."""
    start = time.perf_counter()
    made = plan(found, stocks(), demand)
    return time.perf_counter() - start, made.gap


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=300)
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for seed in range(options.cases):
        found = units(options.units, seed)
        rate_s, rate_gap = timed(found, Demand(rate=2500, headroom=0.1))
        most_s, most_gap = timed(found, Demand(devices=GPUS))
        sizes = {"undominated": len(undominated(found))}
        rows.append(sizes | {"rate_s": rate_s, "rate_gap": rate_gap, "most_s": most_s, "most_gap": most_gap})
    if options.json:
        print(json.dumps({"units": options.units, "gpus": GPUS, "pools": len(POOLS), "cases": rows}, indent=2))
        return
    print(f"{GPUS} GPUs, {len(POOLS)} pools, {options.units} deployments, {options.cases} cases; seconds")
    for key, text in (("rate", "cheapest plan of a rate"), ("most", "most that the GPUs can serve")):
        times, gaps = [row[f"{key}_s"] for row in rows], [row[f"{key}_gap"] for row in rows]
        proven = sum(gap == 0 for gap in gaps)
        print(f"  {text:<30} median {statistics.median(times):.2f}  worst {max(times):.2f}", end="")
        print(f"  proven the best {proven} of {len(rows)}, others within {max(gaps):.2%}")


if __name__ == "__main__":
    main()
