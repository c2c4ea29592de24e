"""What the surrogate sees of candidates: names, logarithms of sizes, and of the load.

The columns are the same for every candidate: two slots for pools (the prefill and the decode pool; the one mixed pool
fills both), in each the parallel sizes and every option that some engine offers. What a candidate does not have is the
same for all that do not have it, so that it makes no difference between them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache

import numpy as np

from perf_model.numeric import FloatArray, IntArray, floats
from perf_model.surrogate import Features
from search_spaces.engines import ENGINES
from search_spaces.serving import Candidate, Pool

LEAST_DOUBT, LARGEST_DOUBT = 1 / 3, 3.0
_SIZES = ("tp", "pp", "dp", "ep")
_SLOTS_OPTION = "max_num_seqs"


def features_of(
    candidates: Sequence[Candidate],
    doubts: Iterable[float],
    node_types: Mapping[str, str] | None = None,
    study: str = "",
    model: str = "",
) -> Features:
    """Features of `candidates`, whose predictions are as doubtful as `doubts` says (1 as usual).

    `node_types` maps a node pool to the name of its device, so that pools of one kind share what is learnt. `study`
    names an earlier study, and `model` its model where that was another one.
    """
    types = tuple((node_types or {}).items())
    rows = [_row(candidate, types, model) for candidate in candidates]
    configs, categories, sizes, loads = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Features(
        configs=np.array(configs, dtype=np.int64),
        studies=np.full(len(rows), _code(study), dtype=np.int64),
        categories=np.array(categories, dtype=np.int64).reshape(len(rows), -1),
        sizes=np.array(sizes, dtype=np.float64).reshape(len(rows), -1),
        loads=np.array(loads, dtype=np.float64).reshape(len(rows), -1),
        doubt=np.clip(np.fromiter(doubts, np.float64, len(rows)), LEAST_DOUBT, LARGEST_DOUBT),
    )


@lru_cache(maxsize=4_000)
def _row(
    candidate: Candidate, types: tuple[tuple[str, str], ...], model: str
) -> tuple[int, IntArray, FloatArray, FloatArray]:
    """Configuration, categories, sizes and loads of a candidate; a search asks for most of them again and again."""
    names = np.array([_code(model), *_categories(candidate, dict(types))], dtype=np.int64)
    sizes = floats(_sizes(candidate))
    config = zlib.crc32(names.tobytes() + sizes.tobytes())
    return config, names, sizes, floats(_loads(candidate))


@cache
def _options() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the options of all engines: those that are names, and those that are numbers."""
    numbers = {p.name: p.is_number for spec in ENGINES.values() for p in spec.parameters}
    return tuple(n for n, is_number in numbers.items() if not is_number), tuple(n for n, i in numbers.items() if i)


@lru_cache(maxsize=4096)
def _code(name: str) -> int:
    return zlib.crc32(name.encode())


def _slots(candidate: Candidate) -> tuple[Pool, Pool]:
    return candidate.config.pools[0], candidate.config.pools[-1]


def _categories(candidate: Candidate, types: Mapping[str, str]) -> list[int]:
    config = candidate.config
    row = [_code(config.engine), _code(str(config.mode))]
    for pool in _slots(candidate):
        values = dict(pool.options)
        row.append(_code(types.get(pool.node_pool, pool.node_pool)))
        row += [_code(str(values.get(name, ""))) for name in _options()[0]]
    return row


def _sizes(candidate: Candidate) -> list[float]:
    row = []
    for pool in _slots(candidate):
        values = dict(pool.options)
        counts = [pool.replicas, pool.devices_per_rank, *(getattr(pool.parallelism, name) for name in _SIZES)]
        row += [math.log(count) for count in counts]
        row += [_log(values.get(name)) for name in _options()[1]]
    return row


def _log(value: object) -> float:
    """Logarithm of a number above 0; 0 for anything else, and for what is absent."""
    return math.log(value) if isinstance(value, (int, float)) and value > 0 else 0.0


def _loads(candidate: Candidate) -> list[float]:
    """Log of the load, of the load per device, and of the load per slot of the pool that decodes."""
    load, pool = math.log(candidate.load.value), candidate.config.pools[-1]
    slots = _log(dict(pool.options).get(_SLOTS_OPTION)) + math.log(pool.replicas * pool.parallelism.dp)
    return [load, load - math.log(candidate.config.devices), load - slots]
