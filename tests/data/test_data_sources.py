from __future__ import annotations

import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample
from cloob.data.sources import open_source
from cloob.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, image: Callable[..., bytes]) -> Path:
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(("b.png", "sub/a.JPG", "c.d.webp")):
        (tmp_path / name).write_bytes(image(i))
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    return tmp_path


def test_a_folder_is_read_with_its_sub_folders_in_order(folder: Path, image: Callable[..., bytes]) -> None:
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(b"")
    (folder / "._b.png").write_bytes(b"")
    (folder / "notes.md").write_text("no pair")
    source = open_source(folder)
    assert [source.read(i).key for i in range(len(source))] == ["b.png", "c.d.webp", "sub/a.JPG"]
    assert source.read(2).image == image(1) and source.read(1).caption == "caption of c.d.webp"
    assert source.shard_sizes == (3,) and pickle.loads(pickle.dumps(source)).read(0) == source.read(0)


def test_a_folders_bad_samples(folder: Path, image: Callable[..., bytes]) -> None:
    (folder / "alone.txt").write_text("no image")
    (folder / "bare.png").write_bytes(image())
    (folder / "huge.png").write_bytes(image())
    (folder / "huge.txt").write_bytes(b"a" * (MAX_CAPTION_BYTES + 1))
    source = open_source(folder)
    found = {}
    for i in range(len(source)):
        try:
            source.read(i)
        except BadSample as bad:
            found[bad.key] = bad.reason
    assert found == {"alone.txt": "missing image", "bare.png": "missing caption", "huge.png": "caption too long"}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("absent", r"absent: no such file or folder \(did you mean sub\?|absent: no such file or folder"),
        ("absent/deeper", "nor is there a folder"),
        ("notes.md", r"expected a folder, a table \(.csv.*\) or a tar"),
        ("empty", "empty: 0 usable pairs, at least 2 are needed"),
    ],
)
def test_what_cannot_be_opened_gets_one_line(folder: Path, spec: str, said: str) -> None:
    (folder / "notes.md").write_text("x")
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=said) as caught:
        open_source(folder / spec)
    assert "\n" not in str(caught.value) and spec in str(caught.value)


def test_a_mistyped_name_gets_the_nearest(folder: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean sub\?"):
        open_source(folder / "subb")


def test_names_that_are_not_utf8(tmp_path: Path, image: Callable[..., bytes]) -> None:
    """As old data sets have them, in folders and in tars."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(2):
        stem = os.fsdecode(b"%d-caf\xe9" % i)
        (folder / f"{stem}.png").write_bytes(image(i))
        (folder / f"{stem}.txt").write_text(f"pair {i}")
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(folder, ".")
    for place in (folder, tmp_path / "set.tar"):
        sample = open_source(place).read(1)
        assert sample.key.endswith("1-caf\ufffd" + (".png" if place == folder else "")), sample.key
        assert (sample.image, sample.caption) == (image(1), "pair 1")


def test_one_pair_is_not_enough(tmp_path: Path, image: Callable[..., bytes]) -> None:
    (tmp_path / "a.png").write_bytes(image())
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="1 usable pair, at least 2 are needed"):
        open_source(tmp_path)
    (tmp_path / "b.png").write_bytes(image())
    with pytest.raises(
        InputError, match=r"1 of 2 pairs usable, at least 2 are needed; 1 × missing caption; first: b\.png"
    ):
        open_source(tmp_path)


def test_an_unknown_demo_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no demo set 'demo:vall': did you mean demo:val"):
        open_source("demo:vall")
