"""Study files over layers: what is merged, who set it, and what is said where layers do not go together."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tuner.layers_file import LayerError, Stage, layer_folders, read_layer, read_layers
from tuner.study_errors import StudyFileError
from tuner.study_file import LayeredStudy, dump_study, load_layered, load_study_file, parse_study

ROOT = Path(__file__).parents[2]
CPU = """
name: small
workload: {isl: 128, osl: 32, concurrency: [1, 2]}
node_pools: {local: {cpus_per_node: 2}}
"""
GPU = """
name: large
model: {name: Llama-3.1-70B}
workload: {isl: 128, osl: 32, concurrency: [1, 2]}
node_pools: {h200: {device: h200_sxm, gpus_per_node: 8}}
"""


def layered(folder: Path, text: str, overrides: tuple[str, ...] = (), **layers: str) -> LayeredStudy:
    """The study of `text` with layers of the user's own, by name, in `folder`/mine."""
    mine = folder / "mine"
    mine.mkdir(exist_ok=True)
    for name, content in layers.items():
        (mine / f"{name}.yaml").write_text(f"name: {name}\nabout: a test\n{content}")
    (folder / "study.yaml").write_text(text + ("layers: mine\n" if layers else ""))
    return load_layered(folder / "study.yaml", overrides)


def problem(folder: Path, text: str, **layers: str) -> str:
    with pytest.raises(StudyFileError) as caught:
        layered(folder, text, (), **layers)
    return str(caught.value)


def test_ten_lines_are_a_study_and_each_value_has_its_layer() -> None:
    path = ROOT / "examples" / "ten-lines.yaml"
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 10
    found = load_layered(path)
    whose = found.resolved.origins
    assert found.study.engines == {"llamacpp": {}}
    assert whose["objectives",] == "base/objectives"
    assert whose["engines", "llamacpp"] == "base/cpu-engine"
    assert whose["slos", "ttft_p95_ms", "threshold"] == "study file"
    assert whose["measurement", "lateness_limit_ms"] == "engine/llamacpp"


def test_the_resolved_form_is_stored_and_needs_no_layer(tmp_path: Path) -> None:
    study = layered(tmp_path, CPU + "profiles: [balanced]\n").study
    text = dump_study(study)
    assert "profiles" not in yaml.safe_load(text)
    assert parse_study(text) == study
    assert {name: slo.threshold for name, slo in study.slos.items()} == {"ttft_p99_ms": 2000, "tpot_p99_ms": 200}


def test_layers_follow_the_hardware_and_the_model(tmp_path: Path) -> None:
    found = layered(tmp_path, GPU)
    assert found.study.engines == {"vllm": {}}
    assert found.study.space.tp == [1, 2, 4, 8]
    assert found.resolved.origins["space", "tp"] == "hardware/gpu-nodes-8"
    assert found.study.space.ep == [1]
    moe = layered(tmp_path, GPU.replace("Llama-3.1-70B", "DeepSeek-V3"))
    assert moe.study.space.ep == [1, 8]
    assert moe.study.space.dp == [1, 8]
    fewer = layered(tmp_path, GPU, ("node_pools.h200.gpus_per_node=4",))
    assert fewer.study.space.tp == [1, 2, 4]
    assert fewer.resolved.origins["node_pools", "h200", "gpus_per_node"] == "command line"


def test_the_study_file_stands_above_every_layer_and_the_command_line_above_it(tmp_path: Path) -> None:
    own = GPU + "space: {tp: [4]}\nengines: [sglang]\nobjectives: [ttft_p50_ms, tpot_p50_ms]\n"
    found = layered(tmp_path, own, ("space.tp=2",))
    assert found.study.space.tp == [2]
    assert found.resolved.origins["space", "tp"] == "command line"
    assert found.study.engines == {"sglang": {}}
    assert found.study.objectives == ["ttft_p50_ms", "tpot_p50_ms"]


def test_a_named_engine_takes_the_place_of_the_default_and_keeps_its_own_layers(tmp_path: Path) -> None:
    restrict = "stage: engine\nwhen: {engine: sglang}\nset: {engines: {sglang: {mem_fraction_static: [0.9]}}}\n"
    found = layered(tmp_path, GPU + "engines: [sglang]\n", (), restrict=restrict)
    assert found.study.engines == {"sglang": {"mem_fraction_static": [0.9]}}
    assert layered(tmp_path, GPU, (), restrict=restrict).study.engines == {"vllm": {}}


def test_a_profile_gives_nodes_that_the_study_file_completes(tmp_path: Path) -> None:
    text = GPU.replace("node_pools: {h200: {device: h200_sxm, gpus_per_node: 8}}", "profiles: [h100, h200]")
    pools = layered(tmp_path, text).study.node_pools
    assert {name: (pool.device, pool.gpus_per_node) for name, pool in pools.items()} == {
        "h100": ("h100_sxm", 8),
        "h200": ("h200_sxm", 8),
    }
    mine = layered(tmp_path, text + "node_pools: {h100: {nodes: 4, price_per_hour: 24}}\n").study.node_pools
    assert list(mine) == ["h100"], "what a study file lists is what there is"
    assert (mine["h100"].nodes, mine["h100"].gpus_per_node, mine["h100"].price_per_hour) == (4, 8, 24)


def test_one_key_of_a_group_takes_the_others_away(tmp_path: Path) -> None:
    text = CPU.replace("workload: {isl: 128, osl: 32, concurrency: [1, 2]}", "profiles: [chat]")
    assert layered(tmp_path, text).study.workload.concurrency == [4, 16, 64]
    open_loop = layered(tmp_path, text + "workload: {arrival: poisson, request_rate: [2.0]}\n").study.workload
    assert (open_loop.concurrency, open_loop.request_rate, open_loop.isl.mean) == (None, [2.0], 1020)
    model = layered(tmp_path, GPU.replace("model: {name: Llama-3.1-70B}", "profiles: [deepseek]")).study.model
    assert model.name == "DeepSeek-V3"
    swapped = GPU.replace("model: {name: Llama-3.1-70B}", "profiles: [deepseek]\nmodel: {name: Qwen3-32B}")
    assert layered(tmp_path, swapped).study.model.name == "Qwen3-32B"


def test_replace_and_unset_in_a_study_file(tmp_path: Path) -> None:
    text = CPU + "profiles: [balanced]\nslos: {e2e_p99_ms: 9000}\n"
    assert set(layered(tmp_path, text).study.slos) == {"ttft_p99_ms", "tpot_p99_ms", "e2e_p99_ms"}
    assert set(layered(tmp_path, text + "replace: slos\n").study.slos) == {"e2e_p99_ms"}
    assert set(layered(tmp_path, text + "unset: [slos.tpot_p99_ms]\n").study.slos) == {"ttft_p99_ms", "e2e_p99_ms"}
    assert "'slos.e2e_p99_ms' is set in the study file itself" in problem(tmp_path, text + "unset: slos.e2e_p99_ms\n")
    assert "'budget' is not set in the study file" in problem(tmp_path, text + "replace: budget\n")


def test_a_layer_appends_replaces_and_unsets(tmp_path: Path) -> None:
    base = "stage: base\nset: {space: {replicas: [1]}, slos: {ttft_p50_ms: 9, tpot_p50_ms: 9}, budget: {trials: 3}}\n"
    more = "stage: mode\nappend: {space.replicas: [2, 4]}\nreplace: {slos: {e2e_p50_ms: 7}}\nunset: [budget.trials]\n"
    found = layered(tmp_path, CPU, (), base=base, more=more)
    assert found.study.space.replicas == [1, 2, 4]
    assert found.resolved.origins["space", "replicas"] == "base/base + mode/more"
    assert {name: slo.threshold for name, slo in found.study.slos.items()} == {"e2e_p50_ms": 7}
    assert found.study.budget.trials == 32


def test_parts_have_conditions_of_their_own(tmp_path: Path) -> None:
    parts = (
        "stage: model\nparts:\n- {when: {isl: {at_least: 1000}}, set: {budget: {trials: 3}}}\n"
        "- {when: {isl: {at_most: 999}}, set: {budget: {trials: 5}}}\n"
    )
    assert layered(tmp_path, CPU, (), parts=parts).study.budget.trials == 5
    assert layered(tmp_path, CPU, ("workload.isl=1000",), parts=parts).study.budget.trials == 3


def test_layers_of_one_stage_may_not_contradict_each_other(tmp_path: Path) -> None:
    one, two = "stage: mode\nset: {budget: {trials: 3}}\n", "stage: mode\nset: {budget: {trials: 4}}\n"
    message = problem(tmp_path, CPU, one=one, two=two)
    assert "mode/one (3) and mode/two (4) say different things of budget.trials" in message
    assert "set these in the study file, or leave one of the layers out" in message
    assert layered(tmp_path, CPU + "budget: {trials: 7}\n", (), one=one, two=two).study.budget.trials == 7
    later = "stage: engine\nset: {budget: {trials: 9}}\n"
    assert layered(tmp_path, CPU, (), one=one, two=two, later=later).study.budget.trials == 9
    (tmp_path / "mine" / "later.yaml").unlink()
    heir = "stage: mode\nextends: [one]\nset: {budget: {trials: 4}}\n"
    assert layered(tmp_path, CPU, (), one=one, two=heir).study.budget.trials == 4


def test_two_profiles_of_a_kind_that_differ_are_told(tmp_path: Path) -> None:
    message = problem(tmp_path, CPU + "profiles: [balanced, strict_latency]\n")
    assert "profile/balanced ({'threshold': 2000}) and profile/strict_latency ({'threshold': 450})" in message
    assert "slos.ttft_p99_ms" in message


def test_the_order_in_which_profiles_are_chosen_does_not_matter(tmp_path: Path) -> None:
    first = layered(tmp_path, CPU + "profiles: [balanced, batch]\nobjectives: [ttft_p50_ms, tpot_p50_ms]\n").study
    second = layered(tmp_path, CPU + "profiles: [batch, balanced]\nobjectives: [ttft_p50_ms, tpot_p50_ms]\n").study
    assert dump_study(first) == dump_study(second)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("stage: base\nwhen: {engin: vllm}\nset: {seed: 1}\n", ["unknown field 'engin'", "did you mean engine?"]),
        ("stage: base\nwhen: {engine: vlm}\nset: {seed: 1}\n", ["engine is never 'vlm'", "choose llamacpp"]),
        ("stage: base\nwhen: {engine: {at_least: 3}}\nset: {seed: 1}\n", ["engine is no number"]),
        ("stage: bse\nset: {seed: 1}\n", ["stage", "'base'", "'bse'"]),
        ("stage: base\n", ["says nothing"]),
        ("stage: base\nsets: {seed: 1}\n", ["sets"]),
        ("stage: base\nset: {seed: 1}\nunset: [seed]\n", ["says two things of seed"]),
        ("stage: base\nset: {seed: 1}\nunset: ['a..b']\n", ["'a..b' is no key path"]),
        ("stage: base\nset: {seed: 1}\nextends: [nothing]\n", ["extends 'nothing', which is no layer"]),
        ("stage: base\nset: {seed: 1}\nextends: [balanced]\n", ["of stage profile; extend within a stage"]),
        ("stage: profile\nset: {seed: 1}\n", ["every profile has one"]),
        ("- a\n", ["no valid YAML"]),
    ],
)
def test_a_bad_layer_is_told_with_its_file(tmp_path: Path, content: str, parts: list[str]) -> None:
    message = problem(tmp_path, CPU, bad=content)
    for part in ("bad", *parts):
        assert part in message


def test_layers_that_extend_each_other_in_a_circle_are_told(tmp_path: Path) -> None:
    one, two = (f"stage: base\nextends: [{name}]\nset: {{seed: 1}}\n" for name in ("two", "one"))
    message = problem(tmp_path, CPU, one=one, two=two)
    assert "in a circle" in message
    assert "one -> two -> one" in message


def test_conditions_that_hang_on_each_other_in_a_circle_are_told(tmp_path: Path) -> None:
    flip = "stage: base\nwhen: {isl: {at_most: 200}}\nset: {workload: {isl: 300}}\n"
    text = CPU.replace("isl: 128, ", "")
    start = "stage: base\nset: {workload: {isl: 128}}\n"
    message = problem(tmp_path, text, aa=start, flip=flip.replace("stage: base", "stage: mode"))
    assert "mode/flip" in message
    assert "never settle" in message
    assert layered(tmp_path, CPU, (), aa=start, flip=flip.replace("base", "mode")).study.workload.isl.mean == 128


def test_a_layer_does_not_hold_because_of_itself(tmp_path: Path) -> None:
    selfish = "stage: engine\nwhen: {engine: sglang}\nset: {engines: {sglang: {}}}\n"
    assert layered(tmp_path, GPU, (), selfish=selfish).study.engines == {"vllm": {}}
    text = GPU.replace("node_pools: {h200: {device: h200_sxm, gpus_per_node: 8}}", "profiles: [h100, float16_default]")
    found = layered(tmp_path, text + "node_pools: {h100: {nodes: 2}}\n")
    assert list(found.study.engines) == ["vllm"], "a pool whose device a profile names is not taken for a CPU pool"


def test_unknown_and_unsuitable_profiles_are_told(tmp_path: Path) -> None:
    assert "'balnced' is unknown; did you mean balanced?" in problem(tmp_path, CPU + "profiles: balnced\n")
    assert "fp8_static is for weights: fp8 or fp8_block, here it is float16" in problem(
        tmp_path, GPU + "profiles: [fp8_static]\n"
    )
    assert "profiles: 3 is no list of texts" in problem(tmp_path, CPU + "profiles: 3\n")
    assert "is none; give a folder" in problem(tmp_path, CPU + "layers: nowhere\n")


def test_a_misspelt_steering_key_is_told_and_profiles_come_from_the_command_line_too(tmp_path: Path) -> None:
    assert "profils (line 5): unknown key; did you mean profiles?" in problem(tmp_path, CPU + "profils: [chat]\n")
    found = layered(tmp_path, CPU, ("profiles=[balanced]",))
    assert "profile/balanced" in found.resolved.layers


def test_a_bad_value_of_a_layer_is_told_with_its_layer(tmp_path: Path) -> None:
    message = problem(tmp_path, CPU, broken="stage: base\nset: {budget: {trials: many}}\n")
    assert "budget.trials (set by base/broken): 'many' is a text" in message


def test_a_layer_of_the_user_takes_the_place_of_its_namesake(tmp_path: Path) -> None:
    mine = "stage: base\nset: {objectives: [e2e_p50_ms, ttft_p50_ms]}\n"
    assert layered(tmp_path, CPU, (), objectives=mine).study.objectives == ["e2e_p50_ms", "ttft_p50_ms"]


def test_layers_of_the_environment_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "seed.yaml").write_text("name: seed\nstage: base\nabout: ours\nset: {seed: 17}\n")
    monkeypatch.setenv("TUNER_LAYERS", str(tmp_path / "site"))
    assert layered(tmp_path, CPU).study.seed == 17


def test_every_profile_makes_a_study_and_states_its_source(tmp_path: Path) -> None:
    wanted = {"fp8_static": "fp8", "int4_weight_only": "int4", "nvfp4": "nvfp4"}
    for layer in read_layers(layer_folders()).values():
        if layer.stage is not Stage.PROFILE:
            continue
        assert layer.source, layer.name
        study = GPU + f"profiles: [{layer.name}]\n"
        if layer.name in wanted:
            study = study.replace("name: Llama-3.1-70B", "config: model")
            study = study.replace("h200_sxm", "b200_sxm")
            _write_model(tmp_path / "model", wanted[layer.name])
        elif layer.kind == "model":
            study = study.replace("model: {name: Llama-3.1-70B}\n", "")
        elif layer.kind == "hardware":
            study = CPU if layer.name == "cpu" else GPU
            study = study[: study.index("node_pools")] + f"profiles: [{layer.name}]\n"
        elif layer.kind == "workload":
            study = study.replace("workload: {isl: 128, osl: 32, concurrency: [1, 2]}\n", "")
        found = layered(tmp_path, study)
        assert layer.label in found.resolved.layers
        assert layer.label in set(found.resolved.origins.values()), layer.name


def _write_model(folder: Path, quantization: str) -> None:
    import json

    methods = {
        "fp8": {"quant_method": "fp8"},
        "int4": {"quant_method": "awq", "bits": 4},
        "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    }
    folder.mkdir(exist_ok=True)
    raw = json.loads((ROOT / "search_spaces" / "catalogue" / "models" / "Llama-3.1-70B.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": methods[quantization]}))


def test_the_examples_are_studies() -> None:
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        if not path.name.startswith("campaign-"):  # they are files of campaigns
            assert load_study_file(path).name


def test_a_layer_file_reads_alone(tmp_path: Path) -> None:
    source = ROOT / "tuner" / "data" / "layers" / "profiles" / "slo" / "balanced.yaml"
    shutil.copy(source, tmp_path / "x.yaml")
    assert read_layer(tmp_path / "x.yaml").label == "profile/balanced"
    with pytest.raises(LayerError, match="cannot be read"):
        read_layer(tmp_path / "none.yaml")


def test_a_trace_takes_the_place_of_a_profile_s_lengths(tmp_path: Path) -> None:
    rows = "".join(f'{{"timestamp": {t * 100}, "input_length": 64, "output_length": 8}}\n' for t in range(20))
    (tmp_path / "t.jsonl").write_text(rows)
    text = CPU.replace("workload: {isl: 128, osl: 32, concurrency: [1, 2]}", "profiles: [agentic]")
    assert layered(tmp_path, text).study.workload.turns is not None
    replayed = layered(tmp_path, text + "workload: {trace: {file: t.jsonl, format: mooncake}}\n")
    workload = replayed.study.workload
    assert workload.trace is not None
    assert (workload.isl, workload.turns, workload.concurrency) == (None, None, None)
