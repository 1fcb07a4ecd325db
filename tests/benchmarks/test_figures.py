"""The page of figures holds what the records give, and no figure besides; the benchmark of ranks counts rightly."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def page() -> str:
    from benchmarks.figures.page import PAGE

    return (ROOT / PAGE).read_text(encoding="utf-8")


def test_the_page_holds_what_the_records_give(page: str) -> None:
    from benchmarks.figures.page import filled

    assert filled(page) == page, "run: python -m benchmarks.figures"


def rank_rows() -> list[dict[str, Any]]:
    one = {"name": "cloob", "ranks": 1, "flops": 4e9, "cpu_s": 8.0, "wall_s": 8.0, "received_bytes": 0}
    two = {"ranks": 2, "flops": 2.5e9, "cpu_s": 4.0, "wall_s": 6.0, "received_bytes": 3_210_000, "extra_bytes": 75e6}
    return [one | {"extra_bytes": 1e8}, one | two]


def test_tables_by_hand(tmp_path: Path) -> None:
    from benchmarks.figures.page import render

    about = {"cpu": "A CPU", "cores": 2, "load_average": 0.5, "torch": "2", "pairs": 8192, "quick": False}
    records: dict[str, dict[str, Any]] = {
        "ranks": {"machine": about, "rows": rank_rows()},
        "start": {"machine": about, "rows": [{"name": "cloob --help", "cpu_seconds": 0.256, "seconds": 1234.5}]},
        "soak": {
            "machine": about,
            "growth_mb_a_thousand_steps": -0.123,
            "samples": [{"memory": 1e9 * size} for size in (0.5, 1.5, 1.6, 1.4, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5)],
            "tenths": [{"minutes": 12.1, "steps": 3400, "memory": 1.5e9, "descriptors": 31.0, "threads": 9.0}],
        },
        "data": {
            "machine": about,
            "rows": [
                {"data": "D", "workers": 1, "name": "open_clip_train", "per_second": 100.0, "per_cpu_second": 50.0},
                {"data": "D", "workers": 1, "name": "webdataset", "per_second": 150.0, "per_second_ratio": 1.5}
                | {"per_cpu_second": 40.0, "per_cpu_second_ratio": 0.8},
            ],
        },
        "evaluate": {"rows": [{"case": "c", "machine": about | {"load_average": n}} for n in (2.0, 0.5)]},
    }
    found = {}
    for name, record in records.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(record))
        found[name] = render(name, tmp_path)
    assert "): A CPU, 2 cores, torch 2, 8,192 pairs, load 0.5.\n" in found["start"]
    assert "| cloob | 2 | 2.50 (0.62) | 4.00 (0.50) | 6.00 (0.75) |" in found["ranks"]
    assert "| cloob | 2 | 75.0 (0.75) | 3.2 |" in found["ranks"]
    assert "| cloob --help | 0.256 | 1,234 |" in found["start"]
    assert "slope is -0.1 MB in a thousand steps, of samples between 1,400 and 1,600 MB" in found["soak"]
    assert "| 12 | 3,400 | 1,500 | 31 | 9 |" in found["soak"]
    assert "| 1 | webdataset | 150 (1.50) | 40.0 (0.80) |" in found["data"]
    assert "load 0.5 to 2." in found["evaluate"]


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0.00"), (0.00012, "1.2e-04"), (0.05, "0.0500"), (99.96, "100")])
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    from benchmarks.figures.numbers import number

    assert number(value) == shown


def test_received_bytes_are_those_of_the_sockets() -> None:
    from benchmarks import ranks

    before = ranks.received()
    if before is None:
        pytest.skip("this system does not count a socket's bytes")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        peer, _ = server.accept()
        with peer:
            client.sendall(b"x" * 12_345)
            assert len(peer.recv(12_345, socket.MSG_WAITALL)) == 12_345
            assert ranks.received() == before + 12_345


@pytest.mark.nightly
def test_operations_count_products_in_place() -> None:
    from benchmarks import ranks

    a, b, c = torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 4)
    assert ranks.count_flops(lambda: (a @ b, c.addmm_(a, b))) == 2 * (2 * 2 * 3 * 4)


def test_times_are_medians_of_the_mean_rank_and_sizes_of_the_worst() -> None:
    from benchmarks import ranks

    runs = [
        [{"cpu_s": cpu, "wall_s": 2 * cpu, "extra_bytes": 10}, {"cpu_s": cpu + 2, "wall_s": cpu, "extra_bytes": 30}]
        for cpu in (1.0, 5.0, 2.0)
    ]
    found = ranks.timed(runs)
    assert (found["cpu_s"], found["wall_s"], found["extra_bytes"]) == (3.0, 4.0, 30)
    assert [one["cpu_s"] for one in found["rounds"]] == [2.0, 6.0, 3.0]


def test_ranks_that_compute_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import ranks

    def pretend(job: Any) -> list[dict[str, Any]]:
        gradient = torch.arange(1.0, 17.0).view(2, 4, 2) * (1.0 if job.dim == 2 else 1.01)
        for rank, part in enumerate(gradient.chunk(job.ranks, dim=1)):
            torch.save(part.clone(), tmp_path / f"{job.name}-{job.ranks}-{rank}.pt")
        losses = {1: [1.5], 2: [1.0, 2.0 if job.pairs == 4 else 2.1]}[job.ranks]  # of the peer: a rank's own
        return [{"loss": loss, "flops": 1, "received_bytes": n} for n, loss in enumerate(losses)]

    monkeypatch.setattr(ranks, "run", pretend)
    one, two, other_loss, other_gradient = (
        ranks.Job("clip", world, pairs, dim, counted=True, folder=str(tmp_path))
        for world, pairs, dim in ((1, 4, 2), (2, 4, 2), (2, 5, 2), (2, 4, 3))
    )
    for same in (one, two):
        found = ranks.counted(same)
        assert (found["loss_apart"], found["gradient_apart"], found["received_bytes"]) == (0.0, 0.0, same.ranks - 1)
    for other in (other_loss, other_gradient):
        with pytest.raises(SystemExit, match="not what one process computes"):
            ranks.counted(other)


@pytest.mark.nightly
def test_ranks_run_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the ranks do half the work, and the peer's operations are as many."""
    from benchmarks import ranks

    for name in ("MALLOC_MMAP_THRESHOLD_", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1048576" if "MALLOC" in name else "1")
    ranks.main(["--quick", "--out", str(tmp_path)])
    rows = {(r["name"], r["ranks"]): r for r in json.loads((tmp_path / "results.json").read_text())["rows"]}
    for name in ranks.CONTENDERS:
        assert rows[name, 2]["flops"] == 2 * rows[name, 4]["flops"]
        assert rows[name, 4]["gradient_apart"] < ranks.APART and rows[name, 4]["cpu_s"] > 0
    assert rows["clip", 4]["flops"] == rows[ranks.PEER, 4]["flops"] and rows["clip", 1]["received_bytes"] in (0, None)
