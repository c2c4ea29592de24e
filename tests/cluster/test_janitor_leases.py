from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.janitor import Leases, TaggedProcess
from cluster.processes import ProcessId

MINE = ProcessId(host="a", pid=1, created_s=1)
OTHER = ProcessId(host="b", pid=2, created_s=2)
ABANDONED_S = 300.0


def process(pid: int, trial: str, coordinator: ProcessId | None = MINE) -> TaggedProcess:
    return TaggedProcess(pid=pid, study="s", trial=trial, owner=None, coordinator=coordinator)


def leases() -> Leases:
    return Leases(MINE, abandoned_s=ABANDONED_S, now_s=0.0)


def test_a_process_is_kept_until_two_messages_have_left_its_trial_out() -> None:
    kept = leases()
    kept.renew(frozenset({"t1"}), 1.0)
    started = [process(1, "t1"), process(2, "t2")]  # t2 was begun after that message was sent
    assert kept.without(started, 2.0) == []
    kept.renew(frozenset({"t1", "t2"}), 3.0)
    assert kept.without(started, 4.0) == []
    for now_s in (5.0, 6.0):
        kept.renew(frozenset({"t2"}), now_s)
        assert kept.without(started, now_s) == []
    kept.renew(frozenset({"t2"}), 7.0)
    assert kept.without(started, 8.0) == [started[0]]


def test_a_coordinator_that_is_silent_for_long_loses_all_leases() -> None:
    kept = leases()
    kept.renew(frozenset({"t1"}), 10.0)
    own, foreign, untold = process(1, "t1"), process(2, "t1", OTHER), process(3, "t1", None)
    assert kept.without([own, foreign, untold], 10.0 + ABANDONED_S) == []
    assert kept.without([own, foreign, untold], 10.1 + ABANDONED_S) == [own]


@given(st.lists(st.tuples(st.frozensets(st.sampled_from("abc")), st.frozensets(st.sampled_from("abc"))), max_size=30))
def test_a_trial_that_is_named_in_every_message_from_its_start_is_never_ended(
    messages: list[tuple[frozenset[str], frozenset[str]]],
) -> None:
    kept, running = leases(), {"z"}
    for now_s, (named, there) in enumerate(messages):
        kept.renew(named | running, float(now_s))
        found = [process(ord(trial), trial) for trial in sorted(there | running)]
        ended = kept.without(found, float(now_s))
        assert not any(p.trial in named | running for p in ended)
