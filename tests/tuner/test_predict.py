"""`tuner predict`: what it tells of GPU engines and of the embedded one, in text and in JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from perf_model.tables import default_root
from search_spaces.engines import ENGINES, engine_spec
from search_spaces.errors import TunerError
from search_spaces.hardware import DeviceKind
from search_spaces.serving import Role
from tuner.cli import main
from tuner.prediction import look_out
from tuner.study_errors import StudyFileError
from tuner.study_file import load_study_file, parse_study
from tuner.wiring import make_model, make_problem, make_space, require_weights

EXAMPLE = Path(__file__).parents[2] / "examples" / "predict-70b.yaml"
GPU = """
name: gpu
model: {name: Llama-3.1-8B}
workload: {isl: 512, osl: 64, concurrency: [1, 16, 64]}
objectives: [output_tokens_per_s_per_gpu, ttft_p50_ms]
node_pools: {h100: {device: h100_sxm, gpus_per_node: 8, price_per_hour: 24.0}}
engines: {vllm: {quantization: none}}
space: {modes: aggregated, tp: [1, 2, 4]}
"""
CPU = """
name: cores
workload: {isl: 64, osl: 16, concurrency: [1, 2, 4]}
objectives: [output_tokens_per_s, ttft_p50_ms]
node_pools: {local: {cpus_per_node: 2}}
"""


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_TABLES", str(tmp_path / "tables"))
    monkeypatch.setenv("TUNER_DATA", str(tmp_path / "data"))


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tuner", *args])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_example_says_predicted_memory_breakdown_origin_and_bottleneck(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(monkeypatch, capsys, "predict", str(EXAMPLE), "--top", "2")
    assert code == 0, err
    assert out.startswith("PREDICTED, nothing was measured: Llama-3.1-70B on h200")
    assert "the shipped prior" in out
    assert "tp=1 does not fit" in out
    assert "weights 131" in out  # 70.6 G weights of 2 bytes, in GiB
    for part in ("TTFT", "TPOT", "cost of a million output tokens $", "sequences of full length fit", "whole step"):
        assert part in out
    assert "limits it" in out
    if default_root() is None:
        assert "pip install 'tuner[silicon]'" in out
    else:
        assert "public operation tables" in out


def test_json_adds_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(GPU, encoding="utf-8")
    code, out, err = call(monkeypatch, capsys, "predict", str(file), "--json", "--top", "3")
    assert code == 0, err
    found = json.loads(out)
    assert found["predicted"] is True
    default = found["defaults"][0]
    assert default["fits"] is True
    (role,) = default["roles"]
    assert sum(role["time_from"].values()) == pytest.approx(1.0)
    memory = role["memory_bytes"]
    assert memory["weights"] == pytest.approx(16.06e9, rel=0.01)
    assert memory["weights"] + memory["kv_cache"] + memory["activations"] + memory["reserve"] < memory["capacity"]
    assert all(default["log_stddev"][name] > 0 for name in ("ttft_mean_ms", "tpot_mean_ms", "requests_per_s"))
    dollars = default["metrics"]["price_per_hour"] / 3600 / default["metrics"]["output_tokens_per_s"] * 1e6
    assert default["metrics"]["cost_per_million_output_tokens"] == pytest.approx(dollars)


def test_no_shown_configuration_dominates_another_and_all_meet_the_slos() -> None:
    study = parse_study(GPU + "slos: {tpot_p50_ms: 30}\n")
    outlook = look_out(study, top=8)
    assert 1 < len(outlook.best) <= 8
    points = [
        (-f.prediction.metrics["output_tokens_per_s_per_gpu"], f.prediction.metrics["ttft_p50_ms"])
        for f in outlook.best
    ]
    assert points == sorted(points)
    assert [p[1] for p in points] == sorted((p[1] for p in points), reverse=True)
    assert all(f.prediction.metrics["tpot_p50_ms"] <= 30 for f in outlook.best)
    default = outlook.defaults[0].prediction.metrics["output_tokens_per_s_per_gpu"]
    assert outlook.best[0].prediction.metrics["output_tokens_per_s_per_gpu"] >= default


def test_what_does_not_fit_says_so_with_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(GPU.replace("Llama-3.1-8B", "Llama-3.1-70B").replace("[1, 2, 4]", "[1]"), encoding="utf-8")
    code, out, err = call(monkeypatch, capsys, "predict", str(file))
    assert code == 0, err
    assert "DOES NOT FIT: mixed replica: out of memory: a rank needs" in out
    assert "none is predicted to meet" in out


def test_calibration_is_a_choice_that_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study = parse_study(GPU)
    without = look_out(parse_study(GPU, ["calibration=none"]), top=0).defaults[0].prediction
    with_prior = look_out(study, top=0)
    assert any("shipped prior" in note for note in with_prior.notes)
    assert with_prior.defaults[0].prediction.metrics["ttft_mean_ms"] != without.metrics["ttft_mean_ms"]
    file = tmp_path / "study.yaml"
    file.write_text(GPU + "calibration: nowhere.json\n", encoding="utf-8")
    with pytest.raises(StudyFileError, match=r"calibration: .*nowhere.json' is no file; give shipped, none"):
        load_study_file(file)
    monkeypatch.setattr(sys, "argv", ["tuner", "predict", str(file), "--calibration", "none"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0


def test_a_corrected_closed_loop_keeps_littles_law() -> None:
    study = parse_study(GPU)
    for forecast in look_out(study, top=4).best:
        metrics = forecast.prediction.metrics
        e2e = metrics["ttft_mean_ms"] + 63 * metrics["tpot_mean_ms"]
        assert metrics["e2e_mean_ms"] == pytest.approx(e2e)
        users = metrics["requests_per_s"] * e2e / 1e3
        assert users == pytest.approx(forecast.candidate.load.value, rel=0.15)


def test_steps_by_operation_add_up_to_the_step() -> None:
    outlook = look_out(parse_study(GPU), top=0)
    account = outlook.defaults[0].account
    assert account is not None
    (role,) = account.roles
    assert role.role is Role.MIXED
    assert list(role.decode_ms.values()) == sorted(role.decode_ms.values(), reverse=True)
    tpot = look_out(parse_study(GPU, ["calibration=none"]), top=0).defaults[0].prediction.metrics["tpot_mean_ms"]
    assert sum(role.decode_ms.values()) <= tpot * 1.001
    assert account.sentence.endswith(".")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_every_gpu_engine_is_predicted_from_a_name_and_launched_only_with_weights(engine: str) -> None:
    study = parse_study(GPU.replace("vllm: {quantization: none}", f"{engine}: {{}}"))
    forecast = look_out(study, top=1)
    assert forecast.defaults[0].prediction.metrics["ttft_mean_ms"] > 0
    with pytest.raises(TunerError, match=rf"{engine} loads Llama-3.1-8B from somewhere; .*tuner predict FILE"):
        require_weights(study)
    source = "{name: Llama-3.1-8B, source: meta-llama/Llama-3.1-8B-Instruct}"
    with_weights = parse_study(
        GPU.replace("{name: Llama-3.1-8B}", source).replace("vllm: {quantization: none}", f"{engine}: {{}}")
    )
    require_weights(with_weights)
    assert make_model(with_weights).source == "meta-llama/Llama-3.1-8B-Instruct"


def test_run_without_weights_says_so_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/studies.db"
    code, _, err = call(monkeypatch, capsys, "study", "run", str(EXAMPLE), "--storage", storage)
    assert code == 2
    assert "model.source is missing" in err


def test_options_reach_the_model() -> None:
    def decode_kv(options: str) -> float:
        study = parse_study(GPU.replace("{quantization: none}", options), ["workload.concurrency=64"])
        account = look_out(study, top=0).defaults[0].account
        assert account is not None
        return account.roles[0].kv_bytes / account.roles[0].decode_seqs

    assert decode_kv("{kv_cache_dtype: fp8}") == pytest.approx(decode_kv("{kv_cache_dtype: auto}") / 2, rel=0.01)

    def weights(options: str) -> float:
        account = look_out(parse_study(GPU.replace("{quantization: none}", options)), top=0).defaults[0].account
        assert account is not None
        return account.roles[0].weight_bytes

    assert weights("{quantization: fp8}") < 0.6 * weights("{quantization: none}")

    def longest(options: str) -> float:
        study = parse_study(GPU.replace("vllm: {quantization: none}", options))
        return look_out(study, top=0).defaults[0].prediction.metrics["ttft_p99_ms"]

    assert longest("sglang: {max_running_requests: 2}") > 2 * longest("sglang: {max_running_requests: 256}")
    assert longest("trtllm: {max_batch_size: 2}") > 2 * longest("trtllm: {max_batch_size: 256}")


def test_engines_have_their_own_values_of_options_with_one_name() -> None:
    both = "vllm: {kv_cache_dtype: [auto, fp8]}, sglang: {kv_cache_dtype: [auto, fp8_e4m3]}"
    study = parse_study(GPU.replace("vllm: {quantization: none}", both), ["space.compare_numerics=true"])
    space = make_space(study, make_problem(study))
    candidate = space.decode({"engine": "sglang", "mixed.kv_cache_dtype": "fp8"})
    assert candidate.config.pools[0].option("kv_cache_dtype") == "auto"  # fp8 is vLLM's word, not SGLang's
    other = space.decode({"engine": "sglang", "mixed.kv_cache_dtype": "fp8_e4m3"})
    assert other.config.pools[0].option("kv_cache_dtype") == "fp8_e4m3"
    assert space.decode(space.encode(other)) == other


def test_specs_name_their_devices() -> None:
    assert engine_spec("llamacpp").devices == (DeviceKind.CPU,)
    assert engine_spec("vllm").devices == (DeviceKind.GPU, DeviceKind.CPU)
    for name in ("sglang", "trtllm", "emulated"):
        assert engine_spec(name).devices == (DeviceKind.GPU,)
    assert [name for name, spec in ENGINES.items() if spec.apart] == ["vllm", "sglang", "trtllm"]


def test_what_changes_the_answers_is_compared_only_on_demand() -> None:
    both = GPU.replace("{quantization: none}", "{quantization: [none, fp8]}")
    with pytest.raises(StudyFileError, match=r"none, fp8 answer differently.*space\.compare_numerics: true"):
        parse_study(both)
    study = parse_study(both, ["space.compare_numerics=true"])
    genes = {parameter.name: parameter.choices for parameter in make_space(study, make_problem(study)).parameters}
    assert genes["mixed.quantization"] == ("none", "fp8")
    assert "mixed.kv_cache_dtype" not in genes  # nor is it searched where the study does not name it


def test_installations_of_engines_are_checked_and_made_absolute(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    pool = "gpus_per_node: 8, engines: {vllm: venv/bin/vllm}"
    file.write_text(GPU.replace("gpus_per_node: 8", pool), encoding="utf-8")
    (found,) = load_study_file(file).node_pools.values()
    assert found.engines["vllm"].command == [str(tmp_path / "venv/bin/vllm")]
    with pytest.raises(StudyFileError, match="sglang is no engine of the study; choose vllm"):
        parse_study(GPU.replace("gpus_per_node: 8", "gpus_per_node: 8, engines: {sglang: x}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            (
                "device: h100_sxm, gpus_per_node: 8, price_per_hour: 24.0}}\nengines: {vllm: {quantization: none}}",
                "cpus_per_node: 8}}\nengines: {sglang: {}}",
            ),
            "sglang runs on gpu here, not on cpu; choose llamacpp or vllm",
        ),
        (("vllm: {quantization: none}", "llamacpp: {}"), "llamacpp runs on cpu here, not on h100_sxm; choose vllm"),
        (("{name: Llama-3.1-8B}", "{name: Llama-3.1-8B, config: x}"), "exactly one of preset, gguf, name and config"),
        (("{name: Llama-3.1-8B}", "{preset: tiny, nearest_family: true}"), "goes with config alone"),
    ],
)
def test_bad_study_files(change: tuple[str, str], message: str) -> None:
    with pytest.raises(StudyFileError) as caught:
        parse_study(GPU.replace(*change))
    assert message in str(caught.value)


def config_of(architecture: str) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "vocab_size": 1000,
        "max_position_embeddings": 4096,
    }


def test_a_model_of_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("LlamaForCausalLM")), encoding="utf-8")
    file = tmp_path / "study.yaml"
    file.write_text(GPU.replace("{name: Llama-3.1-8B}", "{config: config.json}"), encoding="utf-8")
    study = load_study_file(file)
    model = make_model(study)
    assert (model.hidden_size, model.num_layers) == (512, 3)
    assert model.source == str(tmp_path.resolve())
    assert look_out(study, top=0).defaults[0].prediction.metrics["ttft_mean_ms"] > 0

    file.write_text(CPU + "model: {config: config.json}\n", encoding="utf-8")
    assert make_model(load_study_file(file)).source is None  # llama.cpp writes random weights of that shape


def test_an_unknown_architecture_is_modelled_when_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("NewForCausalLM")), encoding="utf-8")
    file = tmp_path / "study.yaml"
    file.write_text(GPU.replace("{name: Llama-3.1-8B}", "{config: .}"), encoding="utf-8")
    with pytest.raises(TunerError, match=r"architecture 'NewForCausalLM' of model .* is unknown"):
        make_model(load_study_file(file))
    assert make_model(load_study_file(file, ["model.nearest_family=true"])).num_layers == 3


def test_the_embedded_engine_on_a_stand_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(CPU, encoding="utf-8")
    code, out, err = call(monkeypatch, capsys, "predict", str(file), "--top", "1")
    assert code == 0, err
    assert "NOT MEASURED, a core of 10 GFLOP/s and 10 GB/s stands in" in out
    assert "tuner perf collect" in out
    assert "100% roofline" in out
    assert "price_per_hour" in out
    assert "prior" not in out
