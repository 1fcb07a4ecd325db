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


def test_what_it_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["rows"], facts["looked_at"], facts["usable"]) == (7, 7, 5)
    assert {reason: entry["count"] for reason, entry in facts["bad"].items()} == {
        "corrupt image": 1,
        "missing caption": 1,
    }
    assert facts["bad"]["missing caption"]["examples"][0]["key"] == "g.jpg"
    assert facts["pictures"]["width"] == {"min": 40, "median": 40, "p95": 300, "max": 300}
    assert facts["pictures"]["below_224"] == 4
    assert facts["captions"]["tokens"]["max"] == 102 and facts["captions"]["cut"] == 1
    repeated = facts["duplicates"]
    assert repeated["pictures"] == {"surplus": 1, "most": [{"count": 2, "text": "a.jpg", "row": 0}]}
    assert repeated["captions"] == {"surplus": 2, "most": [{"count": 3, "text": "A dog", "row": 1}]}


def test_the_table_and_the_sheet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "made" / "sheet.html"
    assert main(["data", str(folder), "--out", str(sheet), "--pictures", "3"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"missing caption +1, such as g\.jpg", said) and re.search(
        r"cut captions +1 with more than 77", said
    )
    assert "3 say 'A dog'" in said
    assert re.search(r"equal pictures +1 copies among captioned pictures", said)
    page = sheet.read_text()
    assert page.count("<img ") == 3 + 1  # and the one that is there twice
    assert "a &lt;b&gt;red&lt;/b&gt; square" in page and "<b>red" not in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    uris = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert len(uris) == 4 and not any(b"SECRET" in base64.b64decode(uri) for uri in uris)


def test_a_jpeg_without_its_end_and_heic_without_a_decoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
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
