from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cluster import processes
from cluster.janitor import end_orphans, tagged_processes
from cluster.node_facts import usable_cores
from cluster.processes import ManagedProcess, ProcessId, Tags, answers, free_port, log_tail, wait_until_answers
from tests.support.processes import is_alive, wait_until_gone

SLEEP = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)")
SERVER = (sys.executable, "-m", "http.server", "--bind", "127.0.0.1")


def wait_for_text(log: Path, text: str, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while text not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, f"{text!r} never came in {log}"
        time.sleep(0.01)


def test_a_process_keeps_its_id_its_cores_and_its_log(tmp_path: Path) -> None:
    core = usable_cores()[0]
    code = "import os; print(os.getpid(), sorted(os.sched_getaffinity(0)), os.environ['MARK'])"
    child = ManagedProcess(
        argv=(sys.executable, "-c", code), env={"MARK": "here"}, log=tmp_path / "a" / "log", cores=(core,)
    )
    assert child.wait(20.0) == 0
    assert child.tail() == f"{child.pid} [{core}] here"


def test_a_program_that_is_not_there_exits_with_127_and_says_so(tmp_path: Path) -> None:
    child = ManagedProcess(argv=("no-such-program",), env={}, log=tmp_path / "log")
    assert child.wait(20.0) == 127
    assert "cannot start no-such-program" in child.tail()


def test_terminate_ends_children_too_and_those_that_ignore_sigterm(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = ManagedProcess(argv=(sys.executable, "-c", code), env={}, log=tmp_path / "log")
    wait_for_text(tmp_path / "log", "child ")
    grandchild = int(process.tail().split()[1])
    process.terminate(0.5)
    assert not is_alive(process.pid)
    wait_until_gone(grandchild, 5.0)


def test_a_process_ends_with_the_thread_that_started_it(tmp_path: Path) -> None:
    started: list[ManagedProcess] = []
    up = threading.Event()

    def start_and_leave() -> None:
        started.append(ManagedProcess(argv=SLEEP, env={}, log=tmp_path / "log"))
        wait_for_text(tmp_path / "log", "up")
        assert is_alive(started[0].pid)
        up.set()

    thread = threading.Thread(target=start_and_leave)
    thread.start()
    thread.join()
    assert up.is_set()
    assert started[0].wait(5.0) == -signal.SIGKILL


def test_readiness_waits_for_200_and_gives_up_when_the_process_ends(tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}/"
    assert not answers(url)
    server = ManagedProcess(argv=(*SERVER, str(port)), env={}, log=tmp_path / "log")
    try:
        assert wait_until_answers(server, url, 20.0)
        assert not wait_until_answers(server, url + "missing", 0.3)
    finally:
        server.terminate(5.0)
    began = time.monotonic()
    assert not wait_until_answers(server, url, 20.0)
    assert time.monotonic() - began < 15.0


def test_the_tail_is_the_last_lines_however_long_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n" for i in range(100_000)))
    assert log_tail(log, lines=2) == "line 99998\nline 99999"
    assert len(log_tail(log, lines=10**6, limit_bytes=100)) <= 100
    assert log_tail(tmp_path / "missing") == ""


def test_a_process_id_is_not_mistaken_for_a_later_process() -> None:
    me = ProcessId.of(os.getpid())
    assert ProcessId.parse(str(me)) == me
    assert me.is_alive
    assert me.is_here
    assert not ProcessId(host=me.host, pid=me.pid, created_s=me.created_s - 100).is_alive
    assert not ProcessId(host="elsewhere", pid=me.pid, created_s=me.created_s).is_here
    assert ProcessId.parse("") is None
    assert ProcessId.parse("host|12|x") is None


def test_folders_of_dead_coordinators_of_this_host_go() -> None:
    me = ProcessId.of(os.getpid())
    elsewhere = ProcessId(host="elsewhere", pid=1, created_s=1)
    folders = [processes.node_folder(owner) for owner in (gone(), me, elsewhere)]
    try:
        for folder in folders:
            (folder / "models").mkdir(parents=True)
        processes.remove_left_folders()
        assert [folder.exists() for folder in folders] == [False, True, True]
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def gone() -> ProcessId:
    """A process of this host that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    identity = ProcessId.of(child.pid)
    child.wait()
    return identity


def test_the_janitor_ends_what_a_dead_coordinator_left_and_nothing_else(tmp_path: Path) -> None:
    me = ProcessId.of(os.getpid())
    study = f"janitor-{me.pid}"
    left = Tags(study=study, trial="t1", coordinator=gone()).environment()
    kept = Tags(study=study, trial="t2", coordinator=me).environment()
    other = {processes.TAG_STUDY: f"{study}-other", processes.TAG_COORDINATOR: str(gone())}
    with ThreadPoolExecutor(1) as starter:  # its thread lives as long as the processes should
        children = [
            starter.submit(ManagedProcess, argv=SLEEP, env=env, log=tmp_path / str(i)).result()
            for i, env in enumerate([left, kept, other])
        ]
        try:
            for i in range(3):
                wait_for_text(tmp_path / str(i), "up")
            assert {p.trial: p.orphaned for p in tagged_processes(study)} == {"t1": True, "t2": False}
            assert [orphan.pid for orphan in end_orphans(study)] == [children[0].pid]
            assert [is_alive(child.pid) for child in children] == [False, True, True]
        finally:
            for child in children:
                child.terminate(5.0)
    assert tagged_processes(study) == []


@pytest.mark.parametrize("owner_lives", [True, False])
def test_the_owner_decides_too(owner_lives: bool) -> None:
    me = ProcessId.of(os.getpid())
    study = f"owners-{me.pid}"
    env = {processes.TAG_STUDY: study, processes.TAG_OWNER: str(me if owner_lives else gone())}
    child = subprocess.Popen(SLEEP, env={**os.environ, **env}, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        found = [p for p in tagged_processes(study) if p.pid == child.pid]
        assert [p.orphaned for p in found] == [not owner_lives]
    finally:
        child.kill()
        child.communicate()
    assert not psutil.pid_exists(child.pid)
