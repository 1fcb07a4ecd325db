"""Mutated copies of good files: refused in one line, or loaded as the numbers that the file holds; never a crash.

Zip archives carry checksums: what loads of them is the original's numbers. Pickles and safetensors carry none: a copy
whose numbers were changed loads with just these numbers changed.
"""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cloob import load_model
from cloob.errors import InputError

BASE = "hostile/base"
FILES = [
    "mljku_micro.pt",
    "crowsonkb_micro.pkl",
    "open_clip_model.safetensors",
    "openai/vit/vit-jit.pt",
    "openai/vit/vit-state-dict.pt",
    "crowsonkb/tiny/slim_numpy2_protocol5.pkl",
    "crowsonkb/tiny/slim_jax_array.pkl",
    "rinna/bert/pytorch_model.bin",
    "hf_clip/vit_gelu/model.safetensors",
]
CHECKSUMMED = (".pt", ".bin")


def mutate(content: bytes, source: random.Random) -> bytes:
    """One to three changes: a byte, a run of bytes, a cut, a removed or doubled piece."""
    changed = bytearray(content)
    alone = source.random() < 0.3  # two changes of length could cancel each other, and shift good numbers
    for _ in range(1 if alone else source.randint(1, 3)):
        kind, at = source.choice((3, 4) if alone else (0, 1, 2, 5)), source.randrange(len(changed))
        if kind == 0:
            changed[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            changed[at] = source.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            changed[at : at + 8] = source.randbytes(len(changed[at : at + 8]))
        elif kind == 3:
            del changed[at : at + source.randint(1, 64)]
        elif kind == 4:
            changed[at:at] = changed[at : at + source.randint(1, 64)]
        else:
            near = min(at, 4096) if source.random() < 0.5 else max(at, len(changed) - 4096)
            changed[near : near + 4] = source.randbytes(len(changed[near : near + 4]))
    return bytes(changed)


def prepare(shared: Path, name: str, home: Path) -> tuple[Path, Path]:
    """The file that is to be mutated in a folder with all that it needs, and what ``load_model`` is given."""
    source = shared / (name if "/" in name else f"{BASE}/{name}")
    home.mkdir()
    for beside in source.parent.glob("*.json"):
        if "/" in name or source.stem in beside.stem or beside.stem in ("micro", "open_clip_config"):
            shutil.copy(beside, home)
    if source.name == "open_clip_model.safetensors":
        (home / "crowsonkb_micro.json").unlink(missing_ok=True)
    else:
        (home / "open_clip_config.json").unlink(missing_ok=True)
    target = Path(shutil.copy(source, home))
    return target, home if target.suffix in (".safetensors", ".bin") else target


def numbers(given: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_model(given).state_dict()


def changed_bytes(before: Tensor, after: Tensor) -> int:
    return int((before.reshape(-1).view(torch.uint8) != after.reshape(-1).view(torch.uint8)).sum())


def fuzz(shared: Path, name: str, home: Path, copies: int) -> tuple[int, int]:
    """Loads so many mutated copies; returns how many were refused, and how many loaded."""
    target, given = prepare(shared, name, home)
    good, content = numbers(given), target.read_bytes()
    lines: list[str] = []
    loaded = 0
    for seed in range(copies):
        target.write_bytes(mutate(content, random.Random(f"{name} {seed}")))
        try:
            found = numbers(given)
        except InputError as error:
            lines.append(str(error))
            continue
        loaded += 1
        assert {key: value.shape for key, value in found.items()} == {key: v.shape for key, v in good.items()}, seed
        different = sum(not torch.equal(found[key], good[key]) for key in good)
        # Three changes, each of them perhaps on the border of two tensors.
        assert different <= (0 if target.suffix in CHECKSUMMED else 6), seed
        if different:
            assert sum(changed_bytes(good[key], found[key]) for key in good) <= 24, seed
    assert not [line for line in lines if "\n" in line]
    return len(lines), loaded


@pytest.mark.parametrize("name", FILES)
def test_a_few_mutated_copies(shared_weights: Path, tmp_path: Path, name: str) -> None:
    refused, _ = fuzz(shared_weights, name, tmp_path / "f", 40)
    assert refused > 0


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", FILES)
def test_two_thousand_mutated_copies(shared_weights: Path, tmp_path: Path, name: str) -> None:
    refused, loaded = fuzz(shared_weights, name, tmp_path / "f", 2000)
    assert refused > 200 and refused + loaded == 2000
