"""The model of a deployment: where the tool made it for the measurement, it makes the same again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tuner.deploy.chosen import Chosen

MODELS = "models"
"""Name of the folder in which the replicas of a study find what the tool made for them."""


def ship_model(chosen: Chosen, out: Path) -> tuple[Chosen, str | None]:
    """`chosen` with a copy of its model below `out`, and the path of that below `out`.

    None where there is none to make: for a file of the user's, or a name that the engine looks up. Random weights
    follow from the shape of the model alone, so that the copy equals what was measured.
    """
    measured = next((p.model_source for p in chosen.processes.values() if p.model_source is not None), None)
    if measured is None or Path(measured).parent.name != MODELS:
        return chosen, None
    folder = (out / MODELS).resolve()
    prepared = chosen.backend.prepare(chosen.problem.model, folder).source
    if prepared is None or Path(prepared).parent != folder or Path(prepared).name != Path(measured).name:
        return chosen, None
    return replace(chosen, local_model=prepared), f"{MODELS}/{Path(prepared).relative_to(folder).as_posix()}"
