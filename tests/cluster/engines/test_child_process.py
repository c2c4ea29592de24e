"""Processes end with whoever started them, in the ways that each stage of their life allows."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from cluster.processes import TAG_OWNER, ProcessId
from tests.support.processes import is_alive, wait_until_gone

STARTER = """
import os, subprocess, sys, threading
from cluster.processes import TAG_OWNER, ProcessId
env = os.environ | {TAG_OWNER: str(ProcessId.of(os.getpid()))}
child = None
def start():
    global child
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=env, stdout=subprocess.PIPE, text=True)
    print(child.pid, child.stdout.readline().strip(), flush=True)
thread = threading.Thread(target=start)
thread.start()
thread.join()
print("thread ended", flush=True)
sys.stdin.read()
"""
HOLDS_THE_INTERPRETER_LOCK = """
import re
from cluster.engines.child_process import bound_to_starting_thread, die_with_owner
with bound_to_starting_thread():
    die_with_owner()
    print("ready", flush=True)
    re.match("(a+)+b", "a" * 60)
"""
SERVES = """
import time
from cluster.engines.child_process import bound_to_starting_thread, die_with_owner
with bound_to_starting_thread():
    die_with_owner()
print("ready", flush=True)
time.sleep(60)
"""


def start(child: str, *, wait_for_thread: bool) -> tuple[subprocess.Popen[str], int]:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    pid, word = starter.stdout.readline().split()
    assert word == "ready"
    if wait_for_thread:
        assert starter.stdout.readline() == "thread ended\n"
    return starter, int(pid)


def end(starter: subprocess.Popen[str], pid: int) -> None:
    starter.kill()
    starter.communicate()
    if is_alive(pid):
        os.kill(pid, 9)


def test_a_process_that_serves_outlives_the_thread_but_not_the_process_that_started_it() -> None:
    starter, pid = start(SERVES, wait_for_thread=True)
    try:
        time.sleep(0.3)
        assert is_alive(pid)
        starter.kill()
        wait_until_gone(pid, 2.0)
    finally:
        end(starter, pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of the parent's death is Linux's")
def test_a_process_that_loads_ends_with_its_starter_even_where_no_python_code_can_run() -> None:
    starter, pid = start(HOLDS_THE_INTERPRETER_LOCK, wait_for_thread=False)
    try:
        starter.kill()
        wait_until_gone(pid, 2.0)
    finally:
        end(starter, pid)


def test_an_owner_that_is_gone_already_is_noticed_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    owner = ProcessId.of(gone.pid)
    gone.wait()
    result = subprocess.run(
        [sys.executable, "-c", SERVES],
        env=os.environ | {TAG_OWNER: str(owner)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert result.returncode == 70
    assert "is gone: ending" in result.stderr
