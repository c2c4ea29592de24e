"""What a router is started with."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, Field, model_validator


class Protocol(StrEnum):
    """How a prefill replica and a decode replica are told of each other's part in a request.

    - `slots`: the router saves a slot of one and restores it on the other (llama.cpp);
    - `kv_transfer_params`: the prefill replica answers with the address of the KV blocks, which goes to the decode
      replica (vLLM with NIXL);
    - `repeat`: both get the same prompt one after the other, and find each other's blocks (vLLM with files);
    - `bootstrap`: both get the request at once, with the place where they meet (SGLang);
    - `disaggregated_params`: the context server answers with what the generation server needs (TensorRT-LLM).
    """

    SLOTS = "slots"
    KV_TRANSFER_PARAMS = "kv_transfer_params"
    REPEAT = "repeat"
    BOOTSTRAP = "bootstrap"
    DISAGGREGATED_PARAMS = "disaggregated_params"


class RouterOptions(BaseModel, frozen=True, extra="forbid"):
    """Where a router listens and the base URLs of its replicas: mixed ones, or prefill and decode ones.

    `prefill_slots` and `decode_slots` count the slots of each replica of the kind, for the protocol of slots.
    `prefill_side_ports` are the ports on which prefill replicas are met, one for each URL, for the protocol of
    bootstrap. `slot_dir` is the folder through which KV caches are handed over where they are files; the replicas and
    the router see it under the same path. `metrics` are the figures of the replicas' `/metrics` to tell of, by our
    name: a sample's name, with labels that it must have.
    """

    host: str
    port: int = Field(ge=1, le=65535)
    mixed_urls: tuple[str, ...] = ()
    prefill_urls: tuple[str, ...] = ()
    decode_urls: tuple[str, ...] = ()
    protocol: Protocol = Protocol.SLOTS
    prefill_slots: int = Field(ge=0, default=0)
    decode_slots: int = Field(ge=0, default=0)
    prefill_side_ports: tuple[int, ...] = ()
    metrics: Mapping[str, str] = Field(default_factory=dict)
    slot_dir: Path

    @model_validator(mode="after")
    def _check(self) -> RouterOptions:
        aggregated = bool(self.mixed_urls) and not self.prefill_urls and not self.decode_urls
        disaggregated = not self.mixed_urls and bool(self.prefill_urls) and bool(self.decode_urls)
        if not aggregated and not disaggregated:
            raise ValueError("give mixed_urls, or both prefill_urls and decode_urls")
        by_slots = disaggregated and self.protocol is Protocol.SLOTS
        if by_slots and (self.prefill_slots < 1 or self.decode_slots < 1):
            raise ValueError(
                f"prefill_slots={self.prefill_slots} and decode_slots={self.decode_slots} must both be at least 1"
            )
        met = disaggregated and self.protocol is Protocol.BOOTSTRAP
        if met and len(self.prefill_side_ports) != len(self.prefill_urls):
            raise ValueError(
                f"prefill_side_ports={list(self.prefill_side_ports)}: give one for each of {len(self.prefill_urls)} "
                "prefill_urls"
            )
        return self

    @property
    def is_disaggregated(self) -> bool:
        """True where prefill and decode have replicas of their own."""
        return bool(self.prefill_urls)

    @property
    def urls(self) -> tuple[str, ...]:
        """Base URLs of all replicas."""
        return self.mixed_urls + self.prefill_urls + self.decode_urls
