"""What is listed as a copy is there, is another file, and is no other shot's: originals
are safe.
"""

import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from cloob.cli import main
from cloob.errors import InputError
from cloob.search.index import Index
from make import encoded, raw_file
from search_colours import loads, make_index


@pytest.fixture(autouse=True)
def colour_model(monkeypatch):
    loads(monkeypatch)


def spotted(size=40, colour="blue"):
    image = Image.new("RGB", (size, size), colour)
    image.paste("black", (0, 0, size // 10, size // 10))
    return image


def listed(index, capsys, *words):
    """The names of the groups that the command line lists, and what it says."""
    assert main(["search", str(index), "--duplicates", "--paths", *words]) == 0
    out, err = capsys.readouterr()
    return [
        [Path(path).name for path in group.splitlines()]
        for group in out.split("\n\n")
        if group
    ], err


def test_a_copy_that_is_gone_or_changed_or_has_another_name_is_not_listed(
    tmp_path, capsys
):
    pictures = tmp_path / "pictures"
    for size, (group, number) in enumerate(
        (("gone", 3), ("one", 2), ("edited", 3), ("linked", 1)), 40
    ):
        (pictures / group).mkdir(parents=True)
        for i in range(number):
            spotted(size).save(pictures / group / f"{i}.png")
    os.link(pictures / "linked" / "0.png", pictures / "linked" / "1.png")
    index = make_index(tmp_path / "index", pictures)
    for gone in ("gone/0.png", "one/0.png"):
        (pictures / gone).unlink()
    edited = pictures / "edited" / "1.png"
    state = edited.stat()
    edited.write_bytes(edited.read_bytes()[::-1])  # as many bytes
    os.utime(edited, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    groups, err = listed(index, capsys, "--exact")
    assert sorted(groups) == [["0.png", "2.png"], ["1.png", "2.png"]]
    assert (
        "3 files left out: gone, or changed since indexed" in err
        and "1 second name of a file" in err
    )
    with Index.open(index) as opened:
        assert [group[0].score for group in opened.duplicates(exact=True)] == [1, 1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_disk_that_is_mounted_twice_is_no_copy(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
    spotted().save(tmp_path / "pictures" / "a" / "0.png")
    mount = [
        "mount",
        "--bind",
        str(tmp_path / "pictures" / "a"),
        str(tmp_path / "pictures" / "b"),
    ]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        groups, err = listed(
            make_index(tmp_path / "index", tmp_path / "pictures"), capsys
        )
    finally:
        subprocess.run(["umount", mount[-1]], check=True)
    assert groups == [] and "1 second name" in err


def test_the_best_is_the_raw_and_then_what_the_camera_wrote(tmp_path, capsys):
    pytest.importorskip("rawpy", reason="rawpy is not installed")
    pictures = tmp_path / "pictures"
    for name in ("dcim", "copies"):
        (pictures / name).mkdir(parents=True)
    exif, shot = Image.Exif(), spotted(64)
    exif[0x0132] = "2021:03:04 05:06:07"
    jpeg = encoded(shot, "JPEG", exif=exif, quality=80)
    (pictures / "dcim" / "1.JPG").write_bytes(jpeg)
    (pictures / "copies" / "better.jpg").write_bytes(
        encoded(shot, "JPEG", quality=100, subsampling=0)
    )
    index = make_index(tmp_path / "index", pictures)
    assert listed(index, capsys, "--threshold", "0.5")[0] == [["1.JPG", "better.jpg"]]
    (pictures / "dcim" / "1.DNG").write_bytes(
        raw_file(encoded(shot.resize((32, 32)), "JPEG"), 64)
    )
    (pictures / "copies" / "larger.png").write_bytes(encoded(shot.resize((65, 65))))
    index = make_index(tmp_path / "index", pictures)
    with Index.open(index) as opened:
        sizes = {
            Path(item.path).name: item.width
            for item in opened.items(opened.store.ids())
        }
    assert sizes["1.DNG"] == 64
    groups, _ = listed(index, capsys, "--threshold", "0.5")
    assert groups == [["1.DNG", "1.JPG", "larger.png", "better.jpg"]]
    assert (
        listed(index, capsys, "--threshold", "0.5", "--where", "path like '%dcim%'")[0]
        == []
    )  # one shot
    main(["search", str(index), "--duplicates", "--threshold", "0.5", "--rest"])
    assert [Path(path).name for path in capsys.readouterr().out.splitlines()] == [
        "larger.png",
        "better.jpg",
    ]


def test_pictures_of_one_colour_do_not_look_alike(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for size in (30, 31, 30):
        Image.new("RGB", (size, size), "blue").save(
            tmp_path / "pictures" / f"{size}.png"
        )
        spotted(size, "red").save(tmp_path / "pictures" / f"spot-{size}.png")
    (tmp_path / "pictures" / "copy.png").write_bytes(
        (tmp_path / "pictures" / "30.png").read_bytes()
    )
    groups, _ = listed(
        make_index(tmp_path / "index", tmp_path / "pictures"),
        capsys,
        "--threshold",
        "0.5",
    )
    assert groups == [["spot-31.png", "spot-30.png"], ["30.png", "copy.png"]]


def test_copies_and_files_of_one_shot_are_one_line(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "copy.png", "b.png"):
        spotted(41 if name == "b.png" else 40).save(tmp_path / "pictures" / name)
    spotted().save(tmp_path / "pictures" / "b.jpg")
    index = make_index(tmp_path / "index", tmp_path / "pictures")
    for words in (["blue", "--cutoff", "none"], ["--where", "width > 0"]):
        assert main(["search", str(index), *words]) == 0
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert [line[-1] for line in lines] == ["+1", "+1"]
        assert {Path(line[3]).stem for line in lines} < {"a", "copy", "b"}


def test_a_thumbnail_is_kept_while_its_file_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    for size in (40, 41):
        spotted(size).save(tmp_path / "pictures" / f"{size}.png")
    with Index.open(make_index(tmp_path / "index", tmp_path / "pictures")) as index:
        first = index.thumbnail(1, 64)
        monkeypatch.setattr("cloob.search.scan.open.thumbnail", lambda *_: b"made anew")
        assert (
            index.thumbnail(1, 64) == first
            and index.thumbnail(1, 128) == index.thumbnail(2, 64) == b"made anew"
        )
        (tmp_path / "pictures" / "40.png").unlink()
        with pytest.raises(InputError, match="missing image"):
            index.thumbnail(1, 64)


def test_a_line_feed_in_a_name_makes_no_other_path(tmp_path, capsys):
    (tmp_path / "pictures" / "evil\n").mkdir(parents=True)
    for name in ("evil\n/victim.png", "good.png"):
        spotted().save(tmp_path / "pictures" / name)
    index = make_index(tmp_path / "index", tmp_path / "pictures")
    for words in (["--where", "width > 0"], ["--duplicates", "--exact"]):
        assert main(["search", str(index), *words, "--paths"]) == 0
        out, err = capsys.readouterr()
        assert (
            out == f"{tmp_path / 'pictures' / 'good.png'}\n"
            and "1 path with a line feed left out" in err
        )
        assert main(["search", str(index), *words, "--paths", "-0"]) == 0
        assert sorted(capsys.readouterr().out.split("\0")) == [
            "",
            *sorted(map(str, tmp_path.rglob("*.png"))),
        ]
