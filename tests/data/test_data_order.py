"""Folders of pairs, imagefolders, the set inside the package; an epoch's order, and
what is held out.

The order has each pair once, shard by shard, and is the same for whoever asks for which
stretch.
"""

import io
import logging
import os
import pickle
import re
import shutil
import tracemalloc
from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cloob import open_source
from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, caption_id
from cloob.data.open import DEMO
from cloob.data.order import EpochOrder, ShardSizes
from cloob.data.source import choose_held_out, mix
from cloob.data.source import split as part
from cloob.errors import InputError
from cloob.evaluation.sets.pictures import open_labelled
from cloob.pictures import decode
from make import Listed, noise, outcomes
from support import raises

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def rows_of(order, epoch, lanes=1):
    return order.epoch(epoch, lanes)(np.arange(len(order)))


def test_a_local_order_is_numpys_permutation():
    expected = np.random.Generator(np.random.PCG64([5, 2])).permutation(42)
    for lanes in (1, 4):
        assert np.array_equal(
            rows_of(EpochOrder([ShardSizes((30, 12))], seed=5), 2, lanes), expected
        )
    straight = EpochOrder(
        [ShardSizes((5,), True), ShardSizes((3,))], seed=5, shuffle=False, buffer=9
    )
    assert np.array_equal(rows_of(straight, 1), np.arange(8))


@settings(max_examples=60)
@given(
    SHARDS, st.integers(1, 7), st.integers(0, 300), st.integers(0, 5), st.integers(0, 9)
)
def test_each_pair_exactly_once_in_any_lanes_and_any_stretch(
    sizes, lanes, buffer, epoch, seed
):
    def order():
        return EpochOrder([ShardSizes(tuple(sizes), True)], seed=seed, buffer=buffer)

    rows = rows_of(order(), epoch, lanes)
    assert len(order()) == len(rows) == sum(sizes)
    assert rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), np.arange(sum(sizes)))
    again = order().epoch(epoch, lanes)
    starts = range(len(rows) // 5 * 5, -1, -5)  # from the end to the start
    stretches = [again(np.arange(at, min(at + 5, len(rows)))) for at in starts][::-1]
    assert np.array_equal(np.concatenate(stretches), rows)


@settings(max_examples=80)
@given(SHARDS, st.integers(1, 7), st.integers(1, 60), st.integers(0, 5))
def test_a_lane_reads_shard_after_shard_and_moves_pairs_within_the_buffer(
    sizes, lanes, buffer, epoch
):
    parts = [ShardSizes(tuple(sizes), True)]
    shuffled = rows_of(EpochOrder(parts, seed=3, buffer=buffer), epoch, lanes)
    straight = rows_of(
        EpochOrder(parts, seed=3, buffer=1), epoch, lanes
    )  # blocks of one pair: nothing moves
    seen = []
    for lane in range(lanes):
        plain = straight[lane::lanes]
        place = {row: i for i, row in enumerate(plain.tolist())}
        assert all(
            abs(place[row] - i) < buffer
            for i, row in enumerate(shuffled[lane::lanes].tolist())
        )
        shards = np.searchsorted(np.cumsum(sizes), plain, side="right").tolist()
        seen += [s for i, s in enumerate(shards) if i == 0 or s != shards[i - 1]]
    # A shard in two lanes is the last of one and the first of the next.
    assert all(
        seen[seen.index(s) : seen.index(s) + seen.count(s)] == [s] * seen.count(s)
        for s in set(seen)
    )


def test_each_stretch_holds_every_source_in_its_proportion():
    parts = [
        ShardSizes((1000,) * 10, True),
        ShardSizes((5_000,), False),
        ShardSizes((300,) * 7, True),
    ]
    rows = rows_of(EpochOrder(parts, seed=0, buffer=2000), 0, lanes=2)
    of_first = [(rows[i : i + 500] < 10_000).mean() for i in range(0, 17_000, 500)]
    # 10,000 of 17,100 over the whole epoch
    assert min(of_first) > 0.5
    assert max(of_first) < 0.67
    local = rows[(rows >= 10_000) & (rows < 15_000)]
    assert np.abs(np.diff(local)).mean() > 1000  # all over the table


def test_400_million_streamed_pairs_cost_no_memory():
    """The start of an epoch, a batch in its middle and its end, for one rank of
    eight.
    """
    parts = [ShardSizes((10_000,) * 40_000, True)]
    tracemalloc.start()
    try:
        order = EpochOrder(parts, seed=0, buffer=10_000)
        rows_at = order.epoch(3, lanes=8)
        rows = np.concatenate(
            [
                rows_at(np.arange(at, at + 32_768, 8))
                for at in (0, 200_000_000, 399_967_232)
            ]
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6
    assert len(order) == 400_000_000
    assert len(set(rows.tolist())) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < 400_000_000


# --val-split: what is held out shares no picture and no caption with what is trained on


@cache
def as_png(row):
    """A picture of one row of grey pixels; none of no pixels."""
    file = io.BytesIO(b"no picture")
    if row:
        Image.frombytes("L", (len(row), 1), row).save(file, "PNG")
    return file.getvalue()


def split(source, share):
    return part(source, choose_held_out(source, share))


def contents(source):
    found = []
    for index in range(len(source)):
        try:
            sample = source.read(index)
            found.append((sample.image, sample.caption))
        except BadSample:
            found.append(None)
    return found


pairs = st.tuples(
    st.binary(max_size=1).map(as_png),
    st.sampled_from([*"abcdefghij", "A", " a", "b  b", "B b"]),
)
sets = st.lists(st.none() | pairs, min_size=1, max_size=60)


@given(st.lists(sets, min_size=1, max_size=3), st.floats(0.01, 0.6), st.randoms())
def test_no_picture_or_caption_is_on_both_sides(lists, share, random):
    source = mix([Listed(pairs) for pairs in lists])
    everything = [pair for pairs in lists for pair in pairs]
    readable = [pair for pair in everything if pair is not None]
    try:
        train, held = (contents(part) for part in split(source, share))
    except InputError:
        return
    assert Counter(train) + Counter(held) == Counter(everything)
    assert None not in held
    held_pairs = [p for p in held if p]
    train_pairs = [p for p in train if p]
    assert as_png(b"") not in {image for image, _ in held_pairs}
    assert not {image for image, _ in held_pairs} & {image for image, _ in train_pairs}
    assert not {caption_id(text) for _, text in held_pairs} & {
        caption_id(text) for _, text in train_pairs
    }
    assert 2 <= len(held) <= max(2, round(share * len(readable)))
    # The bytes alone decide: not the order of the rows, nor which source has them.
    shuffled = list(everything)
    random.shuffle(shuffled)
    again = split(Listed(shuffled), share)
    assert Counter(contents(again[1])) == Counter(held)


@given(st.integers(10, 300), st.sampled_from([0.05, 0.1, 0.3]))
def test_of_different_pairs_exactly_the_share_is_held_out(n, share):
    source = Listed([(as_png(n.to_bytes(2, "big")), f"caption {n}") for n in range(n)])
    train, held = split(source, share)
    assert len(held) == max(2, round(share * n))
    assert len(train) == n - len(held)
    assert sum(train.shard_sizes) == len(train)
    assert sum(held.shard_sizes) == len(held)
    assert pickle.loads(pickle.dumps(train)).read(0) == train.read(0)
    assert train.fingerprint() != held.fingerprint()


def test_what_cannot_be_split_is_refused_in_one_line():
    same = Listed([(as_png(bytes([n])), "a photo") for n in range(20)])
    raises(
        InputError,
        r"val_split is 0.1: of 20 usable pairs 0 can be held out .*--val-data",
        split,
        same,
        0.1,
    )


def test_the_parts_of_a_split_are_those_of_its_sources():
    """So that an epoch spreads every source, and reads it file by file."""
    pictures = [(as_png(bytes([n])), f"c{n}") for n in range(9)]
    sources = [Listed(pictures[:4]), Listed(pictures[4:5]), Listed(pictures[5:])]
    sources[2].streamed = True
    train, held = part(mix(sources), np.array([0, 4, 5, 6]))
    expected = (ShardSizes((1, 2)), ShardSizes(()), ShardSizes((2,), True))
    assert train.parts == expected
    wanted = (ShardSizes((1,)), ShardSizes((1,)), ShardSizes((2,), True))
    assert held.parts == wanted
    found = [train.read(row).caption for row in range(5)]
    assert found == [
        "c1",
        "c2",
        "c3",
        "c7",
        "c8",
    ]
    order = EpochOrder(train.parts, seed=1, buffer=3).epoch(0)
    assert sorted(order(np.arange(5))) == [*range(5)]


# Sources


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
    found = [source.read(i).key for i in range(len(source))]
    assert found == [
        "b.png",
        "c.d.webp",
        "sub/a.JPG",
    ]
    assert source.read(2).image == noise(1)
    assert source.read(1).caption == "caption of c.d.webp"
    assert source.shard_sizes == (3,)
    assert pickle.loads(pickle.dumps(source)).read(0) == source.read(0)


def test_a_folders_bad_samples(folder):
    for name, caption in (
        ("alone", b"no image"),
        ("huge", b"a" * (MAX_CAPTION_BYTES + 1)),
        ("raw", b"a caption"),
    ):
        (folder / f"{name}.txt").write_bytes(caption)
    for name in ("bare.png", "huge.png", "raw.CR2"):
        (folder / name).write_bytes(noise())
    bad = {
        key: said
        for key, said in outcomes(open_source(folder)).items()
        if not said.startswith("caption of")
    }
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
    assert (
        f"{folder}: 3 rows; 2 linked folders not followed, e.g. {folder}/near"
        in caplog.text
    )
    assert len(open_source(folder / "near")) == 3  # itself a link: it was named


def test_probes_are_spread_over_the_whole_source(tmp_path):
    """A table whose first rows are bad is opened; one of bad rows, or of pictures that
    do not decode, is refused.
    """
    (tmp_path / "good.png").write_bytes(noise())
    (tmp_path / "cut.png").write_bytes(noise()[:40])
    path = tmp_path / "t.csv"
    for bad, good, said in (
        ("gone.png", 50, ""),
        (
            "gone.png",
            0,
            (
                "0 of 1,000 pairs looked at, spread over all 5,000, usable, .* 1,000 ×"
                " missing image"
            ),
        ),
        ("cut.png", 0, "0 of 1,000 pairs looked at, .* 1,000 × corrupt image"),
    ):
        rows = [bad] * (5000 - good) + ["good.png"] * good
        path.write_text(
            "filepath,title\n" + "".join(f"{name},a caption\n" for name in rows)
        )
        if not said:
            assert len(open_source(path)) == 5000
            continue
        raises(InputError, said, open_source, path)


def test_sources_are_read_one_after_the_other(shards):
    two = (
        open_source(shards),
        open_source(shards / "00002.tar"),
    )  # of 5 + 4 + 3 and of 3 pairs
    both = mix(two)
    assert len(both) == 15
    assert both.shard_sizes == (5, 4, 3, 3)
    assert not both.streamed
    expected = [two[0].read(i) for i in range(12)] + [two[1].read(i) for i in range(3)]
    assert [both.read(i) for i in range(15)] == expected
    wanted = f"{two[0].name} + {two[1].name}"
    assert both.name == wanted
    assert pickle.loads(pickle.dumps(both)).read(14) == expected[14]
    assert mix(two[:1]) is two[0]


@pytest.fixture(scope="module")
def demo():
    """All pairs of the set inside the package."""
    sources = {spec: open_source(spec) for spec in ("demo", "demo:val")}
    assert len(sources["demo"].shard_sizes) > 1
    return {
        spec: [source.read(i) for i in range(len(source))]
        for spec, source in sources.items()
    }


def test_every_pair_is_good_and_held_out_captions_are_not_trained_on(demo):
    train, val = demo.values()
    assert 5_500 <= len(train) <= 6_500
    assert len(val) == 500
    assert len(open_labelled("demo:noto-emoji")) == 1540
    assert sum(path.stat().st_size for path in DEMO.rglob("*")) <= 10_000_000
    for samples in (train, val):
        assert len({sample.key for sample in samples}) == len(samples)
        for sample in samples[::10]:
            assert decode(sample.image).size == (64, 64)
            assert sample.image[8:12] == b"WEBP"
    held_out = {caption_id(sample.caption) for sample in val}
    assert len(held_out) == 500
    assert not held_out & {caption_id(sample.caption) for sample in train}


def test_the_notice_counts_what_is_there(demo):
    text = (DEMO / "NOTICE").read_text(encoding="utf-8")
    table = {
        m[1]: (m[2], int(m[3]), int(m[4]))
        for m in re.finditer(
            r"^(\S+) +(public domain|MIT|Apache-2\.0|\S+) +(\d+) +(\d+)  \S",
            text,
            re.MULTILINE,
        )
    }
    for samples, column in zip(demo.values(), (1, 2), strict=True):
        found = Counter(
            sample.key.rpartition("/")[2].rpartition("-")[0] for sample in samples
        )
        expected = Counter({name: row[column] for name, row in table.items()})
        assert found == expected
    assert {row[0] for row in table.values()} == {"public domain", "MIT", "Apache-2.0"}
    pairs = len(demo["demo"])
    shared = sum(
        n
        for n in Counter(caption_id(sample.caption) for sample in demo["demo"]).values()
        if n > 1
    )
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
        raises(
            BadSample,
            r"a\.png: no permission to read \(.*Permission denied",
            source.read,
            0,
        )
    finally:
        os.seteuid(user)
