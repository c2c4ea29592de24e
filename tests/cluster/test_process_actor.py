"""The actor of a process, as a plain object: what it leaves nothing of."""

from __future__ import annotations

from pathlib import Path

import pytest

from search_spaces.outcome import FailureReason
from tests.support.memory_hog import make_actor, served
from tests.support.processes import is_alive, wait_until_gone


@pytest.mark.engine
def test_what_a_crashed_process_left_ends_with_the_deployment(tmp_path: Path) -> None:
    actor = make_actor()
    failure = served(actor, tmp_path, "parent")
    assert failure.reason is FailureReason.ENGINE_CRASH
    child = int(failure.log_tail.split()[1])
    assert is_alive(child), "it has a session of its own and no parent any more, as an engine's workers may"
    log = actor.stop(5.0)
    wait_until_gone(child, 5.0)
    assert log.decode() == f"child {child}\n"


@pytest.mark.engine
def test_a_process_that_was_never_started_is_stopped_without_a_word(tmp_path: Path) -> None:
    del tmp_path
    actor = make_actor()
    assert actor.stop(1.0) == b""
    assert not actor.watch()
    assert actor.account(0.0, ready=True).death is None
