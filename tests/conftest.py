"""Fixtures of the whole test session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support import postgres
from tests.support.ray_problem import POOL

if TYPE_CHECKING:
    from cluster.ray_session import RayCluster


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A local Ray cluster of the session with the pool of `tests.support.ray_problem` and room for two trials.

    It takes 5 to 20 s to start, once; tests that use it are marked `ray`. Other processes of a test can join it at
    `ray_cluster.address`.
    """
    from cluster.ray_session import connect

    with connect(None, [POOL], trials_at_once=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.PostgresServer]:
    """A PostgreSQL server of the session; tests that use it are skipped, with the reason, where none can be started."""
    reason = postgres.missing()
    if reason is not None:
        pytest.skip(reason)
    with postgres.postgres_server() as server:
        yield server
