from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cluster.janitor import Leases, TaggedProcess
from cluster.processes import ManagedProcess, ProcessId, Tags
from cluster.ray_nodes import NodeAgent, WatchRule

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


def test_an_agent_ends_what_its_coordinator_does_not_run(tmp_path: Path) -> None:
    me = ProcessId.of(os.getpid())
    study = f"agent-{me.pid}"
    sleep = (sys.executable, "-c", "import time; time.sleep(60)")
    agent = NodeAgent(study, me, WatchRule(scan_s=0.1, abandoned_s=600.0))
    with ThreadPoolExecutor(1) as starter:  # its thread lives as long as the processes should
        children = {
            trial: starter.submit(
                ManagedProcess,
                argv=sleep,
                env=Tags(study=study, trial=trial, coordinator=me).environment(),
                log=tmp_path / trial,
            ).result()
            for trial in ("kept", "dropped")
        }
        try:
            ended: list[TaggedProcess] = []
            deadline = time.monotonic() + 20.0
            while children["dropped"].exit_code() is None or not ended:
                ended += agent.beat(frozenset({"kept"}))
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert {process.trial for process in ended} == {"dropped"}
            assert children["kept"].exit_code() is None
            abandoned = NodeAgent(study, me, WatchRule(scan_s=0.1, abandoned_s=0.5))  # never hears of anybody
            assert children["kept"].wait(20.0) is not None
            abandoned.close()
        finally:
            agent.close()
            for child in children.values():
                child.terminate(5.0)


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
