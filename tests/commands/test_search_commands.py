"""``cloob search``, ``cloob classify`` and ``cloob embed`` as a user runs them, with a model that knows colours."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import pty
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cloob.cli import main
from cloob.commands.work.embed import write_vectors
from cloob.commands.work.serve import run as serve
from cloob.commands.work.showing import write_new
from cloob.models.folder import read_model, save_model
from cloob.models.runs import MODEL_FOLDER
from cloob.models.towers import create_model
from cloob.pictures import Unreadable
from cloob.search.index import Index
from cloob.search.sort.fewshot import is_head
from cloob.search.update import UpdateOptions
from search_colours import ColourModel, make_index, write_pictures
from support import picture, refused, run_cloob


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``pictures`` and ``index``."""
    folder = tmp_path_factory.mktemp("searched")
    make_index(folder / "index", write_pictures(folder / "pictures"))
    return folder


@pytest.fixture(autouse=True)
def colour_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever model is asked for knows colours, and each name is one of a model."""
    monkeypatch.setattr("cloob.models.names.check_source", lambda _: None)
    for name in ("cloob.models.load.load_model", "cloob.models.fingerprint.load_model"):
        monkeypatch.setattr(name, lambda *_, **__: ColourModel())
    for variable in ("CLOOB_CACHE", "CLOOB_CACHE_BYTES"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))  # put back at the end


def no_model(*_: object, **__: object) -> ColourModel:
    raise AssertionError("a model is loaded")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    assert main(words) == 0
    out, err = capsys.readouterr()
    return out, err


def test_lines_json_and_paths(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = str(place / "index")
    out, err = run(capsys, "search", index, "a red thing")
    lines = [line.split("\t") for line in out.splitlines()]
    assert err == "" and len(lines) == 4
    for score, margin, id_, path, caption in lines:
        assert float(score) > 0.9 and float(margin) > 3 and int(id_) > 0
        assert Path(path).stem.startswith("red-") and caption.startswith("red number")
    found = json.loads(run(capsys, "search", index, "red", "--json", "--top", "2")[0])
    assert (found["query"], found["searched"], found["cut"], found["model"]) == (["red"], 32, 0, "colours")
    assert [hit["path"] for hit in found["hits"]] == [line[3] for line in lines[:2]]
    assert found["hits"][0].keys() >= {"id", "score", "margin", "caption", "width", "columns", "date"}
    out, _ = run(capsys, "search", index, "red", "--paths")
    assert out.splitlines() == [line[3] for line in lines]
    out, _ = run(capsys, "search", index, "red", "--paths", "-0")
    assert out.split("\0") == [*(line[3] for line in lines), ""]


def test_the_first_line_of_a_caption_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, caption = tmp_path / "pictures", "a long first line\r\nsecond\nthird"
    pictures.mkdir()
    (pictures / "red.png").write_bytes(picture("red"))
    (pictures / "red.txt").write_bytes(caption.encode())
    index = str(make_index(tmp_path / "index", pictures))
    assert run(capsys, "search", index, "red")[0].endswith("red.png\ta long first line\n")
    hits = json.loads(run(capsys, "search", index, "red", "--json")[0])["hits"]
    assert hits[0]["caption"].split() == caption.split()
    assert run(capsys, "search", index, "red", "--explain")[0].count("red.png  a long first line\n") == 2
    for variable, value in {"CLOOB_PICTURES": "none", "COLUMNS": str(25 + len(str(pictures / "red.png")) + 7)}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(capsys, "search", index, "red")[0].endswith("red.png  a long…\n")


def test_a_picture_that_does_not_decode_here_has_its_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def undecodable(*_: object) -> None:
        raise Unreadable("no decoder", "HEIC; not installed")

    monkeypatch.setattr("cloob.search.show.terminal.protocol", lambda *_: "kitty")
    monkeypatch.setattr("cloob.search.show.terminal.small", undecodable)
    out, _ = run(capsys, "search", str(place / "index"), "red")
    assert out.count("(no decoder: HEIC; not installed)\n") == 4 and out.count("red-") == 4


def test_weights_filters_pictures_and_likeness(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, red = str(place / "index"), str(place / "pictures" / "red-1.png")

    def found(*words: str) -> list[str]:
        return [Path(path).stem for path in run(capsys, "search", index, *words, "--paths")[0].splitlines()]

    def found_behind(words: list[str], terms: list[str]) -> list[str]:
        return [Path(p).stem for p in run(capsys, "search", index, *words, "--paths", "--", *terms)[0].splitlines()]

    assert found("blue", "--where", "name = 'blue-3.png'") == ["blue-3"]
    assert found(red, "--top", "1") == ["red-1"]
    assert {n[:4] for n in found_behind(["red", "+0.9:cyan", "--top", "4"], ["-red"])} == {"cyan"}
    alike = found("--like", red)
    assert "red-1" not in alike and {name[:3] for name in alike[:3]} == {"red"} and len(alike) == 20
    id_ = json.loads(run(capsys, "search", index, red, "--top", "1", "--json")[0])["hits"][0]["id"]
    assert found("--like", str(id_)) == alike


def test_a_name_that_is_not_utf8_and_labels_too_long_for_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = write_pictures(tmp_path / "pictures", n=1)
    odd = (pictures / "red-0.png").rename(pictures / os.fsdecode(b"caf\xe9.png"))
    index = str(make_index(tmp_path / "index", pictures))
    assert "blue-0" in run(capsys, "search", index, "--like", str(odd))[0]
    labels = ",".join(f"a colour of number {i}" for i in range(40))
    assert run(capsys, "classify", index, "--labels", labels)[0].count("\n") == 8


def test_a_query_that_begins_with_a_tilde_is_words(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "search", str(place / "index"), "~root", "--cutoff", "none", "--json")[0])
    assert found["query"] == ["~root"] and len(found["hits"]) == 20


def test_nothing_fits(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "search", str(place / "index"), "the third declension")
    assert out == "" and "nothing fits among 32 pictures" in err
    out, _ = run(capsys, "search", str(place / "index"), "the third declension", "--cutoff", "none", "--top", "3")
    assert out.count("\n") == 3
    _, err = run(capsys, "search", str(place / "index"), "red", "--where", "width > 1000")
    assert "no picture to search" in err
    assert len(run(capsys, "search", str(place / "index"), "red", "--cutoff", "-1.5e3")[0].splitlines()) == 20


def test_copies_never_overwrite(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "copies"
    target.mkdir()
    (target / "red-0.png").write_bytes(b"mine")
    _, err = run(capsys, "search", str(place / "index"), "red", "--copy-to", str(target))
    assert (target / "red-0.png").read_bytes() == b"mine" and "4 copied" in err
    assert (target / "red-0-2.png").read_bytes() == (place / "pictures" / "red-0.png").read_bytes()
    _, err = run(capsys, "search", str(place / "index"), "red", "--copy-to", str(target))
    assert "0 copied" in err and "4 were there" in err and len(list(target.iterdir())) == 5


def test_a_copy_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, most))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_new(tmp_path, "a.png", bytes(11))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_gone_or_changed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    index = make_index(tmp_path / "index", pictures)
    (pictures / "red-0.png").unlink()
    (pictures / "red-1.png").write_bytes(b"another")
    assert main(["search", str(index), "red", "--copy-to", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "red-0.png is not copied" in err and "red-1.png is not copied" in err and "2 could not be copied" in err
    sheet = tmp_path / "sheet.html"
    _, err = run(capsys, "search", str(index), "red", "--sheet", str(sheet))
    assert sheet.read_text().count("not readable any more") == 2
    assert "cloob: 2 pictures cannot be shown: " in err and ".png: " in err


def test_duplicates_and_explain(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = str(place / "index")
    groups = json.loads(run(capsys, "search", index, "--duplicates", "--threshold", "0.9", "--json")[0])["groups"]
    assert len(groups) == 8 and all(len(group) == 4 for group in groups)
    for group in groups:
        assert [picture["width"] for picture in group] == [23, 22, 21, 20]
        assert group[0]["cosine"] == 1 > group[1]["cosine"] > 0.9 and group[0]["equal"] is None
    out, err = run(capsys, "search", index, "--duplicates", "--threshold", "0.9", "--paths")
    assert err == "cloob: 8 groups of look-alikes, 32 pictures (0 groups equal byte by byte, 0 files)\n"
    paths = [[picture["path"] for picture in group] for group in groups]
    assert [part.splitlines() for part in out.split("\n\n")] == paths
    out, _ = run(capsys, "search", index, "--duplicates", "--threshold", "0.9", "--paths", "-0")
    assert [part.split("\0") for part in out.removesuffix("\0").split("\0\0")] == paths
    found = json.loads(run(capsys, "search", index, "red", "--explain", "--beta", "50", "--json")[0])
    assert found["beta"] == 50 and sum(p["weight"] for p in found["pictures"]) == pytest.approx(1, abs=0.01)
    devices: list[str] = []
    monkeypatch.setattr(
        "cloob.models.fingerprint.load_model", lambda *_, device: devices.append(device) or ColourModel()
    )
    run(capsys, "search", index, "--like", "1", "--explain", "--device", "cpu")
    assert devices == ["cpu"]
    out, _ = run(capsys, "search", index, "red", "--explain")
    assert "β = 8: of 32 pictures" in out and "Nearest to what was retrieved" in out


def test_equal_bytes_are_named_and_a_second_name_of_a_file_is_no_duplicate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = write_pictures(tmp_path / "pictures", n=1)
    (pictures / "a-link.png").symlink_to("red-0.png")
    (pictures / "blue-copy.png").write_bytes((pictures / "blue-0.png").read_bytes())
    (pictures / "a-blue-link.png").symlink_to("blue-copy.png")
    (pictures / "blue-large.png").write_bytes(picture((0, 0, 255), (40, 40)))
    index = make_index(tmp_path / "index", pictures)
    out, err = run(capsys, "search", str(index), "--duplicates")
    lines = [line.split("\t") for line in out.splitlines()]
    assert [(Path(line[4]).name, line[1]) for line in lines] == [
        ("blue-large.png", "40x40"),
        ("blue-copy.png", "20x20"),
        ("blue-0.png", "20x20"),
    ]
    assert [line[5:] for line in lines] == [[], [], [f"same bytes as {lines[1][3]}"]]
    assert {line[0] for line in lines} == {"1.0000"} and lines[1][2] == str((pictures / "blue-0.png").stat().st_size)
    assert err == "cloob: 1 group of look-alikes, 3 pictures (1 group equal byte by byte, 2 files)\n"
    out, err = run(capsys, "search", str(index), "--duplicates", "--exact", "--paths")
    assert [Path(path).name for path in out.splitlines()] == ["blue-copy.png", "blue-0.png"]
    assert err == "cloob: 1 group equal byte by byte, 2 files\n"
    _, err = run(capsys, "search", str(index), "--duplicates", "--where", "name like 'red%'")
    assert err == "cloob: no look-alikes (cosine 0.97 and above)\n"
    (tmp_path / "t.csv").write_text("filepath\npictures/red-0.png\n")
    with Index.open(index, writable=True) as opened:
        opened.update([tmp_path / "t.csv"], UpdateOptions(model=ColourModel()))  # type: ignore[arg-type]
    assert run(capsys, "search", str(index), "--duplicates", "--exact", "--paths")[0] == out


def test_classify_an_index_and_a_folder_alike(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_index, err = run(
        capsys, "classify", str(place / "index"), "--labels", "red, blue", "--json", "--none", "--cutoff", "3"
    )
    assert "red 4" in err and "none of these 24" in err and "does not say its τ⁻¹" in err
    words = ("classify", str(place / "pictures"), "--labels", "red,blue", "--json", "--none", "--cutoff", "3")
    of_folder, _ = run(capsys, *words, "--model", "colours")
    rows = [json.loads(line) for line in of_index.splitlines()]
    assert [row["labels"] for row in rows] == [json.loads(line)["labels"] for line in of_folder.splitlines()]
    for row in rows:
        name = Path(row["path"]).stem.split("-")[0]
        assert [entry["label"] for entry in row["labels"]] == ([name] if name in ("red", "blue") else [])
    out, err = run(capsys, "classify", str(place / "index"), "--labels", "red,blue", "--csv", "--inv-tau", "10")
    table = list(csv.DictReader(io.StringIO(out)))
    assert len(table) == 32 and table[0].keys() == {"path", "label", "probability", "margin"} and "τ⁻¹" not in err


def test_labels_of_a_file_and_a_file_of_a_labels_name(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("labels.txt", "red"):
        Path(name).write_text("# colours\nblue\n\ngreen\n")

    def labels(text: str) -> set[str]:
        out, _ = run(capsys, "classify", str(place / "index"), "--labels", text, "--csv", "--none")
        return {row["label"] for row in csv.DictReader(io.StringIO(out))} - {""}

    assert labels("labels.txt") == labels("./red") == {"blue", "green"}
    assert labels("red") == {"red"}


def test_move_to_never_overwrites_and_what_fits_none_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = write_pictures(tmp_path / "pictures", n=2)
    target = tmp_path / "sorted"
    (target / "red").mkdir(parents=True)
    (target / "red" / "red-0.png").write_bytes(b"mine")
    (tmp_path / "labels.txt").write_text("red\nblue/../green\n\n", encoding="utf-8-sig")
    words = ("--labels", str(tmp_path / "labels.txt"), "--none", "--cutoff", "3", "--move-to", str(target))
    _, err = run(capsys, "classify", str(pictures), *words, "--model", "colours")
    assert "moved to" in err and "fit no label and stay" in err
    assert (target / "red" / "red-0.png").read_bytes() == b"mine"
    with Image.open(target / "red" / "red-0-2.png") as moved:
        assert moved.size == (20, 20)
    assert {path.name for path in target.iterdir()} <= {"red", "blue_.._green"}
    assert (pictures / "white-0.png").is_file() and not (pictures / "red-0.png").exists()


def test_only_what_was_indexed_is_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = write_pictures(tmp_path / "pictures", n=1)
    index = make_index(tmp_path / "index", pictures)
    (pictures / "red-0.png").write_bytes(b"my letters")
    words = ("classify", str(index), "--labels", "red,blue", "--move-to", str(tmp_path / "sorted"))
    assert main(words) == 1
    err = capsys.readouterr().err
    assert "red-0.png is not moved: has changed since it was indexed" in err and "1 could not be moved" in err
    assert (pictures / "red-0.png").read_bytes() == b"my letters"


def test_captions_move_with_their_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, target = tmp_path / "pictures", tmp_path / "sorted" / "red"
    for name, caption in {"x/a.png": "one", "y/a.png": "two", "y/a.jpg": None, "z/a.png": None}.items():
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        (pictures / name).write_bytes(picture("red"))
        if caption is not None:
            (pictures / name).with_suffix(".TXT" if caption == "one" else ".txt").write_text(caption)
    index = make_index(tmp_path / "index", pictures)
    run(capsys, "classify", str(index), "--labels", "red,blue", "--move-to", str(tmp_path / "sorted"))
    assert not [path for path in pictures.rglob("*") if path.is_file()]
    with Index.create(tmp_path / "after") as after:
        after.update([target], UpdateOptions(model=ColourModel()))  # type: ignore[arg-type]
        said = {Path(item.path).name: item.caption for item in after.items(after.store.ids().tolist())}
    assert said == {"a.png": "one", "a-2.jpg": "two", "a-3.png": "two", "a-4.png": None}


def test_what_is_moved_keeps_its_own_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, names = tmp_path / "pictures", {"a::b.png", "b.png", "c\\d.png", " e.png", "f\x07.png"}
    pictures.mkdir()
    for name in names:
        (pictures / name).write_bytes(picture("red"))
    run(
        capsys,
        "classify",
        str(pictures),
        "--labels",
        "red,blue",
        "--model",
        "colours",
        "--move-to",
        str(tmp_path / "to"),
    )
    assert {path.name for path in (tmp_path / "to" / "red").iterdir()} == names


def test_labels_that_differ_in_a_slash_have_folders_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, target = write_pictures(tmp_path / "pictures"), tmp_path / "sorted"
    words = ("--labels", "fog/x,fog_x", "--model", "colours", "--move-to", str(target))
    run(capsys, "classify", str(pictures), *words)
    assert {path.name for path in target.iterdir()} == {"fog_x", "fog_x-2"}


def test_the_only_picture_has_none_like_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture("red"))
    index = make_index(tmp_path / "index", tmp_path / "pictures")
    _, err = run(capsys, "search", str(index), "--like", "1")
    assert err == "cloob: there is no other picture to search\n"


def test_what_cannot_be_moved_leaves_no_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that cannot be written: its files can be copied, and not removed."""
    pictures = write_pictures(tmp_path / "pictures", n=1)
    before = sorted(pictures.iterdir())

    def refused_there(call: Callable[..., None]) -> Callable[..., None]:
        def refuse(path: Any, *more: Any, **named: Any) -> None:
            if isinstance(path, str | Path) and Path(path).parent == pictures:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            call(path, *more, **named)

        return refuse

    monkeypatch.setattr(os, "unlink", refused_there(os.unlink))
    monkeypatch.setattr(os, "rename", refused_there(os.rename))
    words = ("--labels", "red,blue", "--model", "colours", "--move-to", str(tmp_path / "sorted"))
    assert main(("classify", str(pictures), *words)) == 1
    err = capsys.readouterr().err
    assert "red-0.png is not moved: Permission denied" in err and "0 moved to" in err
    assert sorted(pictures.iterdir()) == before
    assert not [path for path in (tmp_path / "sorted").rglob("*") if path.is_file()]


def test_classify_counts_at_the_end_what_it_could_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(picture("red"))
    (pictures / "broken.png").write_bytes(b"no picture")
    assert main(("classify", str(pictures), "--labels", "red,blue", "--model", "colours")) == 1
    assert "; 1 could not be read (see above)\n" in capsys.readouterr().err


def test_examples_make_a_head_that_is_kept(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, flat = tmp_path / "examples", write_pictures(tmp_path / "flat")
    for name in ("red", "blue"):
        (examples / name).mkdir(parents=True)
        for path in flat.glob(f"{name}-*.png"):
            path.rename(examples / name / path.name)
    index = str(tmp_path / "index")
    with Index.create(index) as made:
        made.update([place / "pictures"], UpdateOptions(model=ColourModel(), name="colours", draft=True))  # type: ignore[arg-type]
    words = ("--where", "name like 'red%' or name like 'blue%'", "--csv")
    out, err = run(capsys, "classify", index, "--examples", str(examples), *words)
    assert "100.0% of 8 examples right" in err
    head = tmp_path / "index" / "heads" / "examples.safetensors"
    assert is_head(head)
    (other := tmp_path / "other.safetensors").write_bytes(b"weights")
    said = refused(capsys, "classify", index, "--examples", str(examples), "--head", str(other))
    assert "is a file of another kind" in said and other.read_bytes() == b"weights"
    monkeypatch.setattr("cloob.models.fingerprint.load_model", no_model)  # vectors of an index are enough
    assert run(capsys, "classify", index, "--head", str(head), *words)[0] == out
    for row in csv.DictReader(io.StringIO(out)):
        assert Path(row["path"]).stem.startswith(row["label"])


def test_embed_writes_the_same_rows_in_three_forms(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet
    from safetensors import safe_open

    pictures = tmp_path / "pictures"
    write_pictures(pictures, n=1)
    (pictures / "cut.png").write_bytes(picture("red")[:50])
    (pictures / "red-0.txt").write_text("long " * 10_000)
    for suffix in ("npz", "safetensors", "parquet"):
        out = tmp_path / f"vectors.{suffix}"
        assert main(["embed", str(pictures), "--model", "colours", "--out", str(out)]) == 1
        err = capsys.readouterr().err
        assert "1 × corrupt image: " in err and "8 pictures, 1 could not be read" in err
    with np.load(tmp_path / "vectors.npz", allow_pickle=False) as file:
        vectors, paths = file["vectors"], file["paths"].tolist()
        captions = json.loads(file["captions"].item())
    assert vectors.dtype == np.float32 and vectors.shape == (8, 24) and len(paths) == 8
    assert captions == [(pictures / path).with_suffix(".txt").read_text().strip() for path in paths]
    assert (tmp_path / "vectors.npz").stat().st_size < 60_000  # no caption is padded to the longest
    with safe_open(tmp_path / "vectors.safetensors", framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("vectors"), vectors)
        assert json.loads(file.metadata()["paths"]) == paths
    table = parquet.read_table(tmp_path / "vectors.parquet").to_pydict()
    np.testing.assert_allclose(np.array(table["vector"]), vectors, atol=1e-6)
    assert table["path"] == paths
    monkeypatch.setattr("cloob.models.fingerprint.load_model", no_model)
    assert main(["embed", str(place / "index"), "--out", str(tmp_path / "of-index.npz")]) == 0
    assert "32 pictures" in capsys.readouterr().err


def test_a_folder_that_cannot_be_listed_is_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, scandir = write_pictures(tmp_path / "pictures", n=1), os.scandir
    (pictures / "locked").mkdir()

    def locked(path: str) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert main(["embed", str(pictures), "--model", "colours", "--out", str(tmp_path / "vectors.npz")]) == 1
    err = capsys.readouterr().err
    assert "left out, folder cannot be listed: 1: " in err and "8 pictures, 1 could not be read" in err


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_pictures_that_are_removed_meanwhile_leave_the_others_their_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    from pyarrow import parquet

    out = tmp_path / f"vectors.{suffix}"
    place = make_index(tmp_path / "index", write_pictures(tmp_path / "pictures", n=1))
    with Index.open(place, writable=True) as index:
        ids, read = index.store.ids().tolist(), index.store.vectors
        known = {item.path: row for item, row in zip(index.items(ids), read("colours", ids), strict=True)}

        def late(model: str, ids: list[int]) -> np.ndarray:
            rows = read(model, ids)
            index.store.remove(ids[:1])
            return rows

        monkeypatch.setattr(index.store, "vectors", late)
        count = write_vectors(index, out)
    if suffix == "npz":
        with np.load(out) as file:
            paths, vectors = file["paths"].tolist(), file["vectors"]
    else:
        table = parquet.read_table(out)
        paths, vectors = table["path"].to_pylist(), np.array(table["vector"].to_pylist())
    assert 0 < count == len(paths) == len(vectors) < 8
    np.testing.assert_array_equal(vectors, np.stack([known[path] for path in paths]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("search", "{index}"), "nothing to search for"),
        (("search", "{none}", "a"), "no such folder; cloob index SRC --model M --out {none} makes one"),
        (("search", "{pictures}", "a"), "holds no index; cloob index SRC --model M --out NAME.idx makes one"),
        (("search", "{pictures}/red-0.png", "a"), "is a file; cloob index SRC --model M --out NAME.idx makes one"),
        (("search", "{index}", "a", "--where", "captoin = 'x'"), "did you mean caption?"),
        (("search", "{index}", "a", "--cutoff", "high"), "--cutoff is 'high'"),
        (("search", "{index}", "a", "--top", "0"), "--top is 0"),
        (("search", "{index}", "file:///etc/passwd"), "file:// is not opened"),
        (("search", "{index}", "none.jpg"), "no such picture"),
        (("search", "{index}", "-people"), "comes behind --"),
        (("search", "{index}", "a", "-2024"), "comes behind --"),
        (("search", "{index}", "a", "--explain", "--beta", "-1"), "β is -1"),
        (("search", "{index}", "a", "--", "+0:b"), "the weight is 0"),
        (("search", "{index}", "--like", "999"), "no picture of"),
        (("search", "{index}", "a", "--model", "coluors"), "did you mean colours?"),
        (("search", "{index}", "a", "--beta", "3"), "--beta is that of --explain"),
        (("search", "{index}", "a", "--explain", "--beta", "0"), "β is 0"),
        (("search", "{index}", "a", "--explain", "--cutoff", "2"), "--explain leaves nothing out"),
        (("search", "{index}", "--duplicates", "--top", "5"), "--duplicates names all groups"),
        (("search", "{index}", "a", "--threshold", "0.9"), "--threshold is that of --duplicates"),
        (("search", "{index}", "a", "--duplicates"), "leave the query out"),
        (("search", "{index}", "a", "--top", "abc"), "--top is 'abc'; a whole number is wanted"),
        (("search", "{index}", "a", "--beta", "abc"), "--beta is 'abc'; a number is wanted"),
        (("search", "mysql://localhost/x", "a"), "mysql://localhost/x: mysql:// is no index"),
        (
            ("search", "{index}", "0.5:red"),
            "a weight needs its sign, +0.5:red; for the words as they stand write words:",
        ),
        (("search", "{index}", "a", "--exact"), "--exact is that of --duplicates"),
        (("search", "{index}", "--duplicates", "--exact", "--threshold", "0.9"), "one of them"),
        (("search", "{index}", "a", "--sheet", "own.csv"), "own.csv: ends in .csv; .html or .htm is wanted"),
        (("search", "{index}", "a", "--sheet", "{pictures}"), "ends in nothing"),
        (("search", "{index}", "a", "-0"), "-0 ends the paths of --paths"),
        (("classify", "{pictures}", "--labels", "a"), "no model given"),
        (("classify", "{index}"), "give --labels"),
        (("classify", "{index}", "--labels", "a,a"), "'a' is there twice"),
        (("classify", "{index}", "--labels", "a,b", "--cutoff", "9"), "add one of them"),
        (("classify", "{index}", "--labels", "none.txt"), "no such file"),
        (("classify", "{index}", "--labels", "a", "--templates", "x"), "has no {{c}}"),
        (("classify", "{index}", "--labels", "a", "--multi", "--cutoff", "nan"), "the cutoff is nan"),
        (("classify", "{index}", "--examples", "{none}"), "no such folder"),
        (("classify", "{index}", "--examples", "{pictures}", "--head", "a.pt"), "ends in .pt; .safetensors is wanted"),
        (("classify", "{index}", "--head", "{none}"), "no such head"),
        (("classify", "{index}", "--labels", "a", "--multi", "--move-to", "{none}"), "one of them"),
        (("classify", "{none}", "--labels", "a", "--model", "m"), "no such file or folder"),
        (("classify", "{none}.idx", "--labels", "a"), "none.idx: no such file or folder"),
        (("serve", "{none}"), "no such folder; cloob index"),
        (("serve", "{pictures}"), "holds no index; cloob index"),
        (("embed", "{pictures}", "--out", "x.csv", "--model", "m"), ".parquet"),
        (("embed", "a.parquet", "--out", "./a.parquet", "--overwrite", "--model", "m"), "is what is read"),
        (("embed", "{pictures}", "--out", "{pictures}/red-0.npz"), "no model given"),
    ],
)
def test_mistakes_are_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    places = {"index": place / "index", "pictures": place / "pictures", "none": place / "none"}
    filled = [word.format(**places) for word in words]
    assert said.format(**places) in refused(capsys, *filled)


def test_help_and_mistakes_need_neither_torch_nor_numpy(place: Path) -> None:
    code = (
        "import sys\nfrom cloob.cli import main\n"
        "for words in ('search --help', 'search nowhere a', 'classify nowhere', 'embed --help'):\n"
        "    main(words.split())\nassert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    code = (
        "import sys\nfrom cloob.cli import main\n"
        "assert main(['search', sys.argv[1], '--like', '3', '--json']) == 0\n"
        "assert main(['search', sys.argv[1], '--duplicates']) == 0\n"
        "assert main(['index', 'demo-pictures', '--model', '.', '--out', 'nowhere']) == 2\n"
        "assert not {'torch', 'pyarrow', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(place / "index")], check=True, capture_output=True)


def test_what_strangers_wrote_does_not_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "red\x1b]0;title\x07\u202e.png").write_bytes(picture("red"))
    (pictures / "red\x1b]0;title\x07\u202e.txt").write_text("red \x1b[2J\u2066 caption")
    index = make_index(tmp_path / "index", pictures)
    for words in (("search", str(index), "red"), ("search", str(index), "red", "--explain")):
        out, _ = run(capsys, *words)
        assert "\x1b" not in out and "\u202e" not in out
    out, _ = run(capsys, "classify", str(index), "--labels", "red,blue")
    assert "\x1b" not in out and "\u202e" not in out


def test_a_model_of_a_stranger_does_not_command_the_terminal_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = make_index(tmp_path / "index", write_pictures(tmp_path / "pictures"))
    with sqlite3.connect(index / "index.sqlite") as file:
        file.execute("UPDATE models SET name = ?", ["m\x1b]0;title\x07"])
    file.close()
    said = refused(capsys, "search", str(index), "red", "--model", "zzz")
    assert "known: m\N{REPLACEMENT CHARACTER}]0;title" in said and "\x1b" not in said
    out, err = run(capsys, "index", "--out", str(index))
    assert "m\N{REPLACEMENT CHARACTER}]0;title" in out and "\x1b" not in out + err
    monkeypatch.setattr("cloob.serve.run.serve", lambda *_: None)
    serve(str(index), host="127.0.0.1", port=0, token=None, model=None, browser=False)
    err = capsys.readouterr().err
    assert "m\N{REPLACEMENT CHARACTER}]0;title" in err and "\x1b" not in err


@pytest.mark.nightly
def test_a_process_with_a_model_of_its_own(tmp_path: Path) -> None:
    model = tmp_path / MODEL_FOLDER
    save_model(model, create_model("tiny-vit", seed=0), {"inv_tau": 30.0})
    with Index.create(tmp_path / "index") as index:
        options = UpdateOptions(model=read_model(model, lambda _: None), name=str(model))  # type: ignore[arg-type, return-value]
        index.update([write_pictures(tmp_path / "pictures", n=1)], options)
    done = run_cloob("search", str(tmp_path / "index"), "a red thing", "--cutoff", "none", "--paths", "--top", "3")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 3


def test_pictures_in_a_terminal(place: Path) -> None:
    """A real terminal: the escape of the protocol comes before each line."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-kitty"}
    environment.pop("TMUX", None)
    words = [sys.executable, "-m", "cloob", "search", str(place / "index"), "--like", "3", "--top", "2"]
    process = subprocess.Popen(words, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    parts = []
    try:
        while part := os.read(leader, 65536):
            parts.append(part)
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait(60) == 0
    shown = b"".join(parts)
    assert shown.count(b"\x1b_Ga=T,f=100,") == 2 and b"next: cloob search" in shown
