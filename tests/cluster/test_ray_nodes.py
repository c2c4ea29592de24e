"""A Ray cluster of several nodes: replicas over nodes, nodes that go, every class of failure through the runner."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from search_spaces.outcome import FailureReason

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(900)]

LIMIT_S = 840.0
WORDS = {
    FailureReason.OUT_OF_MEMORY_AT_BOOT: "CUDA out of memory",
    FailureReason.OUT_OF_MEMORY_UNDER_LOAD: "CUDA out of memory",
    FailureReason.STARTUP_TIMEOUT: "emulated hang",
    FailureReason.INVALID_FLAGS: "unrecognized arguments",
    FailureReason.KV_CACHE_TOO_SMALL: "can be stored in KV cache",
    FailureReason.ENGINE_CRASH: "Segmentation fault",
    FailureReason.MEASUREMENT_TIMEOUT: "serving big",
    FailureReason.REQUESTS_FAILED: "serving big",
    FailureReason.TRANSPORT: "address already in use",
    FailureReason.UNHEALTHY_NODE: "uncorrectable ECC",
}
"""What the engine itself says, for the classes in which an engine has a word."""
OF_THE_RUNNER = {FailureReason.LATE_CLIENT: "ms late", FailureReason.LOST_COORDINATOR: "was stopped"}
"""What the runner says where no engine is at fault; the other classes have scenarios of their own below."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests.support.nodes_driver` found; its scenarios run on one cluster."""
    folder = tmp_path_factory.mktemp("nodes")
    command = [sys.executable, "-m", "tests.support.nodes_driver", str(folder)]
    with (folder / "driver.log").open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=log, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, (folder / "driver.log").read_text()[-4000:]
    found: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    return found


@pytest.mark.parametrize(("name", "parts"), [("stages", 2), ("ranks", 3)])
def test_a_replica_spans_nodes_where_its_devices_do(answers: dict[str, Any], name: str, parts: int) -> None:
    found = answers["spans"][name]
    assert "metrics" in found, found
    assert found["parts"] == list(range(parts))
    assert len({found["hosts"][f"mixed-0.{rank}"] for rank in range(parts)}) == parts, (
        "each part is on a node of its own"
    )
    assert {f"log_mixed-0.{rank}" for rank in range(parts)} <= set(found["artifacts"])
    assert found["metrics"]["price_per_hour"] == pytest.approx(6.0 * parts)


def test_a_part_that_fails_is_the_cause_and_not_the_parts_that_end_with_it(answers: dict[str, Any]) -> None:
    memory = answers["spans"]["out_of_memory"]
    assert memory["failure"] == FailureReason.OUT_OF_MEMORY_UNDER_LOAD
    assert memory["detail"].startswith("mixed-0.1 exited")
    assert "CUDA out of memory" in memory["log"]
    boot = answers["spans"]["crash_at_boot"]
    assert (boot["failure"], boot["detail"][:9]) == (FailureReason.ENGINE_CRASH, "mixed-0.1")
    assert "before it served" in boot["detail"]
    leader = answers["spans"]["crash_of_leader"]
    assert (leader["failure"], leader["detail"][:9]) == (FailureReason.ENGINE_CRASH, "mixed-0.0")
    assert "Segmentation fault" in leader["log"]


@pytest.mark.parametrize("reason", [*WORDS, *OF_THE_RUNNER])
def test_a_class_of_failure_is_found_with_the_engines_own_words(answers: dict[str, Any], reason: FailureReason) -> None:
    found = answers["classes"][reason.value]
    assert found["failure"] == reason, found
    assert WORDS.get(reason, "") in found["log"]
    assert OF_THE_RUNNER.get(reason, "") in found["detail"]
    assert found["retryable"] is reason.is_infrastructure


def test_no_class_of_failure_is_left_out() -> None:
    elsewhere = {FailureReason.PLACEMENT, FailureReason.LOST_NODE}  # test_a_node_that_dies
    assert set(WORDS) | set(OF_THE_RUNNER) | elsewhere == set(FailureReason)


def test_a_replica_starts_when_its_gpus_memory_is_free(answers: dict[str, Any]) -> None:
    held = answers["memory"]["held"]
    assert held["failure"] == FailureReason.UNHEALTHY_NODE
    assert "device 0 has 27.9 of 80.0 GiB in use by process" in held["detail"]
    waited = answers["memory"]["held_for_a_while"]
    assert "metrics" in waited, waited
    assert waited["took_s"] > 3.0


def test_engines_listen_on_their_nodes_address_and_ask_for_the_key(answers: dict[str, Any]) -> None:
    secured = answers["secured"]
    assert set(secured["listening"]) == {"mixed-0", "mixed-1", "router"}
    for name, addresses in secured["listening"].items():
        assert set(addresses) == {secured["hosts"][name]}, name
        completions, metrics, health, _ = secured["statuses"][name]
        assert (completions, metrics, health) == (401, 401, 200)
    assert secured["statuses"]["mixed-0"][3] == 200, "with the key its metrics are open"
    assert secured["exposed"] == [], "the key is in no command line, record, log or artefact"
    parts = answers["spans"]["stages"]["hosts"]
    assert all(host.startswith("127.0.1.") for host in parts.values()), "over nodes: each on its own address"


def test_a_node_that_shares_no_folder_sends_logs_and_timings(answers: dict[str, Any]) -> None:
    if answers["apart"] is None:
        pytest.skip("a mount namespace of one's own takes rights that this user does not have")
    apart = answers["apart"]
    assert "metrics" in apart["alone"], apart["alone"]
    assert apart["files"].keys() == {"mixed-0.log", "request_timings.parquet"}
    assert all(size > 100 for size in apart["files"].values())
    assert apart["left"] == []
    assert apart["split"]["failure"] == FailureReason.PLACEMENT
    assert "put the work folder on a file system that all nodes share" in apart["split"]["detail"]


def test_a_trial_goes_elsewhere_after_a_node_was_unhealthy(answers: dict[str, Any]) -> None:
    found = answers["distrusted"]
    assert found["reasons"] == [FailureReason.UNHEALTHY_NODE] * 4
    assert len(set(found["used"][:3])) == 3, "each of the first three trials is on a node that has not failed yet"
    assert found["used"][3] in found["used"][:3], "and where all have failed, one of them has to do"


def test_what_a_dead_coordinator_of_another_host_left_is_ended_at_the_start(answers: dict[str, Any]) -> None:
    assert answers["swept"] == {"ended": ["gone"], "alive": ["here"]}


def test_a_process_without_a_lease_is_ended(answers: dict[str, Any]) -> None:
    unleased = answers["unleased"]
    assert unleased["code"] == -15
    assert unleased["ended"] == ["nobody's"]
    assert unleased["own_still_measured"]


def test_a_silent_node_is_lost_long_before_ray_says_so(answers: dict[str, Any]) -> None:
    silent = answers["silent"]
    assert silent["failure"] == FailureReason.LOST_NODE
    assert "does not answer any more, though Ray counts it as alive" in silent["detail"]
    assert silent["ray_said_alive"]
    assert silent["took_s"] < 25.0
    assert "metrics" in silent["next"], "the next trial runs on the other nodes"
    assert silent["next_avoided_it"]
    assert silent["came_back"]


def test_a_node_that_dies(answers: dict[str, Any]) -> None:
    dead = answers["dead"]
    assert dead["failure"] == FailureReason.LOST_NODE
    assert dead["retryable"]
    assert dead["large"]["failure"] == FailureReason.PLACEMENT
    assert "pool 'h100' has 2 of 3 nodes" in dead["large"]["detail"]
    assert "metrics" in dead["small"], "what fits the nodes that are left does not wait for the one that is gone"
