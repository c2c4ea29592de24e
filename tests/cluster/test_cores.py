from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.cores import CoreLedger


def test_replicas_come_from_the_front_and_the_client_keeps_the_last_core() -> None:
    ledger = CoreLedger(range(4))
    assert ledger.grant_replica("p", 1) == (0,)
    assert ledger.grant_replica("d", 1) == (1,)
    assert ledger.grant_client("c") == (3,)
    assert ledger.grant_router("r") == (2,)
    assert not any(ledger.shared(owner) for owner in "pdcr")


def test_on_two_cores_replicas_share_one_and_the_client_keeps_its_own() -> None:
    ledger = CoreLedger(range(2))
    assert [ledger.grant_replica(owner, 1) for owner in "pd"] == [(0,), (0,)]
    assert ledger.grant_client("c") == (1,)
    assert ledger.shared("p") == ledger.shared("d") == (0,)
    assert ledger.shared("c") == ()
    assert ledger.grant_router("r") == (1,)
    assert ledger.shared("c") == (1,)


def test_a_replica_as_large_as_the_machine_takes_every_core() -> None:
    ledger = CoreLedger(range(2))
    assert ledger.grant_replica("p", 2) == (0, 1)
    assert ledger.grant_client("c") == (1,)
    assert ledger.shared("p") == (1,)


def test_freed_cores_are_granted_again() -> None:
    ledger = CoreLedger(range(3))
    ledger.grant_replica("a", 1)
    ledger.grant_replica("b", 1)
    ledger.free("a")
    ledger.free("a")
    assert ledger.grant_replica("c", 1) == (0,)
    assert ledger.shared("c") == ()


def test_the_host_side_of_a_gpu_engine_stays_off_the_client_core() -> None:
    assert CoreLedger(range(4)).grant_host() == (0, 1, 2)
    assert CoreLedger([0]).grant_host() == (0,)


@given(st.integers(1, 8), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4), st.booleans()), max_size=30))
def test_sharing_is_told_exactly_when_cores_overlap(size: int, moves: list[tuple[int, int, bool]]) -> None:
    ledger = CoreLedger(range(size))
    held: dict[str, tuple[int, ...]] = {}
    for number, count, give_back in moves:
        owner = f"o{number}"
        if give_back or owner in held:
            ledger.free(owner)
            held.pop(owner, None)
        else:
            held[owner] = ledger.grant_replica(owner, count)
            assert len(held[owner]) == min(count, size)
    for owner, cores in held.items():
        others = {core for other, theirs in held.items() if other != owner for core in theirs}
        assert set(ledger.shared(owner)) == set(cores) & others
