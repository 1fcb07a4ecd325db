"""Tables of paths and captions, also with one quote too many; Arrow and Parquet files
with the images inside.
"""

import json
import os
import pickle
import sys

import pyarrow as pa
import pytest

from cloob import open_source
from cloob.data.batch import MAX_CAPTION_BYTES, BadSample
from cloob.data.transforms import TrainTransform
from cloob.errors import InputError
from make import (
    code_points,
    loaded,
    noise,
    outcomes,
    samples,
    sent,
    write_arrow,
    write_table,
)
from support import raises


def row_of(title, path, n=0):
    return {"title": title, "filepath": path, "n": n}


ROWS = [row_of(f"caption {i}", f"img/{i}.png", i) for i in range(4)]
FORMATS = ("t.csv", "t.tsv", "t.parquet", "t.jsonl")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img").mkdir()
    for i in range(64):
        (tmp_path / "img" / f"{i}.png").write_bytes(noise(i))
    return tmp_path


def pairs_in(source):
    """The pictures and captions of all rows."""
    return [(sample.image, sample.caption) for sample in samples(source)]


def pairs_of(numbers, word="pair"):
    """Those whose picture and caption have these numbers."""
    return [(noise(i), f"{word} {i}") for i in numbers]


def captions_of(source, n=None):
    """Those of the first rows."""
    return [source.read(row).caption for row in range(n or len(source))]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pairs(folder, name):
    path = folder / name
    absolute = row_of("caption 0", str(folder / "img" / "0.png"))
    source = open_source(write_table(path, [*ROWS, absolute]))
    assert source.shard_sizes == (5,)
    assert source.name == str(path)
    assert pairs_in(source) == pairs_of((0, 1, 2, 3, 0), "caption")
    assert source.read(3).key == "img/3.png"
    assert sent(source).read(2) == source.read(2)
    both = open_source(path, caption_column="filepath")
    assert both.read(1).caption == "img/1.png"


TAB_SEPARATED = """\ttitle\tfilepath
0\ta "fine", red flag\timg/0.png
1\t"two
lines"\timg/1.png
"""
SEMICOLONS = "\ufefftitle;filepath\r\nw\xfcrfel;img/0.png\r\nb;img/1.png\r\n"


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        # with a csv name, as the authors have it
        (TAB_SEPARATED, ['a "fine", red flag', "two\nlines"]),
        ("filepath, title,n\nimg/0.png,a,1\nimg/1.png,b,1\n", ["a", "b"]),
        (" title ,filepath , n\na,img/0.png,1\nb,img/1.png,1\n", ["a", "b"]),
        (SEMICOLONS, ["w\xfcrfel", "b"]),
        ("title,filepath\ra,img/0.png\rb,img/1.png\r", ["a", "b"]),
    ],
)
def test_delimiters_headers_and_line_ends(folder, content, captions):
    (folder / "t.csv").write_bytes(content.encode())
    assert captions_of(open_source(folder / "t.csv")) == captions


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.jsonl"])
def test_bad_rows_are_counted_by_reason(folder, name):
    too_long = "a" * (MAX_CAPTION_BYTES + 1)
    much_too_long = "b" * 1_000_000
    bad = [row_of("gone", "img/99.png"), row_of("no path", ""), row_of("folder", "img")]
    bad.append(row_of(" ", "img/0.png"))
    bad += [row_of(caption, "img/0.png") for caption in (too_long, much_too_long)]
    reasons = ["missing image"] * 3 + ["empty caption"] + ["caption too long"] * 2
    source = open_source(write_table(folder / name, [*ROWS, *bad]))
    for row, reason in enumerate(reasons, 4):
        with pytest.raises(BadSample, match=f"row {row + 1} of {name}") as caught:
            source.read(row)
        assert caught.value.reason == reason


@pytest.mark.skipif(
    os.name != "posix" or sys.platform == "darwin", reason="names are text here"
)
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_what_is_not_utf8(folder, name):
    """A caption spoils its own row; a path is read, and its key is UTF-8."""
    latin = os.fsdecode(b"caf\xe9.png")
    (folder / latin).write_bytes(noise(7))
    rows = [*ROWS, row_of("caption 0", "CAFE.png"), row_of("caption 0", "no-CAFE")]
    path = write_table(folder / name, rows)
    content = path.read_bytes().replace(b"CAFE", b"caf\xe9")
    content = content.replace(b"caption 2", b"caf\xe9")
    path.write_bytes(content)
    source = open_source(path)
    raises(BadSample, "caption not UTF-8", source.read, 2)
    assert source.read(3).caption == "caption 3"
    assert source.read(4).key == "caf\N{REPLACEMENT CHARACTER}.png"
    assert source.read(4).image == noise(7)
    with pytest.raises(BadSample) as caught:
        source.read(5)
    assert caught.value.key == "no-caf\N{REPLACEMENT CHARACTER}"


def test_a_name_of_a_column_that_is_not_utf8(folder):
    path = folder / "t.jsonl"
    lines = [json.dumps({**row, "CAFE": 1, "\ud800": 2}) for row in ROWS]
    path.write_bytes("\n".join(lines).encode().replace(b"CAFE", b"caf\xe9"))
    assert len(pairs_in(open_source(path))) == len(ROWS)
    raises(InputError, "no column 'no'", open_source, path, image_column="no")


def test_captions_that_are_no_text(folder):
    captions = [7, "caf\xe9", 1.5, True, None]
    rows = [row_of(caption, "img/0.png") for caption in captions]
    rows.append({"filepath": "img/0.png"})
    source = open_source(write_table(folder / "t.jsonl", rows))
    assert captions_of(source, 4) == ["7", "caf\xe9", "1.5", "true"]
    raises(BadSample, "missing caption", source.read, 4)
    raises(BadSample, "missing caption", source.read, 5)
    path = write_table(folder / "t.parquet", [*ROWS, row_of(None, "img/0.png")])
    raises(BadSample, "missing caption", open_source(path).read, 4)
    rows = [row_of([1, 2], "img/0.png")]
    several = open_source(write_table(folder / "t.jsonl", rows))
    assert captions_of(several) == ["1", "2"]
    path = write_table(folder / "t.parquet", rows)
    said = r"column 'title' holds list<.*>, not text"
    raises(InputError, said, open_source, path)


def quoted(path, changes, end="\n"):
    """64 rows with captions of their own; ``changes`` replaces captions, by row
    from 1.
    """
    lines = ["filepath,title"]
    for row in range(1, 65):
        caption = changes.get(row, f"caption {row}")
        lines.append(f"img/{row - 1}.png,{caption}")
    text = end.join([*lines, ""])
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(("row", "end"), [(4, "\n"), (41, "\r\n"), (63, "\r")])
def test_a_quote_that_is_never_closed(folder, row, end):
    path = quoted(folder / "t.csv", {row: '"oh no'}, end)
    raises(InputError, f"t.csv: a quote in row {row} is not closed", open_source, path)


def test_captions_of_several_lines_are_no_fault(folder):
    verses = "\n".join(f"verse {i}, and on it goes, and on" for i in range(200))
    captions = {
        3: '"two\nlines, with a comma"',
        5: '"a ""quoted"" word\r\n\r\nafter an empty line"',
        7: f'"{verses}"',
        9: '"see a.png\nand b.png, which is blue"',
        64: '"the last\none"',
    }
    source = open_source(quoted(folder / "t.csv", captions))
    assert len(pairs_in(source)) == 64
    assert source.read(4).caption == 'a "quoted" word\r\n\r\nafter an empty line'
    assert source.read(6).caption == verses


# Arrow and Parquet with the images inside


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
KINDS = pytest.mark.parametrize("kind", ["parquet", "arrow"])


def table(rows, caption="caption"):
    """Columns as ``datasets`` stores them: {bytes, path} and text."""
    structs = [{"bytes": noise(i), "path": None} for i in rows]
    captions = [f"pair {i}" for i in rows]
    return pa.table({"image": pa.array(structs, IMAGE), caption: captions})


def write_saved(folder, tables):
    """What ``Dataset.save_to_disk`` writes."""
    files = []
    for i, content in enumerate(tables):
        name = f"data-{i:05d}-of-{len(tables):05d}.arrow"
        write_arrow(folder / name, content, "stream")
        files.append({"filename": name})
    state = json.dumps({"_data_files": files})
    (folder / "state.json").write_text(state)
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))


def test_a_saved_dataset(tmp_path):
    folder = write_saved(tmp_path / "set", [table(range(5)), table(range(5, 8))])
    source = open_source(folder)
    assert source.shard_sizes == (5, 3)
    assert source.streamed is False
    assert pairs_in(source) == pairs_of(range(8))
    assert source.read(6).key == "data-00001-of-00002.arrow/1"
    packed = pickle.dumps(source)
    assert len(packed) < 3000
    assert pickle.loads(packed).read(7) == source.read(7)
    assert open_source(folder / "*.arrow").shard_sizes == (5, 3)


def test_what_datasets_itself_writes(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    kinds = {"image": datasets.Image(), "caption": datasets.Value("string")}
    features = datasets.Features(kinds)
    columns = table(range(6)).to_pydict()
    made = datasets.Dataset.from_dict(columns, features=features)
    one = tmp_path / "one"
    made.save_to_disk(str(one), num_shards=2)
    several = tmp_path / "splits"
    splits = datasets.DatasetDict({"train": made, "test": made.select([4, 1])})
    splits.save_to_disk(str(several))
    made.to_parquet(tmp_path / "p" / "train-00000-of-00001.parquet")
    every = pairs_of(range(6))
    assert pairs_in(open_source(one)) == every
    assert pairs_in(open_source(several / "test")) == [every[4], every[1]]
    assert pairs_in(open_source(tmp_path / "p")) == every
    said = "splits holds the splits test, train; name one"
    raises(InputError, said, open_source, several)


def test_parquet_with_images_is_unpacked_once(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    # more rows than are unpacked at once
    write_arrow(folder / "train-00000-of-00002.parquet", table(range(70)))
    second = folder / "train-00001-of-00002.parquet"
    write_arrow(second, table(range(70, 73)))
    source = open_source(folder)
    assert source.streamed is False
    assert source.shard_sizes == (70, 3)
    assert pairs_in(source) == pairs_of(range(73))
    unpacked = list(tmp_path.glob("cache/tables/*.arrow"))
    assert len(unpacked) == 2
    found = []
    for workers in (0, 1):
        options = {"drop_last": False, "workers": workers}
        pairs = loaded(source, TrainTransform(4), code_points, 20, **options)
        keys = [batch.keys for batch in pairs.epoch(0)]
        found.append(str(keys))
        pairs.close()
    here, there = found
    assert here == there
    assert "00000" in here
    assert "00001" in here
    # A changed file is unpacked anew.
    write_arrow(second, table(range(20, 24)))
    assert open_source(folder).read(70).image == noise(20)
    monkeypatch.setenv("CLOOB_CACHE_BYTES", "1000")
    raises(InputError, "set CLOOB_CACHE_BYTES to more", open_source, folder)


@KINDS
def test_images_as_bytes_and_as_paths(tmp_path, kind):
    first = noise(1)
    second = noise(2)
    struct = [{"bytes": None, "path": "a.png"}, {"bytes": second, "path": "gone.png"}]
    structs = pa.array(struct, IMAGE)
    texts = pa.array(["one", "two"], pa.large_string())
    columns = {"s": structs, "b": [first, second], "p": ["a.png"] * 2, "text": texts}
    path = write_arrow(tmp_path / f"a.{kind}", pa.table(columns))
    (tmp_path / "a.png").write_bytes(first)
    for column, picture in (("s", second), ("b", second), ("p", first)):
        source = open_source(path, image_column=column, caption_column="text")
        assert pairs_in(source) == [(first, "one"), (picture, "two")]


def test_bad_rows_of_arrow_are_counted_by_reason(tmp_path):
    good = {"bytes": noise(0), "path": None}
    neither = {"bytes": None, "path": None}
    gone = {"bytes": None, "path": "gone.png"}
    images = [good, good, neither, None, gone, good, good, good]
    captions = [b"good", b"good", b"x", b"x", b"x", None, b" ", b"caf\xe9"]
    expected = ["good"] * 2 + ["missing image"] * 3
    expected += ["missing caption", "empty caption", "caption not UTF-8"]
    text = pa.array(captions, pa.binary()).view(pa.string())  # not checked to be UTF-8
    content = pa.table({"image": pa.array(images, IMAGE), "title": text})
    source = open_source(write_saved(tmp_path / "set", [content]))
    assert list(outcomes(source).values()) == expected


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({}, r"no column 'title'; its columns: image, .*, n .*--caption-column"),
        ({"image_column": "img", "caption_column": "other"}, "'img'.*--image-column"),
        ({"caption_column": "n"}, "column 'n' holds int64, not text"),
        (
            {"image_column": "n", "caption_column": "other"},
            "column 'n' holds int64, not images",
        ),
    ],
)
def test_columns_are_found_or_asked_for(tmp_path, columns, said):
    content = table(range(3)).append_column("other", pa.array(["a", "b", "c"]))
    content = content.append_column("n", pa.array([1, 2, 3]))
    folder = write_saved(tmp_path / "set", [content])
    assert open_source(folder, caption_column="other").read(2).caption == "c"
    raises(InputError, said, open_source, folder, **columns)


@KINDS
def test_a_later_file_of_another_form_is_named(tmp_path, kind):
    first = table(range(3))
    folder = tmp_path / "set"
    write_arrow(folder / f"0.{kind}", first)
    second = folder / f"1.{kind}"
    write_arrow(second, first.set_column(1, "caption", pa.array([1, 2, 3])))
    raises(InputError, rf"1\.{kind}.* holds int64, not text", open_source, folder)
    write_arrow(second, table(range(3), "other"))
    raises(InputError, rf"1\.{kind}.* has no column 'caption'", open_source, folder)
    write_arrow(second, first.set_column(1, "caption", pa.nulls(3)))
    raises(BadSample, "missing caption", open_source(folder).read, 3)
    second.write_bytes(b"junk")
    raises(InputError, rf"1\.{kind} cannot be read as {kind}", open_source, folder)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_of_either_kind_is_mapped_and_compressed_arrow_read(tmp_path, kind):
    letters = pa.array(["a", "b", "a"] * 100).dictionary_encode()
    content = table(range(300)).append_column("kind", letters)
    path = write_arrow(tmp_path / "a.arrow", content, kind)
    now = pa.total_allocated_bytes()
    source = open_source(path, caption_column="caption")
    assert source.read(299).image == noise(299)
    assert pa.total_allocated_bytes() - now < path.stat().st_size / 4
    write_arrow(path, content, kind, compression="lz4")
    assert open_source(path, caption_column="caption").read(299).caption == "pair 299"


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_a_list_of_captions_is_a_pair_for_each(tmp_path, ending):
    """COCO and Flickr30k lie so on the hub; an empty list is one bad sample."""
    captions = [["a", "b"], [], ["c"], None, ["d", "e", "f"]]
    pictures = table(range(5)).column("image")
    lists = pa.array(captions, pa.list_(pa.string()))
    content = pa.table({"image": pictures, "captions": lists})
    folder = tmp_path / "set"
    write_arrow(folder / f"0.{ending}", content.slice(0, 2))
    write_arrow(folder / f"1.{ending}", content.slice(2))
    source = open_source(folder, caption_column="captions")
    assert len(source) == 8
    assert source.shard_sizes == (3, 5)
    expected = {0: (0, "a"), 1: (0, "b"), 3: (2, "c"), 5: (4, "d"), 7: (4, "f")}
    for row, (picture, caption) in expected.items():
        sample = source.read(row)
        assert sample.image == noise(picture)
        assert sample.caption == caption
    raises(BadSample, "missing caption", source.read, 2)
    raises(BadSample, "missing caption", source.read, 4)
    wanted = [0, 0, 2, 3, 4, 5, 5, 5]
    assert source.first_rows().tolist() == wanted
    in_another_order = content.column(1).take([0, 2, 1, 3, 4])
    turned = content.set_column(1, "captions", in_another_order)
    other = open_source(write_arrow(tmp_path / f"other.{ending}", turned))
    assert other.fingerprint()["captions"] != source.fingerprint()["captions"]
