"""Options that several commands have, each with one name, one type and one wording."""

from __future__ import annotations

from typing import Annotated

import typer

StorageOption = Annotated[
    str | None, typer.Option("--storage", help="Storage URL; TUNER_STORAGE or ./tuner-data by default.")
]
FileStorageOption = Annotated[
    str | None,
    typer.Option("--storage", help="Storage URL; that of the file, TUNER_STORAGE or ./tuner-data by default."),
]
Address = Annotated[
    str | None,
    typer.Option("--address", envvar="RAY_ADDRESS", help="Ray cluster to join; a local one is started by default."),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the study file: --set budget.trials=8.")
]
Detach = Annotated[bool, typer.Option("--detach", help="Run it on the Ray cluster and return at once.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Print one line per event instead of a live view.")]
Follow = Annotated[bool, typer.Option("-f", "--follow", help="Go on until nobody runs it any more.")]
Tail = Annotated[int | None, typer.Option("--tail", min=0, help="Only the last lines.")]
WaitS = Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for the end; 0 not to wait.")]
