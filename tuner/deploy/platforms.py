"""Files for platforms that start the engines themselves: Ray Serve LLM, NVIDIA Dynamo and llm-d.

They keep the engine's options, but have an HTTP server or router of their own. Which options that leaves out, and that
the router is not the measured one, stands in the README: measure again there.

Formats: Ray Serve's config file with `ray.serve.llm:build_openai_app` and `build_pd_openai_app` (Ray Serve LLM
documentation), `DynamoGraphDeployment` of `nvidia.com/v1alpha1` (the custom resource definitions of Dynamo), values of
the Helm chart `llm-d-modelservice` (its values.yaml and schema).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from search_spaces.errors import InvalidValueError
from search_spaces.outcome import LaunchedProcess
from search_spaces.serving import Mode, Pool, Role
from studies.codec import Json
from tuner.deploy.chosen import Chosen
from tuner.deploy.images import image_of
from tuner.deploy.layout import ROUTER, Part, Place, PlaceOf, parts_of
from tuner.deploy.machines import Output, Wishes, model_path
from tuner.deploy.pods import ANY_ADDRESS, SHARED, Pod, claims_of, listening_everywhere, pod_of
from tuner.deploy.render import POD_IP, OutFile, render

DYNAMO_VERSION = "1.3.1"
DYNAMO_IMAGES = {
    "vllm": "nvcr.io/nvidia/ai-dynamo/vllm-runtime",
    "sglang": "nvcr.io/nvidia/ai-dynamo/sglang-runtime",
    "trtllm": "nvcr.io/nvidia/ai-dynamo/tensorrtllm-runtime",
}
LLM_D_SIDECAR_PORT = 8200
"""Where a decode replica listens behind llm-d's routing sidecar (`routing.proxy.targetPort`)."""
HTTP_FLAGS = ("--host", "--port", "--disable-uvicorn-access-log", "--enable-prompt-tokens-details")
"""Options of vLLM's and SGLang's own HTTP servers, which these platforms do not use."""
MODEL_FLAGS = ("--model", "--model-path", "--served-model-name")
DYNAMO_TRTLLM = {
    "--max_seq_len": "--max-seq-len",
    "--max_batch_size": "--max-batch-size",
    "--max_num_tokens": "--max-num-tokens",
    "--kv_cache_free_gpu_memory_fraction": "--free-gpu-memory-fraction",
    "--tp_size": "--tensor-parallel-size",
    "--pp_size": "--pipeline-parallel-size",
    "--ep_size": "--expert-parallel-size",
    "--extra_llm_api_options": "--extra-engine-args",
}
"""Options of `trtllm-serve` as `dynamo.trtllm` calls them; those of vLLM and SGLang have their own names there."""


@dataclass(frozen=True, kw_only=True)
class EngineCall:
    """An engine's command line, taken apart: what it loads, the name that it serves it under, and its options in order.

    An option is (flag, value), with None for a switch.
    """

    model: str
    served_name: str
    options: tuple[tuple[str, str | None], ...]

    def without(self, flags: Sequence[str]) -> EngineCall:
        """The call without `flags`."""
        kept = tuple(option for option in self.options if option[0] not in flags)
        return EngineCall(model=self.model, served_name=self.served_name, options=kept)

    @property
    def words(self) -> tuple[str, ...]:
        """The options as words of a command line."""
        return tuple(word for flag, value in self.options for word in ((flag,) if value is None else (flag, value)))


def engine_call(argv: Sequence[str], engine: str) -> EngineCall:
    """The command line `argv` of a server of `engine`; raises `InvalidValueError` for one of another form."""
    words = list(argv)
    if engine == "sglang":
        rest, model = words[_index(words, "sglang.launch_server", engine) + 1 :], None
    else:
        start = _index(words, {"vllm": "serve", "trtllm": "serve"}[engine], engine, program="trtllm-serve") + 1
        rest, model = words[start + 1 :], words[start]
    options = tuple(_options(rest))
    named = dict(options)
    found = model or named.get("--model-path") or named.get("--model")
    if found is None:
        raise InvalidValueError(f"the command line of {engine} names no model: {words}")
    return EngineCall(
        model=found,
        served_name=named.get("--served-model-name") or found,
        options=tuple(option for option in options if option[0] not in MODEL_FLAGS),
    )


def _index(words: list[str], word: str, engine: str, program: str = "") -> int:
    """Position of the last word of the program; `trtllm-serve` may stand alone or before `serve`."""
    if word in words:
        return words.index(word)
    at = next((i for i, found in enumerate(words) if program and PurePosixPath(found).name == program), None)
    if at is None:
        raise InvalidValueError(f"no {word!r} in the command line of {engine}: {words}")
    return at


def _options(words: list[str]) -> list[tuple[str, str | None]]:
    options: list[tuple[str, str | None]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            options.append((flag, value if equals else None))
        elif options and options[-1][1] is None:
            options[-1] = (options[-1][0], word)
        else:
            raise InvalidValueError(f"{word!r} is no option, nor the value of one, in {words}")
    return options


def ray_serve(chosen: Chosen, wishes: Wishes) -> Output:
    """`serve.yaml` for `serve run`, which runs vLLM."""
    _require_engine(chosen, "ray-serve", ("vllm",))
    parts = _replicas(chosen, wishes, "ray-serve")
    configs = {part.pool.role: _llm_config(part, chosen) for part in parts if part.pool is not None}
    if chosen.config.mode is Mode.AGGREGATED:
        builder = "build_openai_app"
        args: dict[str, Json] = {"llm_configs": [configs[Role.MIXED]]}
    else:
        builder = "build_pd_openai_app"
        args = {"prefill_config": configs[Role.PREFILL], "decode_config": configs[Role.DECODE]}
    text = render("serve.yaml.j2", title=wishes.title, name=wishes.name, port=wishes.port, builder=builder, args=args)
    return Output(
        files=(OutFile(path="serve.yaml", text=text),),
        parts=tuple(parts),
        endpoint=f"http://127.0.0.1:{wishes.port}",
        start=("serve run serve.yaml",),
        notes=("It runs on the Ray cluster that it is started on, with ray[serve,llm] and the measured vLLM there.",),
        platform_notes=(_left_out(parts, "vllm", "Ray Serve"), _other_router("Ray Serve")),
    )


def _llm_config(part: Part, chosen: Chosen) -> dict[str, Json]:
    """An `LLMConfig`: options of the command line are engine arguments of the same name."""
    call = engine_call(part.command.argv, "vllm").without(HTTP_FLAGS)
    arguments: dict[str, Json] = {}
    for flag, value in call.options:
        name = flag.removeprefix("--").replace("-", "_")
        if value is None and name.startswith("no_"):
            arguments[name.removeprefix("no_")] = False
        else:
            arguments[name] = True if value is None else _typed(value)
    replicas = 1 if part.pool is None else part.pool.replicas
    variables: dict[str, Json] = {key: value for key, value in part.command.env.items() if key not in _PLACED}
    config: dict[str, Json] = {
        "model_loading_config": {"model_id": call.served_name, "model_source": call.model},
        "deployment_config": {"num_replicas": replicas},
        "engine_kwargs": arguments,
    }
    kind = None if part.pool is None else chosen.problem.node_pool(part.pool.node_pool).accelerator_type
    if kind is not None:
        config["accelerator_type"] = kind
    if variables:
        config["runtime_env"] = {"env_vars": variables}
    return config


_PLACED = ("VLLM_HOST_IP", "CUDA_VISIBLE_DEVICES", "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT")
"""Variables that say where a replica is: Ray sets them."""


def _typed(value: str) -> Json:
    """A number, a JSON object or text, as the engine's own parser would read it."""
    try:
        parsed: Json = json.loads(value)
    except ValueError:
        return value
    return parsed if isinstance(parsed, int | float | dict | list) else value


def dynamo(chosen: Chosen, wishes: Wishes) -> Output:
    """`dynamo.yaml`: a DynamoGraphDeployment with Dynamo's frontend and a worker component for each pool."""
    _require_engine(chosen, "dynamo", tuple(DYNAMO_IMAGES))
    engine = chosen.config.engine
    image = wishes.image or f"{DYNAMO_IMAGES[engine]}:{DYNAMO_VERSION}"
    parts = _replicas(chosen, wishes, "dynamo")
    workers = [_worker(part, chosen, wishes, image) for part in parts]
    text = render(
        "dynamo.yaml.j2",
        title=wishes.title,
        name=wishes.name,
        engine=engine,
        image=image,
        workers=workers,
        claims=claims_of([worker.pod for worker in workers]),
    )
    return Output(
        files=(OutFile(path="dynamo.yaml", text=text),),
        parts=tuple(parts),
        endpoint=f"http://{wishes.name}-frontend:8000",
        start=("kubectl apply -f dynamo.yaml",),
        platform_notes=(
            _other_version(chosen, image),
            _left_out(parts, engine, "Dynamo"),
            _other_router("Dynamo"),
        ),
    )


def _other_version(chosen: Chosen, image: str) -> str:
    engine = chosen.config.engine
    return (
        f"The image {image} holds a {engine} of its own, maybe of another version than the measured "
        f"{chosen.measurement.environment.get('engine_version', engine)}; name another with --image."
    )


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A worker of a Dynamo graph; `phase` is prefill or decode, None for both."""

    name: str
    phase: str | None
    replicas: int
    pod: Pod


def _worker(part: Part, chosen: Chosen, wishes: Wishes, image: str) -> Worker:
    engine, pool = chosen.config.engine, _pool(part)
    call = engine_call(part.command.argv, engine).without(HTTP_FLAGS)
    source = "--model" if engine == "vllm" else "--model-path"
    argv = ["python3", "-m", f"dynamo.{engine}", source, call.model, "--served-model-name", call.served_name]
    argv += _trtllm_words(call) if engine == "trtllm" else call.words
    if pool.role is not Role.MIXED and "--disaggregation-mode" not in argv:
        argv += ["--disaggregation-mode", str(pool.role)]
    phase = None if pool.role is Role.MIXED else str(pool.role)
    pod = pod_of(part, chosen, wishes, argv=tuple(argv), image=image)
    return Worker(name=f"{engine}-{pool.role}", phase=phase, replicas=pool.replicas, pod=pod)


def _trtllm_words(call: EngineCall) -> tuple[str, ...]:
    """The options under Dynamo's names; raises `InvalidValueError` for one that it does not have."""
    words: list[str] = []
    for flag, value in call.options:
        if flag == "--backend":  # Dynamo's worker has the PyTorch one
            continue
        if flag == "--enable_chunked_prefill":
            words += ["--override-engine-args", '{"enable_chunked_prefill": true}']
        elif flag in DYNAMO_TRTLLM and value is not None:
            words += [DYNAMO_TRTLLM[flag], value]
        else:
            raise InvalidValueError(f"dynamo.trtllm has no option for {flag}; deploy to kubernetes or lws")
    return tuple(words)


def llm_d(chosen: Chosen, wishes: Wishes) -> Output:
    """`values.yaml` of the Helm chart llm-d-modelservice, which runs vLLM."""
    _require_engine(chosen, "llm-d", ("vllm",))
    disaggregated = chosen.config.mode is Mode.DISAGGREGATED
    decode_port = LLM_D_SIDECAR_PORT if disaggregated else wishes.port
    parts = _replicas(chosen, wishes, "llm-d", ports={Role.DECODE: decode_port})
    image = image_of(chosen, wishes.image)
    pods = {_pool(part).role: (part, _llm_d_pod(part, chosen, wishes, image)) for part in parts}
    decode = pods[Role.DECODE if disaggregated else Role.MIXED]
    text = render(
        "values.yaml.j2",
        title=wishes.title,
        name=wishes.name,
        model=_artifacts(decode[0], wishes),
        port=wishes.port,
        sidecar_port=LLM_D_SIDECAR_PORT,
        disaggregated=disaggregated,
        decode=decode,
        prefill=pods.get(Role.PREFILL),
    )
    return Output(
        files=(OutFile(path="values.yaml", text=text),),
        parts=tuple(parts),
        endpoint=f"http://{wishes.name}:{wishes.port}",
        start=(
            "helm repo add llm-d-modelservice https://llm-d-incubation.github.io/llm-d-modelservice/",
            f"helm install {wishes.name} llm-d-modelservice/llm-d-modelservice -f values.yaml",
        ),
        notes=("The endpoint is that of the gateway and its inference pool, which are installed before.",),
        platform_notes=(_other_router("llm-d"),),
    )


def _llm_d_pod(part: Part, chosen: Chosen, wishes: Wishes, image: str) -> Pod:
    argv = listening_everywhere(part.command.argv)
    if any("{{" in word for word in (*argv, *part.command.env.values())):
        raise InvalidValueError("the command holds '{{', which Helm would take for a template; deploy to kubernetes")
    return pod_of(part, chosen, wishes, argv=(PurePosixPath(argv[0]).name, *argv[1:]), image=image)


def _artifacts(part: Part, wishes: Wishes) -> Mapping[str, str]:
    """Name and address of the model for the chart: on Hugging Face, or on a claim."""
    call = engine_call(part.command.argv, "vllm")
    if call.model.startswith("/"):
        return {"name": call.served_name, "uri": f"pvc://{wishes.name}-model{call.model}"}
    return {"name": call.served_name, "uri": f"hf://{call.model}"}


def _require_engine(chosen: Chosen, target: str, engines: tuple[str, ...]) -> None:
    if chosen.config.engine not in engines:
        raise InvalidValueError(
            f"target {target} runs {' or '.join(engines)}, and trial {chosen.trial.number} was measured on "
            f"{chosen.config.engine}; choose shell, compose, kubernetes or lws"
        )


def _replicas(chosen: Chosen, wishes: Wishes, target: str, ports: Mapping[Role, int] | None = None) -> list[Part]:
    """One process for each pool: its replicas are alike, and the platform multiplies them."""
    parts = [part for part in parts_of(chosen, _in_platform(chosen, wishes, ports or {})) if part.name != ROUTER]
    if any(part.measured.part is not None for part in parts):
        raise InvalidValueError(f"target {target} does not yet deploy replicas that span nodes; choose shell or lws")
    first: dict[Role, Part] = {}
    for part in parts:
        first.setdefault(_pool(part).role, part)
    return list(first.values())


def _in_platform(chosen: Chosen, wishes: Wishes, ports: Mapping[Role, int]) -> PlaceOf:
    source = f"/{wishes.model}" if wishes.model is not None else model_path(chosen, wishes)

    def place(process: LaunchedProcess) -> Place:
        role = next((role for role in ports if process.name.startswith(f"{role}-")), None)
        port = wishes.port if role is None else ports[role]
        return Place(
            host=ANY_ADDRESS if process.name == ROUTER else POD_IP,
            port=port,
            url=f"http://{process.name}:{port}",
            work_dir="/etc/tuner",
            shared_dir=SHARED,
            model_source=None if process.model_source is None else source,
        )

    return place


def _pool(part: Part) -> Pool:
    if part.pool is None:
        raise AssertionError("the router has no pool, and is left to the platform")
    return part.pool


def _left_out(parts: Sequence[Part], engine: str, platform: str) -> str:
    flags = {flag for part in parts for flag, _ in engine_call(part.command.argv, engine).options}
    left = [flag for flag in HTTP_FLAGS if flag in flags]
    return f"{platform} has an HTTP server of its own: the engine's options {', '.join(left)} are left out."


def _other_router(platform: str) -> str:
    return (
        f"Requests are routed by {platform}, and not by the router of the measurement: the figures above are those of "
        "the engines behind the measured router. Measure again here."
    )
