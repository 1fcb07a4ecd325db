"""The tests with the mark ``gpu``, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch
from benchmarks.on_gpu.record import Record

ROOT = Path(__file__).parents[2]


def measure(record: Record, device: torch.device) -> None:
    """A row for each test: ``passed``, ``failed`` or ``skipped``, its seconds, and the first line of why."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        command += ["--durations=0", f"--junitxml={report}", "-x" if record.left() < 30 else "--maxfail=20"]
        environment = os.environ | {"CLOOB_GPU_TESTS": device.type, "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=max(5.0, record.left() - 5),
                check=False,
            )
            told = done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            told = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else str(error.stdout or "")
            record.skip("the rest of the tests", f"out of time; the last words: {told.strip()[-300:]}")
        if not report.is_file():
            record.skip("tests", f"pytest wrote no report; its last words: {told.strip()[-500:]}")
            return
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            record.row(**_row(case))


def _row(case: ElementTree.Element) -> dict[str, object]:
    row: dict[str, object] = {
        "test": f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}",
        "seconds": float(case.get("time", 0)),
        "outcome": "passed",
    }
    for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            said = (found.get("message") or "").strip().splitlines()
            row |= {"outcome": outcome, "why": said[0][:300] if said else ""}
    return row
