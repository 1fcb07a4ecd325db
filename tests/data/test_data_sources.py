from __future__ import annotations

import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cloob import cli
from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, RawSample
from cloob.data.open import _check_usable, open_source
from cloob.data.source import Source
from cloob.errors import InputError
from cloob.evaluation.sets.captioned import open_captioned


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


def test_a_sub_folder_that_cannot_be_listed_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def failing(path: str):  # type: ignore[no-untyped-def]
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(InputError) as caught:
        open_source(folder)
    said = "cannot be listed (Permission denied); make it readable, or move it elsewhere"
    assert str(caught.value) == f"{folder / 'sub'}: {said}"


def test_linked_folders_are_not_followed_and_said(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(folder, elsewhere / "pairs")
    (folder / "near").symlink_to(elsewhere / "pairs", target_is_directory=True)
    (folder / "sub" / "round").symlink_to(folder, target_is_directory=True)
    (folder / ".hidden").symlink_to(elsewhere)
    with caplog.at_level(logging.WARNING):
        assert len(open_source(folder)) == 3
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{folder}: 3 rows, 3 pairs; 2 linked folders not followed, e.g. {folder}/near: "
        "give each to --data by itself to read it too"
    )
    assert len(open_source(folder / "near")) == 3  # itself a link: it was named


def outcomes(source: Source) -> dict[str, str]:
    found = {}
    for i in range(len(source)):
        try:
            sample = source.read(i)
            found[sample.key] = sample.caption
        except BadSample as bad:
            found[bad.key] = f"{bad.reason}: {bad.detail}"
    return found


def test_endings_in_capitals_and_of_phones(tmp_path: Path, image: Callable[..., bytes]) -> None:
    for picture, caption in (("a.HEIC", "a.txt"), ("K.jpg", "K.TXT"), ("l.AVIF", "l.Caption"), ("m.png", "m.txt")):
        (tmp_path / picture).write_bytes(image())
        (tmp_path / caption).write_text(f"caption of {picture}")
    (tmp_path / "m.caption").write_text("not this one")
    source = open_source(tmp_path)
    names = ["K.jpg", "a.HEIC", "l.AVIF", "m.png"]
    assert outcomes(source) == {name: f"caption of {name}" for name in names} and source.pairs == 4
    assert outcomes(pickle.loads(pickle.dumps(source))) == outcomes(source)


def test_what_is_there_in_place_of_an_image_is_named(folder: Path) -> None:
    (folder / "raw.TXT").write_text("a caption")
    (folder / "raw.CR2").write_bytes(b"x")
    said = outcomes(open_source(folder))["raw.TXT"]
    assert said == f"missing image: no image beside {folder}/raw.TXT but raw.CR2, which is of no kind that is read here"


def test_pairs_of_a_tar_with_endings_in_capitals(
    tmp_path: Path, image: Callable[..., bytes], write_tar: Callable[..., Path]
) -> None:
    files = {f"{name}": image() for name in ("a.HEIC", "b.JPG", "c.avif")}
    write_tar(tmp_path / "t.tar", files | {"a.TXT": b"a", "b.txt": b"b", "c.Txt": b"c"})
    assert outcomes(open_source(tmp_path / "t.tar")) == {f"t.tar/{key}": key for key in "abc"}


IMAGEFOLDERS = {
    "text": ("metadata.csv", 'file_name,label,text\nsub/0.png,1,"zero, and"\n1.png,2,one\n'),
    "caption": ("metadata.csv", 'file_name,caption,n\nsub/0.png,"zero, and",1\n1.png,one,2\n'),
    "the only other": (
        "metadata.jsonl",
        '{"file_name": "sub/0.png", "x": "zero, and"}\n{"file_name": "1.png", "x": "one"}\n',
    ),
}


@pytest.mark.parametrize("kind", IMAGEFOLDERS)
def test_an_imagefolder_is_read_by_its_table(tmp_path: Path, image: Callable[..., bytes], kind: str) -> None:
    name, content = IMAGEFOLDERS[kind]
    for split in ("train", "val"):
        (tmp_path / split / "sub").mkdir(parents=True)
        for i, path in enumerate(("sub/0.png", "1.png")):
            (tmp_path / split / path).write_bytes(image(i))
        (tmp_path / split / name).write_text(content)
    source = open_source(tmp_path / "train")
    assert outcomes(source) == {"sub/0.png": "zero, and", "1.png": "one"} and source.read(1).image == image(1)
    assert open_captioned(tmp_path / "train").read(0).captions == ("zero, and",)
    with pytest.raises(InputError) as caught:
        open_source(tmp_path)
    assert str(caught.value).endswith(f"tables of captions: train, val; name one: {tmp_path / 'train'}")


def test_an_imagefolder_of_labels_has_no_captions(folder: Path) -> None:
    for path in folder.rglob("*.txt"):
        path.unlink()
    (folder / "metadata.csv").write_text("file_name,label,split\nb.png,1,train\nc.d.webp,2,train\n")
    with pytest.raises(
        InputError, match=r"metadata\.csv has no column 'title'; its columns: file_name, label, split.*-c"
    ):
        open_source(folder)
    assert outcomes(open_source(folder, caption_column="label"))["b.png"] == "1"


def test_one_pair_is_not_enough(tmp_path: Path, image: Callable[..., bytes], caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(image())
    (tmp_path / "a.txt").write_text("a")
    with caplog.at_level(logging.INFO), pytest.raises(InputError, match="1 usable pair, at least 2 are needed"):
        open_source(tmp_path)
    assert caplog.messages == [f"{tmp_path}: 1 row, 1 pair"]
    (tmp_path / "b.png").write_bytes(image())
    with pytest.raises(
        InputError, match=r"1 of 2 pairs usable, at least 2 are needed; 1 × missing caption; first: b\.png"
    ):
        open_source(tmp_path)


class Numbered:
    """Pairs by number, of which a few can be read; remembers what was asked for."""

    name = "numbered"

    def __init__(self, sizes: tuple[int, ...], good: set[int], picture: bytes, streamed: bool = False) -> None:
        self.shard_sizes, self.streamed = sizes, streamed
        self.good, self.picture = good, picture
        self.asked: list[int] = []

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def read(self, index: int) -> RawSample:
        self.asked.append(index)
        if index not in self.good:
            raise BadSample("missing image", f"pair {index}")
        return RawSample(f"pair {index}", self.picture, "a caption")


def test_probes_are_spread_over_the_whole_source(image: Callable[..., bytes]) -> None:
    source = Numbered((1_000_000,), set(range(990_000, 1_000_000)), image())
    _check_usable(source)  # its first 990,000 rows are bad
    assert len(source.asked) < 1000
    nothing = Numbered((1_000_000,), set(), image())
    with pytest.raises(
        InputError, match=r"0 of 1,000 pairs looked at, spread over all 1,000,000, usable.*1,000 × miss"
    ):
        _check_usable(nothing)
    assert (nothing.asked[0], nothing.asked[-1]) == (0, 999_999) and max(np.diff(nothing.asked)) == 1001


def test_of_a_streamed_source_few_files_are_fetched(image: Callable[..., bytes]) -> None:
    good = Numbered((5000,) * 40, set(range(200_000)), image(), streamed=True)
    _check_usable(good)
    assert max(good.asked) < 5000  # the first file alone
    nothing = Numbered((5000,) * 40, set(), image(), streamed=True)
    with pytest.raises(InputError, match="0 of 1,000 pairs looked at"):
        _check_usable(nothing)
    assert sorted({index // 5000 for index in nothing.asked}) == [0, 13, 26, 39]


def test_a_pair_whose_picture_does_not_decode_is_no_usable_one(image: Callable[..., bytes]) -> None:
    with pytest.raises(InputError, match=r"0 of 50 pairs usable, at least 2 are needed; 50 × corrupt image"):
        _check_usable(Numbered((50,), set(range(50)), image()[:40]))


def test_1500_rows_without_one_picture_do_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"img/{i}.png,caption {i}\n" for i in range(1500))
    (tmp_path / "t.csv").write_text(f"filepath,title\n{rows}")
    words = "--data t.csv --model tiny-vit --device cpu --workers 0 --out run"
    assert cli.main(["train", *words.split()]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("cloob: t.csv: 0 of 1,000 pairs looked at, spread over all 1,500, usable")
    assert "missing image" in told and not (tmp_path / "run").exists()
