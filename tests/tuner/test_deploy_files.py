"""Files of every deploy target: each is valid for what reads it, complete, and quotes whatever a study may hold."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.errors import InvalidValueError
from search_spaces.serving import Mode
from tests.support.deployable import KEY, MODEL_SOURCE, embedded, on_gpus
from tuner.deploy.chosen import Chosen
from tuner.deploy.command import Target, make_files, write_files
from tuner.deploy.render import yaml_scalar

KUBERNETES = "1.35"
RAY = Path(ray.__file__).parent
SCHEMAS = Path(__file__).parents[1] / "data" / "schemas"
CASES: dict[str, Callable[[Path], Chosen]] = {
    "embedded": embedded,
    "embedded-pd": lambda folder: embedded(folder, Mode.DISAGGREGATED, 2),
    "embedded-x3": lambda folder: embedded(folder, replicas=3),
    "emulated-pd": lambda folder: on_gpus("emulated", folder, Mode.DISAGGREGATED, tp=2),
    "vllm": lambda folder: on_gpus("vllm", folder, tp=4),
    "vllm-pd": lambda folder: on_gpus("vllm", folder, Mode.DISAGGREGATED, 2, tp=4),
    "sglang-pd": lambda folder: on_gpus("sglang", folder, Mode.DISAGGREGATED, tp=4),
    "trtllm": lambda folder: on_gpus("trtllm", folder, tp=4),
    "trtllm-pd": lambda folder: on_gpus("trtllm", folder, Mode.DISAGGREGATED, tp=4),
}
EVERYWHERE = (Target.SHELL, Target.COMPOSE, Target.KUBERNETES, Target.LWS)
ONLY_VLLM = (Target.RAY_SERVE, Target.DYNAMO, Target.LLM_D)


Deployed = Callable[[str, Target], Path]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """Makes the output folder of a target for a case, once."""
    folder = tmp_path_factory.mktemp("deployed")

    @cache
    def trial(case: str) -> Chosen:
        return CASES[case](folder / case)

    @cache
    def make(case: str, target: Target) -> Path:
        out = folder / f"{case}-{target}"
        write_files(make_files(trial(case), target, out)[1], out)
        return out

    return make


def documents(path: Path) -> Iterator[dict[str, Any]]:
    return (tree for tree in yaml.safe_load_all(path.read_text()) if tree is not None)


def check_pod(spec: dict[str, Any]) -> None:
    """Check a pod by wrapping it into a resource that Kubernetes itself publishes a schema for."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def check_own_schema(tree: object, name: str) -> None:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(tree)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", EVERYWHERE)
def test_no_placeholder_is_left_and_no_secret_written(case: str, target: Target, deployed: Deployed) -> None:
    out = deployed(case, target)
    for path in (path for path in out.rglob("*") if path.is_file() and path.suffix != ".gguf"):
        text = path.read_text()
        assert not re.search(r"\{\{|\{%|\{#|\bTODO\b|\bFIXME\b|<[A-Z_]{3,}>|\bNone\b|Undefined", text), path
        assert KEY not in text
    assert (out / "README.md").is_file()


@pytest.mark.parametrize("case", CASES)
def test_shell_scripts_pass_shellcheck(case: str, deployed: Deployed) -> None:
    out = deployed(case, Target.SHELL)
    checker = Path(sys.executable).with_name("shellcheck")
    for script in out.glob("*.sh"):
        assert script.stat().st_mode & 0o111
        found = subprocess.run([checker, script], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("case", CASES)
def test_compose_files_match_the_compose_specification(case: str, deployed: Deployed) -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text())
    (tree,) = documents(deployed(case, Target.COMPOSE) / "compose.yaml")
    jsonschema.Draft7Validator(schema).validate(tree)


@pytest.mark.parametrize("case", CASES)
def test_kubernetes_manifests_match_its_published_schemas(case: str, deployed: Deployed) -> None:
    trees = list(documents(deployed(case, Target.KUBERNETES) / "kubernetes.yaml"))
    for tree in trees:
        kubernetes_validate.validate(tree, KUBERNETES, strict=True)
    check_references(trees)


def check_references(trees: list[dict[str, Any]]) -> None:
    """Every volume that is mounted is there, and every Service, claim and ConfigMap that is named."""
    names = {(tree["kind"], tree["metadata"]["name"]) for tree in trees}
    assert len(names) == len(trees), "two resources of one kind and name"
    for tree in trees:
        for spec in pods_of(tree):
            volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
            mounted = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", ())}
            assert mounted == volumes.keys()
            for volume in volumes.values():
                if "persistentVolumeClaim" in volume:
                    assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
                if "configMap" in volume:
                    assert ("ConfigMap", volume["configMap"]["name"]) in names


def pods_of(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    match tree["kind"]:
        case "Deployment":
            yield tree["spec"]["template"]["spec"]
        case "LeaderWorkerSet":
            template = tree["spec"]["leaderWorkerTemplate"]
            yield template["workerTemplate"]["spec"]
            if "leaderTemplate" in template:
                yield template["leaderTemplate"]["spec"]


@pytest.mark.parametrize("case", CASES)
def test_leader_worker_sets(case: str, deployed: Deployed) -> None:
    trees = list(documents(deployed(case, Target.LWS) / "lws.yaml"))
    sets = [tree for tree in trees if tree["kind"] == "LeaderWorkerSet"]
    assert sets
    for tree in trees:
        if tree in sets:
            check_own_schema(tree, "leaderworkerset")
            for spec in pods_of(tree):
                check_pod(spec)
        else:
            kubernetes_validate.validate(tree, KUBERNETES, strict=True)
    check_references(trees)


@pytest.mark.parametrize("case", ["vllm", "vllm-pd", "sglang-pd", "trtllm", "trtllm-pd"])
def test_a_dynamo_graph(case: str, deployed: Deployed) -> None:
    trees = list(documents(deployed(case, Target.DYNAMO) / "dynamo.yaml"))
    graph = trees[-1]
    check_own_schema(graph, "dynamographdeployment")
    services = graph["spec"]["services"]
    for service in services.values():
        spec = dict(service["extraPodSpec"])
        check_pod(spec | {"containers": [{"name": "main", **spec.pop("mainContainer")}]})
    phases = {service.get("subComponentType") for name, service in services.items() if name != "Frontend"}
    assert phases == ({"prefill", "decode"} if case.endswith("-pd") else {None})
    engine = case.removesuffix("-pd")
    for name, service in services.items():
        if name != "Frontend":
            args = service["extraPodSpec"]["mainContainer"]["args"]
            assert args[:2] == ["-m", f"dynamo.{engine}"]
            assert not [word for word in args if word.startswith("--") and "_" in word]
            assert args.count("--disaggregation-mode") == (1 if case.endswith("-pd") else 0)


@pytest.mark.parametrize("case", ["vllm", "vllm-pd"])
def test_values_for_llm_d(case: str, deployed: Deployed) -> None:
    (values,) = documents(deployed(case, Target.LLM_D) / "values.yaml")
    check_own_schema(values, "llm-d-modelservice")
    for section in ("decode", "prefill"):
        if values[section]["create"]:
            for container in values[section]["containers"]:
                own = {
                    key: value for key, value in container.items() if key not in {"modelCommand", "mountModelVolume"}
                }
                check_pod({"containers": [own], "volumes": values[section].get("volumes", [])})
    assert values["prefill"]["create"] is (case == "vllm-pd")
    assert values["modelArtifacts"]["uri"] == f"hf://{MODEL_SOURCE}"
    decode = values["decode"]["containers"][0]
    port = int(decode["args"][decode["args"].index("--port") + 1])
    routing = values["routing"]
    assert port == (routing["proxy"]["targetPort"] if case == "vllm-pd" else routing["servicePort"])


def fields_of(source: Path, name: str) -> set[str]:
    """Fields of a class of the installed Ray, read from its source: importing it wants Ray Serve's dependencies."""
    tree = ast.parse(source.read_text())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        node.target.id for node in found.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@pytest.mark.parametrize("case", ["vllm", "vllm-pd"])
def test_a_config_for_ray_serve(case: str, deployed: Deployed) -> None:
    (tree,) = documents(deployed(case, Target.RAY_SERVE) / "serve.yaml")
    (application,) = tree["applications"]
    serve, llm = RAY / "serve" / "schema.py", RAY / "llm" / "_internal" / "serve"
    assert tree.keys() <= fields_of(serve, "ServeDeploySchema")
    assert tree["http_options"].keys() <= fields_of(serve, "HTTPOptionsSchema")
    assert application.keys() <= fields_of(serve, "ServeApplicationSchema")
    args = application["args"]
    if case == "vllm-pd":
        assert args.keys() <= fields_of(llm / "serving_patterns" / "prefill_decode" / "builder.py", "PDServingArgs")
    configs = args["llm_configs"] if case == "vllm" else [args["prefill_config"], args["decode_config"]]
    for config in configs:
        model_fields = fields_of(llm / "core" / "configs" / "llm_config.py", "ModelLoadingConfig")
        assert config.keys() <= fields_of(llm / "core" / "configs" / "llm_config.py", "LLMConfig")
        assert config["model_loading_config"].keys() <= model_fields
        assert config["deployment_config"].keys() <= fields_of(serve, "DeploymentSchema")
        arguments = config["engine_kwargs"]
        assert arguments["tensor_parallel_size"] == 4
        assert arguments["enable_chunked_prefill"] is True
        assert isinstance(arguments["gpu_memory_utilization"], float)
        assert "host" not in arguments
    if case == "vllm-pd":
        assert [config["engine_kwargs"]["kv_transfer_config"]["kv_role"] for config in configs] == [
            "kv_producer",
            "kv_consumer",
        ]


@pytest.mark.parametrize("target", ONLY_VLLM)
def test_a_platform_that_cannot_run_the_engine_says_what_can(target: Target, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="measured on llamacpp; choose shell, compose"):
        make_files(embedded(tmp_path), target, tmp_path / "out")


def test_the_readme_holds_the_figures_and_the_way_back(deployed: Deployed) -> None:
    out = deployed("emulated-pd", Target.SHELL)
    text = (out / "README.md").read_text()
    assert "EMULATED" in text
    assert "It misses SLOs: ttft\\_p99\\_ms=16 (SLO 1)" in text
    assert "| ttft\\_p50\\_ms | 11 | ms |" in text
    assert "tuner bench benchmark.json --url http://127.0.0.1:8000" in text
    assert "vLLM 0.32.0+cpu" in text  # the recorded version, whatever the engine
    assert "NVIDIA H100 80GB HBM3" in text


HARD = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40)


@settings(deadline=None)  # other processes may have the machine
@given(HARD)
def test_any_text_survives_yaml(text: str) -> None:
    assert yaml.safe_load(f"key: {yaml_scalar(text)}\nnext: 1") == {"key": text, "next": 1}


@pytest.mark.parametrize("text", ["$(rm -rf /)", "a'b\"c", "${HOME}", "`id`", "x\ny", "--flag; id", "$$(POD_IP)"])
def test_what_a_study_holds_is_never_run_or_expanded(text: str, tmp_path: Path) -> None:
    chosen = embedded(tmp_path)
    from dataclasses import replace

    hostile = replace(chosen, problem=replace(chosen.problem, model=replace(chosen.problem.model, name=text)))
    recorded = tuple(
        replace(p, argv=(*p.argv[:-1], json.dumps(json.loads(p.argv[-1]) | {"model_name": text})))
        for p in hostile.measurement.processes
    )
    hostile = replace(hostile, measurement=replace(hostile.measurement, processes=recorded))
    outputs = {target: make_files(hostile, target, tmp_path / target)[1][0].text for target in EVERYWHERE}
    word = json.dumps({"model_name": text})[1:-1]
    script = next(line for line in outputs[Target.SHELL].splitlines() if "llamacpp_server" in line)
    assert word in shlex.split(script)[-1]
    (service,) = yaml.safe_load(outputs[Target.COMPOSE])["services"].values()
    assert word in service["command"][-1].replace("$$", "$")
    assert "$" not in service["command"][-1].replace("$$", "")
    trees = [tree for tree in yaml.safe_load_all(outputs[Target.KUBERNETES]) if tree["kind"] == "Deployment"]
    (argument,) = (tree["spec"]["template"]["spec"]["containers"][0]["args"][-1] for tree in trees)
    assert word in argument.replace("$$(", "$(") or text == "$$(POD_IP)"
    assert not re.search(r"(?<!\$)\$\((?!POD_IP)", argument)
