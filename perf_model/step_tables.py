"""Steps of an engine on CPU cores as measured on a node: tables of prefill and decode steps correct the roofline.

A table holds milliseconds of steps of one model with one set of options. What is taken from it is the ratio of measured
to the roofline's time, interpolated (in the logarithm of tokens and of sequences, linearly in context) and held beyond
the measured range. A step with prompt tokens and decoding sequences takes the mean of both ratios, weighted by the
roofline's time of each part. Another model than the measured one, or other options, take the ratios of the nearest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from perf_model.batch import StepBatch, step_batch
from perf_model.curves import Origin
from perf_model.embedded import EmbeddedSteps
from perf_model.numeric import FloatArray, floats
from perf_model.tables import EMPTY, Table, load
from search_spaces.errors import InvalidValueError
from search_spaces.hardware import Device, DeviceKind
from search_spaces.model import Attention, DenseFeedForward, LayerGroup, ModelSpec

FAMILY = "engine_steps"
PREFILL_TABLE, DECODE_TABLE, REQUEST_TABLE = "context_step_perf", "generation_step_perf", "request_perf"
SAVE_TABLE, RESTORE_TABLE = "save_perf", "restore_perf"
DEVICE_FILE = "core.json"
_MODEL_COLUMNS = (
    "hidden_size",
    "vocab_size",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "intermediate_size",
    "tied_embeddings",
    "weight_bits",
)


@dataclass(frozen=True, kw_only=True)
class MeasuredNode:
    """What was measured of one kind of node: its core, and its engine's steps (`folder` of one engine version)."""

    system: str
    device: Device
    folder: Path

    @cached_property
    def _tables(self) -> dict[str, Table]:
        names = (PREFILL_TABLE, DECODE_TABLE, REQUEST_TABLE, SAVE_TABLE, RESTORE_TABLE)
        files = {name: self.folder / f"{name}.parquet" for name in names}
        return {name: load(file) if file.is_file() else EMPTY for name, file in files.items()}

    def request_ms(self) -> float | None:
        """Time of a request outside the engine's steps; None where it was not measured."""
        table = self._tables[REQUEST_TABLE]
        return float(np.median(table.number("latency"))) if len(table) else None

    def hand_over_ms(self, roofline: EmbeddedSteps, tokens: float) -> tuple[float, float] | None:
        """What saving and restoring the KV cache of `tokens` tokens occupies of an engine; None if not measured.

        The nearest measured length counts: most of it does not hang on the length.
        """
        found = [self._nearest(name, roofline) for name in (SAVE_TABLE, RESTORE_TABLE)]
        if not all(len(table) for table in found):
            return None
        nearest = [int(np.argmin(np.abs(table.number("isl") - tokens))) for table in found]
        save, restore = (float(t.number("latency")[i]) for t, i in zip(found, nearest, strict=True))
        return save, restore

    def steps(self, roofline: EmbeddedSteps) -> EmbeddedSteps | MeasuredSteps:
        """`roofline` corrected by what was measured; unchanged where no step was."""
        on_node = replace(roofline, device=self.device)
        prefill, decode = (self._nearest(name, roofline) for name in (PREFILL_TABLE, DECODE_TABLE))
        if not len(prefill) or not len(decode):
            return roofline
        own = model_columns(roofline.model)
        same = all(float(prefill.number(name)[0]) == own[name] for name in _MODEL_COLUMNS)
        return MeasuredSteps(roofline=on_node, prefill=prefill, decode=decode, same_model=same)

    def _nearest(self, name: str, wanted: EmbeddedSteps) -> Table:
        """Rows of the model of the nearest size and, among these, of the nearest options."""
        table = self._tables[name]
        if not len(table):
            return table
        distance = np.abs(np.log2(table.number("parameters") / wanted.model.parameters)) * 1e3
        distance = distance + 100.0 * np.abs(np.log2(table.number("threads") / wanted.cores))
        distance = distance + 10.0 * ~table.mask("kv_cache_dtype", wanted.kv_cache_dtype)
        distance = distance + np.abs(np.log2(table.number("ubatch_size") / wanted.ubatch_size))
        return table.take(np.flatnonzero(distance <= distance.min() + 1e-9))


@dataclass(frozen=True)
class MeasuredSteps:
    """Step times of `roofline`, times measured ratios. `same_model` says whether the tables are of this very model."""

    roofline: EmbeddedSteps
    prefill: Table
    decode: Table
    same_model: bool

    def step_ms(self, batch: StepBatch) -> FloatArray:
        """Duration of a step, in milliseconds."""
        return self.roofline.step_ms(batch) * self._ratio(batch)

    def breakdown_ms(self, batch: StepBatch) -> dict[str, FloatArray]:
        """Milliseconds by operation, in the roofline's proportions."""
        ratio = self._ratio(batch)
        return {name: part * ratio for name, part in self.roofline.breakdown_ms(batch).items()}

    def origins(self, batch: StepBatch) -> dict[Origin, float]:
        """Share of a step's time by where it comes from (arrays of one element)."""
        shares = dict.fromkeys(Origin, 0.0)
        prompt, decoding = _parts(batch)
        for part, surface in ((prompt, self._prefill_surface), (decoding, self._decode_surface)):
            time = float(np.ravel(self.roofline.step_ms(part))[0])
            if time > 0:
                shares[surface.origin(*_place(part)) if self.same_model else Origin.EXTRAPOLATED] += time
        whole = sum(shares.values())
        return {origin: time / whole for origin, time in shares.items()}

    def _ratio(self, batch: StepBatch) -> FloatArray:
        prompt, decoding = _parts(batch)
        first, second = self.roofline.step_ms(prompt), self.roofline.step_ms(decoding)
        weighted = first * self._prefill_surface(*_place(prompt)) + second * self._decode_surface(*_place(decoding))
        return weighted / np.maximum(first + second, 1e-12)

    @cached_property
    def _prefill_surface(self) -> _Ratios:
        tokens = self.prefill.number("isl")
        return self._ratios(self.prefill, tokens, np.zeros_like(tokens), prompt=True)

    @cached_property
    def _decode_surface(self) -> _Ratios:
        return self._ratios(self.decode, self.decode.number("batch_size"), self.decode.number("step"), prompt=False)

    def _ratios(self, table: Table, rows: FloatArray, columns: FloatArray, *, prompt: bool) -> _Ratios:
        own = replace(
            self.roofline,
            cores=int(table.number("threads")[0]),
            ubatch_size=int(table.number("ubatch_size")[0]),
            model=_model_of(table),
            kv_cache_dtype=_word(table, "kv_cache_dtype"),
        )
        batch = _prompts(rows) if prompt else step_batch(decode_seqs=rows, decode_context=columns)
        ratio = table.number("latency") / own.step_ms(batch)
        grid = np.full((len(np.unique(rows)), len(np.unique(columns))), np.nan)
        knots = np.unique(rows), np.unique(columns)
        grid[np.searchsorted(knots[0], rows), np.searchsorted(knots[1], columns)] = ratio
        return _Ratios(rows=knots[0], columns=knots[1], values=_filled(grid))


def model_columns(model: ModelSpec) -> dict[str, float]:
    """What a row says of the measured model; raises `InvalidValueError` where layers are not plain."""
    attention, block = model.plain_layer()
    return {
        "parameters": float(model.parameters),
        "hidden_size": float(model.hidden_size),
        "vocab_size": float(model.vocab_size),
        "layers": float(model.num_layers),
        "heads": float(attention.heads),
        "kv_heads": float(attention.kv_heads),
        "head_dim": float(attention.head_dim),
        "intermediate_size": float(block.intermediate_size),
        "tied_embeddings": float(model.tied_embeddings),
        "weight_bits": float(model.weight_bits),
    }


def _model_of(table: Table) -> ModelSpec:
    """The measured model of the first row."""
    held = {name: float(table.number(name)[0]) for name in _MODEL_COLUMNS}
    heads, kv_heads, head_dim = (int(held[name]) for name in ("heads", "kv_heads", "head_dim"))
    group = LayerGroup(
        count=int(held["layers"]),
        attention=Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim),
        feed_forward=DenseFeedForward(intermediate_size=int(held["intermediate_size"])),
    )
    return ModelSpec(
        name="measured",
        hidden_size=int(held["hidden_size"]),
        vocab_size=int(held["vocab_size"]),
        layers=(group,),
        tied_embeddings=bool(held["tied_embeddings"]),
        weight_bits=held["weight_bits"],
    )


def _word(table: Table, column: str) -> str:
    """The text in the first row of a column."""
    return table.words[column][int(table.number(column)[0])]


def _prompts(tokens: FloatArray) -> StepBatch:
    return step_batch(prefill_tokens=tokens, prefill_seqs=1.0, prompt=tokens)


def _parts(batch: StepBatch) -> tuple[StepBatch, StepBatch]:
    """The prompts' part of a step and the decoding sequences' part."""
    none = np.zeros_like(batch.tokens)
    prompt = replace(batch, decode_seqs=none)
    return prompt, replace(batch, prefill_tokens=none, prefill_seqs=none)


def _place(batch: StepBatch) -> tuple[FloatArray, FloatArray]:
    """Where a part of a step lies in its table: tokens of prompts, or sequences and their context."""
    if np.any(batch.prefill_tokens > 0):
        return np.maximum(batch.prefill_tokens, 1.0), np.zeros_like(batch.tokens)
    return np.maximum(batch.decode_seqs, 1.0), batch.decode_context


@dataclass(frozen=True, kw_only=True)
class _Ratios:
    """Ratios on a grid: linear in log2 of `rows` and in `columns`, held beyond."""

    rows: FloatArray
    columns: FloatArray
    values: FloatArray

    def __call__(self, row: FloatArray, column: FloatArray) -> FloatArray:
        i, u = _locate(np.log2(self.rows), np.log2(row))
        j, v = _locate(self.columns, column)
        i2, j2 = np.minimum(i + 1, len(self.rows) - 1), np.minimum(j + 1, len(self.columns) - 1)
        low = self.values[i, j] * (1.0 - v) + self.values[i, j2] * v
        high = self.values[i2, j] * (1.0 - v) + self.values[i2, j2] * v
        return floats(low * (1.0 - u) + high * u)

    def origin(self, row: FloatArray, column: FloatArray) -> Origin:
        """Where the ratio at one point comes from."""
        at, beside = float(np.ravel(row)[0]), float(np.ravel(column)[0])
        if at in self.rows and beside in self.columns:
            return Origin.EXACT
        inside = self.rows[0] <= at <= self.rows[-1] and self.columns[0] <= beside <= self.columns[-1]
        return Origin.INTERPOLATED if inside else Origin.EXTRAPOLATED


def _locate(knots: FloatArray, at: FloatArray) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.int64]], FloatArray]:
    """Index of the knot below each element and the share of the way to the next, clipped to the knots."""
    index = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, max(len(knots) - 2, 0))
    if len(knots) == 1:
        return index, np.zeros_like(at)
    left, right = knots[index], knots[index + 1]
    return index, np.clip((at - left) / (right - left), 0.0, 1.0)


def _filled(grid: FloatArray) -> FloatArray:
    """Missing cells take the nearest value of their row, else of the table."""
    known = np.argwhere(~np.isnan(grid))
    for i, j in np.argwhere(np.isnan(grid)):
        distance = np.abs(known[:, 0] - i) * 100 + np.abs(known[:, 1] - j)
        grid[i, j] = grid[tuple(known[np.argmin(distance)])]
    return grid


def steps_folder(root: Path, system: str, engine: str, version: str) -> Path:
    """Where the steps of an engine version on a system lie below `root`."""
    return root / "data" / system / FAMILY / engine / version


def measured_node(root: Path, system: str, engine: str) -> MeasuredNode | None:
    """What was measured of `system` with the newest version of `engine`; None where nothing was."""
    base = root / "data" / system / FAMILY / engine
    folders = sorted(path for path in base.iterdir() if (path / DEVICE_FILE).is_file()) if base.is_dir() else []
    if not folders:
        return None
    return MeasuredNode(system=system, device=read_device(folders[-1] / DEVICE_FILE), folder=folders[-1])


def read_device(file: Path) -> Device:
    """The core in `file`; raises `InvalidValueError` for a damaged one."""
    try:
        held: Mapping[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return Device(
            name=str(held["name"]),
            kind=DeviceKind.CPU,
            memory_bytes=float(held["memory_bytes"]),
            memory_bandwidth=float(held["memory_bandwidth"]),
            flops={"fp32": float(held["fp32_flops"])},
            link_bandwidth=float(held["link_bandwidth"]),
            network_bandwidth=float(held["network_bandwidth"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidValueError(f"{file} describes no core ({error}); collect the node's tables anew") from error


def write_device(file: Path, device: Device) -> None:
    """Write a core for `read_device`."""
    content = {
        "name": device.name,
        "memory_bytes": device.memory_bytes,
        "memory_bandwidth": device.memory_bandwidth,
        "fp32_flops": device.flops["fp32"],
        "link_bandwidth": device.link_bandwidth,
        "network_bandwidth": device.network_bandwidth,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
