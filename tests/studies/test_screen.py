"""What the screen proposes, and what it turns down."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from search_spaces.metrics import METRICS
from search_spaces.outcome import Failure, FailureReason, Prediction
from search_spaces.problem import Slo
from search_spaces.rules import infeasibility
from search_spaces.serving import Candidate, Mode
from search_spaces.space import Space
from studies.errors import SpaceExhausted
from studies.predictions import ROWS_PER_FILE, PredictionLog, Rejected
from studies.records import Origin, TrialRecord, TrialStatus
from studies.screen import Choice, Handed, Predict, Request, Screen, all_candidates
from tests.studies.toy import biased_model, measure, small_space, surface, toy_problem, wide_space

PROBLEM = toy_problem()
SPACE = wide_space(PROBLEM)


def make_screen(folder: Path, space: Space = SPACE, predict: Predict | None = None) -> Screen:
    return Screen(space.problem, space, seed=1, predict=predict, log=PredictionLog(folder))


def measured(number: int, candidate: Candidate, predict: Predict | None = None) -> TrialRecord:
    outcome = measure(candidate)
    return TrialRecord(
        number=number,
        status=TrialStatus.MEASURED,
        candidate=candidate,
        key=candidate.key,
        origin=Origin.SEED,
        prediction=predict([candidate])[0] if predict else None,
        outcome=outcome,
        values=surface(candidate),
    )


def request(number: int, trials: Sequence[TrialRecord] = (), **changes: object) -> Request:
    base = Request(number=number, trials=trials, tried={trial.key or "" for trial in trials})
    return replace(base, **changes)


def sample(count: int, seed: int = 0) -> list[Candidate]:
    rng = random.Random(seed)
    return [c for c in (SPACE.sample(rng) for _ in range(10 * count)) if infeasibility(c, PROBLEM) is None][:count]


def test_the_best_predicted_candidate_is_chosen_and_the_rest_is_written_down(tmp_path: Path) -> None:
    default = measured(0, SPACE.default())
    ordinary = sample(20)
    splendid = ordinary[7]

    def predict(candidates: Sequence[Candidate]) -> list[Prediction]:
        rates = [5000.0 if c == splendid else 1.0 for c in candidates]
        return [Prediction(metrics={"output_tokens_per_s": rate, "ttft_p50_ms": 9.0}) for rate in rates]

    log = PredictionLog(tmp_path / "predictions")
    screen = Screen(PROBLEM, SPACE, 1, predict, log)
    (choice,) = screen.choose(ordinary, request(12, [default]))
    assert (choice.candidate, choice.origin) == (splendid, Origin.SCREENED)
    assert choice.expected_gain is not None
    assert choice.expected_gain > 1.0, "many times what is held"
    log.flush()
    table = pd.read_parquet(tmp_path / "predictions")
    assert {c.key for c in ordinary} - {splendid.key} <= set(table["key"])
    assert {c.key for c in SPACE.neighbours(SPACE.default())} & set(table["key"]), "it thinks of its own too"
    assert len(table) == log.count == table["key"].nunique()
    assert set(table["trial"]) == {12}
    outscored = table[table["reason"] == "outscored"]
    assert (outscored["predicted_output_tokens_per_s"] == 1.0).all()
    assert outscored["predicted_tpot_p50_ms"].isna().all()
    assert (table.loc[table["reason"] != "outscored", "reason"].str.startswith("infeasible: ")).all()
    assert [column for column in table if column.startswith("predicted_")] == [f"predicted_{name}" for name in METRICS]
    assert SPACE.decode(json.loads(outscored["genotype"].iloc[0])).key == outscored["key"].iloc[0]
    assert PredictionLog(tmp_path / "predictions").count == log.count, "a resumed study counts on"


def test_a_hint_is_measured_where_the_model_says_so_and_not_otherwise(tmp_path: Path) -> None:
    default, hint = measured(0, SPACE.default()), sample(40)[-1]

    def choice_where_a_hint_gives(rate: float, folder: Path) -> Choice:
        def predict(candidates: Sequence[Candidate]) -> list[Prediction]:
            rates = [rate if c == hint else 50.0 for c in candidates]
            return [Prediction(metrics={"output_tokens_per_s": r, "ttft_p50_ms": 9.0}) for r in rates]

        screen = Screen(PROBLEM, SPACE, 1, predict, PredictionLog(folder), handed=Handed(hints=(hint,)))
        (choice,) = screen.choose([], request(12, [default]))
        return choice

    good, bad = choice_where_a_hint_gives(5000.0, tmp_path / "good"), choice_where_a_hint_gives(1.0, tmp_path / "bad")
    assert (good.candidate, good.origin) == (hint, Origin.SEED), "nothing else proposes it"
    assert bad.candidate != hint
    assert bad.origin is Origin.SCREENED


def test_what_is_turned_down_again_and_again_is_written_once(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "predictions")
    screen = Screen(PROBLEM, SPACE, 1, biased_model(), log)
    for number in range(10, 14):
        screen.choose(sample(20), request(number, [measured(0, SPACE.default())]))
    log.flush()
    table = pd.read_parquet(tmp_path / "predictions")
    assert not table[["key", "reason"]].duplicated().any()
    assert set(table["trial"]) > {10}, "new ones are"


def test_one_proposal_in_ten_takes_the_first_child_whatever_the_model_says(tmp_path: Path) -> None:
    screen = make_screen(tmp_path, predict=biased_model())
    default = measured(0, SPACE.default())
    children = sample(30)
    origins = [screen.choose(children, request(number, [default]))[0].origin for number in range(10, 30)]
    assert [i for i, origin in enumerate(origins, start=10) if origin is Origin.UNSCREENED] == [19, 29]
    (choice,) = screen.choose(children, request(19, [default]))
    assert choice.candidate == children[0]
    assert choice.prediction == biased_model()([children[0]])[0], "predicted all the same: that is the point"


def test_tried_and_impossible_candidates_are_never_chosen(tmp_path: Path) -> None:
    pool = sample(10)
    tried = [measured(i, candidate) for i, candidate in enumerate(pool[:9])]
    rng = random.Random(3)
    drawn = [SPACE.sample(rng) for _ in range(100)]
    impossible = next(candidate for candidate in drawn if infeasibility(candidate, PROBLEM) is not None)
    (alone,) = make_screen(tmp_path).choose([impossible, *pool], request(12, tried))
    assert alone.candidate == pool[9], "without a model the first that will do"
    for number in range(20, 28):
        (choice,) = make_screen(tmp_path, predict=biased_model()).choose([impossible, *pool], request(number, tried))
        assert infeasibility(choice.candidate, PROBLEM) is None
        assert choice.key not in {trial.key for trial in tried}


def test_candidates_that_the_model_rules_out_are_left_for_the_very_last(tmp_path: Path) -> None:
    space = small_space(PROBLEM)
    everything = {candidate.key: candidate for candidate in all_candidates(space)}

    def predict(candidates: Sequence[Candidate]) -> list[Prediction]:
        fits = biased_model()(list(candidates))
        too_large = Prediction(metrics={}, infeasible="12 GB of weights in 8 GB")
        return [too_large if c.load.value > 1 else p for c, p in zip(candidates, fits, strict=True)]

    log = PredictionLog(tmp_path / "predictions")
    screen = Screen(PROBLEM, space, 1, predict, log)
    trials: list[TrialRecord] = []
    for number in range(10, 10 + len(everything)):
        (choice,) = screen.choose(list(everything.values()), request(number, trials))
        trials.append(measured(number, choice.candidate))
    screened = [trial.candidate.load.value for trial in trials if trial.number % 10 != 9 and trial.candidate]
    assert screened[:4] == [1.0] * 4
    assert len({trial.key for trial in trials}) == len(everything)
    with pytest.raises(SpaceExhausted):
        screen.require_untried({trial.key or "" for trial in trials}, 99)
    log.flush()
    reasons = set(pd.read_parquet(tmp_path / "predictions")["reason"])
    assert reasons == {"outscored", "predicted: 12 GB of weights in 8 GB"}


def test_a_warm_deployment_at_another_load_wins_where_starting_is_dear(tmp_path: Path) -> None:
    up = SPACE.default()
    cold = measure(up)
    trial = replace(measured(0, up), outcome=replace(cold, timings_s={"start": 60_000.0, "measure": 5.0}))
    screen = make_screen(tmp_path, predict=biased_model(1.0))
    (choice,) = screen.choose(sample(60), request(12, [trial], warm=(up.config,)))
    assert choice.origin is Origin.WARM
    assert choice.candidate.config == up.config
    assert choice.candidate.load != up.load
    assert screen.choose(sample(60), request(12, [trial]))[0].origin is Origin.SCREENED


def failed(number: int, candidate: Candidate) -> TrialRecord:
    outcome = Failure(reason=FailureReason.STARTUP_TIMEOUT, detail="no replica was ready", timings_s={"start": 60.0})
    return replace(measured(number, candidate), status=TrialStatus.FAILED, outcome=outcome, values=None)


def test_a_family_that_failed_every_time_is_not_proposed_again_and_again(tmp_path: Path) -> None:
    """The model promises ten times the throughput of disaggregated serving, which never starts here."""

    def promising(candidates: Sequence[Candidate]) -> list[Prediction]:
        factors = [10.0 if c.config.mode is Mode.DISAGGREGATED else 1.0 for c in candidates]
        return [
            replace(p, metrics=p.metrics | {"output_tokens_per_s": p.metrics["output_tokens_per_s"] * factor})
            for p, factor in zip(biased_model(1.0)(candidates), factors, strict=True)
        ]

    screen = make_screen(tmp_path, predict=promising)
    trials = [measured(0, SPACE.default(Mode.AGGREGATED)), failed(1, SPACE.default(Mode.DISAGGREGATED))]
    for number in range(2, 22):
        candidate = screen.choose(sample(20, seed=number), request(number, trials))[0].candidate
        is_broken = candidate.config.mode is Mode.DISAGGREGATED
        trials.append(failed(number, candidate) if is_broken else measured(number, candidate))
    failures = [trial.number for trial in trials if trial.status is TrialStatus.FAILED]
    assert len(failures) >= 2, "one failure is not enough to give up what is promised ten times as good"
    assert len(failures) <= 5
    assert max(failures) < 16, "and not later either"


def test_what_failed_every_time_is_not_proposed_unscreened_either(tmp_path: Path) -> None:
    family = [c for c in sample(200) if c.config.mode is Mode.DISAGGREGATED]
    trials = [failed(number, candidate) for number, candidate in enumerate(family[:6])]
    for predict in (None, biased_model()):
        screen = make_screen(tmp_path, predict=predict)
        for suggested in (family[6:9], []):
            (choice,) = screen.choose(suggested, request(19, trials))
            assert choice.origin is Origin.UNSCREENED
            assert choice.candidate.config.mode is Mode.AGGREGATED


def test_what_is_being_measured_is_taken_for_measured_as_predicted(tmp_path: Path) -> None:
    screen = make_screen(tmp_path, predict=biased_model(1.0))
    default = measured(0, SPACE.default())
    (first,) = screen.choose(sample(60), request(12, [default]))
    assert first.prediction is not None
    running = TrialRecord(
        number=1,
        status=TrialStatus.RUNNING,
        candidate=first.candidate,
        key=first.key,
        origin=first.origin,
        prediction=first.prediction,
        outcome=None,
        values=None,
    )
    (second,) = screen.choose(sample(60), request(12, [default, running]))
    assert second.key != first.key
    gains = [choice.expected_gain for choice in (first, second)]
    assert gains[0] is not None
    assert gains[1] is not None
    assert gains[1] < 0.8 * gains[0]


def test_proposals_avoid_what_is_predicted_to_miss_its_slo(tmp_path: Path) -> None:
    problem = replace(PROBLEM, slos=(Slo(metric="ttft_p50_ms", threshold=15.0),))
    screen = make_screen(tmp_path, space=replace(SPACE, problem=problem), predict=biased_model(1.0))
    trials: list[TrialRecord] = []
    for number in range(2, 9):
        (choice,) = screen.choose([], request(number, trials))
        missed = surface(choice.candidate)[1] / 15.0 - 1
        trials.append(replace(measured(number, choice.candidate), violations={"ttft_p50_ms": missed}))
    waits = [surface(trial.candidate)[1] for trial in trials if trial.candidate]
    assert len(waits) == 7
    assert max(waits) < 20.0


def test_choices_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    first, second = (make_screen(tmp_path, predict=biased_model()) for _ in range(2))
    default = [measured(0, SPACE.default())]
    (_,) = first.choose([], request(2, default))
    assert first.choose([], request(3, default)) == second.choose([], request(3, default))
    assert first.choose([], request(3, default)) != first.choose([], request(4, default))


def test_the_log_writes_a_file_when_its_buffer_is_full(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path)
    row = Rejected(trial=1, key="k", genotype={"a": 1}, metrics={"ttft_p50_ms": 2.0}, score=None, reason="outscored")
    for _ in range(ROWS_PER_FILE + 1):
        log.add(row)
    assert [path.name for path in tmp_path.iterdir()] == ["0000001-0.parquet"]
    log.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000001-0.parquet", "0000001-1.parquet"]
    assert len(pd.read_parquet(tmp_path)) == PredictionLog(tmp_path).count == ROWS_PER_FILE + 1
