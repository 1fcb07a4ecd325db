"""Folders of pairs, imagefolders, the set inside the package; an epoch's order, and
what is held out.

The order has each pair once, shard by shard, and is the same for whoever asks for which
stretch.
"""

import io
import itertools
import logging
import os
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
from make import Listed, noise, outcomes, samples, sent
from support import raises

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def rows_of(order, epoch, lanes=1):
    rows_at = order.epoch(epoch, lanes)
    return rows_at(np.arange(len(order)))


def test_a_local_order_is_numpys_permutation():
    bits = np.random.PCG64([5, 2])
    expected = np.random.Generator(bits).permutation(42)
    for lanes in (1, 4):
        order = EpochOrder([ShardSizes((30, 12))], seed=5)
        assert np.array_equal(rows_of(order, 2, lanes), expected)
    parts = [ShardSizes((5,), True), ShardSizes((3,))]
    straight = EpochOrder(parts, seed=5, shuffle=False, buffer=9)
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
    starts = np.arange(0, len(rows) + 1, 5)
    for start in reversed(starts):
        end = min(start + 5, len(rows))
        assert np.array_equal(again(np.arange(start, end)), rows[start:end])


@settings(max_examples=80)
@given(SHARDS, st.integers(1, 7), st.integers(1, 60), st.integers(0, 5))
def test_a_lane_reads_shard_after_shard_and_moves_pairs_within_the_buffer(
    sizes, lanes, buffer, epoch
):
    parts = [ShardSizes(tuple(sizes), True)]
    shuffled = rows_of(EpochOrder(parts, seed=3, buffer=buffer), epoch, lanes)
    # of blocks of one pair nothing moves
    straight = rows_of(EpochOrder(parts, seed=3, buffer=1), epoch, lanes)
    ends = np.cumsum(sizes)
    seen = []
    for lane in range(lanes):
        plain = straight[lane::lanes]
        place = {row: i for i, row in enumerate(plain.tolist())}
        for i, row in enumerate(shuffled[lane::lanes].tolist()):
            assert abs(place[row] - i) < buffer
        shards = np.searchsorted(ends, plain, side="right").tolist()
        seen += [shard for shard, _ in itertools.groupby(shards)]
    # A shard in two lanes is the last of one and the first of the next.
    stretches = [shard for shard, _ in itertools.groupby(seen)]
    assert len(stretches) == len(set(seen))


def test_each_stretch_holds_every_source_in_its_proportion():
    first = ShardSizes((1000,) * 10, True)
    local = ShardSizes((5_000,), False)
    last = ShardSizes((300,) * 7, True)
    order = EpochOrder([first, local, last], seed=0, buffer=2000)
    rows = rows_of(order, 0, lanes=2)
    stretches = rows[:17_000].reshape(-1, 500)
    of_first = (stretches < 10_000).mean(1)
    # 10,000 of 17,100 over the whole epoch
    assert of_first.min() > 0.5
    assert of_first.max() < 0.67
    of_local = rows[(rows >= 10_000) & (rows < 15_000)]
    distances = np.abs(np.diff(of_local))
    assert distances.mean() > 1000  # all over the table


def test_400_million_streamed_pairs_cost_no_memory():
    """The start of an epoch, a batch in its middle and its end, for one rank of
    eight.
    """
    parts = [ShardSizes((10_000,) * 40_000, True)]
    tracemalloc.start()
    try:
        order = EpochOrder(parts, seed=0, buffer=10_000)
        rows_at = order.epoch(3, lanes=8)
        rows = []
        for at in (0, 200_000_000, 399_967_232):
            places = np.arange(at, at + 32_768, 8)
            rows += rows_at(places).tolist()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100e6
    assert len(order) == 400_000_000
    assert len(set(rows)) == len(rows)
    assert min(rows) >= 0
    assert max(rows) < 400_000_000


# --val-split: what is held out shares no picture and no caption with what is trained on


@cache
def as_png(row):
    """A picture of one row of grey pixels; none of no pixels."""
    file = io.BytesIO(b"no picture")
    if row:
        Image.frombytes("L", (len(row), 1), row).save(file, "PNG")
    return file.getvalue()


def split(source, share):
    """What is trained on, and what is held out."""
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
        parts = split(source, share)
    except InputError:
        return
    train, held = map(contents, parts)
    assert Counter(train) + Counter(held) == Counter(everything)
    assert None not in held
    train = [pair for pair in train if pair is not None]
    held_images = {image for image, _ in held}
    train_images = {image for image, _ in train}
    assert as_png(b"") not in held_images
    assert not held_images & train_images
    held_captions = {caption_id(text) for _, text in held}
    train_captions = {caption_id(text) for _, text in train}
    assert not held_captions & train_captions
    of_share = round(share * len(readable))
    assert 2 <= len(held) <= max(2, of_share)
    # The bytes alone decide: not the order of the rows, nor which source has them.
    shuffled = list(everything)
    random.shuffle(shuffled)
    _, again = split(Listed(shuffled), share)
    assert Counter(contents(again)) == Counter(held)


@given(st.integers(10, 300), st.sampled_from([0.05, 0.1, 0.3]))
def test_of_different_pairs_exactly_the_share_is_held_out(n, share):
    pictures = [as_png(i.to_bytes(2, "big")) for i in range(n)]
    captions = [f"caption {i}" for i in range(n)]
    train, held = split(Listed(zip(pictures, captions, strict=True)), share)
    of_share = round(share * n)
    assert len(held) == max(2, of_share)
    assert len(train) == n - len(held)
    assert sum(train.shard_sizes) == len(train)
    assert sum(held.shard_sizes) == len(held)
    assert sent(train).read(0) == train.read(0)
    assert train.fingerprint() != held.fingerprint()


def test_what_cannot_be_split_is_refused_in_one_line():
    same = Listed([(as_png(bytes([n])), "a photo") for n in range(20)])
    said = r"val_split is 0.1: of 20 usable pairs 0 can be held out .*--val-data"
    raises(InputError, said, split, same, 0.1)


def test_the_parts_of_a_split_are_those_of_its_sources():
    """So that an epoch spreads every source, and reads it file by file."""
    pairs = [(as_png(bytes([n])), f"c{n}") for n in range(9)]
    last = Listed(pairs[5:])
    last.streamed = True
    source = mix([Listed(pairs[:4]), Listed(pairs[4:5]), last])
    train, held = part(source, np.array([0, 4, 5, 6]))
    expected = (ShardSizes((1, 2)), ShardSizes(()), ShardSizes((2,), True))
    assert train.parts == expected
    wanted = (ShardSizes((1,)), ShardSizes((1,)), ShardSizes((2,), True))
    assert held.parts == wanted
    found = [sample.caption for sample in samples(train)]
    assert found == ["c1", "c2", "c3", "c7", "c8"]
    order = EpochOrder(train.parts, seed=1, buffer=3)
    assert sorted(rows_of(order, 0)) == [*range(5)]


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
    found = [sample.key for sample in samples(source)]
    assert found == ["b.png", "c.d.webp", "sub/a.JPG"]
    assert source.read(2).image == noise(1)
    assert source.read(1).caption == "caption of c.d.webp"
    assert source.shard_sizes == (3,)
    assert sent(source).read(0) == source.read(0)


def test_a_folders_bad_samples(folder):
    for name in ("alone", "huge", "raw"):
        (folder / f"{name}.txt").write_text("a caption")
    (folder / "huge.txt").write_bytes(b"a" * (MAX_CAPTION_BYTES + 1))
    for name in ("bare.png", "huge.png", "raw.CR2"):
        (folder / name).write_bytes(noise())
    found = outcomes(open_source(folder))
    good = {key for key, said in found.items() if said.startswith("caption of")}
    assert len(good) == 3
    bad = {key: found[key] for key in found.keys() - good}
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
    said = f"{folder}: 3 rows; 2 linked folders not followed, e.g. {folder}/near"
    assert said in caplog.text
    assert len(open_source(folder / "near")) == 3  # itself a link: it was named


def test_probes_are_spread_over_the_whole_source(tmp_path):
    """A table whose first rows are bad is opened; one of bad rows, or of pictures that
    do not decode, is refused.
    """
    (tmp_path / "good.png").write_bytes(noise())
    (tmp_path / "cut.png").write_bytes(noise()[:40])

    def table(bad, good=0):
        lines = [f"{bad},a caption\n"] * (5000 - good)
        lines += ["good.png,a caption\n"] * good
        path = tmp_path / "t.csv"
        path.write_text("filepath,title\n" + "".join(lines))
        return path

    assert len(open_source(table("gone.png", 50))) == 5000
    said = "0 of 1,000 pairs looked at, spread over all 5,000, usable, "
    said += ".* 1,000 × missing image"
    raises(InputError, said, open_source, table("gone.png"))
    said = "0 of 1,000 pairs looked at, .* 1,000 × corrupt image"
    raises(InputError, said, open_source, table("cut.png"))


def test_sources_are_read_one_after_the_other(shards):
    every = open_source(shards)  # of 5 + 4 + 3 pairs
    last = open_source(shards / "00002.tar")
    both = mix((every, last))
    assert len(both) == 15
    assert both.shard_sizes == (5, 4, 3, 3)
    assert not both.streamed
    assert samples(both) == samples(every) + samples(last)
    assert both.name == f"{every.name} + {last.name}"
    assert sent(both).read(14) == last.read(2)
    assert mix((every,)) is every


@pytest.fixture(scope="module")
def demo():
    """All pairs of the set inside the package."""
    sources = {spec: open_source(spec) for spec in ("demo", "demo:val")}
    assert len(sources["demo"].shard_sizes) > 1
    return {spec: samples(source) for spec, source in sources.items()}


def test_every_pair_is_good_and_held_out_captions_are_not_trained_on(demo):
    train, val = demo.values()
    assert 5_500 <= len(train) <= 6_500
    assert len(val) == 500
    assert len(open_labelled("demo:noto-emoji")) == 1540
    sizes = [path.stat().st_size for path in DEMO.rglob("*")]
    assert sum(sizes) <= 10_000_000
    for pairs in (train, val):
        assert len({pair.key for pair in pairs}) == len(pairs)
        for pair in pairs[::10]:
            assert decode(pair.image).size == (64, 64)
            assert pair.image[8:12] == b"WEBP"
    held_out = {caption_id(pair.caption) for pair in val}
    assert len(held_out) == 500
    trained_on = {caption_id(pair.caption) for pair in train}
    assert not held_out & trained_on


LINES_OF_THE_NOTICE = re.compile(
    r"^(\S+) +(public domain|MIT|Apache-2\.0|\S+) +(\d+) +(\d+)  \S", re.MULTILINE
)


def test_the_notice_counts_what_is_there(demo):
    text = (DEMO / "NOTICE").read_text(encoding="utf-8")
    lines = LINES_OF_THE_NOTICE.findall(text)
    licences = {licence for _, licence, _, _ in lines}
    assert licences == {"public domain", "MIT", "Apache-2.0"}
    expected = {"demo": Counter(), "demo:val": Counter()}
    for name, _, n_train, n_val in lines:
        expected["demo"][name] = int(n_train)
        expected["demo:val"][name] = int(n_val)
    for spec, pairs in demo.items():
        names = [pair.key.rpartition("/")[2] for pair in pairs]
        found = Counter(name.rpartition("-")[0] for name in names)
        assert found == expected[spec]
    captions = Counter(caption_id(pair.caption) for pair in demo["demo"])
    shared = sum(times for times in captions.values() if times > 1)
    n = captions.total()
    assert f"{shared:,} of the {n:,} training pairs ({shared / n:.1%})" in text
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
        said = r"a\.png: no permission to read \(.*Permission denied"
        raises(BadSample, said, source.read, 0)
    finally:
        os.seteuid(user)
