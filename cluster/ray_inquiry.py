"""From the first sign of a fault to a verdict: every process of the deployment is heard before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray

from cluster.node_facts import NodeFacts
from cluster.ray_actors import Account
from cluster.ray_calls import Calls
from cluster.ray_nodes import NodeWatch
from cluster.verdicts import depth, most_telling
from search_spaces.outcome import Failure, FailureReason

AUTOPSY_GRACE_S = 0.3
"""How long a process that is about to die is waited for."""


class Inquiry:
    """Collects what is known of a fault; `verdict` is called once, with the account nearest to the cause.

    A node whose part was unhealthy is distrusted for a while.
    """

    def __init__(self, *, calls: Calls, watch: NodeWatch, verdict: Callable[[Failure], None]) -> None:
        self._calls, self._watch, self._verdict = calls, watch, verdict
        self._suspects: list[tuple[str, Failure]] = []
        self._facts: Mapping[str, NodeFacts] = {}
        self.is_open = False

    def hear(
        self,
        name: str,
        failure: Failure | None,
        *,
        actors: Mapping[str, Any],
        facts: Mapping[str, NodeFacts],
        ready: bool,
    ) -> None:
        """`failure` is what is known of the part `name`; the first time, all `actors` of processes are asked.

        `facts` are the nodes of the parts, `ready` says whether the deployment had served.
        """
        if failure is not None:
            self._suspects.append((name, failure))
        if not self.is_open:
            self.is_open, self._facts = True, facts
            calls = {part: actor.account.remote(AUTOPSY_GRACE_S, ready=ready) for part, actor in actors.items()}
            self._calls.gather(calls, self._close)

    def _close(self, accounts: Mapping[str, Account]) -> None:
        deaths = [(name, account.death) for name, account in accounts.items() if account.death is not None]
        unknown = Failure(reason=FailureReason.ENGINE_CRASH, detail="a process ended, and nothing says why")
        known = [*self._suspects, *deaths] or [("", unknown)]
        guilty, cause = min(known, key=lambda pair: depth(pair[1]))
        if cause.reason is FailureReason.UNHEALTHY_NODE and guilty in self._facts:
            self._watch.distrust(self._facts[guilty].node_id)
        first, *others = [failure for _, failure in known]
        failure = most_telling(first, others)
        if not failure.log_tail:
            tails = "\n".join(f"[{name}]\n{account.tail}" for name, account in accounts.items() if account.tail)
            failure = replace(failure, log_tail=tails)
        self._verdict(failure)


def lost_actor(name: str, facts: NodeFacts | None, watch: NodeWatch, error: ray.exceptions.RayError) -> Failure:
    """The actor of the part `name` is gone, with its node or alone, or met an error that it should have reported."""
    gone = facts is not None and watch.is_lost(facts.node_id)
    where = f" on {facts.host}" if facts is not None else ""
    text = str(error).strip().splitlines()
    return Failure(
        reason=FailureReason.LOST_NODE if gone else FailureReason.UNHEALTHY_NODE,
        detail=f"the actor of {name}{where} failed: {type(error).__name__}: {text[-1].strip() if text else ''}",
        log_tail="\n".join(text[-20:]),
    )


def silent_node(silent: Mapping[str, NodeFacts]) -> Failure:
    """The nodes of these parts do not answer."""
    hosts = ", ".join(sorted({facts.host for facts in silent.values()}))
    return Failure(
        reason=FailureReason.LOST_NODE,
        detail=f"the node of {', '.join(silent)} ({hosts}) does not answer any more, though Ray counts it as alive",
    )
