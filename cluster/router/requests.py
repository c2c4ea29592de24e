"""Requests as clients send them."""

from __future__ import annotations

import json

JsonObject = dict[str, object]


class BadRequestError(Exception):
    """The client sent what no replica can answer."""


def parse_request(text: bytes) -> JsonObject:
    """The JSON object in `text`; raises `BadRequestError`."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise BadRequestError(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequestError(f"the body is a {type(body).__name__}, not an object")
    return body


def check_single_prompt(body: JsonObject) -> None:
    """Raise `BadRequestError` unless `body` asks for one answer to one prompt: a slot holds one sequence."""
    prompt = body.get("prompt")
    is_tokens = isinstance(prompt, list) and bool(prompt) and all(isinstance(token, int) for token in prompt)
    if not is_tokens and not (isinstance(prompt, str) and prompt):
        raise BadRequestError("prompt must be a text or a list of token ids, and not empty")
    if body.get("n", 1) != 1:
        raise BadRequestError(f"n={body['n']} is not served with a prefill and a decode pool; ask for n=1")
