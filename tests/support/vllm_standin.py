"""A stand-in for vLLM's command line and HTTP, where the real one is not installed: what it computes is nothing.

    python vllm_standin.py serve MODEL --host H --port P ...

It knows the flags of its real counterpart that tests use, answers `serve --help=all`, asks for VLLM_API_KEY, hands over
"KV caches" by `kv_transfer_params` and counts them in `/metrics`. STANDIN_FORGETS=1 makes it recompute what it is
handed. STANDIN_DIES=WORDS makes it end with these words before it serves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys

from aiohttp import web

FLAGS = (
    "served-model-name host port max-model-len load-format max-num-seqs max-num-batched-tokens dtype "
    "kv-transfer-config tensor-parallel-size block-size speculative-config"
)
SWITCHES = "enable-chunked-prefill enable-prefix-caching enforce-eager"
STEP_S = 0.005
"""Seconds between tokens: a busy client reads an answer without any in one piece, which is a failure of its own."""
STATE = {"prompt": 0, "received": 0, "reset": 0}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="vllm")
    serve = found.add_subparsers(dest="command").add_parser("serve", add_help=False)
    serve.add_argument("model", nargs="?")
    serve.add_argument("--help", nargs="?", const="all")
    for name in FLAGS.split():
        serve.add_argument(f"--{name}")
    for name in SWITCHES.split():
        serve.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    for name in ("disable-uvicorn-access-log", "enable-prompt-tokens-details"):
        serve.add_argument(f"--{name}", action="store_true")
    return found


def guarded(request: web.Request) -> None:
    if request.headers.get("Authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
        raise web.HTTPUnauthorized


async def complete(request: web.Request) -> web.StreamResponse:
    guarded(request)
    body = await request.json()
    tokens, params = len(body["prompt"]), body.get("kv_transfer_params") or {}
    STATE["prompt"] += tokens
    handed = bool(params.get("do_remote_prefill")) and not os.environ.get("STANDIN_FORGETS")
    STATE["received"] += tokens if handed else 0
    usage = {"prompt_tokens": tokens, "completion_tokens": body["max_tokens"]}
    if not body.get("stream"):
        told = {"do_remote_prefill": True, "remote_port": int(os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"])}
        answer = {"choices": [{"text": " w"}], "usage": usage}
        return web.json_response(answer | ({"kv_transfer_params": told} if params else {}))
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(body["max_tokens"]):
        await asyncio.sleep(STEP_S)
        await response.write(b'data: {"choices":[{"index":0,"text":" w","finish_reason":null}]}\n\n')
    await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
    return response


async def metrics(_request: web.Request) -> web.Response:
    label = 'engine="0",model_name="m"'
    lines = [
        f"vllm:prompt_tokens_total{{{label}}} {STATE['prompt']}",
        f'vllm:prompt_tokens_by_source_total{{{label},source="external_kv_transfer"}} {STATE["received"]}',
        f"standin_resets {STATE['reset']}",
    ]
    return web.Response(text="\n".join(lines) + "\n")


async def reset(_request: web.Request) -> web.Response:
    STATE["reset"] += 1
    return web.json_response({"success": True})


async def health(_request: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print("9.9.9")
        return
    options = parser().parse_args()
    if options.help:
        parser().parse_known_args(["serve"])
        listed = [f"--{name} VALUE" for name in FLAGS.split()]
        listed += [f"--{name}, --no-{name}" for name in SWITCHES.split()]
        print("\n".join([*listed, "--disable-uvicorn-access-log", "--enable-prompt-tokens-details"]))
        return
    if os.environ.get("STANDIN_DIES"):
        print(os.environ["STANDIN_DIES"], flush=True)
        print("\n".join(f"(APIServer) Traceback line {n}" for n in range(100)), flush=True)
        sys.exit(1)
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/metrics", metrics)
    app.router.add_post("/reset_prefix_cache", reset)
    app.router.add_get("/health", health)
    web.run_app(app, host=options.host, port=int(options.port), print=None, access_log=None)


if __name__ == "__main__":
    main()
