"""The data benchmark runs, compares the same work, and reports what its repeats say."""

from __future__ import annotations

import gc
import io
import json
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i in range(16):
                pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "WEBP")
                for suffix, data in (("webp", file.getvalue()), ("txt", f"picture {number} {i} &amp; more".encode())):
                    member = tarfile.TarInfo(f"{number}-{i}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages' own, while they are imported
        from benchmarks import data
    yield data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the shard open that it is cut off in
        gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_both_pipelines_give_the_same_work(benchmark: ModuleType, shards: Path) -> None:
    form = benchmark.Form("tiny", tuple(sorted(shards.glob("*.tar"))), 24, 8, 2)
    batches = {}
    for name, make in benchmark.MAKERS.items():
        with make(form, form.open(), 0) as made:
            batches[name] = list(made)
        assert [len(images) for images, _ in batches[name]] == [8, 8]
        assert all(tokens.shape == (8, 77) for _, tokens in batches[name])
    theirs, plain, ours, floats = (batches[name][0][0] for name in benchmark.CONTENDERS)
    assert (theirs.dtype, ours.dtype, floats.dtype) == (torch.float32, torch.uint8, torch.float32)
    assert plain.dtype == torch.float32 and theirs.shape == plain.shape == ours.shape == floats.shape
    torch.testing.assert_close(floats, (ours.float() / 255 - benchmark.MEAN) / benchmark.STD)
    assert abs(theirs.mean() - floats.mean()) < 0.3 and abs(theirs.std() - floats.std()) < 0.3


def test_ratios_are_medians_of_the_repeats(
    benchmark: ModuleType, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([1.0, 5.0, 2.0, 4.0, 2.0, 5.0, 8.0, 2.0, 1.0, 5.0, 3.0, 1.0])

    def pretend(*_: object) -> dict[str, float]:
        rate = next(rates)
        return {"samples": 16, "per_second": rate, "per_cpu_second": 10 * rate}

    monkeypatch.setattr(benchmark, "run", pretend)
    form = benchmark.Form("tiny", tuple(sorted(shards.glob("*.tar"))), 24, 8, 2)
    theirs, plain, ours, floats = benchmark.measure(form, 1, 3)
    assert (plain["per_second"], plain["per_second_ratio"]) == (5.0, 5.0)
    assert (theirs["per_second"], ours["per_second"], floats["per_second"]) == (1.0, 3.0, 2.0)
    assert (theirs["per_second_ratio"], ours["per_second_ratio"], floats["per_cpu_second_ratio"]) == (1.0, 3.0, 1.0)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_it_runs_from_end_to_end(
    benchmark: ModuleType, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        benchmark.main(["--data", str(shards), "--quick", "--repeats", "1", "--workers", "1", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["tokens"]["identical"] is True and record["tokens"]["captions"] == 32
    assert len(record["rows"]) == 12 and all(row["per_cpu_second"] > 0 for row in record["rows"])
    assert {row["data"] for row in record["rows"]} == {
        "WebP 64×64 to 64",
        "JPEG 500×400 to 224",
        "JPEG 1024×768 to 224",
    }
    assert "identical" in capsys.readouterr().out
