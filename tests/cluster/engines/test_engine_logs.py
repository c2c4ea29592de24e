"""Last words of engines, as users reported them: `logs/ENGINE.json` cites the thread of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.engines.log_signs import telling_line
from search_spaces.outcome import FailureReason
from tests.support.apart import backend

LOGS = Path(__file__).parent / "logs"
ENGINES = ("vllm", "sglang", "trtllm")
Excerpt = dict[str, object]


def excerpts(engine: str) -> list[Excerpt]:
    found: list[Excerpt] = json.loads((LOGS / f"{engine}.json").read_text(encoding="utf-8"))
    return found


CASES = [
    pytest.param(engine, excerpt, id=f"{engine}-{n}")
    for engine in ENGINES
    for n, excerpt in enumerate(excerpts(engine))
]


@pytest.mark.parametrize(("engine", "excerpt"), CASES)
def test_real_excerpts_are_classified(engine: str, excerpt: Excerpt) -> None:
    text = "\n".join(excerpt["lines"])  # type: ignore[arg-type]  # a list of lines
    found = backend(engine).classify(excerpt["exit_code"], text, ready=excerpt["ready"])
    assert str(found) == excerpt["expected"], excerpt["source"]


@pytest.mark.parametrize("engine", ENGINES)
def test_there_are_ten_of_every_engine_each_with_its_thread(engine: str) -> None:
    found = excerpts(engine)
    assert len(found) >= 10
    assert all(str(excerpt["source"]).startswith("https://github.com/") for excerpt in found)
    assert len({str(excerpt["expected"]) for excerpt in found}) >= 4
    assert {str(excerpt["expected"]) for excerpt in found} <= {str(reason) for reason in FailureReason}


def test_the_cause_is_found_above_its_consequences() -> None:
    cause = "(EngineCore pid=1) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    text = f"INFO loading\n{cause}\n(APIServer pid=2) RuntimeError: Engine core initialization failed."
    assert telling_line(text) == cause
    assert telling_line("INFO all is well") is None


def test_a_silent_kill_is_taken_for_exhausted_memory() -> None:
    for code in (-9, 137):
        assert backend("vllm").classify(code, "", ready=True) is FailureReason.OUT_OF_MEMORY_UNDER_LOAD
    assert backend("vllm").classify(2, "usage: vllm", ready=False) is FailureReason.INVALID_FLAGS
