"""The order of an epoch: each pair once, shard by shard, and the same for whoever asks for which stretch."""

import io
import pickle
import tracemalloc
from collections import Counter
from functools import cache

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from cloob.cache import Cache
from cloob.data.batch import BadSample, caption_id
from cloob.data.open import open_source
from cloob.data.order import LONG, EpochOrder, ShardSizes, keyed_permutation
from cloob.data.source import choose_held_out, prefetch
from cloob.data.source import split as part
from cloob.errors import InputError
from make import Listed, noise

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
either_length = pytest.mark.parametrize("long", [LONG, 1])


def shard_of(sizes, rows):
    return np.searchsorted(np.cumsum(sizes), rows, side="right")


def excess(counts):
    """How far counts are from equal ones, in standard deviations of χ²; about N(0, 1) for fair draws."""
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


def rows_of(order, epoch, lanes=1):
    return order.epoch(epoch, lanes)(np.arange(len(order)))


@given(st.integers(1, 5000), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
def test_a_keyed_permutation_is_one(n, key):
    numbers = keyed_permutation(n, key)(np.arange(n))
    assert np.array_equal(np.sort(numbers), np.arange(n))
    some = np.arange(n)[:: max(1, n // 7)]
    assert np.array_equal(keyed_permutation(n, key)(some), numbers[some])


@pytest.mark.parametrize("n", [60, pytest.param(101, marks=pytest.mark.nightly)])
def test_any_two_places_hold_any_two_numbers_equally_often(n):
    """Over 4,000 keys: a place's number, and the numbers of two places together, of one half or of both."""
    a, side = np.arange(n), int(np.ceil(np.sqrt(n)))
    others = (1, side, n - 1)
    ones, pairs = np.zeros((n, n)), np.zeros((len(others), n, n))
    for key in range(4_000):
        numbers = keyed_permutation(n, [key])(a)
        ones[a, numbers] += 1
        pairs[range(len(others)), numbers[0], numbers[list(others)]] += 1
    assert max(excess(row) for row in ones) < 5
    assert all(np.diag(each).sum() == 0 and excess(each[~np.eye(n, dtype=bool)]) < 4 for each in pairs)


def test_a_local_order_is_numpys_permutation():
    expected = np.random.Generator(np.random.PCG64([5, 2])).permutation(42)
    for lanes in (1, 4):
        assert np.array_equal(rows_of(EpochOrder([ShardSizes((30, 12))], seed=5), 2, lanes), expected)
    straight = EpochOrder([ShardSizes((5,), True), ShardSizes((3,))], seed=5, shuffle=False, buffer=9)
    assert np.array_equal(rows_of(straight, 1), np.arange(8))


@either_length
@settings(max_examples=60)
@given(SHARDS, st.integers(1, 7), st.integers(0, 300), st.integers(0, 5), st.integers(0, 9))
def test_each_pair_exactly_once_in_any_lanes_and_any_stretch(long, sizes, lanes, buffer, epoch, seed):
    def order():
        return EpochOrder([ShardSizes(tuple(sizes), True)], seed=seed, buffer=buffer, long=long)

    rows = rows_of(order(), epoch, lanes)
    assert len(order()) == len(rows) == sum(sizes) and rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), np.arange(sum(sizes)))
    again = order().epoch(epoch, lanes)
    starts = range(len(rows) // 5 * 5, -1, -5)  # from the end to the start
    stretches = [again(np.arange(at, min(at + 5, len(rows)))) for at in starts][::-1]
    assert np.array_equal(np.concatenate(stretches), rows)


@settings(max_examples=80)
@given(SHARDS, st.integers(1, 7), st.integers(1, 60), st.integers(0, 5))
def test_a_lane_reads_shard_after_shard_and_moves_pairs_within_the_buffer(sizes, lanes, buffer, epoch):
    parts = [ShardSizes(tuple(sizes), True)]
    shuffled = rows_of(EpochOrder(parts, seed=3, buffer=buffer), epoch, lanes)
    straight = rows_of(EpochOrder(parts, seed=3, buffer=1), epoch, lanes)  # blocks of one pair: nothing moves
    seen = []
    for lane in range(lanes):
        plain = straight[lane::lanes]
        place = {row: i for i, row in enumerate(plain.tolist())}
        assert all(abs(place[row] - i) < buffer for i, row in enumerate(shuffled[lane::lanes].tolist()))
        shards = shard_of(sizes, plain).tolist()
        seen += [s for i, s in enumerate(shards) if i == 0 or s != shards[i - 1]]
    # A shard in two lanes is the last of one and the first of the next.
    assert all(seen[seen.index(s) : seen.index(s) + seen.count(s)] == [s] * seen.count(s) for s in set(seen))


def test_each_stretch_holds_every_source_in_its_proportion():
    parts = [ShardSizes((1000,) * 10, True), ShardSizes((5_000,), False), ShardSizes((300,) * 7, True)]
    rows = rows_of(EpochOrder(parts, seed=0, buffer=2000), 0, lanes=2)
    of_first = [(rows[i : i + 500] < 10_000).mean() for i in range(0, 17_000, 500)]
    assert min(of_first) > 0.5 and max(of_first) < 0.67  # 10,000 of 17,100 over the whole epoch
    local = rows[(rows >= 10_000) & (rows < 15_000)]
    assert np.abs(np.diff(local)).mean() > 1000  # all over the table


@pytest.mark.parametrize("buffer", [0, 10_000])
def test_400_million_pairs_cost_no_memory(buffer):
    """The start of an epoch, a batch in its middle and its end, for one rank of eight."""
    parts = [ShardSizes((10_000,) * 40_000, buffer > 0)]
    tracemalloc.start()
    try:
        order = EpochOrder(parts, seed=0, buffer=buffer)
        rows_at = order.epoch(3, lanes=8)
        rows = np.concatenate([rows_at(np.arange(at, at + 32_768, 8)) for at in (0, 200_000_000, 399_967_232)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6 and len(order) == 400_000_000
    assert len(set(rows.tolist())) == len(rows) and rows.min() >= 0 and rows.max() < 400_000_000


# --val-split: what is held out shares no picture and no caption with what is trained on


Pair = tuple[bytes, str]


@cache
def as_png(row):
    """A picture of one row of grey pixels; none of no pixels."""
    file = io.BytesIO(b"no picture")
    if row:
        Image.frombytes("L", (len(row), 1), row).save(file, "PNG")
    return file.getvalue()


def split(sources, share):
    return part(sources, choose_held_out(sources, share))


def contents(source):
    found = []
    for index in range(len(source)):
        try:
            sample = source.read(index)
            found.append((sample.image, sample.caption))
        except BadSample:
            found.append(None)
    return found


pairs = st.tuples(st.binary(max_size=1).map(as_png), st.sampled_from([*"abcdefghij", "A", " a", "b  b", "B b"]))
sets = st.lists(st.none() | pairs, min_size=1, max_size=60)


@given(st.lists(sets, min_size=1, max_size=3), st.floats(0.01, 0.6), st.randoms())
def test_no_picture_or_caption_is_on_both_sides(lists, share, random):
    sources = [Listed(pairs) for pairs in lists]
    everything = [pair for pairs in lists for pair in pairs]
    readable = [pair for pair in everything if pair is not None]
    try:
        train, held = (contents(part) for part in split(sources, share))
    except InputError:
        return
    assert Counter(train) + Counter(held) == Counter(everything)
    assert None not in held
    held_pairs, train_pairs = [p for p in held if p], [p for p in train if p]
    assert as_png(b"") not in {image for image, _ in held_pairs}
    assert not {image for image, _ in held_pairs} & {image for image, _ in train_pairs}
    assert not {caption_id(text) for _, text in held_pairs} & {caption_id(text) for _, text in train_pairs}
    assert 2 <= len(held) <= max(2, round(share * len(readable)))
    # The bytes alone decide: not the order of the rows, nor which source has them.
    shuffled = list(everything)
    random.shuffle(shuffled)
    again = split([Listed(shuffled)], share)
    assert Counter(contents(again[1])) == Counter(held)


@given(st.integers(10, 300), st.sampled_from([0.05, 0.1, 0.3]))
def test_of_different_pairs_exactly_the_share_is_held_out(n, share):
    source = Listed([(as_png(n.to_bytes(2, "big")), f"caption {n}") for n in range(n)])
    train, held = split([source], share)
    assert len(held) == max(2, round(share * n)) and len(train) == n - len(held)
    assert sum(train.shard_sizes) == len(train) and sum(held.shard_sizes) == len(held)
    assert pickle.loads(pickle.dumps(train)).read(0) == train.read(0)
    assert train.fingerprint() != held.fingerprint()


def test_parquet_with_pictures_inside(tmp_path):
    """It is unpacked file by file, so training reads it so, and what it will read soon is asked for."""
    pictures = [noise(n) for n in range(40)]
    table = pa.table({"image": pictures, "caption": [f"caption {n}" for n in range(40)]})
    for n in range(4):
        parquet.write_table(table.slice(10 * n, 10), tmp_path / f"p-{n}.parquet")
    source = open_source(str(tmp_path / "p-*.parquet"), cache=Cache(tmp_path / "cache"))
    train, held = split([source], 0.25)
    assert train.streamed and held.streamed and len(train.shard_sizes) == 4 and sum(train.shard_sizes) == 30
    asked = []
    source.prefetch = asked.append
    prefetch(train, np.array([0, 29]))
    assert [source.read(row).caption for row in asked[0]] == [train.read(0).caption, train.read(29).caption]


def test_what_cannot_be_split_is_refused_in_one_line():
    same = Listed([(as_png(bytes([n])), "a photo") for n in range(20)])
    with pytest.raises(InputError, match=r"val_split is 0.1: of 20 usable pairs 0 can be held out .*--val-data"):
        split([same], 0.1)
    alone = [Listed([(as_png(bytes([n])), f"c{n}")], name="one pair") for n in range(4)]
    with pytest.raises(InputError, match="one pair: all its pairs would be held out"):
        split(alone, 0.5)
