"""Where the kernels run, and how much of a matrix product one program takes.

A program computes BLOCK × BLOCK numbers of a product, walking along its third dimension one LINE of each row at a time.

- BLOCK = 128. The sums stay in registers: 128 · 128 · 4 bytes = 64 KiB. ``retrieval_tiles.pull`` holds two such tiles,
  half of a multiprocessor's 256 KiB, and 128 of the 255 registers that each of 8 · 32 threads may have. A wider tile
  would read less (one of 128 × 128 does 64 operations for each byte of bfloat16 it loads) but would not hold two.
- LINE = 128 bytes, a cache line: 64 numbers in bfloat16, 32 in float32. Both factors of a step take 32 KiB.
- Three steps (``num_stages``) are under way at a time: 96 KiB of shared memory. An H100 has 228 KiB, an A100 164, a
  consumer's card 100.

These are reasons, not measurements: nothing here has run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
LINE = 128
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}  # fused: a · b + c in one operation


@triton.jit
def _probe(at):
    tl.store(at, 0.0)


# TRITON_INTERPRET=1, while this package is imported, turns its kernels into functions that numpy runs.
INTERPRETED = not isinstance(_probe, triton.JITFunction)


def check_rows(rows: Tensor) -> None:
    """Refuses rows that no kernel takes.

    Raises:
        ValueError: They are float64, or not on a CUDA device while the kernels are not interpreted.
    """
    if rows.dtype == torch.float64:
        raise ValueError("backend='triton' takes no float64 rows; backend='streamed' does")
    if not (rows.is_cuda or INTERPRETED):
        raise ValueError(
            f"backend='triton' needs rows on a CUDA device, these are on {rows.device.type}; backend='streamed' runs "
            "there (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly: for tests)"
        )


def cdiv(n: int, size: int) -> int:
    """How many parts of ``size`` cover ``n``."""
    return -(-n // size)


def run(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int | None, **constants: Any) -> None:
    """Runs ``kernel`` on the device of its first argument, a tensor, with this module's sizes."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, BLOCK=BLOCK, **OPTIONS, **constants)


def of_product(dtype: torch.dtype) -> dict[str, Any]:
    """The constants of a kernel that multiplies matrices of ``dtype``."""
    return {
        "DEPTH": LINE // dtype.itemsize,
        # As torch's own products do.
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "LIFT": INTERPRETED and dtype == torch.bfloat16,
    }


def new_tile(n_rows: int, n_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (n_rows, n_columns) matrix whose rows begin at multiples of BLOCK numbers."""
    return torch.empty(n_rows, cdiv(n_columns, BLOCK) * BLOCK, dtype=dtype, device=device)[:, :n_columns]
