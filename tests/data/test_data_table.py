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
from cloob.data.loader import PairLoader
from cloob.data.transforms import TrainTransform
from cloob.errors import InputError
from make import code_points, noise, outcomes, write_arrow, write_table
from support import raises

ROWS = [{"title": f"caption {i}", "filepath": f"img/{i}.png", "n": i} for i in range(4)]
FORMATS = ("t.csv", "t.tsv", "t.parquet", "t.jsonl")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img").mkdir()
    for i in range(64):
        (tmp_path / "img" / f"{i}.png").write_bytes(noise(i))
    return tmp_path


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pairs(folder, name):
    path = write_table(
        folder / name, [*ROWS, {**ROWS[0], "filepath": str(folder / "img" / "0.png")}]
    )
    source = open_source(path)
    assert len(source) == 5
    assert source.shard_sizes == (5,)
    assert source.name.endswith(name)
    for i in (3, 0):
        sample = source.read(i)
        assert (sample.key, sample.caption, sample.image) == (
            f"img/{i}.png",
            f"caption {i}",
            noise(i),
        )
    assert source.read(4).image == noise(0)  # an absolute path is taken as it is
    assert pickle.loads(pickle.dumps(source)).read(2) == source.read(2)
    assert (
        open_source(path, caption_column="filepath").read(1).caption == "img/1.png"
    )  # one column can be both


@pytest.mark.parametrize(
    ("name", "content", "captions"),
    [
        (
            "cc3m.csv",
            (
                '\ttitle\tfilepath\n0\ta "fine", red'
                ' flag\timg/0.png\n1\t"two\nlines"\timg/1.png\n'
            ),
            None,
        ),
        ("t.csv", "filepath, title,n\nimg/0.png,a,1\nimg/1.png,b,1\n", ["a", "b"]),
        ("t.csv", " title ,filepath , n\na,img/0.png,1\nb,img/1.png,1\n", ["a", "b"]),
        (
            "t.csv",
            "\ufefftitle;filepath\r\nw\xfcrfel;img/0.png\r\nb;img/1.png\r\n",
            ["w\xfcrfel", "b"],
        ),
        ("t.csv", "title,filepath\ra,img/0.png\rb,img/1.png\r", ["a", "b"]),
        (
            "t.jsonl",
            "".join(json.dumps(row) + "\r" for row in ROWS),
            [f"caption {i}" for i in range(4)],
        ),
    ],
)
def test_delimiters_headers_and_line_ends(folder, name, content, captions):
    (folder / name).write_bytes(content.encode())
    source = open_source(folder / name)
    expected = captions or [
        'a "fine", red flag',
        "two\nlines",
    ]  # tab-separated with a csv name, as the authors have it
    assert [source.read(i).caption for i in range(len(source))] == expected


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.jsonl"])
def test_bad_rows_are_counted_by_reason(folder, name):
    bad = [
        ("gone", "img/99.png", "missing image"),
        (" ", "img/0.png", "empty caption"),
        ("no path", "", "missing image"),
        ("a" * (MAX_CAPTION_BYTES + 1), "img/0.png", "caption too long"),
        ("a folder", "img", "missing image"),
        ("b" * 1_000_000, "img/0.png", "caption too long"),
    ]
    rows = [
        *ROWS,
        *({"title": title, "filepath": path, "n": 0} for title, path, _ in bad),
    ]
    source = open_source(write_table(folder / name, rows))
    for i, (_, _, reason) in enumerate(bad, 4):
        with pytest.raises(BadSample, match=f"row {i + 1} of {name}") as caught:
            source.read(i)
        assert caught.value.reason == reason


@pytest.mark.skipif(
    os.name != "posix" or sys.platform == "darwin", reason="names are text here"
)
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_what_is_not_utf8(folder, name):
    """A caption spoils its own row; a path is read, and its key is UTF-8."""
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(noise(7))
    path = write_table(
        folder / name,
        [*ROWS, *({**ROWS[0], "filepath": path} for path in ("CAFE.png", "no-CAFE"))],
    )
    path.write_bytes(
        path.read_bytes().replace(b"CAFE", b"caf\xe9").replace(b"caption 2", b"caf\xe9")
    )
    source = open_source(path)
    raises(BadSample, "caption not UTF-8", source.read, 2)
    assert source.read(3).caption == "caption 3"
    assert (source.read(4).key, source.read(4).image) == (
        "caf\N{REPLACEMENT CHARACTER}.png",
        noise(7),
    )
    with pytest.raises(BadSample) as caught:
        source.read(5)
    assert caught.value.key == "no-caf\N{REPLACEMENT CHARACTER}"


def test_captions_that_are_no_text(folder):
    captions = [7, "caf\xe9", 1.5, True, None]
    rows = [
        {"filepath": "img/0.png"},
        *({**ROWS[0], "title": caption} for caption in captions),
    ]
    source = open_source(write_table(folder / "t.jsonl", rows))
    assert [source.read(i).caption for i in range(1, 5)] == [
        "7",
        "caf\xe9",
        "1.5",
        "true",
    ]
    missing = open_source(
        write_table(
            folder / "t.parquet",
            [*ROWS, {"title": None, "filepath": "img/0.png", "n": 0}],
        )
    )
    for each, row in ((source, 0), (source, 5), (missing, 4)):
        raises(BadSample, "missing caption", each.read, row)
    rows = [{"title": [1, 2], "filepath": "img/0.png"}]
    raises(
        InputError,
        r"column 'title' holds list<.*>, not text",
        open_source,
        write_table(folder / "t.parquet", rows),
    )
    rows += [{"title": [], "filepath": "img/1.png"}]
    source = open_source(write_table(folder / "t.jsonl", rows))
    assert [source.read(i).caption for i in range(2)] == ["1", "2"]
    assert source.pictures().tolist() == [0, 0, 2]
    raises(BadSample, "missing caption", source.read, 2)


def quoted(path, changes, end="\n", turned=False):
    """64 rows with captions of their own; ``changes`` replaces captions, by row
    from 1.
    """
    rows = [
        ("filepath", "title"),
        *((f"img/{i - 1}.png", changes.get(i, f"caption {i}")) for i in range(1, 65)),
    ]
    path.write_bytes(
        (
            end.join(",".join(row[::-1] if turned else row) for row in rows) + end
        ).encode()
    )
    return path


@pytest.mark.parametrize(("row", "end"), [(4, "\n"), (41, "\r\n"), (63, "\r")])
def test_a_quote_that_is_never_closed(folder, row, end):
    path = quoted(folder / "t.csv", {row: '"oh no'}, end)
    raises(InputError, f"t.csv: a quote in row {row} is not closed", open_source, path)


def test_captions_of_several_lines_are_no_fault(folder):
    captions = {
        3: '"two\nlines, with a comma"',
        5: '"a ""quoted"" word\r\n\r\nafter an empty line"',
        7: (
            '"'
            + "\n".join(f"verse {i}, and on it goes, and on" for i in range(200))
            + '"'
        ),
        9: '"see a.png\nand b.png, which is blue"',
        64: '"the last\none"',
    }
    source = open_source(quoted(folder / "t.csv", captions))
    assert [bool(source.read(i).caption) for i in range(64)] == [True] * 64
    assert source.read(4).caption == 'a "quoted" word\r\n\r\nafter an empty line'


# Arrow and Parquet with the images inside


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
KINDS = pytest.mark.parametrize("kind", ["parquet", "arrow"])


def table(rows, caption="caption"):
    """Columns as ``datasets`` stores them: {bytes, path} and text."""
    pictures = pa.array([{"bytes": noise(i), "path": None} for i in rows], IMAGE)
    return pa.table({"image": pictures, caption: [f"pair {i}" for i in rows]})


def write_saved(folder, tables):
    """What ``Dataset.save_to_disk`` writes."""
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, content in zip(names, tables, strict=True):
        write_arrow(folder / name, content, "stream")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))


def test_a_saved_dataset(tmp_path):
    folder = write_saved(tmp_path / "set", [table(range(5)), table(range(5, 8))])
    source = open_source(folder)
    assert source.shard_sizes == (5, 3)
    assert not source.streamed
    assert source.name == str(folder)
    assert [(source.read(i).image, source.read(i).caption) for i in range(8)] == [
        (noise(i), f"pair {i}") for i in range(8)
    ]
    assert source.read(6).key == "data-00001-of-00002.arrow/1"
    packed = pickle.dumps(source)
    assert len(packed) < 3000
    assert pickle.loads(packed).read(7) == source.read(7)
    assert open_source(folder / "data-00000-of-00002.arrow").read(4).caption == "pair 4"
    assert open_source(folder / "*.arrow").shard_sizes == (5, 3)


def test_what_datasets_itself_writes(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string")}
    )
    rows = {
        "image": [{"bytes": noise(i), "path": None} for i in range(6)],
        "caption": [f"pair {i}" for i in range(6)],
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": made, "test": made.select([4, 1])}).save_to_disk(
        str(tmp_path / "splits")
    )
    made.to_parquet(tmp_path / "p" / "train-00000-of-00001.parquet")
    for place, order in (("one", range(6)), ("splits/test", (4, 1)), ("p", range(6))):
        source = open_source(tmp_path / place)
        found = [source.read(i) for i in range(len(source))]
        assert [(s.image, s.caption) for s in found] == [
            (noise(i), f"pair {i}") for i in order
        ]
    raises(
        InputError,
        "splits holds the splits test, train; name one",
        open_source,
        tmp_path / "splits",
    )


def test_parquet_with_images_is_unpacked_once(tmp_path):
    for number, rows in enumerate(
        (range(70), range(70, 73))
    ):  # more rows than are unpacked at once
        write_arrow(
            tmp_path / "set" / f"train-0000{number}-of-00002.parquet", table(rows)
        )
    source = open_source(tmp_path / "set")
    assert source.streamed
    assert source.shard_sizes == (70, 3)
    assert [source.read(i).image for i in (72, 0, 69)] == [
        noise(i) for i in (72, 0, 69)
    ]
    assert len(list(tmp_path.glob("cache/tables/*.arrow"))) == 2
    found = []
    for workers in (0, 1):
        pairs = PairLoader(
            source, TrainTransform(4), code_points, 20, drop_last=False, workers=workers
        )
        found.append(str([batch.keys for batch in pairs.epoch(0)]))
        pairs.close()
    assert found[0] == found[1]
    assert all(f"0000{n}" in found[0] for n in (0, 1))
    # A changed file is unpacked anew.
    write_arrow(tmp_path / "set" / "train-00001-of-00002.parquet", table(range(20, 24)))
    assert open_source(tmp_path / "set").read(70).image == noise(20)


@KINDS
def test_images_as_bytes_and_as_paths(tmp_path, kind):
    struct = [{"bytes": None, "path": "a.png"}, {"bytes": noise(2), "path": "gone.png"}]
    columns = {
        "s": pa.array(struct, IMAGE),
        "b": pa.array([noise(1), noise(2)]),
        "p": ["a.png", "a.png"],
    }
    path = write_arrow(
        tmp_path / f"a.{kind}",
        pa.table({**columns, "text": pa.array(["one", "two"], pa.large_string())}),
    )
    (tmp_path / "a.png").write_bytes(noise(1))
    for column, expected in (("s", [1, 2]), ("b", [1, 2]), ("p", [1, 1])):
        source = open_source(path, image_column=column, caption_column="text")
        assert [source.read(i).image for i in range(2)] == [noise(i) for i in expected]
    assert (
        open_source(path, image_column="p", caption_column="p").read(0).caption
        == "a.png"
    )  # one column can be both


def test_bad_rows_of_arrow_are_counted_by_reason(tmp_path):
    good = {"bytes": noise(0), "path": None}
    rows = [
        (good, b"good"),
        (good, b"good"),
        ({"bytes": None, "path": None}, b"x"),
        (None, b"x"),
        ({"bytes": None, "path": "gone.png"}, b"x"),
        (good, None),
        (good, b" "),
        (good, b"caf\xe9"),
    ]
    images, captions = zip(*rows, strict=True)
    text = pa.array(captions, pa.binary()).view(pa.string())  # not checked to be UTF-8
    source = open_source(
        write_saved(
            tmp_path / "set",
            [pa.table({"image": pa.array(images, IMAGE), "title": text})],
        )
    )
    reasons = ["missing image"] * 3 + [
        "missing caption",
        "empty caption",
        "caption not UTF-8",
    ]
    assert [*outcomes(source).values()] == ["good"] * 2 + reasons


def test_columns_are_found_or_asked_for(tmp_path):
    content = table(range(3)).append_column("other", pa.array(["a", "b", "c"]))
    folder = write_saved(
        tmp_path / "set", [content.append_column("n", pa.array([1, 2, 3]))]
    )
    assert open_source(folder, caption_column="other").read(2).caption == "c"
    for columns, said in (
        (
            {},
            (
                r"no column 'title'; its columns: image, caption, other, n"
                r" .*--caption-column"
            ),
        ),
        (
            {"image_column": "img", "caption_column": "other"},
            r"no column 'img'.*--image-column",
        ),
        ({"caption_column": "n"}, "column 'n' holds int64, not text"),
        (
            {"image_column": "n", "caption_column": "other"},
            "column 'n' holds int64, not images",
        ),
    ):
        raises(InputError, said, open_source, folder, **columns)


@KINDS
def test_a_later_file_of_another_form_is_named(tmp_path, kind):
    first = table(range(3))
    write_arrow(tmp_path / "set" / f"0.{kind}", first)
    for content, said in (
        (first.set_column(1, "caption", pa.array([1, 2, 3])), "holds int64, not text"),
        (table(range(3), "other"), "has no column 'caption'"),
    ):
        write_arrow(tmp_path / "set" / f"1.{kind}", content)
        raises(InputError, rf"1\.{kind}.* {said}", open_source, tmp_path / "set")
    write_arrow(
        tmp_path / "set" / f"1.{kind}", first.set_column(1, "caption", pa.nulls(3))
    )
    raises(BadSample, "missing caption", open_source(tmp_path / "set").read, 3)
    (tmp_path / "set" / f"1.{kind}").write_bytes(b"junk")
    raises(
        InputError,
        rf"1\.{kind} cannot be read as {kind}",
        open_source,
        tmp_path / "set",
    )


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_of_either_kind_is_mapped_and_compressed_arrow_read(tmp_path, kind):
    content = table(range(300)).append_column(
        "kind", pa.array(["a", "b", "a"] * 100).dictionary_encode()
    )
    path = write_arrow(tmp_path / "a.arrow", content, kind)
    now = pa.total_allocated_bytes()
    source = open_source(path, caption_column="caption")
    assert [(source.read(i).image, source.read(i).caption) for i in (0, 299)] == [
        (noise(0), "pair 0"),
        (noise(299), "pair 299"),
    ]
    assert pa.total_allocated_bytes() - now < path.stat().st_size / 4
    write_arrow(path, content, kind, compression="lz4")
    assert open_source(path, caption_column="caption").read(299).caption == "pair 299"


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_a_list_of_captions_is_a_pair_for_each(tmp_path, ending):
    """COCO and Flickr30k lie so on the hub; an empty list is one bad sample."""
    captions = [["a", "b"], [], ["c"], None, ["d", "e", "f"]]
    rows = [0, 0, 1, 2, 3, 4, 4, 4]
    pictures = table(range(5)).column("image")
    content = pa.table(
        {"image": pictures, "captions": pa.array(captions, pa.list_(pa.string()))}
    )
    (tmp_path / "set").mkdir()
    for number, part in enumerate((content.slice(0, 2), content.slice(2))):
        write_arrow(tmp_path / "set" / f"{number}.{ending}", part)
    source = open_source(tmp_path / "set", caption_column="captions")
    assert (len(source), source.shard_sizes) == (8, (3, 5))
    for index, caption in enumerate(["a", "b", None, "c", None, "d", "e", "f"]):
        if caption is None:
            raises(BadSample, "missing caption", source.read, index)
        else:
            assert source.read(index).caption == caption
        if caption is not None:
            assert source.read(index).image == noise(rows[index])
    assert source.pictures().tolist() == [0, 0, 2, 3, 4, 5, 5, 5]
    other = content.set_column(1, "captions", content.column(1).take([0, 2, 1, 3, 4]))
    write_arrow(tmp_path / f"other.{ending}", other)
    assert (
        open_source(tmp_path / f"other.{ending}").fingerprint()["captions"]
        != source.fingerprint()["captions"]
    )
