"""Folders of pairs, imagefolders and the set inside the package; what ``open_source`` says of unusable sources."""

import logging
import os
import pickle
import re
import shutil
from collections import Counter

import pytest

from cloob import open_source
from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, caption_id
from cloob.data.open import DEMO
from cloob.data.source import mix
from cloob.errors import InputError
from cloob.evaluation.sets.pictures import open_captioned, open_labelled
from cloob.pictures import decode
from make import noise, outcomes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(("b.png", "sub/a.JPG", "c.d.webp")):
        (tmp_path / name).write_bytes(noise(i))
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    return tmp_path


def test_a_folder_is_read_with_its_sub_folders_in_order(folder):
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(b"")
    (folder / "._b.png").write_bytes(b"")
    (folder / "notes.md").write_text("no pair")
    source = open_source(folder)
    assert [source.read(i).key for i in range(len(source))] == ["b.png", "c.d.webp", "sub/a.JPG"]
    assert source.read(2).image == noise(1) and source.read(1).caption == "caption of c.d.webp"
    assert source.shard_sizes == (3,) and pickle.loads(pickle.dumps(source)).read(0) == source.read(0)


def test_the_names_of_files_are_captions_where_they_are_asked_for(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("red-apple_ripe.png", "sub/blue sky.jpg"):
        (tmp_path / name).write_bytes(noise())
    captions = {"red-apple_ripe.png": "red apple ripe", "sub/blue sky.jpg": "blue sky"}
    assert outcomes(open_source(tmp_path, caption_column="file_name")) == captions
    with pytest.raises(InputError, match="missing caption"):
        open_source(tmp_path)


def test_a_folders_bad_samples(folder):
    for name, caption in (("alone", b"no image"), ("huge", b"a" * (MAX_CAPTION_BYTES + 1)), ("raw", b"a caption")):
        (folder / f"{name}.txt").write_bytes(caption)
    for name in ("bare.png", "huge.png", "raw.CR2"):
        (folder / name).write_bytes(noise())
    bad = {key: said for key, said in outcomes(open_source(folder)).items() if not said.startswith("caption of")}
    assert bad == {
        "alone.txt": "missing image",
        "bare.png": "missing caption",
        "huge.png": "caption too long",
        "raw.txt": "missing image",
    }


def test_linked_folders_are_not_followed_and_said(folder, tmp_path_factory, caplog):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(folder, elsewhere / "pairs")
    (folder / "near").symlink_to(elsewhere / "pairs", target_is_directory=True)
    (folder / "sub" / "round").symlink_to(folder, target_is_directory=True)
    (folder / ".hidden").symlink_to(elsewhere)
    with caplog.at_level(logging.WARNING):
        assert len(open_source(folder)) == 3
    assert f"{folder}: 3 rows; 2 linked folders not followed, e.g. {folder}/near" in caplog.text
    assert len(open_source(folder / "near")) == 3  # itself a link: it was named


IMAGEFOLDERS = {
    "metadata.csv": 'file_name,label,text\nsub/0.png,1,"zero, and"\n1.png,2,one\n',
    "metadata.jsonl": '{"file_name": "sub/0.png", "x": "zero, and"}\n{"file_name": "1.png", "x": "one"}\n',
}


@pytest.mark.parametrize("name", IMAGEFOLDERS)
def test_an_imagefolder_is_read_by_its_table(tmp_path, name):
    for split in ("train", "val"):
        (tmp_path / split / "sub").mkdir(parents=True)
        for i, path in enumerate(("sub/0.png", "1.png")):
            (tmp_path / split / path).write_bytes(noise(i))
        (tmp_path / split / name).write_text(IMAGEFOLDERS[name])
    source = open_source(tmp_path / "train")
    assert outcomes(source) == {"sub/0.png": "zero, and", "1.png": "one"} and source.read(1).image == noise(1)
    assert open_captioned(tmp_path / "train").read(0).captions == ("zero, and",)


def test_probes_are_spread_over_the_whole_source(tmp_path):
    """A table whose first rows are bad is opened; one of bad rows, or of pictures that do not decode, is refused."""
    (tmp_path / "good.png").write_bytes(noise())
    (tmp_path / "cut.png").write_bytes(noise()[:40])
    path = tmp_path / "t.csv"
    for bad, good, said in (
        ("gone.png", 50, ""),
        ("gone.png", 0, "0 of 1,000 pairs looked at, spread over all 5,000, usable, .* 1,000 × missing image"),
        ("cut.png", 0, "0 of 1,000 pairs looked at, .* 1,000 × corrupt image"),
    ):
        rows = [bad] * (5000 - good) + ["good.png"] * good
        path.write_text("filepath,title\n" + "".join(f"{name},a caption\n" for name in rows))
        if not said:
            assert len(open_source(path)) == 5000
            continue
        with pytest.raises(InputError, match=said):
            open_source(path)


def test_sources_are_read_one_after_the_other(shards):
    two = open_source(shards), open_source(shards / "00002.tar")  # of 5 + 4 + 3 and of 3 pairs
    both = mix(two)
    assert len(both) == 15 and both.shard_sizes == (5, 4, 3, 3) and not both.streamed
    expected = [two[0].read(i) for i in range(12)] + [two[1].read(i) for i in range(3)]
    assert [both.read(i) for i in range(15)] == expected
    assert both.name == f"{two[0].name} + {two[1].name}"
    assert pickle.loads(pickle.dumps(both)).read(14) == expected[14]
    assert mix(two[:1]) is two[0]


@pytest.fixture(scope="module")
def demo():
    """All pairs of the set inside the package."""
    sources = {spec: open_source(spec) for spec in ("demo", "demo:val")}
    assert len(sources["demo"].shard_sizes) > 1
    return {spec: [source.read(i) for i in range(len(source))] for spec, source in sources.items()}


def test_every_pair_is_good_and_held_out_captions_are_not_trained_on(demo):
    train, val = demo.values()
    assert 5_500 <= len(train) <= 6_500 and len(val) == 500 and len(open_labelled("demo:noto-emoji")) == 1540
    assert sum(path.stat().st_size for path in DEMO.rglob("*")) <= 10_000_000
    for samples in (train, val):
        assert len({sample.key for sample in samples}) == len(samples)
        for sample in samples[::10]:
            assert decode(sample.image).size == (64, 64) and sample.image[8:12] == b"WEBP"
    held_out = {caption_id(sample.caption) for sample in val}
    assert len(held_out) == 500 and not held_out & {caption_id(sample.caption) for sample in train}


def test_the_notice_counts_what_is_there(demo):
    text = (DEMO / "NOTICE").read_text(encoding="utf-8")
    table = {
        m[1]: (m[2], int(m[3]), int(m[4]))
        for m in re.finditer(r"^(\S+) +(public domain|MIT|Apache-2\.0|\S+) +(\d+) +(\d+)  \S", text, re.MULTILINE)
    }
    for samples, column in zip(demo.values(), (1, 2), strict=True):
        found = Counter(sample.key.rpartition("/")[2].rpartition("-")[0] for sample in samples)
        assert found == Counter({name: row[column] for name, row in table.items()})
    assert {row[0] for row in table.values()} == {"public domain", "MIT", "Apache-2.0"}
    pairs = len(demo["demo"])
    shared = sum(n for n in Counter(caption_id(sample.caption) for sample in demo["demo"]).values() if n > 1)
    assert f"{shared:,} of the {pairs:,} training pairs ({shared / pairs:.1%})" in text
    assert "Apache License" in (DEMO / "LICENSE-Apache-2.0").read_text()


def test_a_file_that_may_not_be_read_is_not_missing(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(noise(0))
        (tmp_path / f"{name}.txt").write_text(name)
    source = open_source(tmp_path)
    (tmp_path / "a.png").chmod(0)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # root may read everything
        with pytest.raises(BadSample, match=r"a\.png: no permission to read \(.*Permission denied"):
            source.read(0)
    finally:
        os.seteuid(user)
