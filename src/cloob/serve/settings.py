"""What the server allows: frozen, so that a running server has one set of limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeConfig:
    """Who may ask, and how much.

    Attributes:
        token: What a request must show as bearer or cookie; None where everyone who reaches the server may ask.
        local: The server listens on loopback: only requests for a loopback name are answered, which stops DNS
            rebinding, and an item's answer holds the whole path of its file.
        max_upload_bytes: Of one picture.
        max_upload_pixels: Of one picture; told by its header, before anything is decoded.
        max_body_bytes: Of a request that uploads nothing.
        max_uploads: Uploaded pictures that are remembered; the one used longest ago goes first.
        max_batch: Queries in one forward pass.
        max_waiting: Queries that may wait for one; more are answered 503.
        max_connections: At a time, idle ones included; requests on more are answered 503.
        max_wait_seconds: Until the head of a connection's first request is here.
    """

    token: str | None = None
    local: bool = True
    max_upload_bytes: int = 20_000_000
    max_upload_pixels: int = 64_000_000
    max_body_bytes: int = 1_000_000
    max_uploads: int = 256
    max_batch: int = 64
    max_waiting: int = 1024
    max_connections: int = 512
    max_wait_seconds: float = 20.0
