from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from torch import Tensor

from cloob.cache import Cache
from cloob.data.batch import BadSample
from cloob.data.loader import PairLoader
from cloob.data.open import open_source
from cloob.data.sources.arrow import ArrowSource
from cloob.data.sources.columns import map_arrow
from cloob.data.sources.table import TableSource
from cloob.data.transforms import TrainTransform
from cloob.errors import InputError

MakeImage = Callable[..., bytes]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(image: MakeImage, rows: range, **names: str) -> pa.Table:
    """Columns as ``datasets`` stores them: {bytes, path} and text."""
    return pa.table(
        {
            names.get("image", "image"): pa.array([{"bytes": image(i), "path": None} for i in rows], IMAGE),
            names.get("caption", "caption"): [f"pair {i}" for i in rows],
        }
    )


def write_saved(folder: Path, tables: list[pa.Table]) -> Path:
    """What ``Dataset.save_to_disk`` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, content in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, content.schema) as writer:
            writer.write_table(content, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write_file(path: Path, content: pa.Table) -> None:
    """One file, of the kind that its name says."""
    if path.suffix == ".parquet":
        parquet.write_table(content, path)
        return
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, content.schema) as file:
        file.write_table(content)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_a_saved_dataset(tmp_path: Path, image: MakeImage) -> None:
    folder = write_saved(tmp_path / "set", [table(image, range(5)), table(image, range(5, 8))])
    source = open_source(folder)
    assert source.shard_sizes == (5, 3) and not source.streamed and source.name == str(folder)
    for i in range(8):
        sample = source.read(i)
        assert sample.image == image(i) and sample.caption == f"pair {i}"
    assert source.read(6).key == "data-00001-of-00002.arrow/1"
    packed = pickle.dumps(source)
    assert len(packed) < 3000 and pickle.loads(packed).read(7) == source.read(7)
    assert open_source(folder / "data-00000-of-00002.arrow").read(4).caption == "pair 4"
    assert open_source(folder / "*.arrow").shard_sizes == (5, 3)


def test_what_datasets_itself_writes(tmp_path: Path, image: MakeImage) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {
        "image": [{"bytes": image(i), "path": None} for i in range(6)],
        "caption": [f"pair {i}" for i in range(6)],
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": made, "test": made.select([4, 1])}).save_to_disk(str(tmp_path / "splits"))
    made.to_parquet(tmp_path / "p" / "train-00000-of-00001.parquet")
    for place, order in (("one", range(6)), ("splits/test", (4, 1)), ("p", range(6))):
        source = open_source(tmp_path / place, cache=Cache(tmp_path / "cache"))
        found = [source.read(i) for i in range(len(source))]
        assert [(s.image, s.caption) for s in found] == [(image(i), f"pair {i}") for i in order]
    with pytest.raises(InputError, match=r"splits holds the splits train, test; name one: .*splits/train"):
        open_source(tmp_path / "splits")


def test_parquet_with_images_is_unpacked_once(
    tmp_path: Path, image: MakeImage, cache: Cache, tokenizer: Callable[[list[str]], Tensor]
) -> None:
    for number, rows in enumerate((range(7), range(7, 10))):
        (tmp_path / "data").mkdir(exist_ok=True)
        parquet.write_table(
            table(image, rows), tmp_path / "data" / f"train-0000{number}-of-00002.parquet", row_group_size=2
        )
    source = open_source(tmp_path, cache=cache)
    assert source.streamed and source.shard_sizes == (7, 3)
    assert [source.read(i).image for i in (9, 0, 6)] == [image(i) for i in (9, 0, 6)]
    assert len(list(tmp_path.glob("cache/tables/*.arrow"))) == 2
    found: list[str] = []
    for workers in (0, 1):
        pairs = PairLoader(source, TrainTransform(4), tokenizer, 3, drop_last=False, workers=workers)
        found.append(str([batch.keys for batch in pairs.epoch(0)]))
        pairs.close()
    assert found[0] == found[1] and all(f"0000{n}" in found[0] for n in (0, 1))
    # A changed file is unpacked anew.
    parquet.write_table(table(image, range(20, 24)), tmp_path / "data" / "train-00001-of-00002.parquet")
    assert open_source(tmp_path, cache=cache).read(7).image == image(20)


@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_file_that_changes_in_a_run_ends_it(
    tmp_path: Path, image: MakeImage, cache: Cache, kind: str, rows: int
) -> None:
    for number in range(2):
        write_file(tmp_path / f"{number}.{kind}", table(image, range(9)))
    source = open_source(tmp_path, cache=cache)
    assert source.read(3).caption == "pair 3"
    worker = pickle.loads(pickle.dumps(source))
    write_file(tmp_path / f"1.{kind}", table(image, range(20, 20 + rows)))
    for reader in (source, worker):
        with pytest.raises(InputError, match=rf"1\.{kind}: has changed since the run began; start it again"):
            reader.read(17)
        assert reader.read(8).caption == "pair 8"
    (tmp_path / f"1.{kind}").unlink()
    with pytest.raises(InputError, match=rf"1\.{kind}: No such file or directory"):
        worker.read(17)


def test_what_is_unpacked_is_read_though_its_file_has_changed(tmp_path: Path, image: MakeImage, cache: Cache) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(table(image, range(3)), path)
    source = open_source(path, cache=cache)
    worker = pickle.loads(pickle.dumps(source))
    assert source.read(2).caption == "pair 2"
    parquet.write_table(table(image, range(20, 22)), path)
    assert worker.read(2).caption == "pair 2"
    assert open_source(path, cache=cache).read(1).caption == "pair 21"


def test_splits_side_by_side_are_not_mixed(tmp_path: Path, image: MakeImage) -> None:
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        parquet.write_table(table(image, range(3)), tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match=r"holds the splits test, train; name the files of one: .*test-\*\.parquet"):
        open_source(tmp_path)


def test_images_as_bytes_and_as_paths(tmp_path: Path, image: MakeImage, cache: Cache) -> None:
    (tmp_path / "a.png").write_bytes(image(1))
    struct = [{"bytes": None, "path": "a.png"}, {"bytes": image(2), "path": "gone.png"}]
    columns = {"s": pa.array(struct, IMAGE), "b": pa.array([image(1), image(2)]), "p": ["a.png", "a.png"]}
    captions = pa.array(["one", "two"], pa.large_string())
    for column, expected in (("s", [1, 2]), ("b", [1, 2]), ("p", [1, 1])):
        folder = tmp_path / column
        write_saved(folder, [pa.table({column: columns[column], "text": captions})])
        (folder / "a.png").write_bytes(image(1))
        source = open_source(folder, image_column=column, caption_column="text")
        assert [source.read(i).image for i in range(2)] == [image(i) for i in expected]


def test_bad_rows_are_counted_by_reason(tmp_path: Path, image: MakeImage) -> None:
    rows = [
        ({"bytes": image(0), "path": None}, b"good"),
        ({"bytes": image(0), "path": None}, b"good"),
        ({"bytes": None, "path": None}, b"x"),
        (None, b"x"),
        ({"bytes": None, "path": "gone.png"}, b"x"),
        ({"bytes": image(0), "path": None}, None),
        ({"bytes": image(0), "path": None}, b" "),
        ({"bytes": image(0), "path": None}, b"caf\xe9"),
    ]
    images, captions = zip(*rows, strict=True)
    text = pa.array(captions, pa.binary()).view(pa.string())  # not checked to be UTF-8
    source = open_source(write_saved(tmp_path / "set", [pa.table({"image": pa.array(images, IMAGE), "title": text})]))
    found = []
    for i in range(2, 8):
        with pytest.raises(BadSample) as caught:
            source.read(i)
        found.append(caught.value.reason)
    assert found == ["missing image"] * 3 + ["missing caption", "empty caption", "caption not UTF-8"]


def test_columns_are_found_or_asked_for(tmp_path: Path, image: MakeImage) -> None:
    content = table(image, range(3)).append_column("other", pa.array(["a", "b", "c"]))
    folder = write_saved(tmp_path / "set", [content.append_column("n", pa.array([1, 2, 3]))])
    with pytest.raises(
        InputError, match=r"no column 'title'; its columns: image, caption, other, n .*--caption-column"
    ):
        open_source(folder)
    assert open_source(folder, caption_column="other").read(2).caption == "c"
    with pytest.raises(InputError, match=r"no column 'img'.*--image-column"):
        open_source(folder, image_column="img", caption_column="other")
    with pytest.raises(InputError, match="column 'n' holds int64, not text"):
        open_source(folder, caption_column="n")
    with pytest.raises(InputError, match="column 'n' holds int64, not images"):
        open_source(folder, image_column="n", caption_column="other")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_later_file_with_a_column_of_another_type_is_named(
    tmp_path: Path, image: MakeImage, cache: Cache, kind: str
) -> None:
    first = table(image, range(3))
    later = tmp_path / f"1.{kind}"
    write_file(tmp_path / f"0.{kind}", first)
    write_file(later, first.set_column(1, "caption", pa.array([1, 2, 3])))
    with pytest.raises(InputError, match=rf"1\.{kind}: column 'caption' holds int64, not text"):
        open_source(tmp_path, cache=cache)
    write_file(later, first.set_column(0, "image", pa.array([1, 2, 3])))
    with pytest.raises(InputError, match=rf"1\.{kind}: column 'image' holds int64, not images"):
        open_source(tmp_path, cache=cache)
    write_file(later, first.set_column(1, "caption", pa.nulls(3)))
    with pytest.raises(BadSample, match="missing caption"):
        open_source(tmp_path, cache=cache).read(3)


def test_broken_folders_get_one_line(tmp_path: Path, image: MakeImage) -> None:
    folder = write_saved(tmp_path / "set", [table(image, range(3)), table(image, range(3), caption="other")])
    with pytest.raises(InputError, match=r"data-00001-of-00002\.arrow has no column 'caption', which data-00000"):
        open_source(folder)
    (folder / "data-00001-of-00002.arrow").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"data-00001-of-00002\.arrow cannot be read as arrow"):
        open_source(folder)
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match=r"data-00001-of-00002\.arrow: no such file, but .*state\.json names it"):
        open_source(folder)


def test_parquet_of_paths_stays_a_table(tmp_path: Path, image: MakeImage) -> None:
    (tmp_path / "a.png").write_bytes(image())
    parquet.write_table(pa.table({"filepath": ["a.png"] * 2, "title": ["x", "y"]}), tmp_path / "t.parquet")
    assert isinstance(open_source(tmp_path / "t.parquet"), TableSource)
    parquet.write_table(table(image, range(2)), tmp_path / "i.parquet")
    assert isinstance(open_source(tmp_path / "i.parquet", cache=Cache(tmp_path / "cache")), ArrowSource)
    assert np.array_equal(open_source(tmp_path / "t.parquet").shard_sizes, [2])


def messages(content: pa.Table, **options: object) -> list[bytes]:
    """A stream's messages: the schema, dictionaries and batches."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, content.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content)
    return [each.serialize().to_pybytes() for each in pa.ipc.MessageReader.open_stream(sink.getvalue())]


def with_kinds(image: MakeImage) -> pa.Table:
    """Pairs with a column that has a dictionary of its own."""
    return table(image, range(3)).append_column("kind", pa.array(["a", "b", "a"]).dictionary_encode())


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_of_either_kind_is_mapped(tmp_path: Path, image: MakeImage, kind: str) -> None:
    path, content = tmp_path / "a.arrow", with_kinds(image)
    with pa.OSFile(str(path), "wb") as sink, getattr(pa.ipc, f"new_{kind}")(sink, content.schema) as file:
        file.write_table(content)
        file.write_table(content)
    now = pa.total_allocated_bytes()
    found = map_arrow(path)
    assert found.equals(pa.concat_tables([content, content])) and pa.total_allocated_bytes() - now < 20_000
    source = open_source(path, caption_column="caption")
    assert [(source.read(i).image, source.read(i).caption) for i in (0, 5)] == [
        (image(0), "pair 0"),
        (image(2), "pair 2"),
    ]


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_compressed_arrow_is_refused(tmp_path: Path, image: MakeImage, kind: str) -> None:
    path, content, options = tmp_path / "a.arrow", table(image, range(3)), pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(path), "wb") as sink, getattr(pa.ipc, f"new_{kind}")(sink, content.schema, options=options) as f:
        f.write_table(content)
    with pytest.raises(InputError, match=r"a\.arrow: is compressed; save it as Arrow without compression"):
        open_source(path)


def two(image: MakeImage, name: str, held: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([pa.array([image(0), image(1)]), held], ["bytes", name])


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_structures_and_columns_that_are_no_pictures(tmp_path: Path, image: MakeImage, cache: Cache, kind: str) -> None:
    path, text = tmp_path / f"a.{kind}", pa.array(["a", "b"])
    for name, held in (
        ("path", pa.array([1, 2])),
        ("path", pa.array([["a"], ["b"]])),
        *([("bytes", pa.array([b"a", b"b"]))] if kind == "arrow" else []),
    ):
        write_file(path, pa.table({"filepath": two(image, name, held), "title": text}))
        with pytest.raises(InputError, match=rf"a\.{kind}: column 'filepath' holds struct.*, not images"):
            open_source(tmp_path, cache=cache)
    pictures = two(image, "path", text)
    for columns, names in (([pictures, text, text], "itt"), ([pictures, pictures, text], "iit")):
        if kind == "arrow":
            write_file(path, pa.table(columns, names=list(names)))
            with pytest.raises(InputError, match=r"a\.arrow has several columns '[it]'; rename all but one"):
                open_source(path, image_column="i", caption_column="t")
