"""What a router is started with."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, model_validator


class RouterOptions(BaseModel, frozen=True, extra="forbid"):
    """Where a router listens and the base URLs of its replicas: mixed ones, or prefill and decode ones.

    `prefill_slots` and `decode_slots` count the slots of each replica of the kind. `slot_dir` is the folder through
    which KV caches are handed over; the replicas and the router see it under the same path.
    """

    host: str
    port: int = Field(ge=1, le=65535)
    mixed_urls: tuple[str, ...] = ()
    prefill_urls: tuple[str, ...] = ()
    decode_urls: tuple[str, ...] = ()
    prefill_slots: int = Field(ge=0, default=0)
    decode_slots: int = Field(ge=0, default=0)
    slot_dir: Path

    @model_validator(mode="after")
    def _check(self) -> RouterOptions:
        aggregated = bool(self.mixed_urls) and not self.prefill_urls and not self.decode_urls
        disaggregated = not self.mixed_urls and bool(self.prefill_urls) and bool(self.decode_urls)
        if not aggregated and not disaggregated:
            raise ValueError("give mixed_urls, or both prefill_urls and decode_urls")
        if disaggregated and (self.prefill_slots < 1 or self.decode_slots < 1):
            raise ValueError(
                f"prefill_slots={self.prefill_slots} and decode_slots={self.decode_slots} must both be at least 1"
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
