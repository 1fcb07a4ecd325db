from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloob.data.order import EpochOrder, Part, epoch_order, local_part

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def shard_of(sizes: tuple[int, ...], rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(sizes), rows, side="right")


def lanes_of(order: np.ndarray, batch: int, lanes: int) -> list[np.ndarray]:
    """The plain loop: what each lane gives, batch by batch."""
    parts: list[list[int]] = [[] for _ in range(lanes)]
    for at in range(0, len(order), batch):
        for lane in range(lanes):
            parts[lane] += local_part(order[at : at + batch], lane, lanes).tolist()
    return [np.array(part, np.int64) for part in parts]


@settings(max_examples=150)
@given(SHARDS, st.integers(1, 33), st.integers(1, 7), st.integers(1, 300), st.integers(0, 5), st.integers(0, 9))
def test_each_pair_exactly_once_in_any_lanes(
    sizes: list[int], batch: int, lanes: int, buffer: int, epoch: int, seed: int
) -> None:
    order = EpochOrder([Part(tuple(sizes), 1.0, True)], seed=seed, batch_size=batch, buffer=buffer)
    rows = order.epoch(epoch, lanes)
    assert len(order) == len(rows) == sum(sizes) and rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), np.arange(sum(sizes)))
    assert np.array_equal(rows, order.epoch(epoch, lanes))  # a pure function
    parts = lanes_of(rows, batch, lanes)
    assert max(map(len, parts)) - min(map(len, parts)) <= len(rows) // batch + 1


@settings(max_examples=150)
@given(SHARDS, st.integers(1, 33), st.integers(1, 7), st.integers(1, 60), st.integers(0, 5))
def test_a_lane_shares_at_most_one_shard_with_its_neighbour_and_moves_pairs_within_the_buffer(
    sizes: list[int], batch: int, lanes: int, buffer: int, epoch: int
) -> None:
    options = {"seed": 3, "batch_size": batch}
    parts = [Part(tuple(sizes), 1.0, True)]
    shuffled = lanes_of(EpochOrder(parts, buffer=buffer, **options).epoch(epoch, lanes), batch, lanes)
    # A window of one place moves nothing: the same lanes, unshuffled.
    straight = lanes_of(EpochOrder(parts, buffer=1, **options).epoch(epoch, lanes), batch, lanes)
    seen: list[int] = []
    for lane, plain in zip(shuffled, straight, strict=True):
        place = {row: i for i, row in enumerate(plain.tolist())}
        assert all(abs(place[row] - i) < buffer for i, row in enumerate(lane.tolist()))
        shards = shard_of(tuple(sizes), plain)
        runs = [int(s) for i, s in enumerate(shards) if i == 0 or s != shards[i - 1]]
        assert len(runs) == len(set(runs))  # shard after shard, none twice
        seen += runs
    assert all(count <= 1 or seen[seen.index(s) : seen.index(s) + count] == [s] * count for s, count in
               Counter(seen).items())  # a shard in two lanes is the last of one and the first of the next  # fmt: skip


def test_ranks_read_the_shards_of_their_own_lane() -> None:
    sizes = (100,) * 24
    order = EpochOrder([Part(sizes, 1.0, True)], seed=0, batch_size=12, buffer=150)
    rows = order.epoch(0, lanes=3)
    shards = [set(shard_of(sizes, part).tolist()) for part in lanes_of(rows, 12, 3)]
    assert all(len(part) <= 9 for part in shards)
    assert sum(map(len, shards)) <= 24 + 2
    # At any moment a lane has few shards open.
    lane = shard_of(sizes, lanes_of(rows, 12, 3)[1])
    assert max(len(set(lane[i : i + 50].tolist())) for i in range(len(lane) - 50)) <= 5


def test_orders_differ_by_epoch_seed_and_mix_shards() -> None:
    part = [Part((50,) * 10, 1.0, True)]
    orders = {
        tuple(EpochOrder(part, seed=seed, batch_size=8, buffer=100).epoch(epoch)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4
    rows = EpochOrder(part, seed=0, batch_size=50, buffer=100).epoch(0)
    assert all(len(set(shard_of((50,) * 10, rows[i : i + 50]).tolist())) >= 2 for i in range(0, 500, 50))


def test_more_lanes_than_pairs_in_a_batch() -> None:
    rows = EpochOrder([Part((7, 6), 1.0, True)], seed=0, batch_size=2, buffer=4).epoch(0, lanes=5)
    assert np.array_equal(np.sort(rows), np.arange(13))


def test_without_a_buffer_one_source_has_the_plain_order() -> None:
    for lanes in (1, 4):
        rows = EpochOrder([Part((30, 12))], seed=5, batch_size=4).epoch(2, lanes)
        assert np.array_equal(rows, epoch_order(42, 5, 2))
    straight = EpochOrder([Part((5,), 0.5, True), Part((3,), 2.0)], seed=5, batch_size=4, shuffle=False, buffer=9)
    assert np.array_equal(straight.epoch(1), np.arange(8))  # in order, and without weights


@pytest.mark.parametrize("buffer", [0, 6])
@settings(max_examples=60)
@given(
    st.lists(st.tuples(SHARDS, st.floats(0.05, 3.0), st.booleans()), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_weights_give_exact_counts(
    buffer: int, drawn: list[tuple[list[int], float, bool]], batch: int, lanes: int, epoch: int
) -> None:
    parts = [Part(tuple(sizes), weight, streamed) for sizes, weight, streamed in drawn]
    order = EpochOrder(parts, seed=1, batch_size=batch, buffer=buffer)
    total = sum(part.rows for part in parts)
    rows = order.epoch(epoch, lanes)
    assert len(rows) == len(order) == sum(round(part.weight * part.rows) for part in parts)
    assert len(set(rows.tolist())) == len(rows)  # repeats are copies with numbers of their own
    counts = np.bincount(rows % max(total, 1), minlength=total)
    start = 0
    for part in parts:
        mine = counts[start : start + part.rows]
        assert mine.sum() == round(part.weight * part.rows)
        assert part.rows == 0 or (mine.min() >= int(part.weight) and mine.max() <= int(part.weight) + 1)
        start += part.rows


@pytest.mark.parametrize(("buffer", "streamed"), [(0, False), (5, False), (5, True)])
def test_a_fraction_takes_another_part_in_each_epoch_until_all_had_their_turn(buffer: int, streamed: bool) -> None:
    parts = [Part((9,)), Part((4, 8), 0.25, streamed)]
    order = EpochOrder(parts, seed=0, batch_size=3, buffer=buffer)
    taken = [[row for row in (order.epoch(e) % 21).tolist() if row >= 9] for e in range(8)]
    assert all(len(rows) == 3 for rows in taken)
    for turn in (taken[:4], taken[4:]):
        assert sorted(row for rows in turn for row in rows) == list(range(9, 21))


def test_local_rows_are_strewn_among_streamed_shards() -> None:
    parts = [Part((1000,) * 10, 1.0, True), Part((10_000,), 1.0, False)]
    rows = EpochOrder(parts, seed=0, batch_size=500, buffer=2000).epoch(0, lanes=2)
    share = [(rows[i : i + 500] >= 10_000).mean() for i in range(0, 20_000, 500)]
    assert min(share) > 0.4 and max(share) < 0.6  # as over the whole epoch
    local = rows[rows >= 10_000]
    assert np.abs(np.diff(local)).mean() > 2000  # all over the table, where it would be 3333
