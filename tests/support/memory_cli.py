"""`tuner` as a process of its own whose trials are measured in memory; it takes no tokens of a service."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import tuner.wiring
from tests.support.commands import connector
from tuner.cli import main

if __name__ == "__main__":
    if any(name.endswith("_TOKEN") for name in os.environ):
        sys.exit("a token of the service was handed on")
    tuner.wiring.connector = connector
    main()
