"""Triton's compiler translates each kernel, as the objective launches it, for NVIDIA cards; no card is needed.

With the arguments of a real call, only that nothing runs: so registers, spills and shared memory are those of the
sizes in ``launch.py``. ``make kernels`` runs this; without the package triton it is skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paper_loops import pairs

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)


from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from cloob.functional import kernels
from cloob.functional.kernels import launch

KIB = 1024
N, D = 192, 64  # divisible by 16, as usual sizes are
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class Launch:
    """A kernel with what it was launched with: arguments as types, and constants."""

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        names = kernel.arg_names
        given = dict(zip(names, arguments, strict=False)) | {"BLOCK": launch.BLOCK} | constants
        self.kernel = kernel
        self.signature, self.constants, self.attributes = {}, {}, {}
        for position, name in enumerate(names):
            value = given[name]
            if isinstance(value, Tensor):
                self.signature[name] = POINTERS[value.dtype]
            elif type(value) is int and name not in constants and name != "BLOCK" and value != 1:
                self.signature[name] = "i32"
            else:
                self.signature[name] = "constexpr"
                self.constants[position,] = value
                continue
            if isinstance(value, Tensor) or value % 16 == 0:
                self.attributes[position,] = [["tt.divisibility", 16]]

    @property
    def key(self) -> str:
        return f"{self.kernel.__name__} {self.signature} {self.constants} {self.attributes}"

    def compiled_for(self, arch: int) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return compile_kernel(source, target=GPUTarget("cuda", arch, 32), options=launch.OPTIONS)


def launches(matmul: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What forward and backward of each member launch, each once."""
    found: dict[str, Launch] = {}

    def record(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        one = Launch(kernel, arguments, constants)
        found.setdefault(one.key, one)

    monkeypatch.setattr(launch, "run", record)
    monkeypatch.setattr(launch, "check_rows", lambda rows: None)
    for module in (kernels.contrast, kernels.retrieval, kernels.sigmoid):
        monkeypatch.setattr(module, "check_rows", lambda rows: None)
    x, y = (side.float().requires_grad_() for side in pairs(N, D))
    options: dict[str, Any] = {"matmul": matmul, "unit_rows": True}
    for ids in (None, torch.arange(N)):
        for contrast, scale in (("infoloob", "paper"), ("sigmoid", "unit")):
            for beta in (4.0, 80.0):
                loss = kernels.cloob_triton(x, y, 30.0, beta, contrast=contrast, scale=scale, ids=ids, **options)
                loss.backward()
    with torch.no_grad():
        kernels.cloob_triton(x, y, 30.0, hopfield=False, **options)
    return list(found.values())


def spilled_and_registers(ptx: str, arch: int, folder: Path) -> tuple[int, int]:
    """Bytes that do not fit into registers, and registers a thread, as ptxas says."""
    (folder / "kernel.ptx").write_text(ptx, encoding="utf-8")
    suffix = "a" if arch >= 90 else ""
    command = [get_ptxas(arch).path, "-v", f"--gpu-name=sm_{arch}{suffix}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill stores", done.stderr)))
    return spills, max(map(int, re.findall(r"Used (\d+) registers", done.stderr)))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("matmul", [torch.bfloat16, None], ids=["bfloat16", "float32"])
def test_kernels_fit_a_multiprocessor(
    arch: int, matmul: torch.dtype | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = launches(matmul, monkeypatch)
    names = {one.kernel.__name__ for one in found}
    assert names == {"exponentials", "pull", "both_sides", "rescale", "sigmoids"}
    for one in found:
        kernel = one.compiled_for(arch)
        spilled, registers = spilled_and_registers(kernel.asm["ptx"], arch, tmp_path)
        shared = kernel.metadata.shared / KIB
        print(f"sm_{arch} {one.kernel.__name__}: {registers} registers, {spilled} B spilled, {shared:.0f} KiB shared")
        # `pull` holds two tiles of sums, and products in float32, which no tensor core does, their factors beside them.
        most = 512 if matmul is None else 0 if arch >= 90 or one.kernel.__name__ != "pull" else 128
        assert shared <= 99 and spilled <= most, one.key
