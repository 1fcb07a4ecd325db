"""The objectives that are compared: ours on each path, the published formula, and other people's where they import."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.objective import INV_TAU, plain
from torch import Tensor

from cloob.objective import make_objective

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss.

    Attributes:
        name: Of the row.
        kind: ``"cloob"``, ``"clip"`` or ``"siglip"``: losses of one kind can be compared.
        arithmetic: Of its matrix products: ``"float32"``, ``"tf32"`` or ``"bfloat16"``.
        loss: (N, D) unit rows of both sides to the loss.
        matrices: About how many float32 N×N matrices it holds at its peak.
    """

    name: str
    kind: str
    arithmetic: str
    loss: Loss
    matrices: float = 0.0


@contextlib.contextmanager
def products(arithmetic: str) -> Iterator[None]:
    """Inside, float32 products are of this arithmetic."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if arithmetic == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def contenders(device: torch.device) -> tuple[list[Contender], dict[str, str]]:
    """All that there is here, and why others are not."""
    found = [
        Contender("plain formula", "cloob", "float32", plain, 10),
        Contender("plain formula", "cloob", "tf32", plain, 10),
        *_ours(device),
    ]
    missing: dict[str, str] = {}
    for name, make in (("open_clip", _open_clip), ("inf-cl", _inf_cl), ("memeff", _memeff), ("siglip-kernel", _siglip)):
        try:
            found += make(device)
        except Exception as error:  # whatever a package that is no part of us raises when it is imported
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return found, missing


def _ours(device: torch.device) -> list[Contender]:
    found = []
    for backend, matrices in (("reference", 14), ("streamed", 0), ("triton", 0)):
        for arithmetic in ("float32", "tf32", "bfloat16"):
            for kind in ("cloob", "clip", "siglip"):
                matmul = "bfloat16" if arithmetic == "bfloat16" else "float32"
                options: dict[str, Any] = {"backend": backend, "matmul": matmul, "check": False}
                if kind == "clip":
                    options |= {"learnable_inv_tau": False, "inv_tau": INV_TAU}
                try:
                    objective = make_objective(kind, **options).to(device)
                except ValueError:  # the reference has no bfloat16; a backend may not be there
                    continue
                kept = matrices if kind == "cloob" else matrices / 3
                found.append(Contender(f"cloob, {backend}", kind, arithmetic, objective, kept))
    return found


def _open_clip(device: torch.device) -> list[Contender]:
    from open_clip.loss import ClipLoss, SigLipLoss

    clip, siglip = ClipLoss(cache_labels=True), SigLipLoss()
    scale, bias = torch.tensor(10.0, device=device), torch.tensor(-10.0, device=device)

    def low(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss: Tensor = clip(x, y, INV_TAU)
        return loss

    return [
        Contender("open_clip ClipLoss", "clip", "float32", lambda x, y: clip(x, y, INV_TAU), 5),
        Contender("open_clip ClipLoss", "clip", "tf32", lambda x, y: clip(x, y, INV_TAU), 5),
        Contender("open_clip ClipLoss", "clip", "bfloat16", low, 5),
        Contender("open_clip SigLipLoss", "siglip", "tf32", lambda x, y: siglip(x, y, scale, bias), 5),
    ]


def _inf_cl(device: torch.device) -> list[Contender]:
    from inf_cl import cal_inf_loss

    if device.type != "cuda":
        raise RuntimeError("needs CUDA")
    scale = torch.tensor(INV_TAU, device=device)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        both: Tensor = cal_inf_loss(x, y, scale=scale) + cal_inf_loss(y, x, scale=scale)
        return both / 2

    return [Contender("inf-cl", "clip", "tf32", loss)]


def _memeff(device: torch.device) -> list[Contender]:
    from memeff import MemoryEfficientCLIPLoss

    if device.type != "cuda":
        raise RuntimeError("needs CUDA")
    loss = MemoryEfficientCLIPLoss(temperature=1 / INV_TAU, normalized_inputs=True)
    return [
        Contender("memeff", "clip", "tf32", loss),
        Contender("memeff", "clip", "bfloat16", lambda x, y: loss(x.bfloat16(), y.bfloat16())),
    ]


def _siglip(device: torch.device) -> list[Contender]:
    from siglip_kernel import fused_siglip_loss

    if device.type != "cuda":
        raise RuntimeError("needs CUDA")
    scale = torch.tensor(2.302585, device=device, requires_grad=True)
    bias = torch.tensor(-10.0, device=device, requires_grad=True)

    def low(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = fused_siglip_loss(x.bfloat16(), y.bfloat16(), scale, bias)
        return loss

    return [Contender("siglip-kernel", "siglip", "bfloat16", low)]
