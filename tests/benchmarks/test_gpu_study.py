"""The study for a GPU, small and on the CPU: its pack, its augmentation, two epochs, and going on where it was."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu_study import augment, data, pack
from benchmarks.gpu_study import runs as study
from benchmarks.gpu_study.__main__ import main, table

from cloob.errors import InputError

CPU = torch.device("cpu")


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    return file.getvalue()


@pytest.fixture(scope="module")
def pictograms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of the pictograms: 24 pairs, 6 held out, one test set of six pictures in two classes."""
    folder = tmp_path_factory.mktemp("pictograms")
    for name, first, count in (("train", 0, 24), ("val", 100, 6)):
        part = folder / "pictograms" / name
        part.mkdir(parents=True)
        for n in range(first, first + count):
            (part / f"{n:03d}.webp").write_bytes(picture(n))
            (part / f"{n:03d}.txt").write_text(f"thing number {n}")
    for name in pack.TESTS:
        for n in range(6):
            place = folder / "zeroshot" / name / "test" / ("a cat", "a dog")[n % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{n}.webp").write_bytes(picture(200 + n))
    return folder


def test_a_pack_holds_the_pictures_as_they_are(
    pictograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = pack.build(pictograms, tmp_path / "pack.zip")
    assert counts == {"train": 24, "val": 6} | dict.fromkeys(pack.TESTS, 6)
    sets = pack.read(tmp_path / "pack.zip")
    captions = sets["train"].facts["captions"]
    for file, caption in zip(sets["train"].files, captions, strict=True):
        assert file == picture(int(caption.rpartition(" ")[2]))
    found = data.test_sets(sets, CPU)["digits"]
    assert found.classnames == ["a cat", "a dog"] and found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    one, other = (sum(len(file) for file in sets[name].files) for name in pack.PAIRS)
    monkeypatch.setattr(pack, "MOST_BYTES", one + other + 2**19)
    assert pack.build(pictograms, tmp_path / "smaller.zip") == {"train": 24, "val": 6}  # no room for a test set
    monkeypatch.setattr(pack, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match=r"MiB, where 0 are allowed"):
        pack.build(pictograms, tmp_path / "large.zip")
    (tmp_path / "none.zip").write_text("no archive")
    with pytest.raises(InputError, match=r"none\.zip: no pack of pictures"):
        pack.read(tmp_path / "none.zip")


def test_pictures_of_another_size_are_refused() -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 64)).save(file, "PNG")
    with pytest.raises(ValueError, match="32 × 64 pixels, where 64 × 64"):
        data.decoded([file.getvalue()], CPU)


def test_a_crop_is_a_part_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a ramp a crop is read off: from which place to which, and whether mirrored."""
    ramp = torch.arange(64.0).expand(500, 3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    rows = augment.cropped(ramp, generator, mirror=True)[:, 0, 32]
    ends = rows[:, [0, -1]].sort(1).values
    widths = (ends[:, 1] - ends[:, 0] + 1) / 64
    # The width of a part is √(area · aspect): at least √(0.9 · 3/4).
    assert widths.min() > 0.8 and widths.max() <= 1.01 and widths.std() > 0.01
    assert ends.min() >= 0 and ends.max() <= 63
    mirrored = rows[:, 0] > rows[:, -1]
    assert 0.4 < mirrored.float().mean() < 0.6
    assert not (augment.cropped(ramp, generator, mirror=False)[:, 0, 32].diff(dim=1) < 0).any()
    monkeypatch.setattr(augment, "CROP", (1.0, 1.0))
    monkeypatch.setattr(augment, "ASPECT", (1.0, 1.0))
    torch.testing.assert_close(augment.cropped(ramp, generator, mirror=False), ramp)


def test_colours_are_those_of_the_formula() -> None:
    pixels = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 255
    found = augment.recoloured(pixels, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    factors = [0.8 + 0.4 * torch.rand(4, generator=generator) for _ in range(3)]
    for n in range(4):
        bright = pixels[n] * factors[0][n]
        weights = (0.299, 0.587, 0.114)
        grey = sum(w * channel for w, channel in zip(weights, bright, strict=True)).mean()
        contrasted = [grey + factors[1][n] * (channel - grey) for channel in bright]
        grey = sum(w * channel for w, channel in zip(weights, contrasted, strict=True))
        for channel, there in zip(contrasted, found[n], strict=True):
            torch.testing.assert_close(there, grey + factors[2][n] * (channel - grey), rtol=1e-4, atol=1e-3)


def test_augmented_pictures_are_pictures_and_the_seed_says_which() -> None:
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, same, other = (augment.augment(images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert one.dtype == torch.uint8 and one.shape == images.shape
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_two_epochs_and_on_where_it_was(pictograms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pack.zip"
    assert main(["build", "--data", str(pictograms), "--pack", str(file)]) == 0
    words = ["run", "--pack", str(file), "--device", "cpu", "--precision", "fp32", "--batch", "8", "--epochs", "2"]
    words += ["--towers", "tiny-vit", "--methods", "cloob"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    told = capsys.readouterr().out
    assert "24 pairs and 7 test sets on CPU" in told and "left out for want of room: nothing" in told

    class Clock:
        """Time for one epoch alone."""

        now = 0.0

        def monotonic(self) -> float:
            self.now += 10.0
            return self.now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "time", Clock())
        sets = pack.read(file)
        tokenizer = study.create_model("tiny-vit", seed=0).tokenizer
        train, val = (data.pairs(sets[name], tokenizer, CPU) for name in pack.PAIRS)
        plan = study.Plan("tiny-vit", "cloob", epochs=2, batch=8, precision="fp32")
        state = tmp_path / "parts" / "state" / f"{plan.name}.pt"
        assert not study.Run(plan, train, state).go(val, until=25.0)
    assert study.Run(plan, train, state).done == 1
    assert main([*words, "--out", str(tmp_path / "parts")]) == 0
    assert not state.exists()
    one, other = (json.loads((tmp_path / name / "tiny-vit-cloob-0.json").read_text()) for name in ("whole", "parts"))
    for key in ("losses", "val", "zeroshot", "pairs_seen", "judged"):
        assert one[key] == other[key], key
    assert one["pairs_seen"] == 48 and len(one["losses"]) == 2 and one["machine"] == "CPU"
    assert "tiny-vit-cloob-0 (CPU, 0.0 M pairs" in table(tmp_path / "whole")
    before = (tmp_path / "whole" / "tiny-vit-cloob-0.json").stat().st_mtime_ns
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0  # what has a record is not run again
    assert (tmp_path / "whole" / "tiny-vit-cloob-0.json").stat().st_mtime_ns == before


def test_the_towers_of_the_study() -> None:
    study.open_clip().add_model_config(study.CONFIGS)
    encoder: Any = study.create_model("vit-s", seed=0)
    assert encoder.image_size == 64 and encoder.context_length == 24
    millions = sum(p.numel() for p in encoder.model.visual.parameters()) / 1e6
    assert 20 < millions < 23  # a ViT-S
