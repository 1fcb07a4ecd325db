"""``cloob data`` as a user runs it, on a folder with most faults that a folder can have."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from cloob.cli import main
from make import encoded, noise_image


def camera(seed: int, width: int = 40, height: int = 30) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "SECRET-CAMERA"
    return encoded(noise_image(seed, width, height), "JPEG", exif=exif)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good pairs, of which two pictures and three captions are the same; two bad ones."""
    path = tmp_path_factory.mktemp("pairs")
    for name, seed, caption in (
        ("a", 1, "a <b>red</b> square"),
        ("b", 1, "A dog"),
        ("c", 2, "a  dog"),
        ("d", 3, "a dog"),
        ("e", 4, " ".join(["word"] * 100)),
    ):
        (path / f"{name}.jpg").write_bytes(camera(seed, *((300, 240) if name == "d" else ())))
        (path / f"{name}.txt").write_text(caption)
    (path / "f.jpg").write_bytes(camera(5)[:200])
    (path / "f.txt").write_text("cut")
    (path / "g.jpg").write_bytes(camera(6))
    return path


def test_the_table_and_the_sheet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "made" / "sheet.html"
    assert main(["data", str(folder), "--out", str(sheet), "--pictures", "3"]) == 0
    said = capsys.readouterr().out
    for line in (
        *(r"rows +7\n", r"usable +5\n", r"corrupt image +1, such as f\.jpg", r"missing caption +1, such as g\.jpg"),
        *(r"width +40 to 300, half of them at most 40", r"small pictures +4 with", r"tokens +\d to 102"),
        *(r"cut captions +1 with more than 77", r"equal pictures +1 copies", r"equal captions +2 .*; 3 say 'A dog'"),
    ):
        assert re.search(line, said), line
    page = sheet.read_text()
    assert page.count("<img ") == 3 + 1  # and the one that is there twice
    assert "a &lt;b&gt;red&lt;/b&gt; square" in page and "<b>red" not in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    uris = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert len(uris) == 4 and not any(b"SECRET" in base64.b64decode(uri) for uri in uris)


def test_a_jpeg_without_its_end_and_heic_without_a_decoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif.HeifImagePlugin", None)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    for name, data in (("a.jpg", camera(1)), ("b.jpg", camera(2)), ("c.jpg", camera(3)[:-3]), ("d.heic", heic)):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    assert main(["data", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"no decoder +1, such as d\.heic \(HEIC: pip install pillow-heif\)", said)
    assert re.search(r"usable +3\n", said) and re.search(r"truncated JPEG +1, taken, such as c\.jpg\n", said)
    assert main(["data", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["truncated"] == {"count": 1, "examples": ["c.jpg"]}
