"""Maps, thumbnails, contact sheets, exports, and pictures in terminals."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from index_fakes import FakeEncoder, options, write_noise
from PIL import Image
from pyarrow import parquet

from cloob.errors import InputError
from cloob.search import terminal
from cloob.search.index import Index
from cloob.search.records import IndexedModel, Item
from cloob.search.where import parse


def photo(path: Path, orientation: int = 6) -> Path:
    """A JPEG with a place, a device and a direction; the left half is red."""
    image = Image.new("RGB", (900, 600), "blue")
    image.paste("red", (0, 0, 450, 600))
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "SECRET-CAMERA", orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", exif=exif, comment=b"SECRET-PLACE")
    return path


def test_a_thumbnail_is_small_upright_and_says_nothing_else(tmp_path: Path) -> None:
    photo(tmp_path / "pictures" / "a.jpg")
    Image.new("RGB", (7, 5), "red").save(tmp_path / "pictures" / "b.png")
    with Index.create(tmp_path / "index") as index:
        index.update([tmp_path / "pictures"], options(FakeEncoder()))
        data = index.thumbnail(1, 100)
        assert b"SECRET" not in data and data.startswith(b"\xff\xd8\xff")
        image = Image.open(io.BytesIO(data))
        assert image.size == (67, 100) and not image.getexif()  # turned by a quarter
        top, bottom = image.getpixel((30, 10)), image.getpixel((30, 90))
        assert top[0] > 200 > 100 > top[2] and bottom[2] > 200 > 100 > bottom[0]
        assert Image.open(io.BytesIO(index.thumbnail(2, 100))).size == (7, 5)
        for size in (0, -1, 5000):
            with pytest.raises(InputError, match="a thumbnail of"):
                index.thumbnail(1, size)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def index_of(place: Path, rows: np.ndarray) -> Index:
    """An index with these vectors, of pictures that do not exist."""
    index = Index.create(place)
    index.store.add_model(IndexedModel("m", "m", "f" * 32, rows.shape[1]))
    items = [Item(0, "s", f"{i}.png", str(i), 1, 0, 1, 1) for i in range(len(rows))]
    index.store.write(items, "m", rows.astype(np.float32))
    return index


def test_maps(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = unit(generator.standard_normal((40, 6)) * [9, 5, 1, 1, 1, 1])
    with index_of(tmp_path / "wide", rows) as index:
        ids, places = index.map()
        assert places.min(0).tolist() == [0, 0] and places.max(0).tolist() == [1, 1]
        centred = rows - rows.mean(0)
        for axis, direction in enumerate(np.linalg.svd(centred)[2][:2]):
            assert abs(np.corrcoef(centred @ direction, places[:, axis])[0, 1]) > 0.9999
        np.testing.assert_array_equal(places, index.map()[1])
        some = index.map(sample=10)[0].tolist()
        assert len(some) == 10 and some == sorted(set(some)) == index.map(sample=10)[0].tolist()
        assert index.map(where="id <= 4")[0].tolist() == [1, 2, 3, 4] and ids.tolist() == list(range(1, 41))
        assert index.map(where="id = 1")[1].tolist() == [[0.5, 0.5]]
    groups = unit(np.repeat(np.eye(3, 12), 10, axis=0) + 0.05 * generator.standard_normal((30, 12)))
    with index_of(tmp_path / "groups", groups) as index:  # t-SNE keeps groups together, the same each time
        places = index.map(method="tsne")[1]
        np.testing.assert_array_equal(places, index.map(method="tsne")[1])
        distance = np.linalg.norm(places[:, None] - places[None], axis=2) + 9 * np.eye(30)
        assert (distance.argmin(1) // 10 == np.arange(30) // 10).all()


def test_an_export(tmp_path: Path) -> None:
    for seed in range(30):
        write_noise(tmp_path / "p" / f"{seed}.png", seed)
    write_noise(tmp_path / "p" / "q.png", 0)
    index = Index.create(tmp_path / "index")
    index.update([tmp_path / "p"], options(FakeEncoder()))
    assert index.export(tmp_path / "out" / "e.parquet") == 31
    rows = parquet.read_table(tmp_path / "out" / "e.parquet").to_pylist()
    assert [row["path"] for row in rows] == [item.path for item in index.items([row["id"] for row in rows])]
    vectors = np.array([row["vector"] for row in rows], np.float32)
    assert (vectors == index.store.vectors("fake", [row["id"] for row in rows])).all()
    np.testing.assert_allclose([[row["x"], row["y"]] for row in rows], index.map()[1], atol=1e-6)
    assert index.export(tmp_path / "one.parquet", where=parse("path like '%/q.png'")) == 1
    with pytest.raises(InputError, match="no picture"):
        index.export(tmp_path / "none.parquet", where=parse("path = 'x'"))
    assert not list(tmp_path.glob(".tmp*")) and not (tmp_path / "none.parquet").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, None),
        ({"TERM": "xterm-kitty", "CLOOB_PICTURES": "none"}, None),
        ({"TERM": "dumb", "CLOOB_PICTURES": "iterm2"}, "iterm2"),
        ({"TERM": "xterm-256color"}, None),
    ],
)
def test_which_terminals_show_pictures(environment: dict[str, str], expected: str | None) -> None:
    assert terminal.protocol(environment, True) == expected
    assert terminal.protocol(environment, False) is None


def test_kitty_and_iterm2_get_the_picture() -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(file := io.BytesIO(), "PNG")
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", terminal.shown(file.getvalue(), "kitty"))
    assert [keys for keys, _ in parts] == ["a=T,f=100,m=1", *["m=1"] * (len(parts) - 2), "m=0"] and len(parts) > 3
    assert all(len(data) <= 4096 for _, data in parts)
    match = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+):([^\a]*)\a", terminal.shown(file.getvalue(), "iterm2"))
    assert match is not None and match[2] == "".join(data for _, data in parts)
    shown = base64.b64decode(match[2])
    assert len(shown) == int(match[1])
    assert Image.open(io.BytesIO(shown)).tobytes() == Image.open(file).tobytes()
