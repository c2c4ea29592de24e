"""Round trips of every stored type, and what happens to records of other versions."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.metrics import METRICS
from search_spaces.outcome import Failure, FailureReason, Measurement, Prediction
from search_spaces.serving import Candidate
from studies.codec import from_json, to_json
from studies.errors import StudyFormatError
from studies.records import Origin, Plan, decode_outcome, decode_plan, encode_outcome, encode_plan
from tests.studies.toy import measure, toy_problem, wide_space

SPACE = wide_space(toy_problem())
numbers = st.floats(allow_nan=False) | st.integers(-(2**53), 2**53).map(float)
texts = st.text(max_size=20)
text_maps = st.dictionaries(texts, texts, max_size=3)
number_maps = st.dictionaries(st.sampled_from(list(METRICS)), numbers, max_size=4)
candidates = st.integers().map(lambda seed: SPACE.sample(random.Random(seed)))
predictions = st.builds(
    Prediction, metrics=number_maps, log_stddev=number_maps, infeasible=st.none() | texts, breakdown_ms=number_maps
)
failures = st.builds(
    Failure,
    reason=st.sampled_from(FailureReason),
    detail=texts,
    log_tail=texts,
    artifacts=text_maps,
    timings_s=number_maps,
    environment=text_maps,
)
measurements = st.builds(
    Measurement,
    metrics=candidates.map(lambda candidate: measure(candidate).metrics),
    client_lateness_ms=numbers,
    timings_s=number_maps,
    environment=text_maps,
    artifacts=text_maps,
    emulated=st.booleans(),
)
of_origin = st.tuples(st.sampled_from([o for o in Origin if not o.is_repeat]), st.none()) | st.tuples(
    st.sampled_from([Origin.CONTROL, Origin.CONFIRM]), st.integers(0, 99)
)
plans = st.builds(
    lambda pair, **fields: Plan(origin=pair[0], repeat_of=pair[1], **fields),
    of_origin,
    candidate=candidates,
    key=texts,
    prediction=st.none() | predictions,
    attempt=st.integers(1, 9),
    losses=st.integers(0, 9),
    retry_of=st.none() | st.integers(0, 99),
)


@given(plans)
def test_a_plan_survives_json_and_keeps_its_key(plan: Plan) -> None:
    read = decode_plan(json.loads(json.dumps(encode_plan(plan))))
    assert read == plan
    assert read.candidate.key == plan.candidate.key


@given(measurements | failures, text_maps)
def test_an_outcome_survives_json(outcome: Measurement | Failure, ids: dict[str, str]) -> None:
    assert decode_outcome(json.loads(json.dumps(encode_outcome(outcome, ids)))) == (outcome, ids)


def test_a_field_that_came_later_takes_its_default() -> None:
    data = to_json(Failure(reason=FailureReason.TRANSPORT, detail="reset"))
    assert isinstance(data, dict)
    del data["log_tail"]
    assert from_json(Failure, data).log_tail == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown fields"),
        ({"reason": "melted"}, "is none of"),
        ({"detail": 7}, "is no str"),
        ({"timings_s": {"start": True}}, "is no float"),
        ({"timings_s": []}, "is no dict"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    data = to_json(Failure(reason=FailureReason.TRANSPORT, detail="reset"))
    assert isinstance(data, dict)
    with pytest.raises(StudyFormatError, match=message):
        from_json(Failure, data | change)  # type: ignore[arg-type] # deliberately of the wrong shape


def test_damaged_candidates_are_refused_with_the_place() -> None:
    data = to_json(SPACE.default())
    assert isinstance(data, dict)
    with pytest.raises(StudyFormatError, match=r"Candidate lacks the fields \['load'\]"):
        from_json(Candidate, {"config": data["config"]})
    with pytest.raises(StudyFormatError, match="impossible value: concurrency=-1"):
        from_json(Candidate, data | {"load": {"arrival": "closed", "value": -1.0}})


def test_another_schema_version_is_refused() -> None:
    with pytest.raises(StudyFormatError, match="schema 2 cannot be read"):
        decode_plan({"schema": 2})
    with pytest.raises(StudyFormatError, match="not of schema 1"):
        decode_outcome({"schema": 2})


def test_values_without_a_json_form_are_refused() -> None:
    with pytest.raises(StudyFormatError, match="has no JSON form"):
        to_json(object())
