from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from torch import Tensor

import cloob.data.sources.mapped as mapped
import cloob.data.sources.parquet as unpacking
from cloob.cache import Cache
from cloob.data.batch import BadSample
from cloob.data.loader import Batching, PairLoader, Share
from cloob.data.open import open_source
from cloob.data.sources.arrow import ArrowSource
from cloob.data.sources.bounds import checked
from cloob.data.sources.mapped import map_arrow
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
        batching, share = Batching(3, drop_last=False), Share(workers=workers)
        pairs = PairLoader(source, TrainTransform(4), tokenizer, batching, share)
        found.append(str([batch.keys for batch in pairs.epoch(0)]))
        pairs.close()
    assert found[0] == found[1] and all(f"0000{n}" in found[0] for n in (0, 1))
    # A changed file is unpacked anew.
    parquet.write_table(table(image, range(20, 24)), tmp_path / "data" / "train-00001-of-00002.parquet")
    assert open_source(tmp_path, cache=cache).read(7).image == image(20)


def test_a_damaged_parquet_file_is_named(tmp_path: Path, image: MakeImage, cache: Cache) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(table(image, range(3)), path)
    path.write_bytes(b"PAR1" + b"\xff" * 200 + path.read_bytes()[204:])  # the footer is whole
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read as Parquet \("):
        open_source(path, cache=cache)


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


def test_rows_that_share_a_picture_are_few_at_a_time(
    tmp_path: Path, image: MakeImage, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, path = image(0) + bytes(4 << 20), tmp_path / "a.parquet"
    pictures = pa.DictionaryArray.from_arrays([0] * 64, [picture])
    parquet.write_table(
        pa.table({"image": pictures, "caption": ["x"] * 64}), path, compression="zstd", store_schema=False
    )
    assert path.stat().st_size < 5000
    before, now = pa.default_memory_pool().max_memory(), pa.total_allocated_bytes()
    source = open_source(path, cache=cache)
    assert source.read(63).image == picture
    assert pa.default_memory_pool().max_memory() <= max(before, now + 64 * 2**20)
    # More than any set of pictures has: nothing is left in the cache.
    with monkeypatch.context() as limits:
        limits.setattr(unpacking, "MAX_IMAGE_BYTES", 32 << 20)
        again = Cache(tmp_path / "again")
        with pytest.raises(
            InputError, match=r"a\.parquet unpacks to more than 33,\d\d\d,\d\d\d bytes: save it as Arrow"
        ):
            open_source(path, cache=again).read(0)
        assert not list(tmp_path.glob("again/tables/*.arrow*"))
        # The pages alone are too much: none is looked at.
        limits.setattr(unpacking, "MAX_IMAGE_BYTES", 1 << 20)
        limits.setattr(parquet.ParquetFile, "iter_batches", None)
        with pytest.raises(InputError, match=r"a\.parquet unpacks to more than 1,\d\d\d,\d\d\d bytes"):
            open_source(path, cache=again).read(0)


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


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "{",
        "[]",
        "{}",
        '{"_data_files": [1]}',
        '{"_data_files": []}',
        '{"_data_files": [{"filename": 3}]}',
    ]
    + [json.dumps({"_data_files": [{"filename": name}]}) for name in ("../other.arrow", "/etc/passwd", "..", "a\nb")],
)
def test_a_saved_set_lists_files_beside_it_alone(tmp_path: Path, image: MakeImage, content: str) -> None:
    folder = write_saved(tmp_path / "saved", [table(image, range(3))])
    (folder / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"saved/state\.json: does not list") as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
    (folder / "dataset_dict.json").write_text(content)
    with pytest.raises(InputError, match=r"saved/dataset_dict\.json: does not list"):
        open_source(folder)


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
@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_arrow_is_refused_before_it_is_unpacked(
    tmp_path: Path, image: MakeImage, kind: str, compression: str
) -> None:
    path, few = tmp_path / "a.arrow", pa.table({"image": pa.array([image(0) + bytes(1 << 20)]), "caption": ["x"]})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, getattr(pa.ipc, f"new_{kind}")(sink, few.schema, options=options) as file:
        for _ in range(64):
            file.write_table(few)
    before, now = pa.default_memory_pool().max_memory(), pa.total_allocated_bytes()
    with pytest.raises(InputError, match=r"a\.arrow: is compressed, .* without compression, or as Parquet"):
        open_source(path)
    assert pa.default_memory_pool().max_memory() <= max(before, now + 2**20)


@pytest.mark.parametrize("place", ["dictionary", "batch", "later"])
def test_one_compressed_message_is_enough(tmp_path: Path, image: MakeImage, place: str) -> None:
    schema, dictionary, batch = messages(with_kinds(image))
    _, small_dictionary, small_batch = messages(with_kinds(image), compression="zstd")
    stream = {
        "dictionary": [schema, small_dictionary, batch],
        "batch": [schema, dictionary, small_batch],
        "later": [schema, dictionary, batch, batch, small_batch],
    }[place]
    path = tmp_path / "a.arrow"
    path.write_bytes(b"".join([schema, dictionary, batch, batch]))
    assert len(open_source(path)) == 6
    path.write_bytes(b"".join(stream))
    assert pa.ipc.open_stream(path.read_bytes()).read_all().num_rows >= 3
    with pytest.raises(InputError, match="is compressed"):
        open_source(path)


def test_a_file_whose_end_names_a_compressed_message_inside_of_a_picture(tmp_path: Path, image: MakeImage) -> None:
    path, content = tmp_path / "a.arrow", table(image, range(3))
    hidden = messages(content, compression="zstd")[1]
    several = pa.table({"image": pa.array([{"bytes": hidden, "path": None}], IMAGE), "caption": ["x"]})
    for shift in range(8):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, several.schema) as file:
            file.write_table(several)
        whole = path.read_bytes()
        if whole.index(hidden) % 8 == 0:
            break
        several = several.set_column(0, "image", pa.array([{"bytes": bytes(shift + 1) + hidden, "path": None}], IMAGE))
    at, size = whole.index(hidden), 8 + int.from_bytes(hidden[4:8], "little")
    batch = whole.index(b"\xff\xff\xff\xff", 8 + 8 + int.from_bytes(whole[12:16], "little"))
    listed = whole.rindex(batch.to_bytes(8, "little"))
    path.write_bytes(whole[:listed] + struct.pack("<qi4xq", at, size, len(hidden) - size) + whole[listed + 24 :])
    assert pa.ipc.open_file(path.read_bytes()).read_all().num_rows == 3
    with pytest.raises(InputError, match="is compressed"):
        open_source(path)


def test_compression_as_arrow_0_17_had_it(tmp_path: Path, image: MakeImage) -> None:
    path, content = tmp_path / "a.arrow", table(image, range(3)).to_batches()[0]
    options = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V4)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, content.schema, options=options) as file:
        file.write_batch(content, custom_metadata={"ARROW:experimental_compression": "zstd"})
    with pytest.raises(InputError, match="is compressed"):
        open_source(path)


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


def patched(path: Path, content: pa.Table, old: bytes, new: bytes) -> Path:
    """A file in which some bytes have been replaced by as many others."""
    write_file(path, content)
    whole = path.read_bytes()
    assert whole.count(old) == 1 and len(old) == len(new)
    path.write_bytes(whole.replace(old, new))
    return path


OUTSIDE = [
    [0, 5, 4096, 64096],
    [0x7FF00000, 0x7FF00010, 0x7FF00020, 0x7FF00030],
    [0, -5, 20, -9],
    [20, 10, 5, 1],
    [0, 5, 10**9, 15],
    [0, 10, 5, 15],
]


@pytest.mark.parametrize("offsets", OUTSIDE)
@pytest.mark.parametrize("kind", ["caption", "image", "bytes", "path"])
def test_offsets_that_lead_elsewhere_are_one_line(tmp_path: Path, kind: str, offsets: list[int]) -> None:
    held, other = pa.array([b"aaaaa", b"bbbbb", b"ccccc"]), pa.array([b"x", b"y", b""])
    struct_of = {"bytes": [held, other], "path": [other, held]}
    image = pa.StructArray.from_arrays(struct_of[kind], ["bytes", "path"]) if kind in struct_of else held
    content = pa.table({"image": other if kind == "caption" else image, "title": other.cast(pa.string())})
    if kind == "caption":
        content = content.set_column(1, "title", held.cast(pa.string()))
    path = patched(tmp_path / "a.arrow", content, struct.pack("<4i", 0, 5, 10, 15), struct.pack("<4i", *offsets))
    with pytest.raises(InputError, match=r"a\.arrow cannot be read as arrow: ") as caught:
        [*map(open_source(path).read, range(3))]
    assert "\n" not in str(caught.value)
    if kind == "caption":
        with pytest.raises(InputError, match=r"a\.arrow cannot be read as arrow: "):
            open_source(path).fingerprint()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([["aaaaa"], ["bbbbb"], ["ccccc"]]),
        pa.array([["aaaaa"], ["bbbbb"], ["ccccc"]], pa.list_(pa.string(), 1)),
        pa.array([[("aaaaa", 1)], [("bbbbb", 2)], [("ccccc", 3)]], pa.map_(pa.string(), pa.int8())),
        pa.array([[{"n": "aaaaa"}], [{"n": "bbbbb"}], [{"n": "ccccc"}]]),
        pa.array(["aaaaa", "bbbbb", "ccccc"]).dictionary_encode(),
        pa.RunEndEncodedArray.from_arrays(pa.array([1, 2, 3], pa.int32()), pa.array(["aaaaa", "bbbbb", "ccccc"])),
    ],
)
def test_offsets_inside_of_other_kinds_are_looked_at(tmp_path: Path, column: pa.Array) -> None:
    content = pa.table({"a": column})
    write_file(tmp_path / "good.arrow", content)
    assert checked(map_arrow(tmp_path / "good.arrow")).equals(content)
    path = patched(tmp_path / "a.arrow", content, struct.pack("<4i", 0, 5, 10, 15), struct.pack("<4i", 0, 5, 10**9, 15))
    with pytest.raises(pa.ArrowInvalid):
        checked(map_arrow(path))


def test_an_index_of_a_dictionary_that_is_not_there(tmp_path: Path) -> None:
    content = pa.table({"a": pa.array(["a", "b", "a", "b"]).dictionary_encode()})
    path = patched(tmp_path / "a.arrow", content, struct.pack("<4i", 0, 1, 0, 1), struct.pack("<4i", 0, 1, 7, 1))
    with pytest.raises(pa.ArrowInvalid):
        checked(map_arrow(path))


def test_what_is_looked_at_may_be_any_text_and_time(tmp_path: Path) -> None:
    bad = pa.array([b"caf\xe9", b"x" * 40])
    columns = {str(kind): bad.view(kind) for kind in (pa.string(), pa.binary())}
    columns |= {"large": bad.cast(pa.large_binary()).view(pa.large_string())}
    columns |= {"view": bad.cast(pa.binary_view()).view(pa.string_view())}
    columns |= {"date": pa.array([1, 2]).view(pa.date64()), "json": pa.nulls(2)}
    columns |= {"list": pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), columns["string"])}
    columns |= {"uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)] * 2, pa.binary(16)))}
    content = pa.table(columns)
    write_file(tmp_path / "a.arrow", content)
    assert checked(map_arrow(tmp_path / "a.arrow")).equals(content)


def listed_again(path: Path, times: int, apart: int = 0) -> None:
    """Has the end of a file with one batch list it many times."""
    whole = path.read_bytes()
    (size,) = struct.unpack("<i", whole[-10:-6])
    body, end = whole[: -10 - size], bytearray(whole[-10 - size : -10])
    table = struct.unpack_from("<I", end)[0]
    places = table - struct.unpack_from("<i", end, table)[0]
    field = table + struct.unpack_from("<H", end, places + 4 + 2 * 3)[0]
    blocks = field + struct.unpack_from("<I", end, field)[0]
    assert struct.unpack_from("<I", end, blocks)[0] == 1
    offset, about, length = struct.unpack_from("<qi4xq", end, blocks + 4)
    end += bytes(-(len(end) + 4) % 8)
    struct.pack_into("<I", end, field, len(end) - field)
    end += struct.pack("<I", times)
    end += b"".join(struct.pack("<qi4xq", offset + apart * i, about, length) for i in range(times))
    end += bytes(-len(end) % 8)
    path.write_bytes(body + end + struct.pack("<i", len(end)) + b"ARROW1")


@pytest.mark.parametrize(("times", "apart"), [(2, 0), (1000, 0), (1000, 16)])
def test_a_batch_that_is_listed_again_and_again(tmp_path: Path, image: MakeImage, times: int, apart: int) -> None:
    path = tmp_path / "a.arrow"
    write_file(path, table(image, range(2)))
    listed_again(path, 1)
    assert len(open_source(path)) == 2
    listed_again(path, times, apart)
    with pytest.raises(InputError, match=r"a\.arrow cannot be read as arrow: its end lists batches that lie over"):
        open_source(path)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_small_batches_of_many_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path, content = tmp_path / "a.arrow", pa.table({f"{i}": pa.nulls(1) for i in range(100)})
    with pa.OSFile(str(path), "wb") as sink, getattr(pa.ipc, f"new_{kind}")(sink, content.schema) as file:
        for _ in range(100):
            file.write_table(content)
    assert map_arrow(path).num_rows == 100
    monkeypatch.setattr(mapped, "_MOST", 2000)
    with pytest.raises(InputError, match=r"a\.arrow: is cut into too many small batches"):
        map_arrow(path)


def test_more_rows_than_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    rows = pa.RecordBatch.from_arrays([pa.nulls(10**9)] * 2, names=["image", "caption"])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as file:
        file.write_batch(rows)
    with pytest.raises(InputError, match=r"a\.arrow: counts 1,000,000,000 rows, but has \d+ bytes"):
        open_source(path)


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("adds", [True, False])
def test_a_dictionary_that_grows(tmp_path: Path, kind: str, adds: bool) -> None:
    path, schema = tmp_path / "a.arrow", pa.schema({"n": pa.dictionary(pa.int8(), pa.string())})
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=adds)
    with pa.OSFile(str(path), "wb") as sink, getattr(pa.ipc, f"new_{kind}")(sink, schema, options=options) as file:
        for count in (2, 3) if adds or kind == "stream" else (2, 2):
            words = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), ["a", "b", "c"][:count])
            file.write_batch(pa.record_batch([words], schema=schema))
    if adds and kind == "stream":
        with pytest.raises(InputError, match=r"a\.arrow: adds to a dictionary between batches"):
            map_arrow(path)
    else:
        assert checked(map_arrow(path)).column(0).to_pylist() == ["a", "b"] * 2


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
