"""The tests with the mark ``gpu``, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from benchmarks.on_gpu.record import Record, read_rows

ROOT = Path(__file__).parents[2]


def measure(record: Record, device: torch.device) -> None:
    """A row for each test: ``passed``, ``failed`` or ``skipped``, its seconds, and the last line of why."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        ours = {"CLOOB_GPU_TESTS": device.type, "CLOOB_GPU_REPORT": str(report), "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | ours,
                capture_output=True,
                text=True,
                timeout=max(5.0, record.left()),
                check=False,
            )
            told = (done.stdout + done.stderr).strip()
        except subprocess.TimeoutExpired:
            told = ""
            record.skip("the rest of the tests", "out of time")
        rows = read_rows(report)
        for row in rows:
            record.row(**row)
        if not rows:
            record.skip("all tests", f"pytest ran none; its last words: {told[-500:]}")
