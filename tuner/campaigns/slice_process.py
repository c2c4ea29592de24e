"""One slice in a process of its own: `python -m tuner.campaigns.slice_process ORDER ADDRESS`, as a campaign starts it.

It ends cleanly, and gives back what it measures, when the process that started it is gone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from search_spaces.errors import TunerError
from tuner.log import warnings_to
from tuner.places import find_place
from tuner.progress import LineProgress
from tuner.session import Again, run_study
from tuner.signals import StopRequest
from tuner.study_file import parse_study
from tuner.study_schema import BudgetSection
from tuner.wiring import connector


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Whether a signal asked to stop, or the parent has gone: its child has another parent then."""
    parent = os.getppid()
    with StopRequest() as signalled:
        yield lambda: signalled() or os.getppid() != parent


def main(order: Path, address: str) -> int:
    """Run the slice; the exit code is 0 where it came to an end of its own, or was stopped."""
    told = json.loads(order.read_text(encoding="utf-8"))
    study = parse_study(told["study"], name=str(order))
    portion = BudgetSection.model_validate(told["portion"])
    again = None if told["again"] is None else Again(**told["again"])
    try:
        with LineProgress(Console(markup=False, highlight=False)) as observer, warnings_to(observer.note):
            connect = connector(address, study, avoid=tuple(told["avoid"]))
            run_study(
                study,
                find_place(None),
                connect=connect,
                stop=stopping(),
                observer=observer,
                portion=portion,
                again=again,
            )
    except TunerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
