"""Access and limits of the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeConfig:
    """Who may ask, and how much a request may bring."""

    # What a request must show as bearer or cookie; None: whoever reaches us may ask.
    token: str | None = None
    # Only requests for a loopback name are answered, against DNS rebinding. Full paths
    # are shown.
    local: bool = True
    max_upload_bytes: int = 20_000_000  # of the form with a file
    max_upload_pixels: int = 64_000_000  # by its header, before anything is decoded
    max_body_bytes: int = 1_000_000  # of a request that uploads nothing
