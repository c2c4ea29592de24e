from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.emulation import Chunk, Fault, FaultKind, FaultPlan, GpuMemory, HandOver, StepTimes
from search_spaces.errors import InvalidValueError


def linear(tokens: float, seqs: float, context: float) -> float:
    """Times that interpolation must give back exactly."""
    return 2.0 + 0.01 * tokens + 0.1 * seqs + 0.001 * context


TOKENS, SEQS, CONTEXTS = (1.0, 64.0, 512.0), (0.0, 1.0, 16.0), (1.0, 1000.0)
TIMES = StepTimes(
    tokens=TOKENS,
    seqs=SEQS,
    contexts=CONTEXTS,
    decode_ms=tuple(tuple(linear(0, s, c) for c in CONTEXTS) for s in SEQS),
    mixed_ms=tuple(tuple(tuple(linear(t, s, c) for c in CONTEXTS) for s in SEQS) for t in TOKENS),
    pair_ms=1e-5,
)


@given(st.integers(1, 1000), st.integers(0, 30), st.floats(1, 2000))
def test_linear_times_are_given_back_inside_the_grid_and_beyond(tokens: int, seqs: int, context: float) -> None:
    found = TIMES.step_ms([Chunk(tokens=tokens)], seqs, context)
    assert found == pytest.approx(linear(tokens, seqs, context))


@given(st.integers(1, 30), st.floats(1, 2000))
def test_decoding_has_a_table_of_its_own(seqs: int, context: float) -> None:
    assert TIMES.step_ms([], seqs, context) == pytest.approx(linear(0, seqs, context))


def test_nothing_to_do_takes_no_time() -> None:
    assert TIMES.step_ms([], 0, 0.0) == 0.0


def test_the_end_of_a_prompt_takes_longer_than_its_beginning_by_its_pairs() -> None:
    first, last = (TIMES.step_ms([Chunk(tokens=100, start=start)], 0, 0.0) for start in (0, 400))
    assert last - first == pytest.approx(100 * 400 * 1e-5)


def test_two_prompts_take_less_than_one_of_their_length() -> None:
    one, two = TIMES.step_ms([Chunk(tokens=200)], 0, 0.0), TIMES.step_ms([Chunk(tokens=100)] * 2, 0, 0.0)
    assert one - two == pytest.approx((200**2 - 2 * 100**2) / 2 * 1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seqs": (1.0, 2.0, 3.0)}, "must begin with 0"),
        ({"tokens": (64.0, 1.0, 2.0)}, "rising"),
        ({"decode_ms": ((1.0, 2.0),)}, "decode_ms has shape"),
        ({"mixed_ms": TIMES.mixed_ms[:1]}, "1 of 3 sheets"),
        ({"pair_ms": -1.0}, "pair_ms=-1.0"),
    ],
)
def test_tables_that_do_not_fit_together_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidValueError, match=said):
        StepTimes(**{name: getattr(TIMES, name) for name in StepTimes.__dataclass_fields__} | changes)


def test_memory_left_for_the_kv_cache() -> None:
    memory = GpuMemory(total_bytes=100.0, weight_bytes=50.0, fixed_bytes=10.0, kv_bytes_per_token=3.0)
    assert memory.kv_tokens(0.9) == 10
    assert memory.kv_tokens(0.5) == 0


def test_half_of_a_hand_over() -> None:
    assert HandOver(bytes_per_token=100.0, bandwidth=1e6, latency_ms=4.0).half_ms(10) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("crash_under_load", Fault(kind=FaultKind.CRASH_UNDER_LOAD)),
        ("slow_start:seconds=2.5", Fault(kind=FaultKind.SLOW_START, seconds=2.5)),
        (
            "drop_streams:after_requests=8,share=0.5",
            Fault(kind=FaultKind.DROP_STREAMS, after_requests=8, share=0.5),
        ),
    ],
)
def test_faults_by_name(text: str, fault: Fault) -> None:
    assert Fault.parse(text) == fault


@pytest.mark.parametrize("text", ["meltdown", "garbage:colour=1", "garbage:share=0"])
def test_faults_that_are_none(text: str) -> None:
    with pytest.raises(InvalidValueError):
        Fault.parse(text)


def test_a_plan_strikes_its_share_and_the_same_ones_again() -> None:
    plan = FaultPlan(shares={FaultKind.CRASH_UNDER_LOAD: 0.25}, seed=3)
    struck = [plan.draw(config_key="c", trial=f"t-{n}") is not None for n in range(2000)]
    assert 0.2 < sum(struck) / len(struck) < 0.3
    assert struck == [plan.draw(config_key="c", trial=f"t-{n}") is not None for n in range(2000)]


def test_faults_of_a_configuration_strike_it_at_every_try() -> None:
    plan = FaultPlan(shares={FaultKind.OUT_OF_MEMORY_AT_BOOT: 0.5})
    for key in map(str, range(50)):
        kinds = {plan.draw(config_key=key, trial=trial) is None for trial in ("first", "second", "third")}
        assert len(kinds) == 1
