"""A storage with a toy study in it, measured in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import TEXT, commands_in


class _Silent:
    def readouterr(self) -> tuple[str, str]:
        return "", ""


def toy_storage(folder: Path, text: str = TEXT) -> str:
    """URL of a storage in `folder` with the study of `text`, run by the real command on trials measured in memory."""
    with pytest.MonkeyPatch.context() as patch:
        invoke = commands_in(folder, patch, _Silent())  # type: ignore[arg-type]  # a capture by its behaviour
        (folder / "study.yaml").write_text(text)
        done = invoke("study", "run", "study.yaml", "--no-progress")
        assert done.code == 0
    return f"sqlite:///{folder / 'tuner-data' / 'studies.db'}"


def study_text(name: str, *, trials: int = 3) -> str:
    """A study file that runs in memory, called `name`."""
    return TEXT.replace("name: toy", f"name: {name}").replace("trials: 5", f"trials: {trials}")
