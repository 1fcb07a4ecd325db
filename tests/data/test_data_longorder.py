"""Orders that are computed as they are needed: permutations, evenly spread, and the same whoever asks for what."""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_loader import Numbers, keys, loader
from test_data_order import SHARDS, lanes_of, shard_of

from cloob.data import loader as loader_module
from cloob.data.loader import PairLoader
from cloob.data.longorder import KeyedPermutation
from cloob.data.order import EpochOrder, Part


def long_order(parts: Sequence[Part], seed: int = 0, batch_size: int = 8, buffer: int = 0) -> EpochOrder:
    return EpochOrder(parts, seed=seed, batch_size=batch_size, buffer=buffer, long_from=1)


def excess(counts: np.ndarray) -> float:
    """How far counts are from equal ones, in standard deviations of χ²; about N(0, 1) for fair draws."""
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


@given(st.integers(1, 5000), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
def test_a_keyed_permutation_is_one(n: int, key: list[int]) -> None:
    permutation = KeyedPermutation(n, key)
    numbers = permutation(np.arange(n))
    assert np.array_equal(np.sort(numbers), np.arange(n))
    some = np.arange(n)[:: max(1, n // 7)]
    assert np.array_equal(KeyedPermutation(n, key)(some), numbers[some])


@pytest.mark.parametrize("n", [60, *(pytest.param(n, marks=pytest.mark.nightly) for n in (101, 256))])
def test_any_two_places_hold_any_two_numbers_equally_often(n: int) -> None:
    """Over 20,000 keys: a place's number, and the numbers of two places together, of one half or of both."""
    a, side = np.arange(n), int(np.ceil(np.sqrt(n)))
    others = (1, side, n - 1)
    ones, pairs = np.zeros((n, n)), np.zeros((len(others), n, n))
    for key in range(20_000):
        numbers = KeyedPermutation(n, [key])(a)
        ones[a, numbers] += 1
        pairs[range(len(others)), numbers[0], numbers[list(others)]] += 1
    assert max(excess(row) for row in ones) < 5
    assert all(np.diag(each).sum() == 0 and excess(each[~np.eye(n, dtype=bool)]) < 4 for each in pairs)


def test_a_large_permutation_is_spread_evenly() -> None:
    """Of two million numbers: by place, from a number to the next one, and against the next epoch."""
    n, bins = 2_000_003, 64
    here, there = (KeyedPermutation(n, [0, epoch])(np.arange(n)) for epoch in (0, 1))
    for a, b in ((np.arange(n), here), (here, there), (here[:-1], here[1:]), (here[:-2], here[2:])):
        assert abs(excess(np.histogram2d(a * bins // n, b * bins // n, bins)[0])) < 5
    steps = np.diff(here) % n
    assert abs(excess(np.histogram(steps, 1024, (0, n))[0])) < 5
    assert (np.abs(np.diff(here)) == 1).sum() < 12 and (here == np.arange(n)).sum() < 10  # 2 and 1 are expected


@settings(max_examples=100)
@given(SHARDS, st.integers(1, 33), st.integers(1, 7), st.integers(0, 300), st.integers(0, 5), st.integers(0, 9))
def test_each_pair_exactly_once_in_any_lanes_and_any_stretch(
    sizes: list[int], batch: int, lanes: int, buffer: int, epoch: int, seed: int
) -> None:
    def order() -> EpochOrder:
        return long_order([Part(tuple(sizes), 1.0, True)], seed, batch, buffer)

    rows = order().epoch(epoch, lanes)[:]
    assert len(order()) == len(rows) == sum(sizes) and rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), np.arange(sum(sizes)))
    again = order().epoch(epoch, lanes)
    stretches = [again[at : at + 5] for at in range(len(rows) // 5 * 5, -1, -5)][::-1]  # from the end to the start
    assert np.array_equal(np.concatenate(stretches), rows)


@settings(max_examples=100)
@given(SHARDS, st.integers(1, 33), st.integers(1, 7), st.integers(1, 60), st.integers(0, 5))
def test_lanes_read_shard_after_shard_and_move_pairs_within_the_buffer(
    sizes: list[int], batch: int, lanes: int, buffer: int, epoch: int
) -> None:
    parts = [Part(tuple(sizes), 1.0, True)]
    shuffled = lanes_of(long_order(parts, 3, batch, buffer).epoch(epoch, lanes)[:], batch, lanes)
    straight = lanes_of(long_order(parts, 3, batch, 1).epoch(epoch, lanes)[:], batch, lanes)
    seen: list[int] = []
    for lane, plain in zip(shuffled, straight, strict=True):
        place = {row: i for i, row in enumerate(plain.tolist())}
        assert all(abs(place[row] - i) < buffer for i, row in enumerate(lane.tolist()))
        shards = shard_of(tuple(sizes), plain).tolist()
        seen += [s for i, s in enumerate(shards) if i == 0 or s != shards[i - 1]]
    assert all(seen[seen.index(s) : seen.index(s) + seen.count(s)] == [s] * seen.count(s) for s in set(seen))


@pytest.mark.parametrize("buffer", [0, 6])
@settings(max_examples=60)
@given(
    st.lists(st.tuples(SHARDS, st.floats(0.05, 3.0), st.booleans()), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_weights_give_the_counts_of_a_short_order(
    buffer: int, drawn: list[tuple[list[int], float, bool]], batch: int, lanes: int, epoch: int
) -> None:
    parts = [Part(tuple(sizes), weight, streamed) for sizes, weight, streamed in drawn]
    total = sum(part.rows for part in parts)
    rows = np.asarray(long_order(parts, 1, batch, buffer).epoch(epoch, lanes)[:])
    assert len(rows) == sum(round(part.weight * part.rows) for part in parts) == len(set(rows.tolist()))
    counts, start = np.bincount(rows % max(total, 1), minlength=total), 0
    for part in parts:
        mine = counts[start : start + part.rows]
        assert mine.sum() == round(part.weight * part.rows)
        assert part.rows == 0 or (mine.min() >= int(part.weight) and mine.max() <= int(part.weight) + 1)
        start += part.rows


@pytest.mark.parametrize(("buffer", "streamed"), [(0, False), (5, False), (5, True)])
def test_a_fraction_takes_another_part_in_each_epoch_until_all_had_their_turn(buffer: int, streamed: bool) -> None:
    order = long_order([Part((9,)), Part((4, 8), 0.25, streamed)], 0, 3, buffer)
    taken = [[row for row in (order.epoch(e)[:] % 21).tolist() if row >= 9] for e in range(8)]
    assert all(len(rows) == 3 for rows in taken)
    for turn in (taken[:4], taken[4:]):
        assert sorted(row for rows in turn for row in rows) == list(range(9, 21))


def test_each_stretch_holds_every_source_in_its_proportion() -> None:
    parts = [Part((1000,) * 10, 1.0, True), Part((10_000,), 0.5, False), Part((300,) * 7, 1.0, True)]
    rows = long_order(parts, 0, 500, 2000).epoch(0, lanes=2)[:]
    of_first = [(rows[i : i + 500] < 10_000).mean() for i in range(0, 17_000, 500)]
    assert min(of_first) > 0.5 and max(of_first) < 0.67  # 10,000 of 17,100 over the whole epoch
    local = rows[(rows >= 10_000) & (rows < 20_000)]
    assert np.abs(np.diff(local)).mean() > 2000  # all over the table


@settings(max_examples=40)
@given(st.booleans(), st.integers(9, 60), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.data())
def test_an_epoch_goes_on_with_another_batch_size_and_other_ranks(
    streamed: bool, n: int, before: int, now: int, lanes: int, data: st.DataObject
) -> None:
    def make(batch: int, rank: int, world: int) -> PairLoader:
        options = {"shuffle_buffer": 5 if streamed else 0, "drop_last": False, "rank": rank, "world_size": world}
        return loader(Numbers(n), lambda captions: torch.tensor([[len(c)] for c in captions]), batch, **options)

    def joined(ranks: list[list[object]]) -> list[int]:
        return [key for step in range(len(ranks[0])) for rank in ranks for key in keys([rank[step]])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "EpochOrder", functools.partial(EpochOrder, long_from=1))
        begun = [list(make(before, rank, lanes).epoch(1)) for rank in range(lanes)]
        whole = joined(begun)
        passed = min(data.draw(st.integers(0, len(begun[0]))) * before, n)
        start, offset = divmod(passed, now)
        world = data.draw(st.integers(1, 3))
        rest = [
            list(make(now, rank, world).epoch(1, start, lanes, offset=offset, order_batch_size=before))
            for rank in range(world)
        ]
    assert joined(rest) == whole[passed:] and sorted(whole) == list(range(n))


@pytest.mark.parametrize("buffer", [0, 10_000])
def test_400_million_pairs_cost_no_memory(buffer: int) -> None:
    """The start of an epoch, a batch in its middle and its end, for one rank of eight."""
    parts = [Part((10_000,) * 40_000, 1.0, buffer > 0)]
    tracemalloc.start()
    try:
        order = EpochOrder(parts, seed=0, batch_size=32_768, buffer=buffer).epoch(3, lanes=8)
        rows = np.concatenate([order[at : at + 4096] for at in (0, 200_000_000, 399_990_000)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6 and len(order) == 400_000_000
    assert len(set(rows.tolist())) == len(rows) and rows.min() >= 0 and rows.max() < 400_000_000
