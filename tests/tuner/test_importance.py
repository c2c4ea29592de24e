"""`tuner study importance`: a parameter that decides is found by the trials and by the model alike."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from search_spaces.errors import TunerError
from studies.importance import LEAST_TRIALS, Evaluator, has_fanova, importances
from tests.support.commands import Invoke, commands_in
from tuner.importance import importance
from tuner.places import existing_place
from tuner.report_importance import share_of_variance
from tuner.stored import history_of


def test_the_share_of_the_variance_by_hand() -> None:
    settings = [{"a": i % 2, "b": i // 2 % 2} for i in range(8)]
    every = np.array([float(found["a"]) + 0.5 * found["b"] for found in settings])
    within_a, total = 8 * 0.25**2, 8 * (0.5**2 + 0.25**2)
    assert share_of_variance("a", settings, every) == pytest.approx(1 - 7 / 6 * within_a / total)
    assert share_of_variance("c", settings, every) is None


@pytest.mark.long
def test_the_command_tells_both_and_their_weakness(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    invoke: Invoke = commands_in(tmp_path, monkeypatch, capsys)
    assert invoke("study", "run", "study.yaml", "--set", f"budget.trials={LEAST_TRIALS + 4}").code == 0
    done = invoke("study", "importance", "toy", "--evaluator", "ped-anova", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["evaluator"] == "ped-anova"
    assert found["measured_trials"] >= LEAST_TRIALS + 4, "repeats are trials too"
    assert set(found["importances"]) == {"output_tokens_per_s", "ttft_p50_ms"}
    for shares in found["importances"].values():
        assert math.fsum(shares.values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for shares in found["model_sensitivity"].values() for share in shares.values())
    assert found["model_sensitivity"]["output_tokens_per_s"]["concurrency"] > 0.05
    assert "screened search" in found["notes"][0]
    shown = invoke("study", "importance", "toy", "--evaluator", "ped-anova").out
    assert "PREDICTED" in shown
    assert "UserWarning" not in done.err
    place = existing_place(None)
    history = history_of(place, "toy")
    if has_fanova():
        assert importances(history, Evaluator.FANOVA).by_objective
    else:
        assert "PED-ANOVA stands in for fANOVA" in " ".join(importance(history, place).notes)
        with pytest.raises(TunerError, match=r"pip install 'tuner\[importance\]'"):
            importance(history, place, evaluator="fanova")
