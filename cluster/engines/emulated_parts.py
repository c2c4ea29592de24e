"""An emulated replica that spans nodes: a process on each, joined to the one that leads.

The leader serves HTTP when all have joined, and tells each of every request. When a part ends, its connections break,
and the others end with it, as the ranks of a real engine do.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

from pydantic import BaseModel, Field

from cluster.engines.child_process import Exit, fail

RETRY_S = 0.05
_REQUEST = b"request\n"


class PartSpec(BaseModel, frozen=True):
    """See `cluster.engines.base.ReplicaPart`."""

    rank: int = Field(ge=0)
    hosts: tuple[str, ...]
    devices: tuple[int, ...]
    rendezvous_port: int = Field(ge=1, le=65535)

    @property
    def leads(self) -> bool:
        """True for the part that serves HTTP."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"part {self.rank} of {len(self.hosts)}"


class Followers:
    """The other parts of a replica, seen from the one that leads. `key` is what they must show."""

    def __init__(self, part: PartSpec, key: str) -> None:
        self._part, self._key = part, key
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._all_joined = asyncio.Event()

    async def join(self) -> None:
        """Wait until every part has joined; ends the process where the port is taken."""
        host, port = self._part.hosts[0], self._part.rendezvous_port
        try:
            await asyncio.start_server(self._serve, host, port)
        except OSError as error:
            fail(Exit.PORT_IN_USE, f"rendezvous port {port} of {host} cannot be bound ({error}); choose another")
        print(f"waiting for {len(self._part.hosts) - 1} other parts at {host}:{port}", flush=True)
        await self._all_joined.wait()

    def tell_request(self) -> None:
        """A request has come."""
        for writer in self._writers.values():
            writer.write(_REQUEST)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank = self._rank(await reader.readline())
        if rank is None:
            writer.close()
            return
        self._writers[rank] = writer
        writer.write(b"joined\n")
        print(f"part {rank} at {self._part.hosts[rank]} has joined", flush=True)
        if len(self._writers) == len(self._part.hosts) - 1:
            self._all_joined.set()
        while await reader.read(1024):
            continue
        fail(Exit.PEER_LOST, f"part {rank} at {self._part.hosts[rank]} is gone")

    def _rank(self, line: bytes) -> int | None:
        """The rank that a newcomer states, None for one that has no place here."""
        rank, _, key = line.decode(errors="replace").strip().partition(" ")
        known = hmac.compare_digest(key.encode(), self._key.encode())
        if not (known and rank.isdigit() and 0 < int(rank) < len(self._part.hosts)):
            return None
        return int(rank)


async def follow(part: PartSpec, key: str, strike: Callable[[], None]) -> None:
    """Join the leader and take part until it is gone, which ends the process; `strike` is called at each request."""
    reader, writer = await _reach(part.hosts[0], part.rendezvous_port)
    writer.write(f"{part.rank} {key}\n".encode())
    if not await reader.readline():
        fail(Exit.PEER_LOST, f"the leader at {part.hosts[0]}:{part.rendezvous_port} did not take {part} in")
    print(f"{part} has joined {part.hosts[0]}:{part.rendezvous_port}", flush=True)
    while await reader.readline():
        strike()
    fail(Exit.PEER_LOST, f"the leader at {part.hosts[0]} is gone")


async def _reach(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the leader, which may not listen yet; whoever starts the process limits the time."""
    while True:
        try:
            return await asyncio.open_connection(host, port)
        except OSError:
            await asyncio.sleep(RETRY_S)
