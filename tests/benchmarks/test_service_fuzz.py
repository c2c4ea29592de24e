"""The service under requests made from its own description: a short run of `benchmarks/service_fuzz.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("schemathesis", reason="it is one of the tools for developers (extra dev)")

from benchmarks.service_fuzz import fuzz


@pytest.mark.long
def test_no_request_breaks_the_service_and_every_answer_is_described(tmp_path: Path) -> None:
    counted, code, said, _ = fuzz(200, 1, tmp_path, phases=("fuzzing",))
    answers = {status for _, status in counted.answers}
    assert code == 0, said
    assert not {status for status in answers if status >= 500}
    assert {200, 404, 422} <= answers, "valid and invalid requests were made, of studies that exist and that do not"
    assert counted.answers.total() >= 150
