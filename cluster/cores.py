"""Which cores each process may use: kept in the coordinator, for every machine (pure bookkeeping).

The last core of a machine is kept for load generators; replicas get cores of their own from the front, and routers a
free one or the load generators'. Where cores run out they are shared, and that is told, never hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class CoreLedger:
    """Grants cores of one machine to named owners."""

    def __init__(self, cores: Iterable[int]) -> None:
        self._cores = tuple(sorted(cores))
        self._granted: dict[str, tuple[int, ...]] = {}

    @property
    def client_core(self) -> int:
        """The core kept for load generators."""
        return self._cores[-1]

    def grant_replica(self, owner: str, count: int) -> tuple[int, ...]:
        """`count` cores for a replica, all where there are fewer; off the load generators' core if enough are left."""
        usable = self._cores[:-1] if count < len(self._cores) else self._cores
        return self._grant(owner, self._least_used(usable)[:count])

    def grant_client(self, owner: str) -> tuple[int, ...]:
        """A core for a load generator: the last, or another free one from the end."""
        return self._grant(owner, self._least_used(self._cores[::-1])[:1])

    def grant_router(self, owner: str) -> tuple[int, ...]:
        """A free core from the end, else the load generators' core."""
        free = [core for core in reversed(self._cores[:-1]) if self._users(core) == 0]
        return self._grant(owner, free[:1] or [self.client_core])

    def grant_host(self) -> tuple[int, ...]:
        """Every core but the load generators', for the host side of an engine on GPUs; not counted as use."""
        return self._cores[:-1] or self._cores

    def free(self, owner: str) -> None:
        """Take back what `owner` has; a no-op where it has nothing."""
        self._granted.pop(owner, None)

    def shared(self, owner: str) -> tuple[int, ...]:
        """The cores of `owner` that others have too."""
        return tuple(core for core in self._granted.get(owner, ()) if self._users(core) > 1)

    def _grant(self, owner: str, cores: Sequence[int]) -> tuple[int, ...]:
        self._granted[owner] = tuple(sorted(cores))
        return self._granted[owner]

    def _least_used(self, cores: Sequence[int]) -> list[int]:
        """`cores` in their order, those with fewer users first."""
        return sorted(cores, key=self._users)

    def _users(self, core: int) -> int:
        return sum(core in cores for cores in self._granted.values())
