"""Predict a study file, run it, and ask its corrected model for a load that was not measured.

python examples/api_whatif.py examples/ten-lines.yaml
"""

from __future__ import annotations

import sys

from tuner import load_study_file, predict, run_study


def main(path: str, *overrides: str) -> None:
    """Print what was predicted, what was measured, and what is expected at four times the load."""
    file = load_study_file(path, *overrides)
    best = predict(file, top=1).best
    print("predicted:", dict(best[0].prediction.metrics) if best else "nothing meets the SLOs")

    study = run_study(file)
    for trial in study.pareto():
        print("measured: ", trial.number, trial.values)

    answer = study.whatif("load=16").answers[0]
    for metric in study.report().objectives:
        print("what if:  ", metric, answer.prediction.metrics.get(metric), answer.interval(metric))
    print("beyond what was measured:", "; ".join(answer.extrapolated) or "nothing")


if __name__ == "__main__":
    main(*sys.argv[1:])
