"""Fixtures of the whole test session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

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
