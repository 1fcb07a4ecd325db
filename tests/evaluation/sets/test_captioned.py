"""Several captions a picture from every documented layout, and recalls against ranks by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cloob.data.batch import BadSample
from cloob.evaluation.sets.captioned import open_captioned
from make import picture, write_table, write_tar

EXPECTED = [
    ("a.png", ("red one", "red two")),
    ("b.png", ("blue",)),
    ("c.png", ("green one", "green two", "green three")),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        (tmp_path / f"{name}.png").write_bytes(picture(colour))
    return tmp_path


def table(folder: Path) -> Path:
    # Rows of a picture need not be neighbours.
    rows = ["a.png,red one", "b.png,blue", "c.png,green one", "a.png,red two", "c.png,green two", "c.png,green three"]
    (folder / "t.csv").write_text("\n".join(["filepath,title", *rows]) + "\n")
    return folder / "t.csv"


def json_lists(folder: Path) -> Path:
    lines = [{"filepath": key, "title": list(texts) if len(texts) > 1 else texts[0]} for key, texts in EXPECTED]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return folder / "t.jsonl"


def parquet(folder: Path) -> Path:
    rows = [{"filepath": key, "title": text} for key, texts in EXPECTED for text in texts]
    return write_table(folder / "t.parquet", rows)


def clip_benchmark(folder: Path) -> Path:
    home = folder / "wds" / "three"
    (home / "test").mkdir(parents=True)
    (home / "dataset_type.txt").write_text("retrieval\n")
    (home / "test" / "nshards.txt").write_text("1\n")
    files = {key: (folder / key).read_bytes() for key, _ in EXPECTED}
    files |= {f"{key.removesuffix('.png')}.txt": "\n".join(texts).encode() for key, texts in EXPECTED}
    write_tar(home / "test" / "0.tar", files)
    return home


LAYOUTS = [table, json_lists, parquet, clip_benchmark]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pictures(layout: Callable[[Path], Path], folder: Path) -> None:
    place = layout(folder)
    found = open_captioned(place)
    samples = [found.read(i) for i in range(len(found))]
    assert [(Path(s.key).name.replace("0.tar/", ""), s.captions) for s in samples] == [
        (key if layout is not clip_benchmark else key.removesuffix(".png"), texts) for key, texts in EXPECTED
    ]
    assert [s.image for s in samples] == [(folder / key).read_bytes() for key, _ in EXPECTED]
    assert found.name == place.name


def test_a_lost_picture_keeps_its_captions_and_a_lost_caption_its_place(folder: Path) -> None:
    path = table(folder)
    path.write_text(path.read_text() + "b.png,\n,x\n".replace(",x\n", ""))
    (folder / "a.png").unlink()
    found = open_captioned(path)
    with pytest.raises(BadSample) as caught:
        found.read(0)
    assert caught.value.captions == ("red one", "red two") and caught.value.reason == "missing image"
    assert found.read(1).captions == ("blue", "")
    path.write_text("filepath,title\nb.png,\nc.png,x\nc.png,y\n")
    with pytest.raises(BadSample, match="empty caption"):
        open_captioned(path).read(0)
    (folder / "t.jsonl").write_text('{"filepath": "a.png"}\n{"filepath": "b.png", "title": ["x", "y"]}\n')
    found = open_captioned(folder / "t.jsonl")
    assert found.read(1).captions == ("x", "y")
    with pytest.raises(BadSample, match="missing caption"):
        found.read(0)
