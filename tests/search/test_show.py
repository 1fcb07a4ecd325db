"""Maps, thumbnails, contact sheets and pictures in terminals."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from cloob.search.show import layout, sheet, terminal
from cloob.search.show.thumbnails import thumbnail
from PIL import Image

from cloob.errors import InputError
from cloob.pictures import Unreadable
from cloob.search.index import Index
from cloob.search.records import Hit, Item
from support import picture


def photo(size: tuple[int, int] = (900, 600), orientation: int = 6) -> bytes:
    """A JPEG with a place, a device and a direction; the left half is red."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "SECRET-CAMERA", orientation
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif, comment=b"SECRET-PLACE")
    return stream.getvalue()


def test_a_thumbnail_is_small_upright_and_says_nothing_else() -> None:
    data = thumbnail(photo(), 100)
    assert b"SECRET" not in data and data.startswith(b"\xff\xd8\xff")
    image = Image.open(io.BytesIO(data))
    assert image.size == (67, 100) and not image.getexif()  # turned by a quarter
    top, bottom = image.getpixel((30, 10)), image.getpixel((30, 90))
    assert top[0] > 200 > 100 > top[2] and bottom[2] > 200 > 100 > bottom[0]
    assert Image.open(io.BytesIO(thumbnail(picture("red", (7, 5)), 100))).size == (7, 5)
    for side in (0, -1, 5000):
        with pytest.raises(InputError, match="a thumbnail of"):
            thumbnail(picture("red"), side)
    with pytest.raises(Unreadable):
        thumbnail(b"no picture")


def test_pca_is_the_two_directions_of_largest_variance() -> None:
    rows = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32) * np.array(
        [9, 5, 1, 1, 1, 1], np.float32
    )
    places = layout.layout(rows)
    assert places.min(0).tolist() == [0, 0] and places.max(0).tolist() == [1, 1]
    centred = rows - rows.mean(0)
    _, _, directions = np.linalg.svd(centred.astype(np.float64))
    for axis in range(2):
        along = centred @ directions[axis]
        assert abs(np.corrcoef(along, places[:, axis])[0, 1]) > 0.9999
    np.testing.assert_array_equal(places, layout.layout(rows.copy()))
    np.testing.assert_allclose(layout.layout(-rows[::-1])[::-1], places, atol=2)  # whatever the sign, within the map


def test_tsne_keeps_groups_together_and_is_the_same_each_time() -> None:
    generator = np.random.default_rng(0)
    rows = np.repeat(np.eye(3, 12), 15, axis=0) + 0.05 * generator.standard_normal((45, 12))
    places = layout.layout(rows.astype(np.float32), "tsne")
    np.testing.assert_array_equal(places, layout.layout(rows.astype(np.float32), "tsne"))
    distance = np.linalg.norm(places[:, None] - places[None], axis=2) + 9 * np.eye(45)
    assert (distance.argmin(1) // 15 == np.arange(45) // 15).all()


def test_a_map_of_an_index(index: Index) -> None:
    ids, places = index.map(sample=10)
    again, same = index.map(sample=10)
    assert len(ids) == 10 and places.shape == (10, 2) and sorted(set(ids.tolist())) == ids.tolist()
    np.testing.assert_array_equal(ids, again)
    np.testing.assert_array_equal(places, same)
    assert len(index.map(where="name like 'red%'")[0]) == 4


def hit(**changes: object) -> Hit:
    facts = {"caption": '<script>alert(1)</script> & "x"', "path": "/a/<img src=x>.jpg", **changes}
    return Hit(Item(7, "a", content="", bytes=1, mtime_ns=0, width=1, height=1, **facts), 0.5, 2.25)  # type: ignore[arg-type]


def test_the_contact_sheet_runs_nothing_and_fetches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "made" / "sheet.html"
    hits = [hit(), hit(path="/a/\udcff.jpg", caption=None)]
    sheet.write_sheet(path, "<b>query</b>", "2 of 3", hits, lambda item: photo() if item.caption else None)
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page and "<img src=x" not in page
    assert page.count("<img ") == 1 and "not readable any more" in page and "margin 2.2" in page
    assert "default-src 'none'; img-src data:" in page and "http" not in page.replace("http-equiv", "")
    (data,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert b"SECRET" not in base64.b64decode(data)
    (file := tmp_path / "a 'b'.jpg").write_bytes(photo())
    sheet.write_sheet(path, "x", "1 of 3", [hit(path=str(file)), hit()], lambda item: photo())
    (link,) = re.findall(r'<a href="([^"]+)"><img ', path.read_text())
    assert link == file.as_uri()
    sheet.write_sheet(path, "x", "0 of 3", [], lambda item: None)
    assert "Nothing fits." in path.read_text()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "foot-extra"}, "sixel"),
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, None),
        ({"TERM": "xterm-kitty", "CLOOB_PICTURES": "none"}, None),
        ({"TERM": "xterm", "CLOOB_PICTURES": "sixel"}, "sixel"),
    ],
)
def test_which_terminals_show_pictures(environment: dict[str, str], expected: str | None) -> None:
    assert terminal.protocol(environment, True) == expected
    assert terminal.protocol(environment, False) is None


def test_kitty_and_iterm2_get_the_picture() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (120, 150, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    shown = terminal.shown(stream.getvalue(), "kitty")
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", shown)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in parts) == shown and len(parts) > 3
    assert parts[0][0] == "a=T,f=100,m=1" and {keys for keys, _ in parts[1:-1]} == {"m=1"} and parts[-1][0] == "m=0"
    assert all(len(data) <= 4096 for _, data in parts)
    data = base64.b64decode("".join(data for _, data in parts))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    match = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+):([^\a]*)\a", terminal.shown(stream.getvalue(), "iterm2"))
    assert match is not None and len(base64.b64decode(match[2])) == int(match[1])


def test_sixels_are_the_picture() -> None:
    image = Image.new("RGB", (23, 15), "red")
    image.paste((0, 255, 0), (4, 3, 20, 14))
    image.putpixel((22, 14), (0, 0, 255))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    seen = decode_sixels(terminal.shown(stream.getvalue(), "sixel"))
    assert np.abs(seen.astype(int) - np.asarray(image)).max() <= 3  # colours are percentages


def decode_sixels(text: str) -> np.ndarray:
    """A picture from sixels, pixel by pixel."""
    body = re.fullmatch(r"\x1bPq(.*)\x1b\\", text, re.DOTALL)[1]  # type: ignore[index]
    width, height = map(int, re.match(r'"1;1;(\d+);(\d+)', body).groups())  # type: ignore[union-attr]
    pixels, palette = np.zeros((height, width, 3), np.uint8), {}
    x = top = colour = 0
    for token in re.findall(r'"[\d;]+|#\d+(?:;[\d;]+)?|!\d+.|.', body):
        if token[0] == "#":
            colour, *rest = map(int, token[1:].split(";"))
            if rest:
                palette[colour] = [round(value * 255 / 100) for value in rest[1:]]
        elif token == "$":
            x = 0
        elif token == "-":
            x, top = 0, top + 6
        elif token[0] != '"':
            count = int(token[1:-1]) if token[0] == "!" else 1
            for bit in range(6):
                if (ord(token[-1]) - 63) >> bit & 1:
                    pixels[top + bit, x : x + count] = palette[colour]
            x += count
    return pixels
