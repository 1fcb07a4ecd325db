"""``benchmarks/gpu.py``: no part starves another, what is left out is named, and all of it runs on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.on_gpu.record import Record, read_rows  # noqa: E402 - likewise
from benchmarks.on_gpu.tables import lay_out, tables  # noqa: E402 - likewise

from benchmarks import gpu  # noqa: E402 - beside the package


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    record = Record(tmp_path / "rows", 10.0)
    assert record.has_time_for("short", 1.0) and not record.has_time_for("long", 6.0)
    record.row(what="short", seconds=1.0)
    with (tmp_path / "rows").open("a") as file:
        file.write('{"what": "cut sh')
    rows = read_rows(tmp_path / "rows")
    assert rows[0]["skipped"] == "long" and "would take about 6.0 s" in rows[0]["why"]
    assert rows[1] == {"what": "short", "seconds": 1.0} and len(rows) == 2
    assert read_rows(tmp_path / "none") == []


def test_a_slow_part_is_ended_and_the_others_have_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: dict[str, float] = {}
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def start(name: str, path: Path, seconds: float, device: str) -> str:
        budgets[name] = seconds
        path.write_text('{"what": 1}\n')
        now[0] += seconds + gpu.GRACE if name == "tests" else 0.1 * seconds
        return "out of time" if name == "tests" else "done"

    monkeypatch.setattr(gpu, "start_part", start)
    parts = gpu.run("cuda", 450.0, list(gpu.SHARES))
    assert list(parts) == list(gpu.SHARES) and now[0] < 450
    assert parts["tests"]["ended"] == "out of time" and parts["tests"]["rows"] == [{"what": 1}]
    for name, share in gpu.SHARES.items():
        assert budgets[name] >= 0.8 * share * 450 - gpu.GRACE


def test_a_process_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "slow.py"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    began = time.monotonic()
    assert gpu.start_part("steps", tmp_path / "rows", 0.3, "cpu") == "out of time"
    assert time.monotonic() - began < 20
    script.write_text("raise SystemExit('no card')")
    monkeypatch.setattr(gpu, "GRACE", 30.0)
    assert gpu.start_part("steps", tmp_path / "rows", 0.3, "cpu") == "failed: no card"


def test_without_a_card_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "start_part", lambda *arguments: "failed: torch sees no CUDA device")
    assert list(gpu.run("cuda", 60.0, list(gpu.SHARES))) == ["environment"]


def test_tables_show_all_rows() -> None:
    def part(*rows: dict[str, Any]) -> dict[str, Any]:
        return {"seconds": 1.0, "budget": 2.0, "ended": "done", "rows": list(rows)}

    row = {"what": "ours", "arithmetic": "tf32", "n": 4096, "dim": 512, "extra_bytes": 3e6}
    told = tables(
        {
            "environment": part({"gpu": "A Card", "cuda": None}),
            "tests": part({"test": "a::b", "outcome": "failed", "why": "wrong"}, {"test": "c", "outcome": "passed"}),
            "objective": part(
                {"what": "GEMM", "operations_per_second": 1.0},
                row | {"kind": "cloob", "median_s": 0.004, "floor_s": 0.002},
                row | {"kind": "clip", "median_s": 0.003, "floor_s": None},
                {"skipped": "N = 131,072", "why": "would need about 640 GiB"},
            ),
        }
    )
    lines = [line.split() for line in told.splitlines()]
    assert ["512", "4,096", "ours", "tf32", "4.00", "3.0", "2.00", "2.00"] in lines
    assert ["512", "4,096", "ours", "tf32", "3.00", "3.0"] in lines
    assert "gpu A Card" in told and "tests: 1 passed, 1 failed, 0 skipped" in told and "a::b  failed   wrong" in told
    assert "objective: N = 131,072: would need about 640 GiB" in told
    assert lay_out("nothing", {"a": str}, []).splitlines() == ["nothing", "a"]


@pytest.mark.nightly
def test_all_of_it_runs_on_the_cpu(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--device",
        "cpu",
        "--minutes",
        "30",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "cpu.json").read_text())["parts"]
    assert {name: part["ended"] for name, part in parts.items()} == dict.fromkeys(gpu.SHARES, "done")
    found = {name: [row for row in part["rows"] if "skipped" not in row] for name, part in parts.items()}
    assert {row["outcome"] for row in found["tests"]} == {"passed", "skipped"}
    kinds = {(row["what"], row["kind"]) for row in found["objective"] if "kind" in row}
    assert {("plain formula", "cloob"), ("cloob, streamed", "siglip"), ("open_clip ClipLoss", "clip")} <= kinds
    assert {row["what"] for row in found["steps"]} >= {"cloob", "cloob, clip loss"}
    assert {row["what"] for row in found["evaluation"]} == {"ranks", "pictures", "texts"}
