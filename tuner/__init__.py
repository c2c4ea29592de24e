"""Finds the best way to serve a large language model on a GPU cluster, by measuring.

What the commands do, for programs: see `tuner.api` and docs/python-api.md. Names are loaded when they are first used,
so that `import tuner` costs next to nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# Before NumPy is loaded. The matrices of a search are small: threads of the linear algebra wait for each other, and for
# the cores that engines or other programs have, longer than they compute. A value that the user has set holds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if TYPE_CHECKING:
    from search_spaces.errors import TunerError
    from tuner.api import (
        Benchmark,
        Campaign,
        CampaignStatus,
        Comparison,
        Confirmation,
        Deployment,
        Importance,
        Layer,
        LayeredStudy,
        LoadMeasurement,
        Observer,
        Outlook,
        Planned,
        Scored,
        Study,
        StudyFile,
        StudyReport,
        StudyStatus,
        WhatIf,
        bench,
        compare,
        config_show,
        list_campaigns,
        list_layers,
        list_profiles,
        list_studies,
        load_benchmark,
        load_campaign,
        load_study,
        load_study_file,
        predict,
        run_campaign,
        run_study,
    )

__all__ = [
    "Benchmark",
    "Campaign",
    "CampaignStatus",
    "Comparison",
    "Confirmation",
    "Deployment",
    "Importance",
    "Layer",
    "LayeredStudy",
    "LoadMeasurement",
    "Observer",
    "Outlook",
    "Planned",
    "Scored",
    "Study",
    "StudyFile",
    "StudyReport",
    "StudyStatus",
    "TunerError",
    "WhatIf",
    "bench",
    "compare",
    "config_show",
    "list_campaigns",
    "list_layers",
    "list_profiles",
    "list_studies",
    "load_benchmark",
    "load_campaign",
    "load_study",
    "load_study_file",
    "predict",
    "run_campaign",
    "run_study",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}; it has {', '.join(__all__)}")
    import tuner.api

    found: object = getattr(tuner.api, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
