"""Sets to judge by: several captions a picture from every documented layout, and
labelled pictures.
"""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cloob.data.batch import BadSample
from cloob.errors import InputError
from cloob.evaluation.sets.pictures import open_captioned, open_labelled
from make import noise, picture, write_arrow, write_table, write_tar

EXPECTED = [
    ("a.png", ("red one", "red two")),
    ("b.png", ("blue",)),
    ("c.png", ("green one", "green two", "green three")),
]


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        (tmp_path / f"{name}.png").write_bytes(picture(colour))
    return tmp_path


def table(folder):
    # Rows of a picture need not be neighbours.
    rows = ["a.png,red one", "b.png,blue", "c.png,green one", "a.png,red two"]
    rows += ["c.png,green two", "c.png,green three"]
    (folder / "t.csv").write_text("\n".join(["filepath,title", *rows]) + "\n")
    return folder / "t.csv"


def json_lists(folder):
    lines = [
        {"filepath": key, "title": list(texts) if len(texts) > 1 else texts[0]}
        for key, texts in EXPECTED
    ]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return folder / "t.jsonl"


def parquet(folder):
    rows = [
        {"filepath": key, "title": text} for key, texts in EXPECTED for text in texts
    ]
    return write_table(folder / "t.parquet", rows)


@pytest.mark.parametrize("layout", [table, json_lists, parquet])
def test_every_layout_gives_the_same_pictures(layout, folder):
    place = layout(folder)
    found = open_captioned(place)
    assert found.name == place.name
    assert len(found) == len(EXPECTED)
    for i, (key, captions) in enumerate(EXPECTED):
        sample = found.read(i)
        assert Path(sample.key).name == key
        assert sample.captions == captions
        assert sample.image == (folder / key).read_bytes()


def test_captions_in_a_list_of_arrow_are_of_one_picture(folder):
    pictures = [(folder / key).read_bytes() for key, _ in EXPECTED]
    titles = [list(texts) for _, texts in EXPECTED]
    columns = {"filepath": pictures, "title": titles}
    write_arrow(folder / "t.arrow", pa.table(columns))
    found = open_captioned(folder / "t.arrow")
    samples = [found.read(i) for i in range(len(found))]
    assert [s.captions for s in samples] == [texts for _, texts in EXPECTED]
    assert [s.image for s in samples] == columns["filepath"]


def test_a_lost_picture_keeps_its_captions_and_a_lost_caption_its_place(folder):
    path = table(folder)
    path.write_text(path.read_text() + "b.png,\n")
    (folder / "a.png").unlink()
    found = open_captioned(path)
    with pytest.raises(BadSample) as caught:
        found.read(0)
    assert caught.value.captions == ("red one", "red two")
    assert caught.value.reason == "missing image"
    assert found.read(1).captions == ("blue", "")


def test_a_picture_without_a_caption_cannot_be_used(folder):
    path = folder / "t.csv"
    path.write_text("filepath,title\nb.png,\nc.png,x\nc.png,y\n")
    with pytest.raises(BadSample, match="empty caption"):
        open_captioned(path).read(0)
    lines = [{"filepath": "a.png"}, {"filepath": "b.png", "title": ["x", "y"]}]
    path = folder / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = open_captioned(path)
    assert found.read(1).captions == ("x", "y")
    with pytest.raises(BadSample, match="missing caption"):
        found.read(0)


@pytest.fixture
def wds(tmp_path):
    """Three classes; shard 0 holds labels 2, 0 and shard 1 holds 1, 2, 2."""
    folder = tmp_path / "pets"
    folder.mkdir()
    (folder / "classnames.txt").write_text("cat\ndog {big}\nbird\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}.\n{c}\n")
    for shard, labels in enumerate(((2, 0), (1, 2, 2))):
        files = {}
        for i, label in enumerate(labels):
            files[f"s{i}.cls"] = f"{label}\n".encode()
            files[f"s{i}.{('webp', 'jpg', 'png')[i]}"] = noise(10 * shard + i)
        write_tar(folder / "test" / f"{shard}.tar", files)
    (folder / "test" / "nshards.txt").write_text("2")
    return folder


def test_a_clip_benchmark_folder_and_a_truncated_shard(wds):
    labelled = open_labelled(wds)
    assert labelled.name == "pets"
    assert labelled.classnames == ("cat", "dog {big}", "bird")
    assert labelled.templates == ("a {c}.", "{c}")
    assert labelled.labels.dtype == np.int64
    assert labelled.labels.tolist() == [2, 0, 1, 2, 2]
    assert labelled.read(3) == ("1.tar/s1", noise(11))
    os.truncate(wds / "test" / "1.tar", 2000)
    with pytest.raises(InputError, match=r"1\.tar is truncated"):
        open_labelled(wds)


def test_an_image_folder_and_a_file_that_vanishes(tmp_path):
    folder = tmp_path / "zoo"
    for i, name in enumerate(("polar_bear/1.png", "polar_bear/x/2.jpg", "ant/1.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(noise(i))
    (folder / ".git").mkdir()
    labelled = open_labelled(folder)
    assert labelled.name == "zoo"
    assert labelled.classnames == ("ant", "polar bear")
    assert labelled.templates == ("{c}",)
    assert labelled.labels.tolist() == [0, 1, 1]
    (folder / "ant" / "1.png").unlink()
    with pytest.raises(BadSample, match=r"ant/1\.png") as caught:
        labelled.read(0)
    assert caught.value.reason == "missing image"
    assert labelled.read(2) == ("polar_bear/x/2.jpg", noise(1))


@pytest.mark.parametrize("has_names", [True, False])
def test_numbered_folders_are_sorted_by_number(tmp_path, has_names):
    names = [f"name of {i}" if has_names else str(i) for i in range(12)]
    for i in range(12):
        (tmp_path / "set" / "test" / f"{i}").mkdir(parents=True)
        (tmp_path / "set" / "test" / f"{i}" / "a.png").write_bytes(noise(i))
    if has_names:
        (tmp_path / "set" / "classnames.txt").write_text("\n".join(names))
    labelled = open_labelled(tmp_path / "set")
    assert labelled.classnames == tuple(names)
    for i, label in enumerate(labelled.labels.tolist()):
        assert labelled.read(i) == (f"{label}/a.png", noise(label))
