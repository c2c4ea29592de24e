"""A study whose PostgreSQL goes away in its middle and comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runner import TrialRequest
from search_spaces.outcome import Outcome
from studies.errors import StorageLostError
from studies.stopping import StopReason
from tests.support import postgres
from tests.support.memory_runner import MemoryRunner, measured
from tests.tuner.test_session import Bench
from tuner.places import Place


@pytest.fixture
def server() -> Iterator[postgres.PostgresServer]:
    """A server that this test may stop."""
    reason = postgres.missing()
    if reason is not None:
        pytest.skip(reason)
    with postgres.postgres_server() as started:
        yield started


def test_the_run_ends_with_what_to_do_and_a_resume_loses_and_repeats_nothing(
    server: postgres.PostgresServer, tmp_path: Path
) -> None:
    bench = Bench(place=Place(url=server.new_database(), directory=tmp_path))
    count = Counter[str]()

    def outcome_of(request: TrialRequest) -> Outcome:
        count[request.candidate.key] += 1
        if count.total() == 4:
            server.stop()
        return measured(request)

    bench.cluster.make_runner = lambda: MemoryRunner(outcome_of=outcome_of)
    with pytest.raises(StorageLostError, match=r"postgresql://tuner:\*\*\*@127.0.0.1:\d+/test_\w+ .*") as caught:
        bench.run("budget.trials=8")
    assert caught.value.exit_code == 75
    assert postgres.PASSWORD not in str(caught.value)
    with pytest.raises(StorageLostError, match="cannot be opened"):
        bench.run("budget.trials=8")
    server.start()
    ended = bench.run("budget.trials=8")
    assert ended.reason is StopReason.TRIALS
    finished = [trial.key for trial in ended.report.trials if trial.is_finished]
    assert len(finished) == len(set(finished)) == 8
    assert count.total() == 9, "only what was measured while the storage went away is measured again"
