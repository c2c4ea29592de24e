"""Reads figures out of the text that Prometheus scrapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')


def read_figures(text: str, wanted: Mapping[str, str]) -> dict[str, float]:
    """The figures `wanted` by our names: sums over the samples of a name that have at least the labels given.

    A wanted sample reads such as `vllm:num_requests_running` or `name{label="value"}`. What `text` does not hold is
    left out.
    """
    sought = {ours: _parsed(sample) for ours, sample in wanted.items()}
    found: dict[str, float] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None:
            continue
        labels = set(_LABEL.findall(sample[2] or ""))
        for ours, (name, needed) in sought.items():
            if sample[1] == name and needed <= labels:
                found[ours] = found.get(ours, 0.0) + float(sample[3])
    return found


def _parsed(sample: str) -> tuple[str, set[tuple[str, str]]]:
    name, _, labels = sample.partition("{")
    return name, set(_LABEL.findall(labels))
