"""Which machine this is, and which versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
from benchmarks.on_gpu.record import Record

PACKAGES = ("torch", "triton", "torchvision", "open_clip_torch", "timm", "inf-cl", "memeff", "siglip-kernel", "pytest")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(record: Record, device: torch.device) -> None:
    """One row."""
    facts: dict[str, object] = {
        "device": device.type,
        "python": platform.python_version(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        **{package: version(package) for package in PACKAGES},
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": card.name,
            "compute_capability": f"{card.major}.{card.minor}",
            "memory_gib": round(card.total_memory / 2**30, 1),
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    record.row(**facts)
