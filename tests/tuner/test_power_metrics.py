"""Figures per watt: known where power was read, predicted at the rated power, refused where it cannot be read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from search_spaces.metrics import POWER_METRICS
from studies.codec import from_json, to_json
from studies.repeats import mean_metrics
from tests.studies.toy import measure, toy_problem, wide_space
from tuner.prediction import look_out
from tuner.study_errors import StudyFileError
from tuner.study_file import parse_study

GPU = """
name: g
model: {name: Llama-3.1-8B}
workload: {isl: 256, osl: 64, concurrency: 8}
objectives: [output_tokens_per_joule, ttft_p50_ms]
node_pools: {h100: {device: h100_sxm, gpus_per_node: 8}}
engines: {vllm: {quantization: none}}
space: {modes: aggregated}
calibration: none
"""


def test_power_that_was_read_gives_tokens_per_joule_and_is_stored() -> None:
    metrics = measure(wide_space(toy_problem()).default()).metrics
    assert not set(POWER_METRICS) & set(metrics.flat())
    powered = replace(metrics, power_w=500.0)
    assert powered.flat()["power_w"] == 500
    assert powered.flat()["output_tokens_per_joule"] == pytest.approx(metrics.output_tokens_per_s / 500)
    assert from_json(type(metrics), to_json(powered)) == powered
    older = {name: value for name, value in to_json(metrics).items() if name != "power_w"}  # type: ignore[union-attr]  # a mapping
    assert from_json(type(metrics), older) == metrics, "measurements of earlier versions have no power"


def test_the_mean_of_runs_needs_a_figure_in_each() -> None:
    metrics = measure(wide_space(toy_problem()).default()).metrics
    one, two = replace(metrics, power_w=400.0), replace(metrics, power_w=600.0)
    assert mean_metrics([one, two]).power_w == 500
    assert mean_metrics([one, metrics]).power_w is None


def test_the_model_predicts_at_the_rated_power() -> None:
    found = look_out(parse_study(GPU), top=0).defaults[0]
    metrics = found.prediction.metrics
    assert metrics["power_w"] == 700 * found.candidate.config.devices
    assert metrics["output_tokens_per_joule"] == pytest.approx(metrics["output_tokens_per_s"] / metrics["power_w"])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (("engines: {vllm: {quantization: none}}", "engines: [emulated]"), "an emulated engine draws none"),
        (
            ("{device: h100_sxm, gpus_per_node: 8}}\nengines: {vllm: {quantization: none}}", "{cpus_per_node: 2}}"),
            "has no GPUs",
        ),
    ],
)
def test_power_that_cannot_be_read_is_no_objective(change: tuple[str, str], part: str) -> None:
    text = GPU.replace(*change)
    if "cpus_per_node" in text:
        text = text.replace("model: {name: Llama-3.1-8B}\n", "") + "engines: [llamacpp]\n"
    with pytest.raises(StudyFileError, match=part):
        parse_study(text)
