"""``--val-split``: what is held out shares no picture and no caption with what is trained on."""

import io
import pickle
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from cloob.cache import Cache
from cloob.data.batch import BadSample, caption_id
from cloob.data.open import open_source
from cloob.data.source import Source, choose_held_out
from cloob.data.source import split as part
from cloob.errors import InputError
from make import Listed, noise

Pair = tuple[bytes, str]


@cache
def as_png(row: bytes) -> bytes:
    """A picture of one row of grey pixels; none of no pixels."""
    file = io.BytesIO(b"no picture")
    if row:
        Image.frombytes("L", (len(row), 1), row).save(file, "PNG")
    return file.getvalue()


def split(sources: Sequence[Source], share: float) -> tuple[Source, Source]:
    return part(sources, choose_held_out(sources, share))


def contents(source: Source) -> list[Pair | None]:
    found: list[Pair | None] = []
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
def test_no_picture_or_caption_is_on_both_sides(lists: list[list[Pair | None]], share: float, random: object) -> None:
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
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = split([Listed(shuffled)], share)
    assert Counter(contents(again[1])) == Counter(held)


@given(st.integers(10, 300), st.sampled_from([0.05, 0.1, 0.3]))
def test_of_different_pairs_exactly_the_share_is_held_out(n: int, share: float) -> None:
    source = Listed([(as_png(n.to_bytes(2, "big")), f"caption {n}") for n in range(n)])
    train, held = split([source], share)
    assert len(held) == max(2, round(share * n)) and len(train) == n - len(held)
    assert sum(train.shard_sizes) == len(train) and sum(held.shard_sizes) == len(held)
    assert pickle.loads(pickle.dumps(train)).read(0) == train.read(0)
    assert train.fingerprint() != held.fingerprint()


def test_parquet_with_pictures_inside(tmp_path: Path) -> None:
    """It is unpacked file by file, so training reads it so, and what it will read soon is asked for."""
    pictures = [noise(n) for n in range(40)]
    table = pa.table({"image": pictures, "caption": [f"caption {n}" for n in range(40)]})
    for n in range(4):
        parquet.write_table(table.slice(10 * n, 10), tmp_path / f"p-{n}.parquet")
    source = open_source(str(tmp_path / "p-*.parquet"), cache=Cache(tmp_path / "cache"))
    train, held = split([source], 0.25)
    assert train.streamed and held.streamed and len(train.shard_sizes) == 4 and sum(train.shard_sizes) == 30
    asked: list[np.ndarray] = []
    source.prefetch = asked.append  # type: ignore[attr-defined]
    train.prefetch(np.array([0, 29]))  # type: ignore[attr-defined]
    assert [source.read(row).caption for row in asked[0]] == [train.read(0).caption, train.read(29).caption]


def test_what_cannot_be_split_is_refused_in_one_line() -> None:
    same = Listed([(as_png(bytes([n])), "a photo") for n in range(20)])
    with pytest.raises(InputError, match=r"val_split is 0.1: of 20 usable pairs 0 can be held out .*--val-data"):
        split([same], 0.1)
    alone = [Listed([(as_png(bytes([n])), f"c{n}")], name="one pair") for n in range(4)]
    with pytest.raises(InputError, match="one pair: all its pairs would be held out"):
        split(alone, 0.5)
